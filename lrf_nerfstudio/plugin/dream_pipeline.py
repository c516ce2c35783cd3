"""Owns the diffusion model of text to 3D, beside the VAE; in training alone."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.utils import profiler
from torch import Tensor

from lrf_nerfstudio.field.backgrounds import plain_latents
from lrf_nerfstudio.guidance.distillation import GuidanceConfig, ScoreGuidance
from lrf_nerfstudio.guidance.models import DiffusionConfig, check_latent_space
from lrf_nerfstudio.guidance.orbits import OrbitConfig
from lrf_nerfstudio.guidance.prompts import PromptConfig, TextEmbedder, ViewPrompts
from lrf_nerfstudio.plugin.dream_model import DreamSplatModel, DreamSplatModelConfig
from lrf_nerfstudio.plugin.orbit_datamanager import OrbitDatamanager, OrbitDatamanagerConfig
from lrf_nerfstudio.plugin.pipeline import LatentPipeline, LatentPipelineConfig
from lrf_nerfstudio.utils.errors import exit_on_user_error
from lrf_nerfstudio.vae import VAE, FieldNormalization, LinearRGB, VAEConfig

SHOWN_VIEWS = 4
"""Views of the fixed orbit that one picture of the training shows."""


@dataclass
class DreamSplatPipelineConfig(LatentPipelineConfig):
    """Configuration of the prompt, the diffusion model, the cameras and the field."""

    _target: type = field(default_factory=lambda: DreamSplatPipeline)
    datamanager: OrbitDatamanagerConfig = field(default_factory=OrbitDatamanagerConfig)
    """The cameras."""
    model: DreamSplatModelConfig = field(default_factory=DreamSplatModelConfig)
    """The radiance field."""
    vae: VAEConfig = field(default_factory=lambda: VAEConfig(source="stabilityai/sd-vae-ft-mse"))
    """The autoencoder in whose latent space the diffusion model works."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The diffusion model that guides."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """How it guides."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """How the prompt depends on the view, and what to keep away from."""
    orbits: OrbitConfig = field(default_factory=OrbitConfig)
    """Where the cameras are."""
    prompt_cache_dir: Path | None = None
    """Folder of the embeddings of prompts; if none, lrf_nerfstudio/prompts in the user's cache."""


class DreamSplatPipeline(LatentPipeline):
    """VAE, cameras and field of text to 3D and, in training, the diffusion model.

    Attributes:
        guidance: tells how rendered latents should change; None unless the pipeline trains.
    """

    config: DreamSplatPipelineConfig
    datamanager: OrbitDatamanager

    @exit_on_user_error()
    def __init__(
        self,
        config: DreamSplatPipelineConfig,
        device: str | torch.device,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: Any = None,
    ) -> None:
        self.guidance: ScoreGuidance | None = None
        self._steps = 1  # of the run, until `prepare_training`
        if test_mode == "val":  # what is wrong with the prompt or the model is said before anything is loaded
            prompts_of(config).check()
            config.diffusion.setup()
        super().__init__(config, device, test_mode, world_size, local_rank, grad_scaler)

    @property
    def model(self) -> DreamSplatModel:
        model = self._model
        assert isinstance(model, DreamSplatModel)
        return model

    def setup_datamanager(self, vae: VAE, device: str | torch.device, **options: Any) -> OrbitDatamanager:
        config = self.config.datamanager
        config.orbits, config.cell = self.config.orbits, vae.spatial_factor
        return config.setup(device=device, **options)

    def initial_state(self, vae: VAE) -> dict[str, Any]:
        """Load what guides; the field starts in the scaled latents of the VAE."""
        self.guidance = load_guidance(self.config, vae)
        return {
            "normalization": FieldNormalization.to_scaled(vae.latent_channels, vae.scaling_factor, vae.shift_factor),
            "linear_rgb": linear_rgb_of_colors(vae),
        }

    def prepare_training(self, steps: int) -> None:
        self._steps = steps
        self.model.prepare_training(steps)
        self.model.background.encode_corners()

    def is_light(self, step: int) -> bool:
        """Return False: most of a step is the diffusion model's, which uses all threads."""
        return False

    @profiler.time_function
    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
        """Render the views of a step and ask the diffusion model how they should change.

        Returns:
            What the model rendered; the losses, of which `guidance` is a mean over cells; and, besides the model's
            metrics, those of :class:`~lrf_nerfstudio.guidance.Guidance` and the range of timesteps, `t_min` and
            `t_max`.
        """
        assert self.guidance is not None, "only training has a guidance"
        camera, batch = self.datamanager.next_train(step)
        outputs = self.model(camera)
        latents = outputs["field"].permute(0, 3, 1, 2)  # field latents are the scaled ones
        guided = self.guidance(latents, batch["azimuths"], batch["elevations"], step / self._steps)
        metrics = self.model.get_metrics_dict(outputs, batch) | guided.metrics
        metrics["t_min"], metrics["t_max"] = guided.timesteps
        losses = {"guidance": guided.loss / (camera.rows * camera.columns)}
        return outputs, losses | self.model.get_loss_dict(outputs, batch, metrics), metrics

    @profiler.time_function
    @torch.no_grad()
    def get_eval_image_metrics_and_images(self, step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Show views from all sides of the fixed orbit beside each other."""
        self.eval()
        views = self.datamanager.fixed_indices_eval_dataloader
        shown = [views[index * len(views) // SHOWN_VIEWS][0] for index in range(SHOWN_VIEWS)]
        picture = torch.cat([self.model.render(camera)["rgb"] for camera in shown], dim=1)
        self.train()
        return {"num_rays": picture.shape[0] * picture.shape[1]}, {"orbit": picture}

    @torch.no_grad()
    def orbit_pictures(self) -> Tensor:
        """Return the decoded pictures [N, H, W, 3] of the fixed orbit, as bytes on the CPU."""
        self.eval()
        views = self.datamanager.fixed_indices_eval_dataloader
        pictures = [(255 * self.model.render(camera)["rgb"]).round().byte().cpu() for camera, _ in views]
        self.train()
        return torch.stack(pictures)


def load_guidance(config: DreamSplatPipelineConfig, vae: VAE) -> ScoreGuidance:
    """Load the diffusion model onto the device of a VAE, with all prompts encoded.

    Raises:
        UserError: if there is no prompt, the model cannot be loaded, or does not take latents of the VAE.
    """
    model = config.diffusion.setup()
    check_latent_space(model, vae)
    prompts = ViewPrompts(prompts_of(config), TextEmbedder(model, vae.device, config.prompt_cache_dir))
    return ScoreGuidance(config.guidance, model.load_denoiser(vae.device), prompts)


def prompts_of(config: DreamSplatPipelineConfig) -> PromptConfig:
    """Return the options of the prompts with the prompt itself, which nerfstudio puts among the model's."""
    return replace(config.prompts, prompt=config.model.prompt or "")


def linear_rgb_of_colors(vae: VAE) -> LinearRGB:
    """Return the linear map from latents to RGB that fits plain pictures of 27 colors."""
    colors = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3)
    latents = plain_latents(vae, colors.to(vae.device))[:, :, None, None]  # [27, C, 1, 1]
    factor = vae.spatial_factor
    images = colors[:, None, None].expand(-1, factor, factor, -1)
    return LinearRGB.fit(zip(latents, images, strict=True), factor)
