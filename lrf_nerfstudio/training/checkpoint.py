"""The checkpoint of a training run: which run it belongs to, and its state."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lrf_nerfstudio.training.config import TrainingConfig
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import replacing

CHECKPOINT = "checkpoint.pt"


def check_output(output: Path, resume: bool) -> None:
    """Check that a run can begin in its output folder, or continue there.

    Raises:
        UserError: if there is no run to resume, if another run is in the folder, or if it holds anything else.
    """
    error: str | None = None
    if resume:
        if not (output / CHECKPOINT).exists():
            error = f"There is no run to --resume in {output} (--output)."
    elif (output / CHECKPOINT).exists():
        error = f"{output} (--output) holds a run already: add --resume to continue it, or choose another folder."
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        error = f"{output} (--output) is not empty. Choose a new folder; nothing is overwritten."
    if error:
        raise UserError(error)


def describe(config: TrainingConfig, **more: Any) -> dict[str, Any]:
    """Return all that decides what a run computes, as plain values.

    Args:
        config: the options; `config.free_options` are left out.
        more: what else decides.
    """
    options = {name: value for name, value in asdict(config).items() if name not in config.free_options}
    return {name.replace("_", " "): _plain(value) for name, value in (options | more).items()}


def write_checkpoint(output: Path, description: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the state of a run; the file is complete or as before at any moment.

    Raises:
        UserError: if the disk is full or the folder cannot be written to.
    """
    hint = "The last good checkpoint is still there: continue with --resume."
    with replacing(output / CHECKPOINT, "--output", hint) as stream:
        torch.save({"description": description, **state}, stream)


def read_checkpoint(output: Path, description: dict[str, Any]) -> dict[str, Any]:
    """Read the state of a run, on the CPU.

    Args:
        output: the run's folder.
        description: what :func:`describe` returns for the run that is to be continued.

    Raises:
        UserError: if the checkpoint is missing, damaged or unsafe, or belongs to a run with another description.
    """
    checkpoint = output / CHECKPOINT
    try:
        state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
        saved = state["description"]
    except Exception as error:  # damage surfaces as whatever the first bad byte leads to
        raise UserError(f"{checkpoint} cannot be read: {error}. Start again in another folder.") from error
    if differing := [name for name in {**saved, **description} if saved.get(name) != description.get(name)]:
        name = differing[0]
        raise UserError(
            f"{checkpoint} belongs to another run: its {name} is {saved.get(name)}, not {description.get(name)}. "
            "Use the options of that run, or another --output."
        )
    return state


def _plain(value: Any) -> Any:
    """Return options as what a checkpoint can hold and a comparison survives: paths as strings, tuples as lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
