"""Time the step of stage I with and without L_corres, alternately in one process.

Example: `lrf benchmark-finetune --scenes plush --vae madebyollin/taesd`.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from torch import Tensor

from lrf_nerfstudio.correspondence import CorrespondenceConfig, find_correspondences, load_scene
from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.stage1 import Stage1, Stage1Config
from lrf_nerfstudio.utils.options import AtLeastOne, Range
from lrf_nerfstudio.utils.timing import Stopwatch


@dataclass
class BenchmarkFinetune:
    """Times the step of stage I with and without L_corres."""

    scenes: tuple[Path, ...]
    """Scenes to take crops from."""
    vae: str = "lrf-f4c4"
    """The autoencoder."""
    batch_size: AtLeastOne = 4
    """Pairs of crops in a step."""
    crop: AtLeastOne = 128
    """Side of a crop in pixels."""
    rounds: Annotated[int, Range(least=2)] = 20
    """Steps of each kind that are timed, after two that are not."""


def main(options: BenchmarkFinetune) -> None:
    """Time the steps and say how long they take."""
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
        trainers = {"with": Trainer(config, Stage1(config, scenes))}
        trainers["without"] = Trainer(without, Stage1(without, scenes))
        batches = batches_of(trainers["with"])
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for number in range(options.rounds + 2):
            batch = next(batches)
            for name in sorted(trainers, reverse=bool(number % 2)):  # what comes second finds warmer caches
                elapsed = timed_step(trainers[name], batch)
                if number >= 2:
                    seconds[name].append(elapsed)
    ratios = [one / other for one, other in zip(seconds["with"], seconds["without"], strict=True)]
    Console().print(
        f"A step takes {statistics.median(seconds['with']):.3f} s with L_corres and "
        f"{statistics.median(seconds['without']):.3f} s without; ratio {statistics.median(ratios):.3f} "
        f"(median of {len(ratios)}; quartiles {', '.join(f'{q:.3f}' for q in statistics.quantiles(ratios, n=4)[::2])})."
    )


def batches_of(trainer: Trainer) -> Iterator[dict[str, Tensor]]:
    """Yield batches on the trainer's device, without end."""
    dataset, size, start = trainer.task.dataset, trainer.config.batch_size, 0
    while True:
        batch = torch.utils.data.default_collate([dataset[start + item] for item in range(size)])
        yield {name: value.to(trainer.accelerator.device) for name, value in batch.items()}
        start += size


def timed_step(trainer: Trainer, batch: dict[str, Tensor]) -> float:
    """Return the seconds of a step of the optimizer."""
    watch = Stopwatch(trainer.accelerator.device)
    trainer.train_on(batch)
    watch.mark("end")
    return watch.seconds("start", "end")
