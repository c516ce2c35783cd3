"""Stage III: tuning the decoder on what radiance fields render.

    L_stageIII = 0.5 |D(Z_train) - I_train|_1 + 0.5 |D(Z_novel) - I_novel|_1

after "Latent Radiance Fields with 3D-aware 2D Representations" (ICLR 2025): Z are latents that fields rendered at the
cameras they were fitted to (train) and at held-out ones (novel). The encoder stays as it is, bit by bit, and with it
the latent space: fields that were fitted before decode with the tuned decoder.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from lrf_nerfstudio.training.data.latent_crops import LatentCrops, cut
from lrf_nerfstudio.training.data.scene_pairs import read_pairs
from lrf_nerfstudio.training.loop import FineTuneConfig, Losses, Task
from lrf_nerfstudio.training.perceptual import PerceptualLosses
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, VAEConfig

KIND_WEIGHT = 0.5
"""Weight of the L1 loss of either kind of views, the paper's."""


@dataclass
class Stage3Config(FineTuneConfig):
    """Tunes the decoder of an autoencoder on latents that radiance fields rendered.

    A loss of weight 0 is left out.
    """

    pairs: Path = Path("pairs")
    """Folder of pairs that scripts/build_stage3_pairs.py wrote, with this autoencoder or one with the same encoder."""
    crop: int = 128
    """Side in pixels of what is compared in a sample, a multiple of the autoencoder's spatial factor."""
    margin: int = 2
    """Cells around a crop that are decoded and not compared: near its edge, the decoder sees less than in a picture."""


class Decode(nn.Module):
    """The decoder of an autoencoder as one call, which is what several processes need."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.autoencoder = vae.autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images [B, h f, w f, 3], not clamped."""
        z = latents.contiguous(memory_format=torch.channels_last)
        return self.autoencoder.decode(z).sample.permute(0, 2, 3, 1) * 0.5 + 0.5


class Stage3(Task):
    """The task of stage III: the decoder is tuned on crops of pairs."""

    dataset: LatentCrops

    def __init__(self, config: Stage3Config) -> None:
        """Loads the autoencoder and the indices of the pairs.

        Raises:
            UserError: the autoencoder cannot be used, the pairs are not its own or not complete, or options do not fit.
        """
        self.config = config
        self.vae = VAEConfig(config.vae).setup()
        self.vae.require_grad_of_decoder()
        factor = self.vae.spatial_factor
        if config.crop % factor or config.crop < 4 * factor:
            raise UserError(
                f"--crop {config.crop} is no multiple of {factor}, the factor of {config.vae}, or too small."
            )
        if config.batch_size < 2 or config.batch_size % 2:
            raise UserError(f"--batch-size {config.batch_size} is odd: half of a batch is of either kind of views.")
        if config.margin < 0:
            raise UserError(f"--margin {config.margin} is negative.")
        self.network = Decode(self.vae)
        self.perceptual = PerceptualLosses(config.feature_weight, config.lpips_weight, config.download_lpips)
        self.notices = self.perceptual.notices
        self.reconstruction_terms = ("train", "novel", *self.perceptual.weights)
        self.dataset = LatentCrops(
            read_pairs(config.pairs, self.vae), config.crop // factor, config.margin, config.seed
        )
        self.weights = {"train": KIND_WEIGHT, "novel": KIND_WEIGHT, **self.perceptual.weights}

    def to(self, device: torch.device) -> None:
        """Moves the networks of the perceptual losses to a device."""
        self.perceptual.to(device)

    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Losses:
        """The terms of L_stageIII for items of :class:`LatentCrops`.

        Where pixels do not count, the photograph takes the place of what was decoded: no loss sees a difference there.
        """
        images, counts, novel = batch["image"], batch["counts"], batch["novel"]
        decoded = cut(network(batch["latent"]).float(), batch["place"], self.dataset.cells, self.vae.spatial_factor)
        decoded = torch.where(counts[..., None], decoded, images)
        errors = (decoded - images).abs().mean(dim=-1).sum(dim=(1, 2))  # [B], of the pixels that count
        pixels = counts.sum(dim=(1, 2))
        terms = {
            name: errors[chosen].sum() / pixels[chosen].sum().clamp(min=1)
            for name, chosen in (("train", ~novel), ("novel", novel))
        }
        terms |= self.perceptual(decoded, images)
        return Losses(terms, self.weights, images, decoded)

    def pictures(self, batch: dict[str, Tensor], losses: Losses) -> Tensor:
        """Up to eight samples, of training and held-out views in turn: photograph and what is decoded."""
        rows = torch.stack([losses.images, losses.decoded.detach()], dim=1)[:8]
        return make_grid(rows.flatten(0, 1).permute(0, 3, 1, 2), nrow=4)
