"""Prompts that depend on where the camera is, and their embeddings."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import torch
from torch import Tensor
from tyro.conf import Suppress

from lrf_nerfstudio.guidance.models import DiffusionModel
from lrf_nerfstudio.utils.cache import TensorCache
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import cache_directory
from lrf_nerfstudio.utils.options import Range

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

View = Literal["front", "side", "back", "overhead"]
VIEWS: tuple[View, ...] = ("front", "side", "back", "overhead")
Angle = Annotated[float, Range(least=0, most=180)]
"""Between two directions, in degrees."""


@dataclass
class PromptConfig:
    """What to make."""

    prompt: Suppress[str] = ""  # on the command line, the option `--prompt` of nerfstudio
    """What to make, such as "a corgi with a crown"."""
    negative_prompt: str = ""
    """What it must not look like, such as "blurry, low quality"."""
    view_dependent: bool = True
    """Append "front view", "side view", "back view" or "overhead view" to the prompt, by where the camera is."""
    perp_neg: bool = False
    """Blend the prompts of neighboring views, and keep away from the prompts of views that the camera does not have
    (Perp-Neg). It counters objects with a face on every side and doubles the time of the U-Net. Needs
    `view_dependent`."""
    front_angle: Angle = 45.0
    """Cameras within so many degrees of azimuth of the front see the front."""
    back_angle: Angle = 45.0
    """Cameras within so many degrees of azimuth of the back see the back; those in between see a side."""
    overhead_angle: Annotated[float, Range(least=0, most=90)] = 60.0
    """Cameras at a larger elevation, in degrees, see the object from overhead."""

    def check(self) -> None:
        """Check that there is a prompt.

        Raises:
            UserError: if there is none.
        """
        if not self.prompt.strip():
            raise UserError('There is no prompt. Say what to make: --prompt "a corgi with a crown".')


class Conditions(NamedTuple):
    """The embeddings that B views are guided by, on the device that computes."""

    prompt: Tensor
    """[B, L, D], of the prompt for each view."""
    negative: Tensor
    """[B, L, D], of the negative prompt, which classifier-free guidance departs from."""
    empty: Tensor
    """[B, L, D], of the empty prompt, with which latents are inverted."""
    repelling: tuple[tuple[Tensor, Tensor], ...] = ()
    """Perp-Neg: embeddings [B, L, D] of what a view is not, and their weights [B, 1, 1, 1], at most 0."""


def view_of(azimuth: float, elevation: float, config: PromptConfig) -> View:
    """Return which view of the object a camera has, with the thresholds of threestudio.

    Args:
        azimuth: in degrees, 0 in front of the object.
        elevation: in degrees, 90 above it.
        config: the thresholds.
    """
    from_front = _from_front(azimuth)
    if elevation > config.overhead_angle:
        return "overhead"
    if from_front < config.front_angle:
        return "front"
    return "back" if from_front > 180.0 - config.back_angle else "side"


class ViewPrompts:
    """The embeddings of a prompt for views from all around, held on the device that computes.

    What a step selects is decided by Python's numbers, so nothing is read back from the device.
    """

    def __init__(self, config: PromptConfig, embed: Callable[[Sequence[str]], Tensor]) -> None:
        """Embed the prompts of all views, once.

        Args:
            config: the prompt.
            embed: maps N texts to embeddings [N, L, D], such as a :class:`TextEmbedder`.

        Raises:
            UserError: if there is no prompt, or what `embed` raises.
        """
        config.check()
        self._config = config
        prompt = config.prompt.strip()
        texts = [f"{prompt}, {view} view" for view in VIEWS] if config.view_dependent else [prompt]
        *views, negative, empty = embed([*texts, config.negative_prompt.strip(), ""]).unbind()
        self._views = dict(zip(VIEWS, views if config.view_dependent else views * len(VIEWS), strict=True))
        self._negative, self._empty = negative, empty

    def conditions(self, azimuths: Sequence[float], elevations: Sequence[float]) -> Conditions:
        """Return the embeddings for B cameras.

        Args:
            azimuths: in degrees, 0 in front of the object; B numbers.
            elevations: in degrees, 90 above it; B numbers.
        """
        count = len(azimuths)
        negative, empty = (one.expand(count, -1, -1) for one in (self._negative, self._empty))
        cameras = list(zip(azimuths, elevations, strict=True))
        if not (self._config.perp_neg and self._config.view_dependent):
            prompts = [self._views[view_of(azimuth, elevation, self._config)] for azimuth, elevation in cameras]
            return Conditions(torch.stack(prompts), negative, empty)
        blends = [self._blend(azimuth, elevation) for azimuth, elevation in cameras]
        repelling = tuple(
            (
                torch.stack([self._views[blend.repelling[i][0]] for blend in blends]),
                torch.tensor([blend.repelling[i][1] for blend in blends])
                .view(-1, 1, 1, 1)
                .to(negative.device, non_blocking=True),
            )
            for i in range(2)
        )
        return Conditions(torch.stack([blend.prompt for blend in blends]), negative, empty, repelling)

    def _blend(self, azimuth: float, elevation: float) -> "_Blend":
        """Interpolate between views as Perp-Neg (Armandpour et al., arXiv 2304.04968) does.

        The weights are functions a exp(-b r) + c of the interpolation, whose constants are those of threestudio.
        """
        if elevation > self._config.overhead_angle:
            return _Blend(self._views["overhead"], (("front", 0.0), ("side", 0.0)))
        from_front = _from_front(azimuth)
        if from_front < 90.0:
            front = 1.0 - from_front / 90.0
            prompt = torch.lerp(self._views["side"], self._views["front"], front)
            # Seen from the front, the side view is repelled most, and the other way round.
            return _Blend(prompt, (("front", -_decay(4.0, -2.426, front)), ("side", -_decay(4.0, -2.426, 1.0 - front))))
        side = 2.0 - from_front / 90.0
        prompt = torch.lerp(self._views["back"], self._views["side"], side)
        return _Blend(prompt, (("front", -_decay(1.0, 0.967, side)), ("side", -_decay(1.0, -0.606, side))))


class _Blend(NamedTuple):
    """The prompt of one camera, and the views that it is kept away from, with weights."""

    prompt: Tensor
    repelling: tuple[tuple[View, float], tuple[View, float]]


def _decay(a: float, c: float, r: float) -> float:
    return max(0.0, a * math.exp(-0.5 * r) + c)


def _from_front(azimuth: float) -> float:
    """Return the angle between an azimuth and the front, 0 to 180 degrees."""
    return abs((azimuth + 180.0) % 360.0 - 180.0)


class TextEmbedder:
    """Embeds texts by the text encoder of a diffusion model, which is in memory only while it is needed.

    Embeddings are kept on disk under a hash of the text encoder, the tokenizer and the text.
    """

    def __init__(
        self, model: DiffusionModel, device: str | torch.device = "cpu", cache_folder: Path | None = None
    ) -> None:
        """Prepare to embed.

        Args:
            model: whose text encoder is used.
            device: where it computes, and where the embeddings are returned.
            cache_folder: where embeddings are kept; None stands for `lrf_nerfstudio/prompts` in the user's cache
                folder.
        """
        self._model, self._device = model, device
        self._cache = TensorCache(cache_folder or cache_directory("prompts"), "--pipeline.prompt-cache-dir")
        self._encoder: tuple[CLIPTokenizer, CLIPTextModel] | None = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings [N, L, D] float32 of N texts; says what of a text is longer than the model takes.

        Raises:
            UserError: if transformers or a part of the model is missing, or the cache cannot be written to.
        """
        identity = self._model.text_identity()
        entries = {
            text: self._cache.load_or_compute(
                {"text encoder": identity, "text": text},
                lambda text=text: self._encode(text),  # type: ignore[misc]
                lambda tensors: (tensors["embedding"], tensors["excess"]),
            )
            for text in texts
        }
        self._encoder = None
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()
        excess = {text: bytes(entry["excess"].tolist()).decode() for text, entry in entries.items()}
        if cut := [f"{words!r} of {text!r}" for text, words in excess.items() if words]:
            length = entries[texts[0]]["embedding"].shape[0]
            warnings.warn(
                f"{self._model.source} takes {length} tokens, so it does not read {'; '.join(cut)}. Shorten --prompt "
                "or the negative prompt.",
                stacklevel=2,
            )
        return torch.stack([entries[text]["embedding"] for text in texts]).to(self._device)

    @torch.no_grad()
    def _encode(self, text: str) -> dict[str, Tensor]:
        """Return `embedding` [L, D] and `excess`, the UTF-8 bytes of the words that are cut off."""
        if self._encoder is None:
            self._encoder = self._model.load_text_encoder(self._device)
        tokenizer, encoder = self._encoder
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        everything = tokenizer(text, verbose=False).input_ids
        padded = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        # The last token that is kept marks the end, as does the last of all.
        excess = tokenizer.decode(everything[length - 1 : -1]).strip() if len(everything) > length else ""
        embedding = encoder(padded.input_ids.to(self._device)).last_hidden_state[0]
        return {
            "embedding": embedding.float().cpu().contiguous(),
            "excess": torch.tensor(list(excess.encode()), dtype=torch.uint8),
        }
