"""Fits radiance fields to many scenes in one process, through what `ns-train latent-splatfacto` runs."""

import copy
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from nerfstudio.utils import profiler, writer
from rich.console import Console

from lrf_nerfstudio.plugin.method import latent_splatfacto
from lrf_nerfstudio.plugin.pipeline import LatentPipeline
from lrf_nerfstudio.plugin.trainer import LatentTrainer, LatentTrainerConfig
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import write_atomically
from lrf_nerfstudio.utils.memory import peak_memory, reset_peak_memory
from lrf_nerfstudio.utils.options import AtLeastOne
from lrf_nerfstudio.utils.progress import progress_bar

_T = TypeVar("_T")


@dataclass
class FittingConfig:
    """How fields are fitted; all else is as `ns-train latent-splatfacto` has it by default."""

    steps: AtLeastOne = 3000
    """Steps that each field is fitted for."""
    downscale_factor: AtLeastOne | None = None
    """N takes the photographs from images_N; nerfstudio chooses where none is given."""


COST = "cost.json"
"""What the fit took up to its last checkpoints, by their steps, in the folder of the run."""


class FieldFit:
    """The fit of a field to a scene; one that was interrupted goes on from its last checkpoint.

    Attributes:
        trainer: set up and, where there was a checkpoint, loaded.
        steps: that the field has been fitted for.
        seconds: that setting up (encoding the photographs, where the cache lacks them) and fitting took, with what was
            done before an interruption.
    """

    def __init__(self, options: LatentTrainerConfig, latest: int | None = None) -> None:
        """Encodes the photographs, or takes their latents from the cache, and takes up the run if there is one.

        Args:
            options: see :func:`trainer_config`.
            latest: a checkpoint of more steps than this is not taken up: the fit begins anew.

        Raises:
            SystemExit: the data or the VAE cannot be used; what is wrong has been printed.
        """
        start = time.perf_counter()
        reset_peak_memory()
        forget_writers()
        models = options.get_checkpoint_dir()
        checkpoints = sorted(models.glob("step-*.ckpt"))
        if checkpoints and (latest is None or _steps_of(checkpoints[-1]) <= latest):
            options.load_dir = models
        set_seed(options.machine.seed)
        if not _is_complete(options, checkpoints):  # else a config.yml is there, of the VAE that it was fitted with
            options.save_config()
        self.trainer: LatentTrainer = options.setup(local_rank=0, world_size=1)
        self.trainer.setup()
        self.steps = self.trainer._start_step
        self._cost_file = options.get_base_dir() / COST
        self._before = self._read_cost()
        self.seconds = self._before.get("seconds", 0.0) + time.perf_counter() - start

    @property
    def pipeline(self) -> LatentPipeline:
        """The data, the VAE and the field."""
        pipeline = self.trainer.pipeline
        assert isinstance(pipeline, LatentPipeline)
        return pipeline

    def run(self, snapshots: Sequence[int], take: Callable[[int], None]) -> None:
        """Fits to the end.

        Args:
            snapshots: steps, none before `self.steps`.
            take: called with each of them when the field has been fitted for so many; the pipeline is in evaluation
                mode then.

        Raises:
            SystemExit: a checkpoint cannot be written; what is wrong has been printed.
        """
        total = self.trainer.config.max_num_iterations

        def take_now() -> None:
            start = time.perf_counter()
            self.pipeline.eval()
            take(self.steps)
            self.seconds -= time.perf_counter() - start

        def after(step: int) -> None:
            self.steps = step + 1
            progress.update(task, completed=self.steps)
            if self.steps in snapshots:
                take_now()

        start = time.perf_counter()
        if self.steps in snapshots:
            take_now()
        if self.steps < total:
            with progress_bar(transient=True) as progress:
                task = progress.add_task("Fitting", total=total, completed=self.steps)
                location = TrainingCallbackLocation.AFTER_TRAIN_ITERATION
                self.trainer.callbacks.append(TrainingCallback([location], after))
                save = self.trainer.save_checkpoint

                def save_with_cost(step: int) -> None:
                    # Before and after: a kill in between leaves the cost of the checkpoint that there is then.
                    self._write_cost(self.seconds + time.perf_counter() - start)
                    save(step)
                    self._write_cost(self.seconds + time.perf_counter() - start)

                self.trainer.save_checkpoint = save_with_cost
                self.trainer.train()
        self.seconds += time.perf_counter() - start

    @property
    def cost(self) -> dict[str, float]:
        """What the fit took: `seconds`, and peak memory as `gigabytes` where the system tells it.

        Empty for a fit that was taken up from a checkpoint whose cost was not kept.
        """
        return self._read_cost()

    def _read_cost(self) -> dict[str, float]:
        """The cost of the steps so far, from the file beside the checkpoints; empty where it is not known."""
        return self._kept_costs().get(str(self.steps), {}) if self.steps else {}

    def _kept_costs(self) -> dict[str, dict[str, float]]:
        if not self._cost_file.exists():
            return {}
        costs: dict[str, dict[str, float]] = json.loads(self._cost_file.read_text())
        return costs

    def _write_cost(self, seconds: float) -> None:
        """Note what the fit has taken by now, beside the cost of the checkpoint before."""
        if self._before or self.trainer._start_step == 0:
            memory = max(peak_memory() or 0, 1e9 * self._before.get("gigabytes", 0.0))
            cost = {"seconds": seconds} | ({"gigabytes": memory / 1e9} if memory else {})
            costs = self._kept_costs() | {str(self.steps): cost}
            kept = {steps: costs[steps] for steps in sorted(costs, key=int)[-2:]}
            write_atomically(self._cost_file, json.dumps(kept).encode(), "--output")


