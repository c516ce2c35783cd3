"""Stage I: an autoencoder is tuned so that corresponding points of different views have the same latent.

    L_stageI = L_VAE + lambda_1 L_corres + lambda_2 L_reg

after "Latent Radiance Fields with 3D-aware 2D Representations" (ICLR 2025). What the paper leaves open is decided here:
L_corres is measured relative to the latents' standard deviation, which a further term keeps from changing; and two
crops of one photograph are decoded from each other's latents, resampled, because a radiance field resamples latents
when it renders them.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from lrf_nerfstudio.correspondence import (
    CorrespondenceConfig,
    SceneCorrespondences,
    find_correspondences,
    load_scene,
    matches_on_disk,
)
from lrf_nerfstudio.training.config import FineTuneConfig
from lrf_nerfstudio.training.data.pair_crops import PairCrops
from lrf_nerfstudio.training.losses import (
    channel_deviation,
    correspondence_loss,
    deviation_loss,
    kl_divergence,
    regularization_loss,
)
from lrf_nerfstudio.training.networks import EncodeDecode, check_crop
from lrf_nerfstudio.training.perceptual import PerceptualLosses
from lrf_nerfstudio.training.task import Losses, Task
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import AtLeastOne, Fraction, NotNegative, Range
from lrf_nerfstudio.utils.progress import track
from lrf_nerfstudio.vae import VAEConfig, sample_latents


@dataclass(kw_only=True)
class Stage1Config(FineTuneConfig):
    """Tunes an autoencoder on scenes so that corresponding points have the same latent.

    A loss of weight 0 is left out.
    """

    scenes: tuple[Path, ...] = ()
    """Folders of scenes in nerfstudio's formats: transforms.json, a COLMAP model, or both; plain photographs too. Every
    pair of photographs comes up equally often; those of a scene that is named twice, twice as often."""
    correspondence: CorrespondenceConfig = field(default_factory=CorrespondenceConfig)
    """Where correspondences come from."""
    images_in_memory: AtLeastOne = 256
    """Photographs that each of the processes that read them keeps decoded."""
    tune: Literal["both", "decoder"] = "both"
    """What is tuned: encoder and decoder; or, in a second run with --feature-weight and --gan-weight, the decoder
    alone. It then learns to fill in the texture that consistent latents no longer describe, while the encoder, and with
    it the latents' consistency, stays as it is."""
    crop: AtLeastOne = 128
    """Side of a crop in pixels, a multiple of the autoencoder's spatial factor. A sample is two crops, of two views."""
    max_reduction: Annotated[float, Range(least=1)] = 3.0
    """Regions up to so many times larger than a crop are reduced to it, so that coarse and fine detail are seen."""
    synthetic_share: Fraction = 0.6
    """Share of the samples whose two crops come from one photograph, at slightly different places and scales. Their
    correspondences are exact and everywhere. Each crop is decoded from the latents of the other one, resampled as by a
    radiance field, so encoder and decoder learn latents that bear it."""
    reconstruction_weight: NotNegative = 1.0
    """Weight of the L1 loss between photographs (in [0, 1]) and decoded images."""
    kl_weight: NotNegative = 1e-6
    """Weight of the KL divergence of the posterior, for autoencoders that have one."""
    correspondence_weight: NotNegative = 0.15
    """lambda_1, weight of L_corres."""
    regularization_weight: NotNegative = 0.02
    """lambda_2, weight of L_reg, the distance to the latents of the original encoder."""
    original_decoder_weight: NotNegative = 0.0
    """Weight of the L1 loss between photographs and what the original decoder makes of the tuned latents. It bounds the
    drift as those see it who know the original latents, such as diffusion models: latents may change where the original
    decoder does not mind."""
    deviation_weight: NotNegative = 1.0
    """Weight of the loss on changes of the latents' standard deviation."""

    free_options: ClassVar[frozenset[str]] = FineTuneConfig.free_options | {"images_in_memory"}


