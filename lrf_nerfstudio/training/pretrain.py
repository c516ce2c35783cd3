"""Trains a small autoencoder from scratch by reconstruction, on photographs alone.

The network is diffusers' AutoencoderTiny. Beside the image, two things can be asked of the latent, because a radiance
field will render it rather than an encoder compute it: the decoder is to bear latents that are slightly wrong (noise is
added to them), and a latent that is moved, turned or scaled is to decode to the image moved, turned or scaled the same
way (as in EQ-VAE, arXiv 2502.09509), since that is what a change of the viewpoint does. Both are off by default: stage
I asks for the second, with pairs of crops.
"""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import replacing
from lrf_nerfstudio.utils.images import find_images, read_image
from lrf_nerfstudio.vae.autoencoder import VAE

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

_CHECKPOINT = "checkpoint.pt"


@dataclass
class TrainVAEConfig:
    """Trains an autoencoder on folders of photographs and writes it as a diffusers folder."""

    images: tuple[Path, ...]
    """Folders of photographs to train on, searched with their subfolders."""
    output: Path
    """Folder to write to: the autoencoder (config.json and weights), the checkpoint, TensorBoard's events."""
    eval_images: tuple[Path, ...] = ()
    """Folders of photographs to measure the reconstruction on. They are not trained on."""
    eval_count: int = 8
    """How many photographs of each of these folders, evenly chosen."""
    # The defaults are those of lrf-f4c4-base; its model card has what they were chosen among.
    latent_channels: int = 4
    """Channels of the latent."""
    width: int = 32
    """Channels of every hidden layer."""
    encoder_blocks: tuple[int, ...] = (0, 2, 3)
    """Residual blocks of the encoder at each resolution, the full one first; each next one is half as large."""
    decoder_blocks: tuple[int, ...] = (4, 3, 1)
    """Residual blocks of the decoder at each resolution, the full one last."""
    steps: int = 3000
    """Optimizer steps in all."""
    batch_size: int = 8
    """Crops in a step."""
    crop: int = 64
    """Side of a crop in pixels, a multiple of the spatial factor."""
    max_reduction: float = 3.0
    """A crop is cut from a region up to so many times larger and reduced, so that coarse and fine detail are seen."""
    learning_rate: float = 1.5e-3
    """Largest learning rate of Adam; it rises over the first 2 % of the steps and falls to 1 % along a cosine."""
    ema_decay: float = 0.998
    """Decay of the moving average of the weights, which is what is measured and written."""
    gradient_weight: float = 0.5
    """Weight of the L1 loss on differences of neighbouring pixels, which keeps detail, beside the L1 loss on pixels."""
    noise: float = 0.0
    """Largest standard deviation of the noise that is added to latents, which lie within about -2 and 2."""
    warp_share: float = 0.0
    """Share of the crops whose latent is moved, turned and scaled before it is decoded."""
    range_weight: float = 0.1
    """Weight of the squared excess of latents beyond -2 and 2; the decoder squashes them at 3."""
    seed: int = 0
    """Seed of the initial weights and of the choice of crops; step n sees the same crops at every run."""
    images_in_memory: int = 1000
    """How many photographs are kept decoded in memory."""
    save_every: int = 200
    """Steps between checkpoints, which are also when the autoencoder is written and measured."""
    resume: bool = False
    """Continue from the checkpoint in the output folder, as if never stopped."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device to train on."""
    tensorboard: bool = False
    """Write the losses and the PSNR for TensorBoard (needs the package tensorboard)."""


def random_crop(image: NDArray[np.uint8], crop: int, max_reduction: float, rng: np.random.Generator) -> Tensor:
    """A randomly placed, reduced, mirrored and recoloured crop of an image.

    Returns:
        [crop, crop, 3] in [0, 1].
    """
    import cv2

    shortest = min(image.shape[:2])
    side = min(shortest, round(crop * max_reduction ** rng.random()))
    top, left = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
    region = cv2.resize(image[top : top + side, left : left + side], (crop, crop), interpolation=cv2.INTER_AREA)
    pixels = region.astype(np.float32) / 255.0
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(random_recoloring(rng)(pixels))


