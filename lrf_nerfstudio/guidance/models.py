"""Stable Diffusion 1.x and 2.x as guides: U-Net, noise schedule and text encoder, each loaded by itself.

A model is a folder in diffusers' format with `unet/`, `scheduler/`, `text_encoder/` and `tokenizer/`. Only safetensors
are read. Of its `vae/`, where there is one, only plain colors are encoded, to know the model's latent space.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from lrf_nerfstudio.guidance.denoiser import PredictionType, UNetDenoiser
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import file_sha256
from lrf_nerfstudio.utils.pretrained import check_all_loaded, first_line, hub_folder, quiet
from lrf_nerfstudio.vae import VAE, VAEConfig

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

OPTION = "--pipeline.diffusion.source"
KINDS = (
    "a folder in diffusers' format with unet/, scheduler/, text_encoder/ and tokenizer/, or a Hugging Face id of a "
    "Stable Diffusion 1.x or 2.x model such as stable-diffusion-v1-5/stable-diffusion-v1-5"
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = (
    *("unet/*.json", "unet/*.safetensors", "scheduler/*.json", "tokenizer/*"),
    *("text_encoder/*.json", "text_encoder/*.safetensors"),
)
_UNET, _TEXT_ENCODER = "diffusion_pytorch_model", "model"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_MORE_CONDITIONS = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "time_cond_proj_dim",
)
"""Options of a U-Net that takes more than a latent, a timestep and a prompt: SDXL, upscalers, latent consistency."""
_UNET_DEFAULTS = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280}
"""What diffusers takes where a configuration does not say."""
_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
"""Options of any scheduler of diffusers that decide how much noise there is at each timestep."""

COLOR_DISTANCE = 0.6
"""Largest distance of two latent spaces that pass for one, see `color_distance`. Untouched variants of one space are
at 0.1, another training of the same architecture is beyond 1."""
_COLORS = ((0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1))
_PROBE_CELLS = 16
"""Side of the plain pictures that are encoded, in cells; the latent is read from the middle, away from the edges."""


class LatentSpace(NamedTuple):
    """What tells a latent space from others of the same shape."""

    spatial_factor: int
    """f, pixels per cell and axis."""
    colors: Tensor
    """Scaled latents [9, C] of black, white, gray, red, green, blue, yellow, cyan and magenta pictures."""

    @classmethod
    @torch.no_grad()
    def of_vae(cls, vae: VAE) -> "LatentSpace":
        """Measure the latent space of an autoencoder, on its device."""
        side = _PROBE_CELLS * vae.spatial_factor
        pictures = torch.tensor(_COLORS)[:, None, None].expand(-1, side, side, -1)
        scaled = vae.scale(vae.encode(pictures))
        return cls(vae.spatial_factor, scaled[:, :, _PROBE_CELLS // 2, _PROBE_CELLS // 2].cpu())


def color_distance(space: LatentSpace, reference: LatentSpace) -> float:
    """Return how far the latents of plain colors are apart, relative to how far those of the reference spread.

    0 for the same space; about 1.4 for two that have nothing to do with each other. Both have the same channels.
    """
    spread = reference.colors - reference.colors.mean(dim=0)
    return float((space.colors - reference.colors).norm() / spread.norm())


STABLE_DIFFUSION = LatentSpace(
    8,
    torch.tensor(
        [
            [-0.901, -2.493, 1.132, 1.279],
            [2.016, 1.337, 0.091, -1.064],
            [0.698, -0.442, 0.599, 0.103],
            [1.026, -0.569, -1.553, 0.698],
            [0.996, 0.820, 2.316, 1.891],
            [-0.788, -2.807, 1.177, -1.495],
            [2.130, 1.939, -0.042, 1.419],
            [0.594, -0.052, 3.012, -0.161],
            [0.571, -1.390, -1.261, -1.472],
        ]
    ),
)
"""The space of Stable Diffusion 1.x and 2.x, as measured by `LatentSpace.of_vae` with TAESD (madebyollin/taesd)."""


@dataclass
class DiffusionConfig:
    """Which diffusion model guides, and how it computes."""

    source: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """The diffusion model: a folder in diffusers' format (unet/, scheduler/, text_encoder/, tokenizer/) or a Hugging
    Face id, of Stable Diffusion 1.x or 2.x or of a model with the same parts. Only safetensors are read."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the U-Net on CUDA. On a CPU it computes in float32 in any case."""

    def setup(self) -> "DiffusionModel":
        """Find the model and check what its configuration files say; no weights are loaded.

        Raises:
            UserError: if there is no such folder, the hub cannot be reached, a part is missing, its weights are
                pickled, or it is no model that takes a latent, a timestep and a prompt.
        """
        return DiffusionModel(self.source, _find(self.source), getattr(torch, self.dtype))


