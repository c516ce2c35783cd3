"""Stage I: tuning an autoencoder so that corresponding points of different views have the same latent.

    L_stageI = L_VAE + lambda_1 L_corres + lambda_2 L_reg

after "Latent Radiance Fields with 3D-aware 2D Representations" (ICLR 2025). What the paper leaves open is decided here:
L_corres is measured relative to the spread of the latents, which a further term holds where it was; and crops of one
photograph are decoded from each other's latents, resampled, as radiance fields do it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.progress import track
from torch import Tensor, nn
from torchvision.utils import make_grid

from lrf_nerfstudio.correspondence import CorrespondenceConfig, SceneCorrespondences, find_correspondences, load_scene
from lrf_nerfstudio.training.data.pair_crops import PairCrops
from lrf_nerfstudio.training.loop import FineTuneConfig, Losses, Task
from lrf_nerfstudio.training.losses import (
    channel_deviation,
    correspondence_loss,
    deviation_loss,
    kl_divergence,
    regularization_loss,
)
from lrf_nerfstudio.training.perceptual import PerceptualLosses
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, VAEConfig, sample_latents


@dataclass
class Stage1Config(FineTuneConfig):
    """Tunes an autoencoder on scenes so that corresponding points have the same latent.

    A loss of weight 0 is left out.
    """

    scenes: tuple[Path, ...] = ()
    """Folders of scenes in nerfstudio's formats: transforms.json, a COLMAP model, or both; plain photographs too."""
    correspondence: CorrespondenceConfig = field(default_factory=CorrespondenceConfig)
    """Where correspondences come from."""
    images_in_memory: int = 256
    """Photographs that each of the processes that read them keeps decoded."""
    tune: Literal["both", "decoder"] = "both"
    """What is tuned: encoder and decoder; or, in a second run, the decoder alone, with --feature-weight and
    --gan-weight. Texture is then decoded for what latents no longer tell, and no loss on it makes them disagree."""
    crop: int = 128
    """Side of a crop in pixels, a multiple of the autoencoder's spatial factor. A sample is two crops, of two views."""
    max_reduction: float = 3.0
    """Regions up to so many times larger than a crop are reduced to it, so that coarse and fine detail are seen."""
    synthetic_share: float = 0.6
    """Share of the samples whose two crops come from one photograph at different places and scales. There,
    correspondences are exact and everywhere, and either crop is decoded from the latents of the other, resampled, as a
    radiance field would render them. Latents learn to survive that, and the decoder learns to decode what is left."""
    reconstruction_weight: float = 1.0
    """Weight of the L1 loss between photographs (in [0, 1]) and decoded images."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence of the posterior, for autoencoders that have one."""
    correspondence_weight: float = 0.15
    """lambda_1, weight of L_corres."""
    regularization_weight: float = 0.02
    """lambda_2, weight of L_reg, the distance to the latents of the original encoder."""
    deviation_weight: float = 1.0
    """Weight of the change of the latents' standard deviation."""


