"""nerfstudio's trainer with checkpoints that survive a kill, load without unpickling, and resume exactly."""

import os
import pickle
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.viewer import Viewer
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lrf_nerfstudio.plugin.optimizers import RunScheduleConfig
from lrf_nerfstudio.plugin.pipeline import LatentPipeline, LatentPipelineConfig
from lrf_nerfstudio.plugin.viewer import PictureClock
from lrf_nerfstudio.utils.errors import UserError, exit_on_user_error
from lrf_nerfstudio.utils.files import replacing, reporting_full_disk, unwritable
from lrf_nerfstudio.utils.options import AtLeastOne, Count, check_options


@dataclass
class LatentTrainerConfig(TrainerConfig):
    """Configuration of the training run."""

    _target: type = field(default_factory=lambda: LatentTrainer)
    max_num_iterations: AtLeastOne = 3000
    """Steps of the run."""
    steps_per_save: AtLeastOne = 1000
    """Steps between checkpoints."""
    steps_per_eval_batch: Count = 0
    """Steps between losses of a held-out view; 0 leaves them out."""
    steps_per_eval_image: Count = 1000
    """Steps between pictures of a held-out view; 0 leaves them out."""
    steps_per_eval_all_images: Count = 0
    """Steps between measurements of all held-out views; 0 leaves them out."""

    def __post_init__(self) -> None:
        # Of the saved configuration too, so that the scene is not put on a GPU later.
        if self.machine.device_type == "cpu" and isinstance(self.pipeline, LatentPipelineConfig):
            self.pipeline.device = "cpu"

    @exit_on_user_error()
    def save_config(self) -> None:
        """Write config.yml into the folder of the run; what is wrong is said where it cannot be written."""
        try:
            super().save_config()
        except OSError as error:
            raise unwritable(self.get_base_dir(), error, "--output-dir") from error


class FairLock:
    """A lock that the thread which had it last gets only when nobody else waits.

    A `threading.Lock` goes to whoever is first, which on a busy machine is the training thread again and again, while
    the viewer's thread waits to render.
    """

    def __init__(self) -> None:
        self._turnstile, self._lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._turnstile:  # held while waiting: who comes back queues up behind
            self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


