"""The loop that tunes an autoencoder: accelerate, moving average, checkpoints that survive a kill, TensorBoard.

What is tuned, on what, and with which losses is a :class:`Task`; all stages share this loop.
"""

import functools
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lrf_nerfstudio.training.adversarial import (
    PatchDiscriminator,
    ProjectedDiscriminator,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_loss,
)
from lrf_nerfstudio.training.perceptual import PretrainedFeatures
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import replacing
from lrf_nerfstudio.vae import VAE

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "checkpoint.pt"

# Options that may differ between a run and its continuation: they do not change what is computed.
_FREE_OPTIONS = (
    "output",
    "resume",
    "device",
    "workers",
    "images_in_memory",
    "save_every",
    "pictures_every",
    "tensorboard",
)


@dataclass
class FineTuneConfig:
    """What all stages of fine-tuning have in common."""

    output: Path
    """Folder to write to: the tuned autoencoder as a diffusers folder, the checkpoint, TensorBoard's events."""
    vae: str = "lrf-f4c4"
    """The autoencoder to tune: a name in the package's assets, a diffusers folder, a .ckpt or .safetensors file in
    latent-diffusion layout, or a Hugging Face id."""
    steps: int = 2000
    """Optimizer steps in all."""
    batch_size: int = 4
    """Samples that a process computes at once."""
    gradient_accumulation: int = 1
    """Batches whose gradients make one step."""
    learning_rate: float = 1e-4
    """Largest learning rate of Adam. Tiny autoencoders bear 1e-4; the KL autoencoder of Stable Diffusion was trained
    with 4.5e-6."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Momenta of Adam, those of latent diffusion's autoencoders."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """The learning rate after the warm-up: as it is, or down to 0 at the last step."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.995
    """Decay of the moving average of the weights, which is what is written. Young averages decay faster."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the computation; weights and losses stay float32. bf16 halves the time of a step on processors and
    GPUs that have it."""
    feature_weight: float = 0.0
    """Weight of the distance of features of a network trained on ImageNet, a perceptual loss without a download."""
    lpips_weight: float = 0.0
    """Weight of LPIPS (VGG), where its weights are in PyTorch's cache or may be downloaded."""
    download_lpips: bool = False
    """Download the weights of LPIPS's VGG where they are missing (530 MB)."""
    gan_weight: float = 0.0
    """Weight of the adversarial loss, relative to the gradient of the reconstruction loss; 0 leaves it out. Latent
    diffusion takes 0.5."""
    discriminator: Literal["projected", "patch"] = "projected"
    """The discriminator judges features of a network trained on ImageNet (Projected GAN), which takes it a hundred
    steps to learn, or pixels (PatchGAN, as latent diffusion), which takes tens of thousands."""
    gan_start: int = 50
    """Step from which the decoder hears the discriminator, which learns from step 0."""
    gan_learning_rate: float = 4e-4
    """Learning rate of the discriminator."""
    seed: int = 0
    """Seed of the data's order and of everything random; sample n is the same at every run."""
    workers: int = 2
    """Processes that read and crop photographs, for each training process; 0 reads in the training process."""
    save_every: int = 100
    """Steps between checkpoints."""
    pictures_every: int = 100
    """Steps between TensorBoard's pictures."""
    tensorboard: bool = True
    """Write losses and pictures for TensorBoard, where the package tensorboard is installed."""
    resume: bool = False
    """Go on from the checkpoint in the output folder, with the data that would have come next."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` takes the GPU of each process where there is one."""


@dataclass
class Losses:
    """What a task computes of a batch.

    Attributes:
        terms: scalars by name, unweighted.
        weights: by the same names; the loss is the weighted sum.
        images: [N, H, W, 3] in [0, 1], photographs to show and to compare with by the discriminator.
        decoded: [N, H, W, 3], what the decoder made of them, not clamped.
    """

    terms: dict[str, Tensor]
    weights: dict[str, float]
    images: Tensor
    decoded: Tensor

    @property
    def total(self) -> Tensor:
        """The weighted sum."""
        return sum((self.weights[name] * term for name, term in self.terms.items()), torch.zeros(()).to(self.decoded))


