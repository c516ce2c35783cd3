"""Gaussians that a diffusion model guides: the field of text to 3D."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from torch import Tensor
from tyro.conf import Suppress

from lrf_nerfstudio.evaluation.clip import PromptSimilarity
from lrf_nerfstudio.field.backgrounds import Color, ColorBackground
from lrf_nerfstudio.guidance.initialization import InitializationConfig, initial_gaussians
from lrf_nerfstudio.plugin.model import LatentSplatfactoModel, LatentSplatfactoModelConfig
from lrf_nerfstudio.plugin.outputs import Outputs
from lrf_nerfstudio.plugin.scene_decoder import SceneDecoderConfig
from lrf_nerfstudio.splatting.strategies import DensificationConfig


@dataclass
class DreamSplatModelConfig(LatentSplatfactoModelConfig):
    """Configuration of the field."""

    _target: type = field(default_factory=lambda: DreamSplatModel)
    prompt: str | None = None
    """What to make, such as "a corgi with a crown"; `--prompt` before the other options is the same."""
    initialization: InitializationConfig = field(default_factory=InitializationConfig)
    """The first Gaussians."""
    densification: DensificationConfig = field(
        default_factory=lambda: DensificationConfig(
            strategy="mcmc",
            max_gaussians=20_000,
            start=0.05,
            stop=0.8,
            refinements=30,
            mcmc_noise=1e4,
            mcmc_opacity_weight=0.01,
            mcmc_scale_weight=0.1,
        )
    )
    """How Gaussians are added and removed. The gradients of a diffusion model are mostly noise, so their size says
    little about where Gaussians are needed: mcmc goes by opacity alone, and its two weights regularize opacities and
    scales. Where the guidance is weak, larger weights make the object vanish."""
    clip: str = "openai/clip-vit-base-patch16"
    """The CLIP model, a folder or a Hugging Face id, by which ns-eval measures how well the pictures fit the prompt.
    It is never downloaded: where it is not on this machine the score is left out."""
    # There are no photographs.
    sh_degree: Suppress[int] = 0
    sh_degree_interval: Suppress[int] = 1
    scene_decoder: Suppress[SceneDecoderConfig] = field(default_factory=lambda: SceneDecoderConfig(share=0.0))
    camera_optimizer: Suppress[CameraOptimizerConfig] = field(default_factory=lambda: CameraOptimizerConfig(mode="off"))
    ssim_lambda: Suppress[float] = 0.0
    download_lpips: Suppress[bool] = False
    # The first Gaussians are those of `initialization`.
    random_init: Suppress[bool] = False
    num_random: Suppress[int] = 0
    random_scale: Suppress[float] = 1.0


class DreamSplatModel(LatentSplatfactoModel):
    """A latent radiance field whose field latents are the VAE's scaled latents, which diffusion models see."""

    config: DreamSplatModelConfig
    background: ColorBackground

    def populate_modules(self) -> None:
        super().populate_modules()
        self.similarity = PromptSimilarity(self.config.clip, "--pipeline.model.clip")

    def make_background(self, scene_color: Tensor | None, training_color: Color | None) -> ColorBackground:
        assert scene_color is None, "there are no transparent photographs"
        return ColorBackground(self.vae, self.normalization, training_color)

    def first_gaussians(self, count: int | None) -> dict[str, Tensor]:
        options = self.config.initialization
        if count is not None:
            options = replace(options, points=None, count=count)
        return initial_gaussians(options, self.vae.latent_channels)

    def get_metrics_dict(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
        """Return what a step reports besides its guidance: `gaussian_count` and the mean `opacity`, on the device."""
        return {"gaussian_count": self.num_points, "opacity": torch.sigmoid(self.opacities.detach()).mean()}

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Return the regularizers of a step, whose guidance is the pipeline's; arguments are not used."""
        with self._full_precision():
            losses = {} if self.strategy is None else self.strategy.losses(self.gauss_params)
            if self.config.use_scale_regularization:
                losses["scale_reg"] = self.needle_loss()
        return losses

    def get_image_metrics_and_images(
        self, outputs: Outputs, batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Measure a rendered view of the fixed orbit.

        Args:
            outputs: what :meth:`render` gives for the view's camera.
            batch: not used.

        Returns:
            `raster_seconds`, `decode_seconds` and, where a CLIP model is on this machine, `clip_score` (100 times the
            cosine of the picture's and the prompt's embeddings); and the decoded picture as `img`.
        """
        metrics = {
            "raster_seconds": outputs["times"].seconds("start", "rasterized"),
            "decode_seconds": outputs["times"].seconds("rasterized", "decoded"),
        }
        score = self.similarity(outputs["rgb"][None], self.config.prompt or "")
        return metrics | ({} if score is None else {"clip_score": score}), {"img": outputs["rgb"]}
