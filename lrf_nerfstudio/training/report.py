"""What a training run says: means of its losses, measures and pictures, on the terminal and in TensorBoard."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrf_nerfstudio.training.config import TrainingConfig
from lrf_nerfstudio.utils.progress import progress_bar

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunningMeans:
    """Means of named scalars, which stay on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one value of each of these names; a value that is not finite makes its mean not finite."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means of what was added since the last call.

        Args:
            reduce: averages a vector over processes.
        """
        if not self._sums:
            return {}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        values = dict(zip(self._sums, reduce(means).tolist(), strict=True))
        self._sums, self._counts = {}, {}
        return values


class Report:
    """Progress on the terminal and in TensorBoard, from the main process; silent in the others."""

    def __init__(self, config: TrainingConfig, step: int, is_main_process: bool) -> None:
        self._config, self._first_step, self._active = config, step, is_main_process
        self._writer: SummaryWriter | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Report":
        if not self._active:
            return self
        self._progress = self._stack.enter_context(progress_bar())
        self._task = self._progress.add_task("Training", total=self._config.steps, completed=self._first_step)
        if self._config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._print("TensorBoard is left out: its package is not installed.", style="yellow")
            else:
                # What an interrupted run logged after its last checkpoint is computed again.
                writer = SummaryWriter(str(self._config.output), purge_step=self._first_step)
                self._writer = self._stack.enter_context(writer)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def say(self, notices: Sequence[str]) -> None:
        """Print what the user should know."""
        for notice in notices if self._active else ():
            self._print(notice, style="yellow")

    def advance(self, step: int) -> None:
        """Move the progress bar to a step."""
        if self._active:
            self._progress.update(self._task, completed=step)

    def losses(self, step: int, means: dict[str, float], learning_rate: float) -> None:
        """Show the means of the losses since the last report."""
        if not self._active:
            return
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self._progress.update(self._task, status=text)
        if step % self._config.save_every == 0:
            self._print(f"step {step}: {text}")
        tags = {name: name if name == "gradient norm" else f"loss/{name}" for name in means}
        self._scalars(step, {tags[name]: value for name, value in means.items()} | {"learning rate": learning_rate})

    def measures(self, step: int, values: dict[str, float]) -> None:
        """Show what was measured at a checkpoint."""
        if self._active and values:
            self._print(f"step {step}: " + "  ".join(f"{name} {value:.2f}" for name, value in values.items()))
            self._scalars(step, values)

    def picture(self, step: int, make: Callable[[], Tensor]) -> None:
        """Write a picture [3, H, W], which is made only where TensorBoard is."""
        if self._writer is not None:
            self._writer.add_image("views", make().clamp(0, 1), step)

    def _print(self, text: str, style: str | None = None) -> None:
        self._progress.print(text, style=style, markup=False, soft_wrap=True)

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