def random_recoloring(rng: np.random.Generator) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Draws a change of colours of images [H, W, 3] in [0, 1]: channels permuted and scaled, gamma.

    A small collection of photographs has few colours; the network is to work with others too.
    """
    permutation = rng.permutation(3) if rng.random() < 0.5 else np.arange(3)
    gains, gamma = rng.uniform(0.7, 1.3, 3), rng.uniform(0.7, 1.4)

    def recolor(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(np.clip(pixels[..., permutation] * gains, 0.0, 1.0) ** gamma, dtype=np.float32)

    return recolor


def random_warps(count: int, share: float, rng: np.random.Generator) -> Tensor:
    """Similarity transforms as `affine_grid` takes them: [count, 2, 3], a `share` of them not the identity.

    Scales are within 0.7 and 1.4, angles within 20 degrees, shifts within a tenth of the picture.
    """
    theta = np.tile(np.eye(2, 3), (count, 1, 1))
    for i in range(round(count * share)):
        scale, angle = math.sqrt(2.0) ** rng.uniform(-1, 1), math.radians(rng.uniform(-20, 20))
        cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
        theta[i] = [[cosine, -sine, rng.uniform(-0.2, 0.2)], [sine, cosine, rng.uniform(-0.2, 0.2)]]
    return torch.from_numpy(theta).float()


def warp(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Resamples [B, ch, h, w] bilinearly by transforms [B, 2, 3].

    Returns:
        (the resampled x, [B, 1, h, w] weights: 1 where the sample lies inside x, else 0).
    """
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    inside = (grid.abs() <= 1.0).all(dim=-1)[:, None].to(x.dtype)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False), inside


def image_loss(prediction: Tensor, target: Tensor, weight: Tensor, gradient_weight: float) -> Tensor:
    """Weighted L1 of pixels plus `gradient_weight` times the L1 of differences of neighbouring pixels.

    Args:
        prediction: [B, 3, H, W].
        target: [B, 3, H, W].
        weight: [B, 1, H, W], 0 where the target is unknown.
        gradient_weight: weight of the differences.
    """
    error = (prediction - target) * weight
    loss = error.abs().mean()
    for axis in (-2, -1):
        loss = loss + 0.5 * gradient_weight * error.diff(dim=axis).abs().mean()
    return loss


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear rise over the first 2 % of the steps, then a cosine down to 1 %."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def build_autoencoder(config: TrainVAEConfig) -> "AutoencoderTiny":
    """A freshly initialised AutoencoderTiny of the configured size.

    Raises:
        UserError: encoder and decoder have different numbers of resolutions, or the crop does not fit.
    """
    from diffusers import AutoencoderTiny

    levels = len(config.encoder_blocks)
    if len(config.decoder_blocks) != levels or config.crop % 2 ** (levels - 1):
        raise UserError(
            "--encoder-blocks and --decoder-blocks must be equally long, and --crop a multiple of "
            f"the spatial factor, {2 ** (levels - 1)}."
        )
    torch.manual_seed(config.seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(config.width,) * levels,
        decoder_block_out_channels=(config.width,) * levels,
        num_encoder_blocks=config.encoder_blocks,
        num_decoder_blocks=config.decoder_blocks,
        latent_channels=config.latent_channels,
    )


