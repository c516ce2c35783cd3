"""Optimizer and scheduler options that differ from nerfstudio's."""

from dataclasses import dataclass, field

import torch
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from torch.optim.lr_scheduler import LRScheduler


@dataclass
class FusedAdamConfig(AdamOptimizerConfig):
    """Adam in one pass over the parameters: on a CPU several times faster than PyTorch's default loop."""

    _target: type = torch.optim.Adam
    eps: float = 1e-15
    """The epsilon value to use."""
    fused: bool = True
    """Whether to use PyTorch's fused kernel."""


@dataclass
class RunLengthDecayConfig(SchedulerConfig):
    """Exponential decay from the optimizer's learning rate to lr_final over the length of the run."""

    _target: type = field(default_factory=lambda: RunLengthDecay)
    lr_final: float = 1.6e-6
    """Learning rate at the end of the decay."""
    max_steps: int | None = None
    """Steps that the decay takes; if none, the run's --max-num-iterations."""


class RunLengthDecay(Scheduler):
    """lr(t) = lr_init^(1 - t) lr_final^t with t = min(step / max_steps, 1).

    Unlike nerfstudio's scheduler, whose state holds NumPy scalars, its state loads with `weights_only=True`.
    """

    config: RunLengthDecayConfig

    def get_scheduler(self, optimizer: torch.optim.Optimizer, lr_init: float) -> LRScheduler:
        max_steps = self.config.max_steps
        assert max_steps is not None, "the trainer fills in the length of the run"
        ratio = self.config.lr_final / lr_init
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: ratio ** min(step / max_steps, 1.0))
