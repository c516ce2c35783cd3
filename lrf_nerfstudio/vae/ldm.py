"""Autoencoders in the layout of the latent-diffusion code base (`encoder.down.0.block.0.conv1.weight`, ...).

Stable Diffusion's original files and the checkpoints that Lightning writes while such an autoencoder is trained have
it. The architecture is read off the shapes of the weights, so no configuration file and no network are needed.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrf_nerfstudio.utils.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# Inside a whole diffusion model the autoencoder's weights carry one of these.
_PREFIXES = ("first_stage_model.", "vae.")
# What training leaves beside the autoencoder: the loss network with its discriminator, and averaged copies.
_DROPPED = ("loss.", "model_ema.")
# latent-diffusion normalises in groups of 32 throughout; the shapes do not tell.
_NORM_GROUPS = 32
_SCALING_FACTORS = {4: 0.18215}  # Stable Diffusion 1 and 2; the layout says nothing about others


class _Ignored:
    """Stands for an object of a training framework in a checkpoint. It holds nothing and runs nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# Lightning before 1.5 keys the states of its callbacks by their class, and stores numpy scalars in them.
_IGNORED_GLOBALS = re.compile(
    r"(pytorch_lightning|lightning\.pytorch)\.callbacks\.|numpy\.(_?core\.multiarray\.|dtype$)"
)


def _load_pickled(path: Path) -> Any:
    """Loads a `torch.save` file without running anything that it contains."""
    refused = UserError(
        f"{path} (--pipeline.vae.source) cannot be loaded safely: it is not a checkpoint of tensors, or it contains "
        "other Python objects, which could run code. If you trust its origin, convert it once where it was made: "
        'safetensors.torch.save_file(torch.load(path, weights_only=False)["state_dict"], "vae.safetensors")'
    )
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:  # any damage: a broken archive, a broken pickle stream
        raise refused from error
    if not all(_IGNORED_GLOBALS.match(name) for name in unknown):
        raise refused
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise refused from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads the autoencoder's weights from a .safetensors file or a pickled checkpoint, prefixes removed.

    Raises:
        UserError: unreadable or unsafe file, or one that does not hold weights in this layout.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} (--pipeline.vae.source) is not a readable safetensors file: {error}") from error
    else:
        weights = _load_pickled(path)
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} (--pipeline.vae.source) does not hold a dictionary of weights.")

    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    weights = {key: value for key, value in weights.items() if not key.startswith(_DROPPED)}
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in weights:
        raise UserError(
            f"{path} (--pipeline.vae.source) is in the layout of diffusers: give the folder that holds it and its "
            "config.json."
        )
    foreign = sorted(key for key in weights if not key.startswith(_PARTS))
    if foreign or "encoder.conv_in.weight" not in weights:
        found = f"has unexpected weights such as {foreign[0]!r}" if foreign else "has no encoder"
        raise UserError(f"{path} (--pipeline.vae.source) is no autoencoder in latent-diffusion layout: it {found}.")
    return weights


def infer_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL for weights in latent-diffusion layout, from their names and shapes.

    Raises:
        KeyError: a weight that the architecture is read from is missing.
    """
    levels = len({key.split(".")[2] for key in weights if key.startswith("encoder.down.")})
    blocks = {key.split(".")[4] for key in weights if key.startswith("encoder.down.0.block.")}
    channels = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    latent_channels = weights["decoder.conv_in.weight"].shape[1]
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(channels),
        "layers_per_block": len(blocks),
        "latent_channels": latent_channels,
        "norm_num_groups": _NORM_GROUPS,
        "scaling_factor": _SCALING_FACTORS.get(latent_channels, 1.0),
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }


def load_ldm(path: Path) -> "AutoencoderKL":
    """Loads an autoencoder in latent-diffusion layout, in float32.

    Raises:
        UserError: unreadable or unsafe file; weights missing, left over or of shapes that AutoencoderKL cannot have.
    """
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    weights = read_state_dict(path)
    try:
        config = infer_config(weights)
        converted = {key: value.float() for key, value in convert_ldm_vae_checkpoint(weights, config).items()}
        lost = len(weights) - len(converted)
        if lost:
            raise ValueError(f"{lost} weights have no counterpart in AutoencoderKL")
        with torch.device("meta"):
            autoencoder = AutoencoderKL(**config)
        autoencoder.load_state_dict(converted, strict=True, assign=True)
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"{path} (--pipeline.vae.source) does not have the architecture of Stable Diffusion's autoencoder: {error}"
        ) from error
    return autoencoder