def trainer_config(scene: Path, vae: str, output: Path, config: FittingConfig) -> LatentTrainerConfig:
    """Return the configuration of a fit to latents alone, without viewer and the pictures of a run that is watched."""
    options = copy.deepcopy(latent_splatfacto.config)
    assert isinstance(options, LatentTrainerConfig)
    options.data = options.pipeline.datamanager.data = scene
    options.pipeline.vae.source = vae
    options.pipeline.datamanager.dataparser.downscale_factor = config.downscale_factor
    options.output_dir, options.experiment_name, options.timestamp = output, "field", "run"
    options.pipeline.model.scene_decoder.share = 0.0  # pictures are the VAE's, which is what is tuned and compared
    options.max_num_iterations = config.steps
    options.vis, options.steps_per_eval_image, options.logging.local_writer.enable = "tensorboard", 0, False
    return options


def attempted(work: Callable[[], _T]) -> _T | None:
    """Do what may fail for one scene and not for the others: what is wrong is printed, and the result is None.

    What the work kept to itself is freed: a trainer is part of cycles, and its memory may be the GPU's.
    """
    try:
        return work()
    except SystemExit:  # the plugin has said what is wrong
        return None
    except UserError as error:
        print(f"\nError: {error}", file=sys.stderr)
        return None
    except Exception:  # whatever it is, the other scenes can be had
        Console().print_exception()
        return None
    finally:
        gc.collect()


def _is_complete(options: LatentTrainerConfig, checkpoints: Sequence[Path]) -> bool:
    """Whether the run that is taken up has nothing left to do."""
    return options.load_dir is not None and _steps_of(checkpoints[-1]) >= options.max_num_iterations


def _steps_of(checkpoint: Path) -> int:
    """Steps that a field has been fitted for when its checkpoint `step-<number of the last one>.ckpt` was written."""
    return int(checkpoint.stem.removeprefix("step-")) + 1


def set_seed(number: int) -> None:
    """Seed all generators of random numbers, as ns-train does."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(number)


def forget_writers() -> None:
    """Empties the lists of event writers and profilers, which nerfstudio keeps for the life of a process."""
    for event_writer in writer.EVENT_WRITERS:
        if isinstance(event_writer, writer.TensorboardWriter):
            event_writer.tb_writer.close()
    for kept in (writer.EVENT_WRITERS, writer.EVENT_STORAGE, profiler.PROFILER):
        kept.clear()
