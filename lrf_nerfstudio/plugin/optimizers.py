"""Optimizer and scheduler options that differ from nerfstudio's."""

from dataclasses import dataclass, field

import torch
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from torch.optim.lr_scheduler import LRScheduler
from tyro.conf import Suppress

from lrf_nerfstudio.utils.options import Fraction, NotNegative, Positive


@dataclass
class FusedAdamConfig(AdamOptimizerConfig):
    """Adam in one pass over the parameters: on a CPU several times faster than PyTorch's default loop."""

    _target: type = torch.optim.Adam
    lr: Positive = 5e-4
    """The learning rate to use."""
    eps: NotNegative = 1e-15
    """The epsilon value to use."""
    max_norm: Positive | None = None
    """The max norm to use for gradient clipping."""
    weight_decay: NotNegative = 0.0
    """The weight decay to use."""
    fused: bool = True
    """Whether to use PyTorch's fused kernel."""


@dataclass
class RunScheduleConfig(SchedulerConfig):
    """The learning rate over the two parts of a run: on latents and, if the scene gets a decoder, on photographs."""

    _target: type = field(default_factory=lambda: RunSchedule)
    lr_final: Positive | None = None
    """Learning rate that an exponential decay over the whole run would end at; none: on latents it stays the same."""
    on_photographs: Positive = 0.75
    """Factor to the learning rate at the beginning of the part on photographs."""
    rise_on_photographs: Fraction = 0.0
    """Fraction of this part in which the learning rate rises from 0: Adam's first steps change every weight by the
    learning rate, which would spoil weights that are good already."""
    decay_on_photographs: Positive = 0.05
    """Further factor that it has decayed to at the end of this part, exponentially."""
    steps: Suppress[int] = 1
    """Length of the run, which the trainer fills in."""
    latent_steps: Suppress[int] = 1
    """Length of the part on latents, which the trainer fills in."""


class RunSchedule(Scheduler):
    """See :class:`RunScheduleConfig`.

    Unlike nerfstudio's schedulers, whose state holds NumPy scalars, its state loads with `weights_only=True`.
    """

    config: RunScheduleConfig

    def get_scheduler(self, optimizer: torch.optim.Optimizer, lr_init: float) -> LRScheduler:
        config = self.config
        ratio = 1.0 if config.lr_final is None else config.lr_final / lr_init

        def factor(step: int) -> float:
            if step < config.latent_steps or config.latent_steps >= config.steps:
                return float(ratio ** min(step / config.steps, 1.0))
            progress = min((step - config.latent_steps) / (config.steps - config.latent_steps), 1.0)
            risen = min(progress / config.rise_on_photographs, 1.0) if config.rise_on_photographs > 0 else 1.0
            return float(risen * config.on_photographs * config.decay_on_photographs**progress)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