class Stage1(Task):
    """The task of stage I: encoder and decoder are tuned on pairs of crops.

    Attributes:
        original: the autoencoder before tuning, frozen; its encoder gives the latents that L_reg compares with.
    """

    def __init__(self, config: Stage1Config, scenes: Sequence[SceneCorrespondences]) -> None:
        """Load the autoencoder.

        Args:
            config: the options.
            scenes: correspondences, which :func:`load_scenes` finds in `config.scenes`.

        Raises:
            UserError: if the autoencoder cannot be used, or if the crop does not fit it or the photographs.
        """
        from diffusers import AutoencoderKL

        self.tunes_encoder = config.tune == "both"
        self.original = VAEConfig(config.vae).setup()
        self.vae = copy.deepcopy(self.original).requires_grad_(True)
        if not self.tunes_encoder:
            self.vae.require_grad_of_decoder()
        factor = self.vae.spatial_factor
        check_crop(config.crop, self.vae)
        is_kl = isinstance(self.vae.autoencoder, AutoencoderKL)
        self.network = EncodeDecode(self.vae)
        self.perceptual = PerceptualLosses(config)
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
            noise_shape=(self.vae.latent_channels, config.crop // factor, config.crop // factor) if is_kl else None,
        )
        self.weights = {
            "l1": config.reconstruction_weight,
            **self.perceptual.weights,
            "kl": config.kl_weight,
            "correspondence": config.correspondence_weight,
            "regularization": config.regularization_weight,
            "original decoder": config.original_decoder_weight,
            "deviation": config.deviation_weight,
        }

    def to(self, device: torch.device) -> None:
        """Move the original autoencoder and the networks of the perceptual losses to a device."""
        self.original.to(device)
        self.perceptual.to(device)

    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Losses:
        """Compute the terms of L_stageI for items of :class:`PairCrops`; those of weight 0 are left out."""
        images = batch["images"].flatten(0, 1)  # [2 B, crop, crop, 3], the views of a pair one after the other
        noise = batch["noise"].flatten(0, 1) if "noise" in batch else None  # [2 B, C, h, w]
        latents, logvar, decoded = network(images, noise, batch["to_other"].flatten(0, 1))
        decoded = decoded.float()
        terms = {"l1": (decoded - images).abs().mean(), **self.perceptual(decoded, images)}
        if self.tunes_encoder:
            terms |= self._latent_losses(latents.float(), None if logvar is None else logvar.float(), images, batch)
        return Losses(terms, self.weights, images, decoded)

    def _latent_losses(
        self, latents: Tensor, logvar: Tensor | None, images: Tensor, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute the terms that only the encoder can lower."""
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
        if self.weights["original decoder"] > 0:
            # One view of each pair tells enough, and a decoder takes as long as everything else together.
            seen = self.original.decode(latents[::2], images.shape[1], images.shape[2], clamp=False)
            terms["original decoder"] = (seen.float() - images[::2]).abs().mean()
        if self.weights["deviation"] > 0:
            terms["deviation"] = deviation_loss(deviation, channel_deviation(original))
        if logvar is not None and self.weights["kl"] > 0:
            terms["kl"] = kl_divergence(latents, logvar)
        return terms

    def pictures(self, batch: dict[str, Tensor], losses: Losses) -> Tensor:
        """Return up to eight crops: the photographs, and below them what is decoded."""
        rows = torch.cat([losses.images[:8], losses.decoded[:8].detach()])
        return make_grid(rows.permute(0, 3, 1, 2), nrow=len(rows) // 2)


def load_scenes(config: Stage1Config) -> list[SceneCorrespondences]:
    """Read the scenes of a configuration and find their correspondences, with a progress bar.

    Among several, a scene that cannot be used is left out, with a message. The matches lie in a temporary file, so
    memory does not grow with the number of scenes.

    Raises:
        UserError: if no scene is given, if none can be used, or if there is no space for the temporary file.
    """
    if not config.scenes:
        raise UserError("Name the folders of the scenes to tune on: --scenes A B ...")
    scenes: list[SceneCorrespondences] = []
    for folder in track(config.scenes, "Correspondences"):
        try:
            scene = find_correspondences(load_scene(folder), config.correspondence)
        except UserError as error:
            if len(config.scenes) == 1:
                raise
            print(f"\nThe scene {folder} is left out. {error}", file=sys.stderr)
        else:
            scenes.append(matches_on_disk(scene))
    if not scenes:
        raise UserError("None of --scenes can be used, for the reasons above.")
    return scenes
