"""A denoiser that knows the answer: what each method of score distillation must give follows from it exactly."""

from collections.abc import Sequence

import torch
from torch import Tensor


def stable_diffusion_schedule() -> Tensor:
    """Alpha-bar of Stable Diffusion 1.x and 2.x, [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


class Oracle:
    """Knows the scaled latents of the views that it is asked about, for each of P prompts.

    Conditions [B, 1, P] are weights of the prompts. A prompt's latents z are certain, so that the noise is
    (x_t - sqrt(a) z) / sqrt(1 - a). What is left of the weights to 1 goes to the prior, a normal distribution of
    latents about 0, whose noise is sqrt(1 - a) x_t / (a spread^2 + 1 - a).

    Attributes:
        latents: [P, B, C, h, w], set before each step; a batch may be asked about several times at once.
        asked: timesteps [B] of each call.
    """

    def __init__(self, latents: Tensor, spread: float = 1.0) -> None:
        self.latents, self.spread = latents, spread
        self.alphas_cumprod = stable_diffusion_schedule().to(latents.device)
        self.asked: list[Tensor] = []

    @torch.no_grad()
    def predict(self, x_t: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        self.asked.append(t)
        alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        repeats = len(x_t) // self.latents.shape[1]
        certain = (x_t - alpha.sqrt() * self.latents.repeat(1, repeats, 1, 1, 1)) / (1 - alpha).sqrt()
        prior = (1 - alpha).sqrt() * x_t / (alpha * self.spread**2 + 1 - alpha)
        weights = conditions[:, 0].T[..., None, None, None]  # [P, B, 1, 1, 1]
        return (weights * certain).sum(dim=0) + (1 - weights.sum(dim=0)) * prior


def embed_names(names: Sequence[str]):
    """Return the embedding of texts for an oracle of P names: a weight of 1 for the first name that a text contains."""

    def embed(texts: Sequence[str]) -> Tensor:
        rows = []
        for text in texts:
            found = [index for index, name in enumerate(names) if name in text]
            rows.append([[float(index in found[:1]) for index in range(len(names))]])
        return torch.tensor(rows)

    return embed


class SamePrompt:
    """Conditions that are the same for all views and for the negative and the empty prompt."""

    def conditions(self, azimuths: Sequence[float], elevations: Sequence[float]):
        from lrf_nerfstudio.guidance import Conditions

        ones = torch.ones(len(azimuths), 1, 1)
        return Conditions(ones, ones, ones)
