"""The loop of all trainings: accelerate, moving average, checkpoints that survive a kill, TensorBoard.

What is trained, on what, and with which losses is a :class:`~lrf_nerfstudio.training.task.Task`; pretraining and the
stages I and III share this loop. On a GPU, nothing is read back from the device between two reports.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lrf_nerfstudio.training.adversarial import Adversary
from lrf_nerfstudio.training.checkpoint import check_output, describe, read_checkpoint, write_checkpoint
from lrf_nerfstudio.training.config import TrainingConfig
from lrf_nerfstudio.training.report import Report, RunningMeans
from lrf_nerfstudio.training.task import Losses, Task
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import reporting_full_disk

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: TrainingConfig) -> "Accelerator":
    """Return accelerate's view of the device and of the other processes.

    Raises:
        UserError: if the device lacks the precision.
    """
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            cpu=config.device == "cpu",
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:  # fp16 on a CPU, bf16 on an old GPU
        raise UserError(f"--mixed-precision {config.mixed_precision} cannot be had here: {error}.") from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed-precision fp16 needs a GPU; CPUs compute with bf16 or no.")
    return accelerator


class Trainer:
    """The state of a run: the network, its moving average, the discriminator, the optimizers and the step."""

    def __init__(self, config: TrainingConfig, task: Task) -> None:
        """Start a run, or take up the one in the output folder if `config.resume` is set.

        Raises:
            UserError: if there is nothing to resume, if another run is in the output folder, if the device lacks the
                precision, or if the discriminator's network is missing.
        """
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.config, self.task = config, task
        self.accelerator = make_accelerator(config)
        self.step = 0
        check_output(config.output, config.resume)
        self.accelerator.wait_for_everyone()  # no process may find what another one writes

        device = self.accelerator.device
        on_gpu = device.type == "cuda"  # where many small kernels take longer than a few large ones
        torch.manual_seed(config.seed)  # the discriminator's first weights, the same in all processes
        self._plain_network = task.network.to(device)
        self._trained = [parameter for parameter in task.network.parameters() if parameter.requires_grad]
        if not self._trained:
            raise UserError(f"{task.vae.source} (--vae) has no weights that could be tuned.")
        optimizer = torch.optim.AdamW(
            self._trained, lr=config.learning_rate, betas=config.betas, weight_decay=0.0, fused=on_gpu
        )
        self.scheduler = get_scheduler(
            "constant_with_warmup" if config.schedule == "constant" else "cosine",
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
        )
        self.network, self.optimizer = self.accelerator.prepare(task.network, optimizer)
        self.ema = EMAModel(self._trained, decay=config.ema_decay, foreach=on_gpu)
        task.to(device)
        self.adversary: Adversary | None = None
        if config.gan_weight > 0:
            self.adversary = Adversary(config, self.accelerator, task.last_layer)
        self._means, self._last_report = RunningMeans(), 0
        if config.resume:
            self._load()
        self.save()  # a run can be resumed from its first moment on, and a folder that cannot be written shows now

    def run(self) -> None:
        """Train to the end, with a progress bar.

        Raises:
            UserError: if a loss or a weight is not finite, or if a checkpoint cannot be written. The last checkpoint
                stays.
        """
        config = self.config
        batches = self._batches()
        hint = "The last good checkpoint is still there: continue with --resume."
        with (
            reporting_full_disk(config.output, "--output", hint),  # TensorBoard writes there too
            Report(config, self.step, self.accelerator.is_main_process) as report,
        ):
            report.say(self.task.notices)
            self.network.train()
            while self.step < config.steps:
                for _ in range(config.gradient_accumulation):
                    batch = next(batches)
                    losses = self.train_on(batch)
                self.step += 1
                report.advance(self.step)
                is_checkpoint = self.step % config.save_every == 0 or self.step == config.steps
                if is_checkpoint or self.step % config.report_every == 0:
                    report.losses(self.step, self.read_losses(), self.scheduler.get_last_lr()[0])
                if self.step % config.pictures_every == 0:
                    report.picture(self.step, lambda: self.task.pictures(batch, losses))  # noqa: B023
                if is_checkpoint:
                    self.save()
                    if self.accelerator.is_main_process:
                        with self._averaged_weights():
                            report.measures(self.step, self.task.evaluate())

    def train_on(self, batch: dict[str, Tensor]) -> Losses:
        """Compute losses and gradients and, when enough batches are accumulated, take a step of the optimizers."""
        config, accelerator, adversary = self.config, self.accelerator, self.adversary
        modules = [self.network] if adversary is None else [self.network, adversary.network]
        with accelerator.accumulate(*modules):
            with accelerator.autocast():
                losses = self.task.losses(self.network, batch)
            loss, terms = losses.total(), dict(losses.terms)
            if adversary is not None and self.step >= config.gan_start:
                reconstruction = losses.total(self.task.reconstruction_terms)
                terms["gan"] = adversary.decoder_loss(losses.decoded, reconstruction)
                loss = loss + terms["gan"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self._trained, config.max_gradient_norm)
                if config.mixed_precision != "fp16":  # whose scaler leaves out the steps that overflow
                    terms["gradient norm"] = norm
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if adversary is not None:
                terms["discriminator"] = adversary.train_on(losses.images, losses.decoded)
            if accelerator.sync_gradients:
                self.scheduler.step()
                self.ema.step(self._trained)
        self._means.add(terms)
        return losses

    def read_losses(self) -> dict[str, float]:
        """Read the means of the losses since the last call, averaged over processes; all processes must call this.

        Raises:
            UserError: if one of them is not finite.
        """
        values = self._means.read(lambda means: self.accelerator.reduce(means, "mean"))
        self._check_finite([name for name, value in values.items() if not abs(value) < float("inf")])
        self._last_report = self.step
        return values

    def _check_finite(self, bad: list[str]) -> None:
        """Raise a UserError if there are names of what is not finite."""
        if bad:
            first, last = self._last_report + 1, self.step
            steps = f"Steps {first} to {last}" if first < last else f"Step {last}"
            raise UserError(
                f"{steps}: {', '.join(bad)} {'is' if len(bad) == 1 else 'are'} not finite. The last good checkpoint in "
                f"{self.config.output} is kept; lower --learning-rate or the term's weight, or compute without "
                "--mixed-precision."
            )

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of this process from the current step on, on its device."""
        config = self.config
        size, rank, processes = config.batch_size, self.accelerator.process_index, self.accelerator.num_processes
        first = self.step * config.gradient_accumulation
        last = config.steps * config.gradient_accumulation
        order = [
            list(range((number * processes + rank) * size, (number * processes + rank + 1) * size))
            for number in range(first, last)
        ]
        loader = DataLoader(
            self.task.dataset,
            batch_sampler=order,
            num_workers=config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        for batch in loader:
            yield {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Let the network have the moving average of its weights for a while."""
        self.ema.store(self._trained)
        self.ema.copy_to(self._trained)
        try:
            yield
        finally:
            self.ema.restore(self._trained)

    def _description(self) -> dict[str, Any]:
        config = self.config
        return describe(
            config,
            samples_per_step=config.batch_size * config.gradient_accumulation * self.accelerator.num_processes,
            reconstruction_terms=self.task.reconstruction_terms,  # without those whose network is missing
            autoencoder=(self.task.vae.fingerprint, self.task.vae.decoder_fingerprint),
        )

    def save(self) -> None:
        """Write the checkpoint, then what was trained, averaged; each is complete or as before at any moment.

        Raises:
            UserError: if the weights are not finite, the disk is full, or the folder cannot be written to.
        """
        weights = [*self._trained, *(self.adversary.network.parameters() if self.adversary else ())]
        finite = torch.stack([weight.detach().isfinite().all() for weight in weights]).all()
        self._check_finite([] if finite.item() else ["a weight"])
        if self.accelerator.is_main_process:
            write_checkpoint(self.config.output, self._description(), self._state())
            with self._averaged_weights():
                self.task.complete()
                self.task.save(self.config.output)
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "step": self.step,
            "network": self._plain_network.state_dict(),
            "optimizer": self.optimizer.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema.state_dict(),
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return state | (self.adversary.state_dict() if self.adversary else {})

    def _load(self) -> None:
        state = read_checkpoint(self.config.output, self._description())
        self.step = self._last_report = state["step"]
        self._plain_network.load_state_dict(state["network"])
        self.optimizer.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.accelerator.device)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.adversary is not None:
            self.adversary.load_state_dict(state)
