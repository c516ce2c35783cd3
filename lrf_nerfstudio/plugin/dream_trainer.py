"""The trainer of text to 3D: a run is named after its prompt, shows its guidance, and ends with a turn of the orbit."""

import io
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from nerfstudio.utils import writer
from PIL import Image
from torch import Tensor

from lrf_nerfstudio.plugin.dream_pipeline import DreamSplatPipeline
from lrf_nerfstudio.plugin.trainer import LatentTrainer, LatentTrainerConfig
from lrf_nerfstudio.utils.errors import exit_on_user_error
from lrf_nerfstudio.utils.files import write_atomically

SHOWN_METRICS = {"t_min": "Smallest t", "t_max": "Largest t", "gradient_norm": "Gradient norm"}
"""Metrics of a step that nerfstudio's table in the terminal shows, and the heads of their columns."""
MAX_NAME = 60
"""Characters of the folder that a run is named after its prompt."""
FRAMES_PER_SECOND = 12


@dataclass
class DreamSplatTrainerConfig(LatentTrainerConfig):
    """Configuration of the training run."""

    _target: type = field(default_factory=lambda: DreamSplatTrainer)

    experiment_name: str | None = None
    """Name of the run's folder; the prompt's words if none."""

    def set_experiment_name(self) -> None:
        """Name the run after the prompt, where the user has not named it."""
        words = re.sub(r"\W+", "-", (self.pipeline.model.prompt or "").lower()).strip("-")
        if self.experiment_name is None and words:
            self.experiment_name = words[:MAX_NAME].rstrip("-")
        super().set_experiment_name()


class DreamSplatTrainer(LatentTrainer):
    """See the module."""

    config: DreamSplatTrainerConfig
    pipeline: DreamSplatPipeline

    def setup(self, test_mode: Any = "val") -> None:
        super().setup(test_mode)
        for events in writer.EVENT_WRITERS:
            if isinstance(events, writer.LocalWriter):
                events.stats_to_track += SHOWN_METRICS.values()
        self.callbacks.append(TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN], self.write_orbit))

    def train_iteration(self, step: int) -> Any:
        loss, losses, metrics = super().train_iteration(step)
        if step % self.config.logging.steps_per_log == 0:
            for name, head in SHOWN_METRICS.items():
                writer.put_scalar(head, metrics[name], step)
        return loss, losses, metrics

    @exit_on_user_error()
    def write_orbit(self, step: int) -> None:
        """Write a turn of the fixed orbit as `orbit.gif` beside the configuration, and to TensorBoard.

        Raises:
            UserError: if the disk is full.
        """
        pictures = self.pipeline.orbit_pictures()
        animation = gif(pictures)
        write_atomically(self.base_dir / "orbit.gif", animation, "--output-dir")
        for events in writer.EVENT_WRITERS:
            if isinstance(events, writer.TensorboardWriter):
                add_animation(events.tb_writer, "Eval Images/orbit", animation, pictures.shape, step)


def gif(pictures: Tensor) -> bytes:
    """Return pictures [N, H, W, 3], bytes, as an animated GIF that begins again at its end."""
    first, *rest = (Image.fromarray(picture.numpy()) for picture in pictures)
    stream, duration = io.BytesIO(), round(1000 / FRAMES_PER_SECOND)
    first.save(stream, "GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    return stream.getvalue()


def add_animation(events: Any, tag: str, animation: bytes, shape: torch.Size, step: int) -> None:
    """Write an animated GIF of pictures [N, H, W, 3] to TensorBoard, which plays it among its images.

    PyTorch's `add_video` makes GIFs too, but with the package moviepy.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=shape[1], width=shape[2], colorspace=3, encoded_image_string=animation)
    events._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
    events.flush()