@torch.no_grad()
def initialize(autoencoder: "AutoencoderTiny", images: Tensor) -> None:
    """Lets training start from an autoencoder that already works, roughly, which saves it its slowest part.

    Channels 0 to 2 of all layers carry colour: the encoder averages it, `latent = 3 * (color - 0.5)`, and the decoder
    interpolates it bilinearly. The other weights stay random; those that lead to further latent channels respond to
    detail and are scaled so that these channels are uncorrelated and of unit variance. Residual branches start at zero.

    Args:
        autoencoder: freshly initialised, with at least 3 latent channels and 4 hidden ones; changed in place.
        images: [B, 3, H, W] in [0, 1], examples for the variance.
    """
    binomial = torch.tensor([0.25, 0.5, 0.25], device=images.device)
    average, center = torch.outer(binomial, binomial), torch.zeros(3, 3, device=images.device)
    center[1, 1] = 1.0

    def carry_color(layer: nn.Conv2d, kernel: Tensor, offset: float = 0.0) -> None:
        layer.weight[:3] = torch.eye(3, layer.in_channels, device=kernel.device)[:, :, None, None] * kernel
        if layer.bias is not None:
            layer.bias[:3] = offset

    for half in (autoencoder.encoder, autoencoder.decoder):
        convolutions = [layer for layer in half.layers if isinstance(layer, nn.Conv2d)]
        for block in (layer for layer in half.layers if hasattr(layer, "fuse")):
            nn.init.zeros_(block.conv[-1].weight)
            nn.init.zeros_(block.conv[-1].bias)
        for layer in convolutions[1:-1]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            carry_color(layer, average)
        first, last = convolutions[0], convolutions[-1]
        if half is autoencoder.encoder:
            first.weight -= first.weight.mean(dim=(2, 3), keepdim=True)  # no response to flat colour, only to detail
            first.weight *= 3.0
            carry_color(first, center)
            carry_color(last, 3.0 * center, offset=-1.5)
        else:
            nn.init.zeros_(last.weight)
            carry_color(first, center / 3.0, offset=0.5)
            carry_color(last, center)

    detail = autoencoder.encode(images * 2.0 - 1.0).latents[:, 3:].movedim(1, 0).flatten(1)  # [C - 3, cells]
    variances, axes = torch.linalg.eigh(torch.cov(detail).reshape(len(detail), len(detail)))
    whitening = axes @ torch.diag(variances.clamp(min=1e-4 * variances.max()).rsqrt()) @ axes.T
    last = autoencoder.encoder.layers[-1]
    last.weight[3:] = torch.einsum("ij,j...->i...", whitening, last.weight[3:])
    last.bias[3:] = whitening @ (last.bias[3:] - detail.mean(dim=1))


@torch.no_grad()
def reconstruction_psnr(vae: VAE, paths: Sequence[Path]) -> float:
    """Mean PSNR in dB of photographs after encoding and decoding, at full size."""
    psnrs = []
    for path in paths:
        image = torch.from_numpy(read_image(path)).to(vae.device).float() / 255.0
        decoded = vae.decode(vae.encode(image[None]), *image.shape[:2])[0]
        psnrs.append(-10.0 * math.log10(F.mse_loss(decoded, image).item()))
    return sum(psnrs) / len(psnrs)