class EncodeDecode(nn.Module):
    """The forward pass of an autoencoder as one call, which is what several processes need."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.autoencoder, self.factor = vae.autoencoder, vae.spatial_factor

    def forward(self, images: Tensor, noise: Tensor, to_other: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encodes and decodes; what the other crop of a pair shows as well is decoded from the other crop's latents.

        Args:
            images: [N, H, W, 3] in [0, 1], sides multiples of the spatial factor.
            noise: [N, C, h, w] standard normal, by which the posterior is sampled before it is decoded. Autoencoders
                without a posterior take no notice of it.
            to_other: [N, 3], of :class:`PairCrops`; image 2 n + 1 is the other one of image 2 n.

        Returns:
            The latent (posterior mode) [N, C, h, w]; the posterior's log variance of the same shape, or None; the
            decoded images [N, H, W, 3], not clamped.
        """
        x = (images * 2.0 - 1.0).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        output = self.autoencoder.encode(x)
        if hasattr(output, "latent_dist"):
            latents, logvar = output.latent_dist.mean, output.latent_dist.logvar
            z = latents + (0.5 * logvar).exp() * noise
        else:
            latents, logvar, z = output.latents, None, output.latents
        z = self._exchanged(z.float(), to_other).to(z)
        return latents, logvar, self.autoencoder.decode(z).sample.permute(0, 2, 3, 1) * 0.5 + 0.5

    def _exchanged(self, z: Tensor, to_other: Tensor) -> Tensor:
        """Latents [N, C, h, w] with those cells replaced that the other crop covers, by its own, resampled."""
        height, width = z.shape[-2:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centers = (torch.stack([columns, rows], dim=-1).flatten(0, 1).to(z) + 0.5) * self.factor  # [h w, 2], (x, y)
        points = to_other[:, None, :1] * centers + to_other[:, None, 1:]
        size = torch.tensor([width, height]).to(z) * self.factor
        # Cells next to the edge of the other crop are left out: the encoder saw less around them.
        covered = ((points > self.factor) & (points < size - self.factor)).all(dim=-1)  # false where NaN
        other = z.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        resampled = sample_latents(other, torch.nan_to_num(points), self.factor, "bicubic")
        return torch.where(covered[..., None], resampled, z.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(z.shape)


class Stage1(Task):
    """The task of stage I: encoder and decoder are tuned on pairs of crops.

    Attributes:
        original: the autoencoder as it was, frozen; its encoder says where latents come from.
    """

    def __init__(self, config: Stage1Config, scenes: Sequence[SceneCorrespondences]) -> None:
        """Loads the autoencoder.

        Args:
            config: the options.
            scenes: what corresponds; :func:`load_scenes` finds it in `config.scenes`.

        Raises:
            UserError: the autoencoder cannot be used, or the crop does not fit it or the photographs.
        """
        self.config = config
        self.original = VAEConfig(config.vae).setup()
        self.vae = copy.deepcopy(self.original).requires_grad_(True)
        if config.tune == "decoder":
            self.vae.require_grad_of_decoder()
        factor = self.vae.spatial_factor
        if config.crop % factor or config.crop < 4 * factor:
            raise UserError(
                f"--crop {config.crop} is no multiple of {factor}, the factor of {config.vae}, or too small."
            )
        self.network = EncodeDecode(self.vae)
        self.perceptual = PerceptualLosses(config.feature_weight, config.lpips_weight, config.download_lpips)
        self.notices = self.perceptual.notices
        self.reconstruction_terms = ("l1", *self.perceptual.weights)
        self.dataset = PairCrops(
            scenes,
            crop=config.crop,
            margin=factor,
            max_reduction=config.max_reduction,
            synthetic_share=config.synthetic_share,
            seed=config.seed,
            images_in_memory=config.images_in_memory,
        )
        self.weights = {
            "l1": config.reconstruction_weight,
            **self.perceptual.weights,
            "kl": config.kl_weight,
            "correspondence": config.correspondence_weight,
            "regularization": config.regularization_weight,
            "deviation": config.deviation_weight,
        }

    def to(self, device: torch.device) -> None:
        """Moves the original autoencoder and the networks of the perceptual losses to a device."""
        self.original.to(device)
        self.perceptual.to(device)

    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Losses:
        """The terms of L_stageI for items of :class:`PairCrops`; those of weight 0 are not computed."""
        images = batch["images"].flatten(0, 1)  # [2 B, crop, crop, 3], the views of a pair one after the other
        latents, logvar, decoded = network(images, self._noise(batch), batch["to_other"].flatten(0, 1))
        decoded = decoded.float()
        terms = {"l1": (decoded - images).abs().mean(), **self.perceptual(decoded, images)}
        if self.config.tune == "both":
            terms |= self._latent_losses(latents.float(), None if logvar is None else logvar.float(), images, batch)
        return Losses(terms, self.weights, images, decoded)

    def _latent_losses(
        self, latents: Tensor, logvar: Tensor | None, images: Tensor, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The terms that only the encoder can lower."""
        terms = {}
        deviation = channel_deviation(latents)
        with torch.no_grad():
            original = self.original.encode(images)
        if self.weights["correspondence"] > 0:
            points = sample_latents(latents, batch["points"].flatten(0, 1), self.vae.spatial_factor)
            points_i, points_j = points[::2], points[1::2]
            terms["correspondence"] = correspondence_loss(
                points_i, points_j, batch["valid"], batch["weight"], deviation
            )
        if self.weights["regularization"] > 0:
            terms["regularization"] = regularization_loss(latents, original)
        if self.weights["deviation"] > 0:
            terms["deviation"] = deviation_loss(deviation, channel_deviation(original))
        if logvar is not None and self.weights["kl"] > 0:
            terms["kl"] = kl_divergence(latents, logvar)
        return terms

    def _noise(self, batch: dict[str, Tensor]) -> Tensor:
        """[2 B, C, h, w] standard normal, decided by the items' numbers alone: a resumed run draws the same."""
        cells = batch["images"].shape[2] // self.vae.spatial_factor
        noise = [
            torch.randn(
                (2, self.vae.latent_channels, cells, cells),
                generator=torch.Generator().manual_seed((self.config.seed << 32) + index),
            )
            for index in batch["index"].tolist()
        ]
        return torch.cat(noise).to(batch["images"].device)

    def pictures(self, batch: dict[str, Tensor], losses: Losses) -> Tensor:
        """Up to eight crops: the photograph, and below it what is decoded."""
        rows = torch.cat([losses.images[:8], losses.decoded[:8].detach()])
        return make_grid(rows.permute(0, 3, 1, 2), nrow=len(rows) // 2)


def load_scenes(config: Stage1Config) -> list[SceneCorrespondences]:
    """Reads the scenes of a configuration and finds their correspondences, with progress.

    Raises:
        UserError: no scene is given, or one cannot be used.
    """
    if not config.scenes:
        raise UserError("Name the folders of the scenes to tune on: --scenes A B ...")
    return [
        find_correspondences(load_scene(folder), config.correspondence)
        for folder in track(config.scenes, description="Correspondences", transient=True)
    ]
