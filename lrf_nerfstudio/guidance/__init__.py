"""Text to 3D without nerfstudio: a diffusion model of scaled latents guides what a field renders.

Importing this package costs torch alone; diffusers and transformers are imported when a model is loaded.
"""

from lrf_nerfstudio.guidance.denoiser import Denoiser, UNetDenoiser
from lrf_nerfstudio.guidance.distillation import Guidance, GuidanceConfig, ScoreGuidance
from lrf_nerfstudio.guidance.initialization import InitializationConfig, initial_gaussians, load_points
from lrf_nerfstudio.guidance.models import DiffusionConfig, DiffusionModel, check_latent_space
from lrf_nerfstudio.guidance.orbits import OrbitConfig, OrbitViews, evaluation_orbit, random_orbits
from lrf_nerfstudio.guidance.prompts import Conditions, PromptConfig, TextEmbedder, ViewPrompts, view_of

__all__ = [
    "Conditions",
    "Denoiser",
    "DiffusionConfig",
    "DiffusionModel",
    "Guidance",
    "GuidanceConfig",
    "InitializationConfig",
    "OrbitConfig",
    "OrbitViews",
    "PromptConfig",
    "ScoreGuidance",
    "TextEmbedder",
    "UNetDenoiser",
    "ViewPrompts",
    "check_latent_space",
    "evaluation_orbit",
    "initial_gaussians",
    "load_points",
    "random_orbits",
    "view_of",
]
