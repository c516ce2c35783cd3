"""A generic decoder of scenes: fitted to what the fields of many scenes render on the dense grid.

    L = (1 - w) |D(Z) - I|_1 + w (1 - SSIM(D(Z), I))

Z are latents that fields render at the cameras that they were fitted to and at held-out ones, D is a decoder as
:class:`~lrf_nerfstudio.field.decoder.SceneDecoder`. The decoder of a new scene starts from D, so it has to learn
from that scene's photographs alone what is special about the scene.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from lrf_nerfstudio.field.decoder import SceneDecoder
from lrf_nerfstudio.field.generic_decoder import FILE, save_generic
from lrf_nerfstudio.field.similarity import WINDOW, picture_similarity
from lrf_nerfstudio.training.config import TrainingConfig
from lrf_nerfstudio.training.data.latent_crops import LatentCrops, cut
from lrf_nerfstudio.training.data.scene_pairs import ScenePairs, read_pairs
from lrf_nerfstudio.training.losses import masked_l1
from lrf_nerfstudio.training.networks import check_crop
from lrf_nerfstudio.training.perceptual import PerceptualLosses
from lrf_nerfstudio.training.task import Losses, Task
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import AtLeastOne, Count, Fraction, Positive
from lrf_nerfstudio.vae import VAE, FieldNormalization, LinearRGB, VAEConfig

MAX_VIEWS_FOR_LINEAR_RGB = 32
"""Photographs that the linear map is fitted to at first."""


@dataclass(kw_only=True)
class GenericDecoderConfig(TrainingConfig):
    """Fits a decoder, small and on the latent grid alone, that the decoders of new scenes start from.

    A loss of weight 0 is left out.
    """

    vae: str = "lrf-f4c4"
    """The autoencoder whose latents are decoded, see --vae of the other stages; it is not changed."""
    pairs: Path = Path("pairs")
    """Folder of pairs that `lrf pairs` wrote with --density 2 f / cell."""
    cell: AtLeastOne = 4
    """Pixels per cell of the grid that it works on, as --pipeline.model.scene-decoder.cell of ns-train."""
    width: AtLeastOne = 32
    """Channels between its convolutions, likewise."""
    blocks: Count = 2
    """Its residual blocks, likewise."""
    crop: AtLeastOne = 128
    """Side in pixels of the square that is compared in a sample, a multiple of the autoencoder's spatial factor."""
    margin: Count = 2
    """Latent cells around a crop that are decoded but not compared: at the edge of what it is given, the decoder sees
    less than inside a whole picture."""
    ssim_weight: Fraction = 0.2
    """Share of 1 - SSIM in the loss; the rest is L1."""
    steps: AtLeastOne = 3000
    """Number of optimizer steps."""
    batch_size: AtLeastOne = 8
    """Samples that each process computes at once, half of training views and half of held-out ones."""
    learning_rate: Positive = 2e-3
    """Largest learning rate of Adam."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Momenta of Adam."""


class GenericDecoder(Task):
    """The task: a decoder of scenes is trained on crops of pairs of many scenes."""

    dataset: LatentCrops

    def __init__(self, config: GenericDecoderConfig) -> None:
        """Load the autoencoder and the indices of the pairs.

        Raises:
            UserError: if the autoencoder cannot be used, if the pairs are not complete, of another density or belong to
                another autoencoder, or if options do not fit together.
        """
        self.vae = VAEConfig(config.vae).setup()
        factor = self.vae.spatial_factor
        check_crop(config.crop, self.vae)
        if config.crop < WINDOW:
            raise UserError(f"--crop {config.crop} is smaller than the window of SSIM, {WINDOW} pixels.")
        if factor % config.cell:  # then crops begin where the decoder's cells do
            raise UserError(
                f"--cell must divide {factor}, the spatial factor of {self.vae.source}; it is {config.cell}."
            )
        if config.batch_size < 2 or config.batch_size % 2:
            raise UserError(f"--batch-size {config.batch_size} is odd: half of a batch is of either kind of views.")
        torch.manual_seed(config.seed)
        self.decoder = SceneDecoder(self.vae.latent_channels, factor, config.cell, config.width, config.blocks)
        scenes = read_pairs(config.pairs, self.vae, self.decoder.density)
        self.decoder.start_from(_linear_rgb(scenes, self.vae), FieldNormalization(self.vae.latent_channels))
        self.network = self.decoder
        self.perceptual = PerceptualLosses(config)
        self.notices = self.perceptual.notices
        self.dataset = LatentCrops(scenes, config.crop // factor, config.margin, config.seed)
        self.weights = {"l1": 1 - config.ssim_weight, "dissimilarity": config.ssim_weight, **self.perceptual.weights}
        self.reconstruction_terms = tuple(self.weights)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.tail.weight

    def to(self, device: torch.device) -> None:
        """Move the networks of the perceptual losses to a device."""
        self.perceptual.to(device)

    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Losses:
        """Compute the terms of L for items of :class:`LatentCrops`.

        Pixels that do not count are replaced by the photograph's, so that no loss sees a difference there.
        """
        images, counts = batch["image"], batch["counts"]
        pictures = network(batch["latent"].permute(0, 2, 3, 1)).float()
        decoded = cut(pictures, batch["place"], self.dataset.cells, self.vae.spatial_factor)
        decoded = torch.where(counts[..., None], decoded, images)  # [B, crop, crop, 3]
        # SSIM looks at every channel by itself: those of all samples are channels of one picture.
        found, wanted = (pictures.permute(1, 2, 0, 3).flatten(2) for pictures in (decoded, images))
        terms = {"l1": masked_l1(decoded, images, counts), "dissimilarity": 1 - picture_similarity(found, wanted)}
        terms |= self.perceptual(decoded, images)
        return Losses(terms, self.weights, images, decoded)

    def pictures(self, batch: dict[str, Tensor], losses: Losses) -> Tensor:
        """Return up to eight samples of training and held-out views in turn: photographs beside what is decoded."""
        rows = torch.stack([losses.images, losses.decoded.detach()], dim=1)[:8]
        return make_grid(rows.flatten(0, 1).permute(0, 3, 1, 2), nrow=4)

    def save(self, output: Path) -> None:
        """Write the decoder beside the checkpoint."""
        save_generic(self.decoder, self.vae, output / FILE)


def _linear_rgb(scenes: list[ScenePairs], vae: VAE) -> LinearRGB:
    """Fit the linear map of latents to RGB to some views of all scenes."""
    views = [(scene, view) for scene in scenes for view in range(len(scene.views))]
    stride = -(-len(views) // MAX_VIEWS_FOR_LINEAR_RGB)
    return LinearRGB.fit(
        (
            (F.avg_pool2d(scene.latent(view, max(scene.latents)), scene.density), scene.photograph(view)[0] / 255)
            for scene, view in views[::stride]
        ),
        vae.spatial_factor,
    )
