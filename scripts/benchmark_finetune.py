"""Times the step of stage I with and without L_corres, alternately in one process.

Example: `python scripts/benchmark_finetune.py --scenes plush --vae madebyollin/taesd`.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from torch import Tensor

from lrf_nerfstudio.correspondence import CorrespondenceConfig, find_correspondences, load_scene
from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.stage1 import Stage1, Stage1Config
from lrf_nerfstudio.utils.errors import exit_on_user_error


@dataclass
class BenchmarkFinetune:
    """Times the step of stage I with and without L_corres."""

    scenes: tuple[Path, ...]
    """Scenes to take crops from."""
    vae: str = "lrf-f4c4"
    """The autoencoder."""
    batch_size: int = 4
    """Pairs of crops in a step."""
    crop: int = 128
    """Side of a crop in pixels."""
    rounds: int = 20
    """Steps of each kind that are timed, after two that are not."""


@exit_on_user_error()
def main() -> None:
    """Command line."""
    options = tyro.cli(BenchmarkFinetune, description=__doc__)
    scenes = [find_correspondences(load_scene(folder), CorrespondenceConfig()) for folder in options.scenes]
    with tempfile.TemporaryDirectory() as folder:
        config = Stage1Config(
            output=Path(folder, "with"),
            vae=options.vae,
            batch_size=options.batch_size,
            crop=options.crop,
            tensorboard=False,
        )
        without = replace(config, output=Path(folder, "without"), correspondence_weight=0.0)
        tuners = {"with": Trainer(config, Stage1(config, scenes))}
        tuners["without"] = Trainer(without, Stage1(without, scenes))
        batches = batches_of(tuners["with"])
        seconds: dict[str, list[float]] = {name: [] for name in tuners}
        for number in range(options.rounds + 2):
            batch = next(batches)
            for name in sorted(tuners, reverse=bool(number % 2)):  # what comes second finds warmer caches
                elapsed = timed_step(tuners[name], batch)
                if number >= 2:
                    seconds[name].append(elapsed)
    ratios = [one / other for one, other in zip(seconds["with"], seconds["without"], strict=True)]
    Console().print(
        f"A step takes {statistics.median(seconds['with']):.3f} s with L_corres and "
        f"{statistics.median(seconds['without']):.3f} s without; ratio {statistics.median(ratios):.3f} "
        f"(median of {len(ratios)}; quartiles {', '.join(f'{q:.3f}' for q in statistics.quantiles(ratios, n=4)[::2])})."
    )


def batches_of(tuner: Trainer) -> Iterator[dict[str, Tensor]]:
    """Batches on the tuner's device, without end."""
    dataset, size, start = tuner.task.dataset, tuner.config.batch_size, 0
    while True:
        batch = torch.utils.data.default_collate([dataset[start + item] for item in range(size)])
        yield {name: value.to(tuner.accelerator.device) for name, value in batch.items()}
        start += size


def timed_step(tuner: Trainer, batch: dict[str, Tensor]) -> float:
    """Seconds of a step of the optimizer."""
    synchronize = torch.cuda.synchronize if tuner.accelerator.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    tuner.train_on(batch)
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
