"""Score distillation: a diffusion model tells in which direction a rendered latent should change.

Latents are rendered and guided directly (Latent-NeRF, arXiv 2211.07600): no encoder is in the loop, and no gradient
goes through the diffusion model. With a = alpha-bar at the timestep t, a rendered scaled latent x, the model's noise e
and the scale s of classifier-free guidance,

- SDS (DreamFusion, arXiv 2209.14988): x_t = sqrt(a) x + sqrt(1 - a) n with random noise n, and the gradient is
  w(t) (e(x_t, guided) - n), where e(x_t, guided) = e(x_t, negative) + s (e(x_t, prompt) - e(x_t, negative));
- CSD (classifier score distillation, arXiv 2310.19415): the classifier's part of it alone,
  w(t) s (e(x_t, prompt) - e(x_t, negative));
- ISM (interval score matching, LucidDreamer, arXiv 2311.11284): x_t and an earlier x_u lie on the path of a DDIM
  inversion of x with the empty prompt, and the gradient is w(t) (e(x_t, guided) - e(x_u, empty)). Nothing but t is
  random.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lrf_nerfstudio.guidance.denoiser import Denoiser
from lrf_nerfstudio.guidance.prompts import Conditions
from lrf_nerfstudio.utils.options import AtLeastOne, Fraction, NotNegative

Kind = Literal["sds", "csd", "ism"]
Weighting = Literal["variance", "latent-nerf", "noise-to-signal", "uniform"]

SCALES: dict[Kind, float] = {"sds": 100.0, "csd": 100.0, "ism": 7.5}


@dataclass
class GuidanceConfig:
    """How a diffusion model guides."""

    kind: Kind = "sds"
    """Score distillation (`sds`, DreamFusion), its classifier alone (`csd`, which is sharper and noisier) or interval
    score matching (`ism`, LucidDreamer, which is sharp, needs no large scale, and takes two to three times as long)."""
    guidance_scale: NotNegative | None = None
    """Scale of classifier-free guidance; larger is more faithful to the prompt and more saturated. None takes 100 for
    `sds` and `csd`, 7.5 for `ism`."""
    weighting: Weighting = "variance"
    """Weight w of a timestep, with a = alpha-bar: `variance` is 1 - a (DreamFusion), `latent-nerf` sqrt(a) (1 - a),
    `noise-to-signal` sqrt((1 - a) / a) (LucidDreamer; the gradient is then a distance of latents), `uniform` 1."""
    t_min: tuple[Fraction, Fraction] = (0.02, 0.02)
    """Smallest timestep at the start and after the annealing, as a share of all timesteps; small timesteps shape
    details."""
    t_max: tuple[Fraction, Fraction] = (0.98, 0.5)
    """Largest timestep at the start and after the annealing; large timesteps shape the whole."""
    anneal: tuple[Fraction, Fraction] = (0.0, 0.2)
    """Progress of the training, 0 to 1, between which the range of timesteps changes linearly."""
    gradient_clip: NotNegative = 2.0
    """Largest norm of a cell's gradient over the channels; larger gradients are shortened, which keeps their direction
    (pixel-wise gradient clipping, arXiv 2310.12474). 0 clips nothing."""
    ism_interval: tuple[AtLeastOne, AtLeastOne] = (80, 50)
    """`ism`: timesteps between u and t at the start and after the annealing."""
    ism_steps: AtLeastOne = 4
    """`ism`: steps of the DDIM inversion up to u, one evaluation of the U-Net each."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what does not fit the other options; see `check_options`."""
        if any(low > high for low, high in zip(self.t_min, self.t_max, strict=True)):
            yield "t_min", f"must not be above t-max, which is {self.t_max[0]} {self.t_max[1]}"
        if self.anneal[0] > self.anneal[1]:
            yield "anneal", "must ascend"


class Prompts(Protocol):
    """Gives the embeddings of a prompt by view, such as :class:`~lrf_nerfstudio.guidance.ViewPrompts`."""

    def conditions(self, azimuths: Sequence[float], elevations: Sequence[float]) -> Conditions:
        """Return the embeddings for B cameras at these angles in degrees."""


