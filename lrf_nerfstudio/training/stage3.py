"""Stage III: the decoder is tuned on what radiance fields render.

    L_stageIII = 0.5 |D(Z_train) - I_train|_1 + 0.5 |D(Z_novel) - I_novel|_1

after "Latent Radiance Fields with 3D-aware 2D Representations" (ICLR 2025): Z are latents that fields render at the
cameras that they were fitted to (train) and at held-out ones (novel). The encoder stays as it is, bit by bit, and with
it the latent space: the tuned decoder also decodes fields that were fitted before.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from lrf_nerfstudio.training.config import FineTuneConfig
from lrf_nerfstudio.training.data.latent_crops import LatentCrops, cut
from lrf_nerfstudio.training.data.scene_pairs import read_pairs
from lrf_nerfstudio.training.losses import masked_l1
from lrf_nerfstudio.training.networks import Decode, check_crop
from lrf_nerfstudio.training.perceptual import PerceptualLosses
from lrf_nerfstudio.training.task import Losses, Task
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import AtLeastOne, Count, Fraction
from lrf_nerfstudio.vae import VAEConfig

KIND_WEIGHT = 0.5
"""Weight of the L1 loss of each kind of views, as in the paper."""


@dataclass(kw_only=True)
class Stage3Config(FineTuneConfig):
    """Tunes the decoder of an autoencoder on latents that radiance fields rendered.

    A loss of weight 0 is left out.
    """

    pairs: Path = Path("pairs")
    """Folder of pairs that `lrf pairs` wrote, with this autoencoder or one with the same encoder."""
    crop: AtLeastOne = 128
    """Side in pixels of the square that is compared in a sample, a multiple of the autoencoder's spatial factor."""
    clean_share: Fraction = 0.0
    """Share of the samples whose latents are not rendered: photographs of the pairs, recolored and mirrored, which the
    encoder encodes. The decoder keeps what it could do, on colors that the scenes lack too. The paper has none."""
    margin: Count = 2
    """Latent cells around a crop that are decoded but not compared: at the edge of what it is given, the decoder sees
    less than inside a whole picture."""


class Stage3(Task):
    """The task of stage III: the decoder is tuned on crops of pairs."""

    dataset: LatentCrops

    def __init__(self, config: Stage3Config) -> None:
        """Load the autoencoder and the indices of the pairs.

        Raises:
            UserError: if the autoencoder cannot be used, if the pairs are not complete or belong to another
                autoencoder, or if options do not fit together.
        """
        self.vae = VAEConfig(config.vae).setup()
        self.vae.require_grad_of_decoder()
        factor = self.vae.spatial_factor
        check_crop(config.crop, self.vae)
        if config.batch_size < 2 or config.batch_size % 2:
            raise UserError(f"--batch-size {config.batch_size} is odd: half of a batch is of either kind of views.")
        self.encodes = config.clean_share > 0
        self.network = Decode(self.vae)
        self.perceptual = PerceptualLosses(config)
        self.notices = self.perceptual.notices
        self.reconstruction_terms = ("train", "novel", *self.perceptual.weights)
        self.dataset = LatentCrops(
            read_pairs(config.pairs, self.vae), config.crop // factor, config.margin, config.seed, config.clean_share
        )
        self.weights = {"train": KIND_WEIGHT, "novel": KIND_WEIGHT, **self.perceptual.weights}

    def to(self, device: torch.device) -> None:
        """Move the encoder and the networks of the perceptual losses to a device."""
        self.vae.to(device)
        self.perceptual.to(device)

    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Losses:
        """Compute the terms of L_stageIII for items of :class:`LatentCrops`.

        Pixels that do not count are replaced by the photograph's, so that no loss sees a difference there.
        """
        images, counts, novel, latents = batch["image"], batch["counts"], batch["novel"], batch["latent"]
        if self.encodes:
            # All samples are encoded: which of them are clean is known on the device alone.
            with torch.no_grad():
                encoded = self.vae.encode(batch["surroundings"])
            latents = torch.where(batch["clean"][:, None, None, None], encoded, latents)
        decoded = cut(network(latents).float(), batch["place"], self.dataset.cells, self.vae.spatial_factor)
        decoded = torch.where(counts[..., None], decoded, images)  # [B, crop, crop, 3]
        terms = {
            name: masked_l1(decoded, images, counts & kind[:, None, None])
            for name, kind in (("train", ~novel), ("novel", novel))
        }
        terms |= self.perceptual(decoded, images)
        return Losses(terms, self.weights, images, decoded)

    def pictures(self, batch: dict[str, Tensor], losses: Losses) -> Tensor:
        """Return up to eight samples of training and held-out views in turn: photographs beside what is decoded."""
        rows = torch.stack([losses.images, losses.decoded.detach()], dim=1)[:8]
        return make_grid(rows.flatten(0, 1).permute(0, 3, 1, 2), nrow=4)