class Task(ABC):
    """What a stage tunes, on what, with which losses.

    Attributes:
        vae: the autoencoder; its parameters that require gradients are tuned.
        network: the module that is called in `losses`; holds `vae`'s autoencoder and nothing else that is tuned.
        dataset: item n depends on n alone; items are dictionaries of tensors.
        reconstruction_terms: names of the losses that the adversarial one is balanced with.
        notices: what the user should know of the run, said once when it begins.
    """

    vae: VAE
    network: nn.Module
    dataset: Dataset[dict[str, Tensor]]
    reconstruction_terms: tuple[str, ...]
    notices: tuple[str, ...] = ()

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Moves what belongs to the task, besides `network`, to a device."""

    @abstractmethod
    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Losses:
        """The losses of a batch.

        Args:
            network: `network`, wrapped for several processes and mixed precision.
            batch: items of `dataset`, stacked.
        """

    @abstractmethod
    def pictures(self, batch: dict[str, Tensor], losses: Losses) -> Tensor:
        """[3, H, W] in [0, 1], a look at a batch."""


class FineTuner:
    """The state of a run: the network, its moving average, the discriminator, the optimizers and the step."""

    def __init__(self, config: FineTuneConfig, task: Task) -> None:
        """Starts a run, or takes up the one in the output folder if `config.resume` is set.

        Raises:
            UserError: nothing to resume, another run is in the output folder, or the device lacks the precision.
        """
        from accelerate import Accelerator
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.config, self.task = config, task
        try:
            self.accelerator = Accelerator(
                mixed_precision=config.mixed_precision,
                gradient_accumulation_steps=config.gradient_accumulation,
                cpu=config.device == "cpu",
                step_scheduler_with_optimizer=False,
            )
        except ValueError as error:  # fp16 on a CPU, bf16 on an old GPU
            raise UserError(f"--mixed-precision {config.mixed_precision} cannot be had here: {error}.") from error
        if config.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise UserError("--mixed-precision fp16 needs a GPU; CPUs compute with bf16 or no.")
        self.step = 0
        self._samples_per_step = config.batch_size * config.gradient_accumulation * self.accelerator.num_processes
        self._prepare_output()

        torch.manual_seed(config.seed)  # the discriminator's first weights, the same in all processes
        self._plain_network = task.network
        self._tuned = [parameter for parameter in task.network.parameters() if parameter.requires_grad]
        if not self._tuned:
            raise UserError(f"{config.vae} (--vae) has no weights that could be tuned.")
        optimizer = torch.optim.AdamW(self._tuned, lr=config.learning_rate, betas=config.betas, weight_decay=0.0)
        self.scheduler = get_scheduler(
            "constant_with_warmup" if config.schedule == "constant" else "cosine",
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
        )
        self.network, self.optimizer = self.accelerator.prepare(task.network, optimizer)
        self.ema = EMAModel(self._tuned, decay=config.ema_decay)
        task.to(self.accelerator.device)

        self.discriminator: nn.Module | None = None
        if config.gan_weight > 0:
            self._plain_discriminator = (
                PatchDiscriminator()
                if config.discriminator == "patch"
                else ProjectedDiscriminator(PretrainedFeatures().to(self.accelerator.device))
            )
            discriminator_optimizer = torch.optim.AdamW(
                self._plain_discriminator.parameters(),
                lr=config.gan_learning_rate,
                betas=config.betas,
                weight_decay=0.0,
            )
            self.discriminator, self.discriminator_optimizer = self.accelerator.prepare(
                self._plain_discriminator, discriminator_optimizer
            )
        if config.resume:
            self._load()
        else:
            self.save()  # a run can be resumed from its first moment on, and a folder that cannot be written shows now

    def run(self) -> None:
        """Trains to the end, with a progress bar.

        Raises:
            UserError: a loss is not finite, or a checkpoint cannot be written. The last checkpoint stays.
        """
        batches = self._batches()
        with ExitStack() as stack:
            report = stack.enter_context(_Report(self.config, self.step, self.accelerator.is_main_process))
            report.say(self.task.notices)
            self.network.train()
            while self.step < self.config.steps:
                for _ in range(self.config.gradient_accumulation):
                    batch = next(batches)
                    terms, losses = self.train_on(batch)
                self.step += 1
                report.terms(self.step, terms, self.scheduler.get_last_lr()[0])
                if self.step % self.config.pictures_every == 0:
                    report.picture(self.step, lambda: self.task.pictures(batch, losses))  # noqa: B023
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    self.save()

    def train_on(self, batch: dict[str, Tensor]) -> tuple[dict[str, float], Losses]:
        """Forward, backward and, when enough batches are accumulated, a step; the terms, averaged over processes."""
        config, accelerator = self.config, self.accelerator
        modules = [self.network] if self.discriminator is None else [self.network, self.discriminator]
        with accelerator.accumulate(*modules):
            with accelerator.autocast():
                losses = self.task.losses(self.network, batch)
            loss, terms = losses.total, dict(losses.terms)
            if self.discriminator is not None and self.step >= config.gan_start:
                terms["gan"] = self._generator_loss(losses)
                loss = loss + terms["gan"]
            values = self._mean_over_processes(terms)
            self._check_finite(values)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self._tuned, config.max_gradient_norm)
                if config.mixed_precision != "fp16":  # whose scaler leaves out the steps that overflow
                    self._check_finite({"gradient norm": float(norm)})
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.discriminator is not None:
                values["discriminator"] = self._train_discriminator(losses)
            if accelerator.sync_gradients:
                self.scheduler.step()
                self.ema.step(self._tuned)
        return values, losses

    def _generator_loss(self, losses: Losses) -> Tensor:
        """The weighted adversarial loss of the decoder."""
        self._plain_discriminator.requires_grad_(False)
        with self.accelerator.autocast():
            adversarial = generator_loss(self._plain_discriminator(losses.decoded.permute(0, 3, 1, 2)))
        self._plain_discriminator.requires_grad_(True)
        reconstruction = sum(
            (losses.weights[name] * losses.terms[name] for name in self.task.reconstruction_terms), torch.zeros(())
        )
        weight = adaptive_weight(reconstruction, adversarial, self._last_layer)
        return self.config.gan_weight * weight * adversarial

    def _train_discriminator(self, losses: Losses) -> float:
        images = torch.cat([losses.images, losses.decoded.detach()]).permute(0, 3, 1, 2)
        assert self.discriminator is not None
        with self.accelerator.autocast():
            logits = self.discriminator(images)
        loss = discriminator_hinge_loss(logits)
        value = self._mean_over_processes({"discriminator": loss})
        self._check_finite(value)
        self.accelerator.backward(loss)
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        return value["discriminator"]

    @functools.cached_property
    def _last_layer(self) -> Tensor:
        decoder = self.task.vae.autoencoder.decoder
        return [module for module in decoder.modules() if isinstance(module, nn.Conv2d)][-1].weight

    def _mean_over_processes(self, terms: dict[str, Tensor]) -> dict[str, float]:
        values = torch.stack([term.detach().float() for term in terms.values()])
        return dict(zip(terms, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def _check_finite(self, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not abs(value) < float("inf")]
        if bad:
            raise UserError(
                f"Step {self.step}: {', '.join(bad)} is not finite. The last good checkpoint in {self.config.output} "
                "is kept; lower --learning-rate or the term's weight, or compute without --mixed-precision."
            )

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches of this process from the current step on."""
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

    def _description(self) -> dict[str, Any]:
        """All that decides what a run computes, as plain values."""
        options = {name: value for name, value in asdict(self.config).items() if name not in _FREE_OPTIONS}
        return _plain({**options, "samples per step": self._samples_per_step})

    def _prepare_output(self) -> None:
        output = self.config.output
        error: str | None = None
        if self.config.resume:
            if not (output / CHECKPOINT).exists():
                error = f"There is no run to --resume in {output} (--output)."
        elif (output / CHECKPOINT).exists():
            error = f"{output} (--output) holds a run already: add --resume to go on with it, or choose another folder."
        elif output.exists() and (not output.is_dir() or any(output.iterdir())):
            error = f"{output} (--output) is not empty. Choose a new folder; nothing is overwritten."
        if error:
            raise UserError(error)
        self.accelerator.wait_for_everyone()  # no process may find what another one writes

    def save(self) -> None:
        """Writes the checkpoint, then the averaged autoencoder; each complete or as before at any moment.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        if self.accelerator.is_main_process:
            state: dict[str, Any] = {
                "description": self._description(),
                "vae": [self.task.vae.fingerprint, self.task.vae.decoder_fingerprint],
                "step": self.step,
                "network": self._plain_network.state_dict(),
                "optimizer": self.optimizer.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "ema": self.ema.state_dict(),
            }
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            if self.discriminator is not None:
                state["discriminator"] = self._plain_discriminator.state_dict()
                state["discriminator optimizer"] = self.discriminator_optimizer.optimizer.state_dict()
            try:
                with replacing(self.config.output / CHECKPOINT) as stream:
                    torch.save(state, stream)
                self._save_autoencoder()
            except (OSError, RuntimeError) as error:  # a failed write, reported in either way
                raise UserError(
                    f"The state of step {self.step} could not be written to {self.config.output}: {error}. The last "
                    "good checkpoint is still there: make room and go on with --resume."
                ) from error
        self.accelerator.wait_for_everyone()

    def _save_autoencoder(self) -> None:
        self.ema.store(self._tuned)
        self.ema.copy_to(self._tuned)
        try:
            self.task.vae.save(self.config.output, dtype=torch.float32)
        finally:
            self.ema.restore(self._tuned)

    def _load(self) -> None:
        checkpoint = self.config.output / CHECKPOINT
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise UserError(f"{checkpoint} cannot be read: {error}. Start again in another folder.") from error
        description = self._description()
        if differing := [name for name, value in description.items() if state["description"].get(name) != value]:
            name = differing[0]
            raise UserError(
                f"{checkpoint} is of another run: its {name} is {state['description'].get(name)}, not "
                f"{description[name]}. Use the options of that run, or another --output."
            )
        if state["vae"] != [self.task.vae.fingerprint, self.task.vae.decoder_fingerprint]:
            raise UserError(f"{checkpoint} is of a run that tunes another autoencoder than {self.config.vae} (--vae).")
        self.step = state["step"]
        self._plain_network.load_state_dict(state["network"])
        self.optimizer.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.accelerator.device)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.discriminator is not None:
            self._plain_discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.optimizer.load_state_dict(state["discriminator optimizer"])


def _plain(value: Any) -> Any:
    """Options as what a checkpoint may hold and a comparison survives: paths as strings, tuples as lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class _Report:
    """Progress on the terminal and in TensorBoard, from the main process; silent in the others."""

    def __init__(self, config: FineTuneConfig, step: int, is_main_process: bool) -> None:
        self._config, self._first_step, self._active = config, step, is_main_process
        self._writer: SummaryWriter | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "_Report":
        if not self._active:
            return self
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = self._stack.enter_context(Progress(*columns, TextColumn("{task.description}")))
        self._task = self._progress.add_task("", total=self._config.steps, completed=self._first_step)
        if self._config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._progress.print("[yellow]TensorBoard is left out: its package is not installed.")
            else:
                # What an interrupted run logged after its last checkpoint is computed again.
                writer = SummaryWriter(str(self._config.output), purge_step=self._first_step)
                self._writer = self._stack.enter_context(writer)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def say(self, notices: Sequence[str]) -> None:
        for notice in notices if self._active else ():
            self._progress.print(f"[yellow]{notice}")

    def terms(self, step: int, terms: dict[str, float], learning_rate: float) -> None:
        if not self._active:
            return
        text = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
        self._progress.update(self._task, completed=step, description=text)
        if step % self._config.save_every == 0:
            self._progress.print(f"step {step}: {text}")
        if self._writer is not None:
            for name, value in terms.items():
                self._writer.add_scalar(f"loss/{name}", value, step)
            self._writer.add_scalar("learning rate", learning_rate, step)

    def picture(self, step: int, make: Callable[[], Tensor]) -> None:
        if self._writer is not None:
            self._writer.add_image("views", make().clamp(0, 1), step)
