"""Train and compare VAEs for latent radiance fields, and prepare and export scenes: one command for each job.

`lrf COMMAND --help` describes a command. Scenes are trained, shown and measured with nerfstudio's commands:
`ns-train latent-splatfacto --data SCENE`.
"""

import ast
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lrf_nerfstudio.utils.cli import run

COMMANDS = {
    "pretrain": "train_vae",
    "stage1": "finetune_stage1",
    "pairs": "build_stage3_pairs",
    "stage3": "finetune_stage3",
    "generic-decoder": "train_generic_decoder",
    "set-vae": "set_vae",
    "measure": "measure_latents",
    "compare": "compare_vaes",
    "benchmark": "benchmark",
    "tables": "tables",
    "psnr-over-time": "psnr_over_time",
    "consistency": "consistency",
    "cameras": "estimate_cameras",
    "triangulate": "triangulate",
    "export": "export_field",
    "demo-scene": "make_demo_scene",
    "training-scenes": "make_training_scenes",
    "toy-diffusion": "train_toy_diffusion",
    "prompt-confusion": "prompt_confusion",
    "benchmark-rasterizer": "benchmark_rasterizer",
    "benchmark-finetune": "benchmark_finetune",
}
"""Names of the commands, and the modules in lrf_nerfstudio/commands whose `main` they call."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Call the command that the first argument names with the arguments behind it.

    Only that command's module is imported, so that `lrf --help` does not wait for PyTorch.

    Args:
        arguments: the command line without the program's name; None stands for that of the process.

    Raises:
        SystemExit: after help and wrong arguments, and where the command fails with a UserError.
    """
    first, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = first.replace("_", "-")  # as in the names of options, where both mean the same
    if command in COMMANDS:
        run(function_of(command), rest, prog=f"lrf {command}")
        return
    from tyro.extras import subcommand_cli_from_dict

    # A shell completes options as well as names, so its script is generated from all of the commands' options.
    described = function_of if first.startswith("--tyro-") else stand_in
    subcommand_cli_from_dict(
        {name: described(name) for name in COMMANDS}, prog="lrf", description=__doc__, args=[first, *rest]
    )


def function_of(command: str) -> Callable[[Any], None]:
    """Return the function behind a command, which takes the command's options."""
    function: Callable[[Any], None] = import_module(f"lrf_nerfstudio.commands.{COMMANDS[command]}").main
    return function


def stand_in(command: str) -> Callable[[], None]:
    """Return a function without options that has the command's summary as its docstring."""

    def described() -> None: ...

    described.__doc__ = summary(command)
    return described


def summary(command: str) -> str:
    """Return the first line of the docstring of a command's module, which is read but not imported."""
    source = Path(__file__).parent.joinpath("commands", f"{COMMANDS[command]}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