class Guidance(NamedTuple):
    """What a step gives."""

    loss: Tensor
    """Scalar, half the squared distance to where the guidance wants the latents, summed over cells and averaged over
    views. Its gradient is the guidance; its value says nothing about progress."""
    metrics: dict[str, Tensor]
    """Scalars on the device: `gradient_norm` (mean over the views, before clipping), `clipped` (share of the cells
    whose gradient was shortened), `not_finite` (share of the gradient's numbers that were NaN or infinite and count as
    0)."""
    timesteps: tuple[int, int]
    """Range of the timesteps of this step, both included."""


class ScoreGuidance:
    """Score distillation by a diffusion model with a prompt.

    Example:
        >>> guidance = ScoreGuidance(GuidanceConfig(), model.load_denoiser("cuda"), prompts)  # doctest: +SKIP
        >>> result = guidance(vae.scale(latents), azimuths, elevations, step / steps)  # doctest: +SKIP
        >>> result.loss.backward()  # doctest: +SKIP
    """

    def __init__(self, config: GuidanceConfig, denoiser: Denoiser, prompts: Prompts) -> None:
        """Guide by a denoiser with the embeddings of prompts, which must be on its device."""
        self._config, self._denoiser, self._prompts = config, denoiser, prompts
        self._scale = SCALES[config.kind] if config.guidance_scale is None else config.guidance_scale
        self._alphas = denoiser.alphas_cumprod

    def __call__(
        self,
        latents: Tensor,
        azimuths: Sequence[float],
        elevations: Sequence[float],
        progress: float,
        generator: torch.Generator | None = None,
    ) -> Guidance:
        """Return the loss whose gradient guides rendered latents. Nothing is read back from the device.

        Args:
            latents: [B, C, h, w], scaled latents of B views.
            azimuths: of the B cameras in degrees, 0 in front of the object.
            elevations: of the B cameras in degrees.
            progress: of the training, 0 to 1, which decides the range of timesteps.
            generator: draws timesteps and noise, on the latents' device; None takes PyTorch's.
        """
        x = latents.detach().float()
        low, high = self.timesteps(progress)
        t = torch.randint(low, high + 1, (len(x),), device=x.device, generator=generator)
        gradient = self.gradient(x, t, self._prompts.conditions(azimuths, elevations), progress, generator)
        finite = gradient.isfinite()
        gradient = torch.where(finite, gradient, torch.zeros_like(gradient))
        norms = gradient.norm(dim=1, keepdim=True)  # [B, 1, h, w]
        metrics = {
            "gradient_norm": norms.square().sum(dim=(1, 2, 3)).sqrt().mean(),
            "not_finite": 1.0 - finite.float().mean(),
            "clipped": torch.zeros_like(norms[0, 0, 0, 0]),
        }
        if limit := self._config.gradient_clip:
            metrics["clipped"] = (norms > limit).float().mean()
            gradient = gradient * (limit / norms.clamp_min(limit))
        loss = 0.5 * (latents.float() - (x - gradient)).square().sum() / len(x)
        return Guidance(loss, metrics, (low, high))

    def timesteps(self, progress: float) -> tuple[int, int]:
        """Return the range of timesteps at a progress of 0 to 1, both included."""
        last = len(self._alphas) - 1
        low, high = (
            min(last, round(self._annealed(values, progress) * len(self._alphas)))
            for values in (self._config.t_min, self._config.t_max)
        )
        return low, high

    @torch.no_grad()
    def gradient(
        self, x: Tensor, t: Tensor, conditions: Conditions, progress: float, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the weighted gradient with respect to latents, as the model gives it: not clipped, maybe not finite.

        Args:
            x: [B, C, h, w], scaled latents, float32.
            t: [B], timesteps.
            conditions: what to guide to.
            progress: of the training; decides the interval of `ism`.
            generator: draws the noise.
        """
        if self._config.kind == "ism":
            difference = self._interval_score(x, t, conditions, progress)
        else:
            noise = torch.randn(x.shape, device=x.device, generator=generator)
            base, direction = self._scores(self._with_noise(x, t, noise), t, conditions)
            difference = self._scale * direction
            if self._config.kind == "sds":
                difference = base + difference - noise
        return self._weights(t) * difference

    def _interval_score(self, x: Tensor, t: Tensor, conditions: Conditions, progress: float) -> Tensor:
        """Return e(x_t, guided) - e(x_u, empty) on the path of a DDIM inversion."""
        u = (t - round(self._annealed(self._config.ism_interval, progress))).clamp_min(0)
        steps = self._config.ism_steps
        level, alpha, x_level = torch.zeros_like(u), torch.ones_like(x[:, :1, :1, :1]), x
        for step in range(1, steps + 1):
            noise = self._denoiser.predict(x_level, level, conditions.empty)
            level = u * step // steps
            x_level, alpha = ddim_step(x_level, noise, alpha, self._alpha(level)), self._alpha(level)
        noise = self._denoiser.predict(x_level, u, conditions.empty)
        base, direction = self._scores(ddim_step(x_level, noise, alpha, self._alpha(t)), t, conditions)
        return base + self._scale * direction - noise

    def _scores(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """Return the noise for the negative prompt, and the direction from it to the prompt; [B, C, h, w] each.

        With Perp-Neg (arXiv 2304.04968), the direction departs from what the view is not, as far as that is
        orthogonal to the prompt's own direction.
        """
        embeddings = [conditions.negative, conditions.prompt, *(embedding for embedding, _ in conditions.repelling)]
        count = len(embeddings)
        noise = self._denoiser.predict(x_t.repeat(count, 1, 1, 1), t.repeat(count), torch.cat(embeddings))
        base, prompt, *others = noise.chunk(count)
        direction = prompt - base
        correction = torch.zeros_like(direction)
        for other, (_, weight) in zip(others, conditions.repelling, strict=True):
            correction = correction + weight * _orthogonal_part(other - base, direction)
        return base, direction + correction

    def _with_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        alpha = self._alpha(t)
        return alpha.sqrt() * x + (1 - alpha).sqrt() * noise

    def _alpha(self, t: Tensor) -> Tensor:
        """Return alpha-bar [B, 1, 1, 1] at timesteps [B]."""
        return self._alphas[t].view(-1, 1, 1, 1)

    def _weights(self, t: Tensor) -> Tensor:
        """Return w [B, 1, 1, 1] at timesteps [B]."""
        alpha = self._alpha(t)
        if self._config.weighting == "variance":
            return 1 - alpha
        if self._config.weighting == "latent-nerf":
            return alpha.sqrt() * (1 - alpha)
        if self._config.weighting == "noise-to-signal":
            return ((1 - alpha) / alpha).sqrt()
        return torch.ones_like(alpha)

    def _annealed(self, values: tuple[float, float], progress: float) -> float:
        """Interpolate between a number's values before and after the annealing."""
        begin, end = self._config.anneal
        share = min(1.0, max(0.0, (progress - begin) / (end - begin))) if end > begin else float(progress >= end)
        return values[0] + share * (values[1] - values[0])


def ddim_step(x: Tensor, noise: Tensor, alpha: Tensor, new_alpha: Tensor) -> Tensor:
    """Move a latent from one level of noise to another along the direction of `noise` (DDIM, arXiv 2010.02502)."""
    clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    return new_alpha.sqrt() * clean + (1 - new_alpha).sqrt() * noise


def _orthogonal_part(vector: Tensor, axis: Tensor) -> Tensor:
    """Return the part of `vector` [B, C, h, w] that is orthogonal to `axis` as a whole, for each of the B."""
    product = (vector * axis).sum(dim=(1, 2, 3), keepdim=True)
    length = axis.square().sum(dim=(1, 2, 3), keepdim=True)
    return vector - product / length.clamp_min(torch.finfo(length.dtype).tiny) * axis