class VAETrainer:
    """The state of a training run: the weights, their moving average, the optimizer and the step."""

    def __init__(self, config: TrainVAEConfig) -> None:
        """Starts a run, or takes up the one in the output folder if `config.resume` is set.

        Raises:
            UserError: photographs missing, options that do not fit together, nothing to resume, or something there that
                would be overwritten.
        """
        self.config = config
        self.paths = find_images(config.images)
        self.eval_paths = {
            folder: files[:: max(1, len(files) // config.eval_count)][: config.eval_count]
            for folder in config.eval_images
            for files in [find_images([folder])]
        }
        device = torch.device(config.device)
        self.model = build_autoencoder(config).to(device=device, memory_format=torch.channels_last)
        self.ema = build_autoencoder(config).to(device=device, memory_format=torch.channels_last).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        self.step = 0
        self._read = functools.lru_cache(maxsize=config.images_in_memory)(read_image)

        examples = torch.cat([self.batch(config.steps + i)[0] for i in range(4)])
        initialize(self.model, examples.to(device))
        self.ema.load_state_dict(self.model.state_dict())

        checkpoint = config.output / _CHECKPOINT
        if config.resume:
            self._load(checkpoint)
        elif checkpoint.exists():
            raise UserError(f"{config.output} (--output) holds a run already: add --resume, or choose another folder.")

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """What step number `step` is trained on, a function of the number and the seed alone.

        Returns:
            crops [B, 3, crop, crop] in [0, 1]; transforms [B, 2, 3] for :func:`warp`; noise [B, C, h, w] for latents.
        """
        config = self.config
        rng = np.random.default_rng((config.seed, step))
        chosen = rng.choice(len(self.paths), config.batch_size)
        crops = [random_crop(self._read(self.paths[i]), config.crop, config.max_reduction, rng) for i in chosen]
        cells = config.crop // 2 ** (len(config.encoder_blocks) - 1)
        deviation = rng.uniform(0.0, config.noise, (config.batch_size, 1, 1, 1))
        noise = deviation * rng.standard_normal((config.batch_size, config.latent_channels, cells, cells))
        theta = random_warps(config.batch_size, config.warp_share, rng)
        return torch.stack(crops).permute(0, 3, 1, 2), theta, torch.from_numpy(noise).float()

    def train_step(self, images: Tensor, theta: Tensor, noise: Tensor) -> float:
        """One step of the optimizer on what :meth:`batch` gives; returns the loss."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(self.step, config.steps)
        latents = self.model.encode(images * 2.0 - 1.0).latents
        excess = F.relu(latents.abs() - 2.0).square().mean()
        warped_latents, _ = warp(latents, theta)
        target, inside = warp(images, theta)
        decoded = self.model.decode(warped_latents + noise).sample * 0.5 + 0.5
        loss = image_loss(decoded, target, inside, config.gradient_weight) + config.range_weight * excess
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # While the average is young it follows the weights closely, so that it does not remember their start.
        decay = min(config.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            for average, weight in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                average.lerp_(weight, 1.0 - decay)
        return loss.item()

    def run(self, report: Callable[[int, dict[str, float]], None]) -> None:
        """Trains to the end.

        Args:
            report: called with the step and named values: `loss` after each step, `psnr/<folder>` in dB after each
                checkpoint.
        """
        device = torch.device(self.config.device)
        with ThreadPoolExecutor(1) as loader:
            upcoming = loader.submit(self.batch, self.step)
            while self.step < self.config.steps:
                images, theta, noise = (tensor.to(device, non_blocking=True) for tensor in upcoming.result())
                upcoming = loader.submit(self.batch, self.step + 1)
                report(self.step, {"loss": self.train_step(images, theta, noise)})
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    self.save()
                    report(self.step, self.evaluate())

    def evaluate(self) -> dict[str, float]:
        """Reconstruction PSNR in dB of the averaged weights, by folder of `--eval-images`."""
        vae = VAE(self.ema)
        psnrs = {folder: reconstruction_psnr(vae, paths) for folder, paths in self.eval_paths.items()}
        return {f"psnr/{'/'.join(folder.parts[-2:])}": psnr for folder, psnr in psnrs.items()}

    def save(self) -> None:
        """Writes the checkpoint and the averaged autoencoder; complete or as before at any moment."""
        output = self.config.output
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "architecture": self._architecture(),
        }
        with replacing(output / _CHECKPOINT) as stream:
            torch.save(state, stream)
        self._set_latent_scale()
        VAE(self.ema).save(output)

    @torch.no_grad()
    def _set_latent_scale(self) -> None:
        """Sets the scaling and shift factors that bring scaled latents to mean 0 and deviation 1 over 64 crops."""
        crops = torch.cat([self.batch(self.config.steps + i)[0] for i in range(-(-64 // self.config.batch_size))])
        latents = self.ema.encode(crops.to(self.config.device) * 2.0 - 1.0).latents
        self.ema.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1.0 / latents.std().item())

    def _architecture(self) -> dict[str, Any]:
        names = ("latent_channels", "width", "encoder_blocks", "decoder_blocks", "seed", "batch_size", "crop")
        return {name: value for name, value in asdict(self.config).items() if name in names}

    def _load(self, checkpoint: Path) -> None:
        try:
            state = torch.load(checkpoint, map_location=self.config.device, weights_only=True)
        except FileNotFoundError as error:
            raise UserError(f"There is no run to --resume in {checkpoint.parent} (--output).") from error
        if state["architecture"] != self._architecture():
            raise UserError(f"{checkpoint} is of a run with other options: {state['architecture']}.")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