class DiffusionModel:
    """A latent diffusion model on this machine, whose parts are loaded when they are asked for.

    Attributes:
        source: as the user named it.
        folder: where its parts are.
        channels: C of its latents.
        embedding_size: D of the embeddings of its prompts.
        prediction_type: what its U-Net predicts.
        alphas_cumprod: [T] float32, the share of the signal's variance at each timestep.
    """

    def __init__(self, source: str, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Read a model's configuration files.

        Args:
            source: as the user named it, for messages.
            folder: with the model's parts.
            dtype: precision of the U-Net on CUDA.

        Raises:
            UserError: see :meth:`DiffusionConfig.setup`.
        """
        self.source, self.folder, self._dtype = source, folder, dtype
        self._unet_variant = _variant(folder / "unet", _UNET)
        self._text_encoder_variant = _variant(folder / "text_encoder", _TEXT_ENCODER)
        if not (folder / "tokenizer").is_dir():
            raise UserError(f"{folder} ({OPTION}) has no tokenizer/. Give {KINDS}.")
        unet = {**_UNET_DEFAULTS, **_read_json(folder / "unet" / "config.json")}
        _check_unet(unet, folder)
        self.channels: int = unet["in_channels"]
        self.embedding_size: int = unet["cross_attention_dim"]
        scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
        self.prediction_type = _prediction_type(scheduler, folder)
        self.alphas_cumprod = _alphas_cumprod(scheduler, folder)

    def load_denoiser(self, device: str | torch.device) -> UNetDenoiser:
        """Load the U-Net onto a device.

        Raises:
            UserError: if its weights are damaged or do not fit its configuration.
        """
        from diffusers import UNet2DConditionModel

        folder, device = self.folder / "unet", torch.device(device)
        try:
            with quiet():
                unet, report = UNet2DConditionModel.from_pretrained(
                    folder,
                    torch_dtype=self._dtype if device.type == "cuda" else torch.float32,
                    variant=self._unet_variant,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except Exception as error:  # damaged weights surface as many types, from several libraries
            raise UserError(f"The U-Net in {folder} ({OPTION}) cannot be loaded: {first_line(error)}") from error
        check_all_loaded(report, f"{folder} ({OPTION})")
        unet = unet.to(device)
        if device.type == "cuda":  # on CPUs this layout is slower
            unet = unet.to(memory_format=torch.channels_last)
        return UNetDenoiser(unet, self.alphas_cumprod, self.prediction_type)

    def load_text_encoder(self, device: str | torch.device) -> tuple["CLIPTokenizer", "CLIPTextModel"]:
        """Load the tokenizer and, in float32 onto a device, the text encoder.

        Raises:
            UserError: if transformers is not installed, or the files are damaged.
        """
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError as error:
            raise UserError(
                "Prompts are encoded by the package transformers, which is not installed: "
                "pip install 'lrf-nerfstudio[text]'."
            ) from error
        folder = self.folder / "text_encoder"
        try:
            with quiet():
                tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
                encoder, report = CLIPTextModel.from_pretrained(
                    folder,
                    dtype=torch.float32,
                    variant=self._text_encoder_variant,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except Exception as error:  # as above
            raise UserError(
                f"The text encoder in {folder} or its tokenizer ({OPTION}) cannot be loaded: {first_line(error)}"
            ) from error
        # Buffers of older versions, and the projection that other pipelines use.
        check_all_loaded(report, f"{folder} ({OPTION})", ignored=("position_ids", "text_projection.weight"))
        if encoder.config.hidden_size != self.embedding_size:
            raise UserError(
                f"The text encoder of {self.folder} ({OPTION}) gives embeddings of {encoder.config.hidden_size} "
                f"numbers, but its U-Net takes {self.embedding_size}. The parts are of two models."
            )
        return tokenizer, encoder.to(device).eval().requires_grad_(False)

    def text_identity(self) -> str:
        """Return a hash of all that decides what a prompt's embedding is: text encoder and tokenizer."""
        files = sorted(path for part in ("text_encoder", "tokenizer") for path in (self.folder / part).iterdir())
        digest = hashlib.sha256()
        for path in files:
            if path.is_file() and path.suffix not in _PICKLES:
                digest.update(f"{path.parent.name}/{path.name} {file_sha256(path)}".encode())
        return digest.hexdigest()

    def latent_space(self) -> LatentSpace:
        """Return the latent space of the model: of its own autoencoder if it is in the folder, else Stable Diffusion's.

        Raises:
            UserError: if the autoencoder in the folder cannot be loaded.
        """
        folder = self.folder / "vae"
        if any(folder.glob("*.safetensors")):
            return LatentSpace.of_vae(VAEConfig(source=str(folder)).setup())
        return STABLE_DIFFUSION


def check_latent_space(model: DiffusionModel, vae: VAE) -> None:
    """Check that a diffusion model takes the scaled latents of an autoencoder.

    Channels and factor are compared, and the scaled latents of plain colors: autoencoders of one architecture, such as
    those of Stable Diffusion and SDXL, TAESD and TAESDXL, differ in nothing else.

    Raises:
        UserError: if it does not, naming `--pipeline.vae.source`.
    """
    needed = model.latent_space()
    advice = (
        f"{model.source} ({OPTION}) cannot guide latents of the VAE {vae.source!r} (--pipeline.vae.source): {{}}. "
        "Choose the VAE of that diffusion model; for Stable Diffusion 1.x and 2.x stabilityai/sd-vae-ft-mse, "
        "madebyollin/taesd or a VAE tuned from one of these."
    )
    if vae.latent_channels != model.channels:
        raise UserError(advice.format(f"it takes {model.channels} channels, not {vae.latent_channels}"))
    if vae.spatial_factor != needed.spatial_factor:
        raise UserError(advice.format(f"its cells are {needed.spatial_factor} pixels wide, not {vae.spatial_factor}"))
    if needed.colors.shape[1] != model.channels:
        raise UserError(
            advice.format(
                f"it is no Stable Diffusion model, since it takes {model.channels} channels, and without its own "
                f"autoencoder in {model.folder / 'vae'} nobody can tell what they mean"
            )
        )
    distance = color_distance(LatentSpace.of_vae(vae), needed)
    if not distance <= COLOR_DISTANCE:
        raise UserError(
            advice.format(
                f"the latents of plain colors, with the VAE's scaling factor of {vae.scaling_factor:g}, are off by "
                f"{distance:.0%} of their spread, so the two are of different latent spaces"
            )
        )


def _find(source: str) -> Path:
    """Return the local folder of a model."""
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        if not (folder / "unet" / "config.json").is_file():
            raise UserError(f"{folder} ({OPTION}) has no unet/config.json. Give {KINDS}.")
        return folder
    if not _HUB_ID.fullmatch(source):
        raise UserError(f"{OPTION} {source!r} was not found. Give {KINDS}.")
    try:
        folder = hub_folder(source, _HUB_FILES, ["*.fp16.*", "*.non_ema.*"], _is_complete)
    except OSError as error:
        raise UserError(
            f"The diffusion model {source!r} ({OPTION}) is neither on this machine nor could it be fetched from "
            f"Hugging Face: {error}. Give {KINDS}."
        ) from error
    if not _is_complete(folder):
        raise UserError(
            f"The Hugging Face repository {source!r} ({OPTION}) lacks a part of a model, or holds its weights not as "
            f"safetensors. Give {KINDS}."
        )
    return folder


def _is_complete(folder: Path) -> bool:
    """Tell whether a folder of the hub's cache holds every part of a model."""
    configurations = ("unet/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json")
    return (
        all((folder / name).is_file() for name in configurations)
        and (folder / "tokenizer").is_dir()
        and all(any((folder / part).glob("*.safetensors")) for part in ("unet", "text_encoder"))
    )


def _variant(folder: Path, stem: str) -> str | None:
    """Return the `variant` by which diffusers and transformers find the safetensors in a folder."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if names & {f"{stem}.safetensors", f"{stem}.safetensors.index.json"}:
        return None
    if names & {f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"}:
        return "fp16"
    if pickles := sorted(name for name in names if name.endswith(_PICKLES)):
        raise UserError(
            f"The weights in {folder} ({OPTION}) are pickled ({pickles[0]}); loading such a file can run any program. "
            "Take the model's safetensors, or convert it with diffusers' `save_pretrained`."
        )
    raise UserError(f"{folder} ({OPTION}) holds no weights ({stem}.safetensors). Give {KINDS}.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{file} ({OPTION}) cannot be read: {first_line(error)}. Give {KINDS}.") from error


def _check_unet(config: dict[str, Any], folder: Path) -> None:
    """Check that a U-Net takes a latent, a timestep and a prompt, and returns one latent."""
    problem = None
    if config.get("_class_name") != "UNet2DConditionModel":
        problem = f"is a {config.get('_class_name')}"
    elif more := [name for name in _MORE_CONDITIONS if config.get(name) is not None]:
        problem = f"needs more conditions than a prompt ({more[0]} is {config[more[0]]!r})"
    elif config.get("in_channels") != config.get("out_channels"):
        problem = f"takes {config.get('in_channels')} channels and returns {config.get('out_channels')}"
    elif not isinstance(config.get("cross_attention_dim"), int):
        problem = "does not take one prompt"
    if problem:
        raise UserError(f"The U-Net in {folder / 'unet'} ({OPTION}) cannot guide: it {problem}. Give {KINDS}.")


def _prediction_type(config: dict[str, Any], folder: Path) -> PredictionType:
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"The model in {folder} ({OPTION}) predicts {prediction_type!r}; supported are 'epsilon' and "
            f"'v_prediction'. Give {KINDS}."
        )
    return prediction_type


def _alphas_cumprod(config: dict[str, Any], folder: Path) -> Tensor:
    """Return the noise schedule [T] that a scheduler's configuration describes."""
    from diffusers import DDPMScheduler

    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise UserError(
            f"The scheduler of {folder} ({OPTION}), {config.get('_class_name')}, has no schedule of betas. "
            f"Give {KINDS}."
        )
    try:
        return DDPMScheduler(**{name: config[name] for name in _SCHEDULE if name in config}).alphas_cumprod
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'scheduler' / 'scheduler_config.json'} ({OPTION}) describes no schedule of noise that is "
            f"known: {first_line(error)}."
        ) from error
