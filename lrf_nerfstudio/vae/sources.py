"""Finds and loads the autoencoder that a source string names."""

import importlib.resources
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.pretrained import check_all_loaded, first_line, hub_folder, quiet
from lrf_nerfstudio.vae.ldm import load_ldm

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

    from lrf_nerfstudio.vae.identity import AveragingAutoencoder, IdentityAutoencoder

    Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny | AveragingAutoencoder | IdentityAutoencoder

RGB = "rgb"
"""The source that names no autoencoder: latents are the colours of the photographs, at full resolution."""
REDUCED_RGB = re.compile(r"rgb-f(2|4|8|16|32)")
"""Sources that name no autoencoder either: latents are the mean colors of cells of so many pixels along each axis."""
CLASSES = ("AutoencoderKL", "AutoencoderTiny")
MOST_BLOCKS = 1000
"""No level of an autoencoder has more residual blocks."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LDM_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
_HUB_FILES = ("config.json", "diffusion_pytorch_model*.safetensors", "*.safetensors.index.json")


def asset_names() -> list[str]:
    """Names of the autoencoders that are part of the package."""
    assets = importlib.resources.files("lrf_nerfstudio") / "assets"
    return sorted(entry.name for entry in assets.iterdir() if (entry / "config.json").is_file())


def _kinds() -> str:
    return (
        f"a name in the package ({', '.join(asset_names())}), {RGB} or {RGB}-f<factor> for none, a folder in diffusers "
        "format, a .ckpt or .safetensors file in latent-diffusion layout, or a Hugging Face id such as "
        "stabilityai/sd-vae-ft-mse"
    )


def load_autoencoder(source: str) -> "Autoencoder":
    """Loads the autoencoder named by `source`, in float32 whatever precision it is stored in.

    Args:
        source: see :class:`lrf_nerfstudio.vae.VAEConfig`; tried as a name in the package, a path, a Hugging Face id.

    Raises:
        UserError: nothing found, the hub is out of reach, or what was found is damaged, unsafe or no such autoencoder.
    """
    if source == RGB:
        from lrf_nerfstudio.vae.identity import IdentityAutoencoder

        return IdentityAutoencoder()
    if reduced := REDUCED_RGB.fullmatch(source):
        from lrf_nerfstudio.vae.identity import AveragingAutoencoder

        blocks = (3,) * int(reduced[1]).bit_length()
        return AveragingAutoencoder(encoder_block_out_channels=blocks, decoder_block_out_channels=blocks)
    if source in asset_names():
        with importlib.resources.as_file(importlib.resources.files("lrf_nerfstudio") / "assets" / source) as folder:
            return _load_folder(folder)
    path = Path(source).expanduser()
    if source and path.is_dir():  # the empty path is the working directory
        return _load_folder(path)
    if path.is_file():
        if path.suffix not in _LDM_SUFFIXES:
            raise UserError(f"{path} (--pipeline.vae.source) is no file of weights; the source must be {_kinds()}.")
        return load_ldm(path)
    if _HUB_ID.fullmatch(source):
        return _load_folder(_hub_folder(source))
    raise UserError(f"--pipeline.vae.source {source!r} was not found; it must be {_kinds()}.")


def _hub_folder(repository: str) -> Path:
    """Local folder of a Hugging Face repository's autoencoder, from the local cache if it is there, else downloaded."""

    def has_weights(folder: Path) -> bool:
        return any(folder.glob("**/*.safetensors"))

    patterns = [*_HUB_FILES, *(f"vae/{name}" for name in _HUB_FILES)]
    try:
        folder = hub_folder(repository, patterns, ["*.fp16.*", "*.non_ema.*"], has_weights)
    except OSError as error:
        raise UserError(
            f"The VAE {repository!r} (--pipeline.vae.source) is neither on this machine nor could it be fetched "
            f"from Hugging Face: {error}. Give {_kinds()}."
        ) from error
    if not has_weights(folder):
        raise UserError(
            f"The Hugging Face repository {repository!r} (--pipeline.vae.source) holds no autoencoder with safetensors "
            f"weights; give {_kinds()}."
        )
    return folder


def _load_folder(folder: Path) -> "Autoencoder":
    """Loads a diffusers folder: of the autoencoder itself, or of a pipeline with the autoencoder in `vae/`."""
    import diffusers

    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        class_name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} (--pipeline.vae.source) has no readable config.json of a diffusers model; the source must be "
            f"{_kinds()}."
        ) from error
    if class_name not in CLASSES:
        raise UserError(
            f"{folder} (--pipeline.vae.source) holds a {class_name}; supported are {' and '.join(CLASSES)}."
        )
    _check_config(config, folder)
    try:
        with quiet():
            autoencoder, report = getattr(diffusers, class_name).from_pretrained(
                folder, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # damaged or unsafe weights surface as many types, from several libraries
        raise UserError(f"The VAE in {folder} (--pipeline.vae.source) cannot be loaded: {first_line(error)}") from error
    check_all_loaded(report, f"{folder} (--pipeline.vae.source)")
    return autoencoder


def _check_config(config: dict[str, Any], folder: Path) -> None:
    """Check what diffusers takes from a config.json as it is, and fails of later, or never ends with.

    Raises:
        UserError: an option is none that an autoencoder can have.
    """
    factors = [config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0]
    counts = [config.get(name, 1) for name in ("num_encoder_blocks", "num_decoder_blocks", "layers_per_block")]
    numbers = [number for count in counts for number in (count if isinstance(count, list) else [count])]
    sound = {
        "scaling_factor or shift_factor": all(isinstance(factor, (int, float)) for factor in factors),
        "number of blocks": all(isinstance(number, int) and 0 <= number <= MOST_BLOCKS for number in numbers),
        "upsample_fn": config.get("upsample_fn", "nearest") in ("nearest", "bilinear", "bicubic", "area"),
    }
    for name, fits in sound.items():
        if not fits:
            raise UserError(
                f"{folder / 'config.json'} (--pipeline.vae.source) is damaged: its {name} is none that an "
                "autoencoder can have. Restore it."
            )