class LatentTrainer(Trainer):
    """Trains on the CPU where there is no CUDA, and resumes as if it had never stopped.

    A checkpoint holds tensors and plain Python values only, so that `torch.load(weights_only=True)` reads it.
    """

    config: LatentTrainerConfig
    pipeline: LatentPipeline

    def __init__(self, config: LatentTrainerConfig, local_rank: int = 0, world_size: int = 1) -> None:
        if config.machine.device_type == "cuda" and not torch.cuda.is_available():
            CONSOLE.log("No CUDA device: training on the CPU.")
            config.machine.device_type = "cpu"
        super().__init__(config, local_rank, world_size)
        if self.mixed_precision:
            # bfloat16 has the range of float32: no scaler of gradients, which would wait for the GPU at every step.
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            self.use_grad_scaler = config.use_grad_scaler
            self.grad_scaler = GradScaler(enabled=self.use_grad_scaler)
        self.train_lock = FairLock()
        self._total_steps = config.max_num_iterations
        self._picture_clock = PictureClock()

    @exit_on_user_error()
    def setup(self, test_mode: Any = "val") -> None:
        check_options(self.config)
        with reporting_full_disk(self.base_dir, "--output-dir"):
            super().setup(test_mode)

    def setup_optimizers(self) -> Optimizers:
        """Optimizers and schedulers; what depends on the length of the run learns it, before a checkpoint is loaded."""
        steps = self.config.max_num_iterations
        self.pipeline.prepare_training(steps)
        latent_steps = self.pipeline.model.latent_steps
        groups = {}
        for name, group in self.config.optimizers.items():
            scheduler = group["scheduler"]
            if isinstance(scheduler, RunScheduleConfig):
                scheduler = replace(scheduler, steps=steps, latent_steps=latent_steps)
            groups[name] = {"optimizer": group["optimizer"], "scheduler": scheduler}
        return Optimizers(groups, self.pipeline.get_param_groups())

    @exit_on_user_error()
    def train(self) -> None:
        total = self._total_steps = self.config.max_num_iterations
        if self._start_step >= total:
            raise UserError(
                f"The checkpoint has already been trained for {self._start_step} steps and --max-num-iterations is "
                f"{total}. Ask for more steps to go on."
            )
        # nerfstudio trains for max_num_iterations more steps; a resumed run stops where the first would have.
        self.config.max_num_iterations = total - self._start_step
        # nerfstudio and TensorBoard write into the folder too.
        hint = f"What checkpoints there are in {self.checkpoint_dir} are complete: resume with --load-dir."
        with reporting_full_disk(self.base_dir, "--output-dir", hint):
            super().train()

    def take_step(self, step: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """Take one training step, as nerfstudio's loop does, for a loop of somebody else's.

        Returns:
            The loss, its parts, and the metrics of the step.
        """
        with self.train_lock:
            self.pipeline.train()
            self._call_back(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
            result: tuple[Tensor, dict[str, Tensor], dict[str, Any]] = self.train_iteration(step)
            self._call_back(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        return result

    def _call_back(self, step: int, location: TrainingCallbackLocation) -> None:
        for callback in self.callbacks:
            callback.run_callback_at_location(step, location)

    def train_iteration(self, step: int) -> Any:
        with ExitStack() as stack:
            if step == self._start_step:
                # nerfstudio steps all schedules, also of parameters that are fitted later.
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            if self.device == "cpu" and self.pipeline.is_light(step):
                stack.enter_context(single_threaded())
            loss, losses, metrics = super().train_iteration(step)
        # nerfstudio logs them as numbers, and PyTorch warns where those come from tensors with a graph.
        return loss.detach(), _detached(losses), _detached(metrics)

    @exit_on_user_error()
    def eval_iteration(self, step: int) -> None:
        """Evaluate what is due; when the parts on latents and on photographs end, say how good the latents are.

        What photographs make of a field's latents is the difference between the two numbers.
        """
        super().eval_iteration(step)
        if (
            step + 1 in (self.pipeline.model.latent_steps, self._total_steps)
            and self.pipeline.model.scene_decoder is not None
            and self.config.steps_per_eval_image > 0
        ):
            value = self.pipeline.held_out_latent_psnr()
            writer.put_scalar(name="Held-out latent_psnr", scalar=value, step=step)
            CONSOLE.log(f"latent_psnr of the held-out views after {step + 1} steps: {value:.2f} dB")

    def _update_viewer_state(self, step: int) -> None:
        """Renew the viewer's picture when it is due; see :class:`PictureClock`."""
        viewer = self.viewer_state
        if not isinstance(viewer, Viewer):
            return super()._update_viewer_state(step)
        self._picture_clock.prepare(viewer)
        super()._update_viewer_state(step)
        self._picture_clock.note(viewer, step)

    def _load_checkpoint(self) -> None:
        path = self.config.load_checkpoint
        if self.config.load_dir is not None:
            path = find_checkpoint(self.config.load_dir, self.config.load_step)
        if path is None:
            return
        state = load_checkpoint(path)
        self._start_step = state["step"] + 1
        self.pipeline.load_pipeline(state["pipeline"], state["step"])
        self.optimizers.load_optimizers(state["optimizers"])
        if self.config.load_scheduler:
            self.optimizers.load_schedulers(state["schedulers"])
        self.grad_scaler.load_state_dict(state["scalers"])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and self.device != "cpu":  # a run may go on where there are fewer GPUs, or none
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        CONSOLE.print(f"Resuming after step {state['step']} of {path}")

    @check_main_thread
    @exit_on_user_error()
    def save_checkpoint(self, step: int) -> None:
        """Write the checkpoint, complete or not at all, and only then delete the older ones.

        Raises:
            UserError: the file cannot be written, because the disk is full, for example. The older checkpoint stays.
        """
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        path = self.checkpoint_dir / f"step-{step:09d}.ckpt"
        state = {
            "step": step,
            "pipeline": self.pipeline.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.optimizers.schedulers.items()},
            "scalers": self.grad_scaler.state_dict(),
            "rng": {"cpu": torch.get_rng_state()}
            | ({} if self.device == "cpu" else {"cuda": torch.cuda.get_rng_state(self.device)}),
        }
        # First outside of the checkpoint directory: nerfstudio takes every file there for a checkpoint.
        staged = self.base_dir / path.name
        hint = f"The last good checkpoint is still in {self.checkpoint_dir}: resume with --load-dir."
        with replacing(staged, "--output-dir", hint) as stream:
            torch.save(state, stream)
        os.replace(staged, path)
        if self.config.save_only_latest_checkpoint:
            for older in self.checkpoint_dir.glob("step-*.ckpt"):
                if older != path:
                    older.unlink()


def _detached(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values without the graphs that they come from."""
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


@contextmanager
def single_threaded() -> Iterator[None]:
    """Give PyTorch one thread.

    A step on latents is a few kernels with threads of their own and many small operations, for which a second OpenMP
    thread costs more than it gives, and much more where other programs want the processors too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def find_checkpoint(directory: Path, step: int | None = None) -> Path:
    """The checkpoint of a step, or the latest one, in a directory of nerfstudio checkpoints.

    Raises:
        UserError: there is none.
    """
    pattern = "step-*.ckpt" if step is None else f"step-{step:09d}.ckpt"
    checkpoints = sorted(directory.glob(pattern))
    if not checkpoints:
        raise UserError(
            f"There is no checkpoint {pattern} in {directory}. --load-dir takes the nerfstudio_models folder of a run."
        )
    return checkpoints[-1]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running any code that it may contain.

    Raises:
        UserError: the file is missing, damaged, or holds pickled objects other than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"There is no checkpoint {path}.") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The checkpoint {path} is refused: it holds more than tensors and plain values, and loading it could run "
            "code. Only checkpoints that this method wrote can be loaded."
        ) from error
    except Exception as error:  # damage surfaces as whatever the first bad byte leads to
        raise UserError(f"The checkpoint {path} is damaged: {error}. Load an earlier one with --load-step.") from error
