"""Pretraining: a small autoencoder is trained from scratch by reconstruction, on photographs alone.

The network is diffusers' AutoencoderTiny. Nothing is asked of its latents but to stay within a range: that
corresponding points of different views have the same latent is left to stage I.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from lrf_nerfstudio.training.config import Momentum, TrainingConfig
from lrf_nerfstudio.training.data.photo_crops import PhotoCrops
from lrf_nerfstudio.training.losses import gradient_loss, range_loss
from lrf_nerfstudio.training.networks import EncodeDecode, check_crop
from lrf_nerfstudio.training.perceptual import PerceptualLosses
from lrf_nerfstudio.training.task import Losses, Task
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.images import find_images, read_image
from lrf_nerfstudio.utils.options import AtLeastOne, Count, NotNegative, Positive, Range
from lrf_nerfstudio.vae import VAE

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

_EXAMPLES = 64
"""Crops by which the latents are scaled."""


@dataclass(kw_only=True)
class PretrainConfig(TrainingConfig):
    """Trains an autoencoder on folders of photographs."""

    images: tuple[Path, ...]
    """Folders of photographs to train on, searched with their subfolders."""
    eval_images: tuple[Path, ...] = ()
    """Folders of photographs to measure the reconstruction on at every checkpoint. They are not trained on."""
    eval_count: AtLeastOne = 8
    """How many photographs of each of these folders are measured, evenly chosen."""
    images_in_memory: AtLeastOne = 1000
    """Photographs that each of the processes that read them keeps decoded."""
    # The defaults are those of lrf-f4c4-base; its model card says what they were chosen among.
    latent_channels: Annotated[int, Range(least=3)] = 4
    """Channels of the latent, of which three carry the colors."""
    width: Annotated[int, Range(least=4)] = 32
    """Channels of every hidden layer."""
    encoder_blocks: tuple[Count, ...] = (0, 2, 3)
    """Residual blocks of the encoder at each resolution, the full one first; each next one is half as large."""
    decoder_blocks: tuple[Count, ...] = (4, 3, 1)
    """Residual blocks of the decoder at each resolution, the full one last."""
    crop: AtLeastOne = 64
    """Side of a crop in pixels, a multiple of the spatial factor."""
    max_reduction: Annotated[float, Range(least=1)] = 3.0
    """A crop is cut from a square up to so many times larger and reduced, so that coarse and fine detail are seen."""
    gradient_weight: NotNegative = 0.5
    """Weight of the L1 loss on differences of neighboring pixels, which preserves detail, beside the L1 loss on pixels,
    whose weight is 1."""
    range_weight: NotNegative = 0.1
    """Weight of the squared excess of latents beyond -2 and 2; the decoder squashes them at 3."""
    steps: AtLeastOne = 3000
    """Number of optimizer steps."""
    batch_size: AtLeastOne = 8
    """Crops that each process computes at once."""
    learning_rate: Positive = 1.5e-3
    """Largest learning rate of Adam."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Momenta of Adam."""
    warmup_steps: Count = 60
    """Steps over which the learning rate rises from 0."""
    ema_decay: Momentum = 0.998
    """Decay of the moving average of the weights, which is what is written. It starts lower and rises to this value."""
    save_every: AtLeastOne = 200
    """Steps between checkpoints, which are also when the reconstruction is measured."""

    free_options: ClassVar[frozenset[str]] = TrainingConfig.free_options | {
        *("eval_images", "eval_count", "images_in_memory")
    }


