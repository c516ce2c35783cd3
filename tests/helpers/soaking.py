"""Trains a tiny scene for very many steps, and watches the memory of the process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PERIOD = 2.0
"""Seconds between two looks at the memory."""


@dataclass
class Soak:
    """Trains a tiny scene for very many steps, latents first and then photographs, and watches the memory."""

    steps: int = 30_000
    """Of the run."""
    output: Path | None = None
    """File for the samples, as JSON: seconds, the last step with a checkpoint, and megabytes."""


def resident_megabytes(process: int) -> float:
    """Return the memory that a process occupies; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
    return kilobytes[0] / 1024 if kilobytes else 0.0


def main(options: Soak) -> None:
    """Train, and print how much memory each tenth of the run took at most."""
    from tiny_scenes import Lens, write_scene
    from tiny_vaes import make_vae

    from lrf_nerfstudio.utils.errors import UserError

    samples: list[tuple[float, int, float]] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = Path(temporary)
        scene, vae = write_scene(folder / "floor", views=17, lenses=Lens(101, 67)), make_vae(folder / "vae")
        models = folder / "out" / "floor" / "latent-splatfacto" / "run" / "nerfstudio_models"
        command = [
            *(Path(sys.executable).with_name("ns-train"), "latent-splatfacto", "--data", scene),
            *("--output-dir", folder / "out", "--timestamp", "run", "--vis", "tensorboard"),
            *("--max-num-iterations", options.steps, "--steps-per-save", max(1, options.steps // 100)),
            *("--pipeline.vae.source", vae, "--pipeline.datamanager.latent-cache-dir", folder / "latents"),
        ]
        begun = time.monotonic()
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
            )
            while process.poll() is None:
                done = max((int(path.stem.removeprefix("step-")) for path in models.glob("*.ckpt")), default=0)
                if memory := resident_megabytes(process.pid):
                    samples.append((round(time.monotonic() - begun, 1), done, round(memory, 1)))
                if options.output is not None:
                    options.output.write_text(json.dumps(samples))
                time.sleep(PERIOD)
        if process.returncode:
            raise UserError(f"The training failed:\n{(folder / 'log').read_text()[-3000:]}")
    print(f"{options.steps} steps in {samples[-1][0]:.0f} s")
    for tenth in range(10):
        first, last = (options.steps * number // 10 for number in (tenth, tenth + 1))
        inside = [memory for _, step, memory in samples if first <= step < last]
        if inside:
            print(f"steps {first} to {last}: at most {max(inside):.0f} MB, {inside[-1]:.0f} MB at the end")
