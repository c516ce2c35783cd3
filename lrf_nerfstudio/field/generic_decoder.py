"""The generic decoder: fitted to many scenes, it is what the decoder of a new scene starts from.

It decodes latents, which mean the same in every scene, where the decoder of a scene decodes that scene's field latents.
A file `scene_decoder.safetensors` keeps it beside the VAE whose latents it decodes.
"""

import copy
import importlib.resources
import json
from pathlib import Path

import torch
from torch import Tensor

from lrf_nerfstudio.field.decoder import PHASES, SceneDecoder
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import write_atomically
from lrf_nerfstudio.vae import VAE, FieldNormalization

FORMAT = "lrf-nerfstudio generic decoder 1"
"""Written into every file; a reader refuses what it does not know."""

FILE = "scene_decoder.safetensors"


@torch.no_grad()
def for_field(generic: SceneDecoder, normalization: FieldNormalization) -> SceneDecoder:
    """Return the decoder of a scene's field latents that makes the pictures of one of latents.

    The affine map of the scene becomes part of the first convolution and of the linear map. At the edge of the grid,
    beyond which convolutions see the middle of the range of what they are given, the pictures differ a little.

    Args:
        generic: decodes latents.
        normalization: of the scene.
    """
    decoder = copy.deepcopy(generic)
    shift, scale = normalization.shift.to(generic.bias), normalization.scale.to(generic.bias)
    weight = generic.head.weight  # [width, 4 C, 3, 3], the means of cells first, then the differences
    assert generic.head.bias is not None and decoder.head.bias is not None
    decoder.head.weight.copy_(weight * scale.repeat(PHASES**2)[:, None, None])
    middle = shift + 0.5 * scale - 0.5  # the convolution is given what exceeds 0.5
    decoder.head.bias.copy_(generic.head.bias + weight[:, : generic.channels].sum(dim=(2, 3)) @ middle)
    decoder.matrix.copy_(generic.matrix * scale)
    decoder.bias.copy_(generic.matrix @ shift + generic.bias)
    return decoder


def save_generic(generic: SceneDecoder, vae: VAE, path: Path) -> None:
    """Write a generic decoder, complete or not at all.

    Args:
        generic: decodes latents.
        vae: whose latents they are.
        path: of the file.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors.torch import save

    description = {
        "format": FORMAT,
        "decoder": generic.config,
        "vae_source": vae.source,
        "vae_fingerprint": vae.fingerprint,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in generic.state_dict().items()}
    # One entry: safetensors writes several in an order of its own, different from run to run.
    content = save(tensors, {"description": json.dumps(description)})
    write_atomically(path, content, option="--output")


def load_generic(path: Path, vae: VAE) -> SceneDecoder:
    """Read a generic decoder of a VAE's latents.

    Raises:
        UserError: the file is missing, damaged, something else, or for the latents of another VAE.
    """
    description, tensors = _read(path)
    if description.get("vae_fingerprint") != vae.fingerprint:
        raise UserError(
            f"The generic decoder in {path} is for the latents of the VAE {description.get('vae_source')!r}, not of "
            f"{vae.source!r}. Use that VAE, or start from `linear`."
        )
    return SceneDecoder.restored(
        description.get("decoder"), tensors, vae.latent_channels, vae.spatial_factor, str(path)
    )


def shipped_generic(vae: VAE) -> Path | None:
    """Return the generic decoder of a VAE's latents that lies beside it or in the package; None if there is none."""
    with importlib.resources.as_file(importlib.resources.files("lrf_nerfstudio") / "assets") as assets:
        beside = [Path(vae.source).expanduser() / FILE] if vae.source else []
        for path in [*beside, *sorted(assets.glob(f"*/{FILE}"))]:
            if path.is_file() and _read(path)[0].get("vae_fingerprint") == vae.fingerprint:
                return path
    return None


def _read(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return the description and the tensors of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("description", "null"))
            if not isinstance(description, dict) or description.get("format") != FORMAT:
                raise UserError(f"{path} is no generic decoder of this version: its format is not {FORMAT!r}.")
            return description, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"The generic decoder {path} cannot be read: {error}.") from error