class Pretrain(Task):
    """The task of pretraining: encoder and decoder are trained on crops of photographs."""

    def __init__(self, config: PretrainConfig) -> None:
        """Build the autoencoder; a few photographs are read.

        Raises:
            UserError: if photographs are missing or damaged, or if options do not fit together.
        """
        paths = find_images(config.images)
        self._eval_paths = {
            folder: files[:: max(1, len(files) // config.eval_count)][: config.eval_count]
            for folder in config.eval_images
            for files in [find_images([folder])]
        }
        # Its fingerprint, by which a resumed run is recognized, is that of the random weights, which follow from the
        # options on every machine; what `initialize` makes of them depends on how a machine rounds.
        self.vae = VAE(build_autoencoder(config), source="a new autoencoder")
        check_crop(config.crop, self.vae)
        self.dataset = PhotoCrops(
            paths, config.crop, config.max_reduction, config.seed, images_in_memory=config.images_in_memory
        )
        examples = PhotoCrops(paths, config.crop, config.max_reduction, config.seed + 1, images_in_memory=1)
        self.examples = torch.stack([examples[index]["image"] for index in range(_EXAMPLES)])  # [N, crop, crop, 3]
        initialize(self.vae.autoencoder, self.examples.permute(0, 3, 1, 2))
        self.network = EncodeDecode(self.vae)
        self.perceptual = PerceptualLosses(config)
        self.notices = self.perceptual.notices
        self.reconstruction_terms = ("l1", "gradient", *self.perceptual.weights)
        self.weights = {
            "l1": 1.0,
            "gradient": config.gradient_weight,
            "range": config.range_weight,
            **self.perceptual.weights,
        }

    def to(self, device: torch.device) -> None:
        """Move the networks of the perceptual losses to a device."""
        self.perceptual.to(device)

    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Losses:
        """Compute the losses of items of :class:`PhotoCrops`."""
        images = batch["image"]  # [B, crop, crop, 3]
        latents, _, decoded = network(images)
        decoded = decoded.float()
        terms = {
            "l1": (decoded - images).abs().mean(),
            "gradient": gradient_loss(decoded, images),
            "range": range_loss(latents.float()),
            **self.perceptual(decoded, images),
        }
        return Losses(terms, self.weights, images, decoded)

    def pictures(self, batch: dict[str, Tensor], losses: Losses) -> Tensor:
        """Return up to eight crops: the photographs, and below them what is decoded."""
        rows = torch.cat([losses.images[:8], losses.decoded[:8].detach()])
        return make_grid(rows.permute(0, 3, 1, 2), nrow=len(rows) // 2)

    @torch.no_grad()
    def complete(self) -> None:
        """Set the scaling and shift factors that bring scaled latents to mean 0 and deviation 1 over the examples."""
        latents = self.vae.encode(self.examples)
        self.vae.autoencoder.register_to_config(
            shift_factor=latents.mean().item(), scaling_factor=1.0 / latents.std().item()
        )

    def evaluate(self) -> dict[str, float]:
        """Return the reconstruction PSNR in dB, by folder of `--eval-images`."""
        psnrs = {folder: reconstruction_psnr(self.vae, paths) for folder, paths in self._eval_paths.items()}
        return {f"psnr/{'/'.join(folder.parts[-2:])}": psnr for folder, psnr in psnrs.items()}


def build_autoencoder(config: PretrainConfig) -> "AutoencoderTiny":
    """Return a freshly initialized AutoencoderTiny of the configured size.

    Raises:
        UserError: if encoder and decoder have different numbers of resolutions.
    """
    from diffusers import AutoencoderTiny

    levels = len(config.encoder_blocks)
    if len(config.decoder_blocks) != levels:
        raise UserError("--encoder-blocks and --decoder-blocks must have one number for each resolution.")
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
    """Set the weights so that training starts from an autoencoder that works roughly, which saves its slowest part.

    Channels 0 to 2 of all layers carry color: the encoder averages it, `latent = 3 * (color - 0.5)`, and the decoder
    interpolates it bilinearly. The other weights stay random; those that lead to further latent channels respond to
    detail and are scaled so that these channels are uncorrelated and of unit variance. Residual branches start at zero.

    Args:
        autoencoder: freshly initialized, with at least 3 latent channels and 4 hidden ones; changed in place.
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
            first.weight -= first.weight.mean(dim=(2, 3), keepdim=True)  # no response to flat color, only to detail
            first.weight *= 3.0
            carry_color(first, center)
            carry_color(last, 3.0 * center, offset=-1.5)
        else:
            nn.init.zeros_(last.weight)
            carry_color(first, center / 3.0, offset=0.5)
            carry_color(last, center)

    if autoencoder.config.latent_channels > 3:
        _whiten_detail(autoencoder, images)


def _whiten_detail(autoencoder: "AutoencoderTiny", images: Tensor) -> None:
    """Scale the last layer of the encoder so that the latent channels from 3 on are uncorrelated and of variance 1."""
    detail = autoencoder.encode(images * 2.0 - 1.0).latents[:, 3:].movedim(1, 0).flatten(1)  # [C - 3, cells]
    variances, axes = torch.linalg.eigh(torch.cov(detail).reshape(len(detail), len(detail)))
    whitening = axes @ torch.diag(variances.clamp(min=1e-4 * variances.max()).rsqrt()) @ axes.T
    last = autoencoder.encoder.layers[-1]
    last.weight[3:] = torch.einsum("ij,j...->i...", whitening, last.weight[3:])
    last.bias[3:] = whitening @ (last.bias[3:] - detail.mean(dim=1))


@torch.no_grad()
def reconstruction_psnr(vae: VAE, paths: Sequence[Path]) -> float:
    """Return the mean PSNR in dB of photographs after encoding and decoding, at full size."""
    psnrs = []
    for path in paths:
        image = torch.from_numpy(read_image(path)).to(vae.device).float() / 255.0
        decoded = vae.decode(vae.encode(image[None]), *image.shape[:2])[0]
        psnrs.append(-10.0 * math.log10(F.mse_loss(decoded, image).item()))
    return sum(psnrs) / len(psnrs)
