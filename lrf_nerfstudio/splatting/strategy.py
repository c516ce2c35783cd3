"""3DGS-MCMC densification that also runs without CUDA.

gsplat's `MCMCStrategy` decides when and how many; only two of its functions exist as CUDA kernels alone: the relocation
formula and the covariance of the injected noise. Tensors on CUDA go to gsplat unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gsplat.strategy import MCMCStrategy
from gsplat.strategy.ops import _update_param_with_optimizer
from torch import Tensor

from lrf_nerfstudio.splatting.reference import covariance_matrices

Params = dict[str, torch.nn.Parameter] | torch.nn.ParameterDict
Optimizers = dict[str, torch.optim.Optimizer]


def compute_relocation(opacities: Tensor, scales: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Opacity and scales with which M Gaussians in one place look like the single one that they replace.

    Equation 9 of "3D Gaussian Splatting as Markov Chain Monte Carlo" (Kheradmand et al. 2024): the opacity is
    `1 - (1 - o)^(1 / M)`, the scales are multiplied by `o / sum_{i=1..M} sum_{k=0..i-1} binom(i - 1, k) (-1)^k
    o_new^(k + 1) / sqrt(k + 1)`. The inner sums alternate and cancel, so that float32 loses them at large M; they are
    taken in float64. By the hockey-stick identity the double sum is `sum_k binom(M, k + 1) (-1)^k o_new^(k + 1) /
    sqrt(k + 1)`.

    Args:
        opacities: [N], in (0, 1).
        scales: [N, 3], linear.
        copies: M, how many Gaussians take the place of each [N], from 1 to 51.

    Returns:
        New opacities [N] and scales [N, 3].
    """
    old = opacities.double()
    new = -torch.expm1(torch.log1p(-old) / copies)
    terms = torch.arange(1, int(copies.max()) + 1 if len(copies) else 1, dtype=torch.float64, device=opacities.device)
    m = copies[:, None].double()
    log_binomials = torch.lgamma(m + 1) - torch.lgamma(terms + 1) - torch.lgamma((m - terms + 1).clamp_min(1))
    signs = 1 - 2 * ((terms - 1) % 2)
    summands = signs * torch.exp(log_binomials + terms * torch.log(new)[:, None]) / torch.sqrt(terms)
    denominators = (summands * (terms <= m)).sum(dim=-1)
    return new.to(opacities), (scales * (old / denominators)[:, None]).to(scales)


@dataclass
class PortableMCMCStrategy(MCMCStrategy):
    """gsplat's MCMCStrategy, on the CPU too. Takes the same parameters, optimizers and state."""

    def step_post_backward(
        self, params: Params, optimizers: Optimizers, state: dict[str, Any], step: int, info: dict[str, Any], lr: float
    ) -> None:
        """Relocates and adds Gaussians at refinement steps, and adds noise to the means at each.

        Args:
            params: Trainable tensors; `opacities` as logits [N] or [N, 1], `scales` as logarithms [N, 3].
            optimizers: One for each of `params`.
            state: What `initialize_state` gave.
            step: Number of the training step.
            info: Of `rasterize`; not used.
            lr: Learning rate of the means, which the noise follows.
        """
        if params["means"].is_cuda:
            super().step_post_backward(params, optimizers, state, step, info, lr)
            return
        if self.refine_start_iter < step < self.refine_stop_iter and step % self.refine_every == 0:
            n_relocated = _relocate(params, optimizers, self.min_opacity)
            n_new = max(0, min(self.cap_max, int(1.05 * len(params["means"]))) - len(params["means"]))
            _add(params, optimizers, n_new, self.min_opacity)
            if self.verbose:
                print(f"Step {step}: {n_relocated} Gaussians relocated, {n_new} added: {len(params['means'])}.")
        _inject_noise(params, lr * self.noise_lr)


@torch.no_grad()
def _divided(params: Params, chosen: Tensor, min_opacity: float) -> tuple[Tensor, Tensor]:
    """Logit opacities and log scales of the Gaussians `chosen` (with repetition) after they share their place."""
    logits = params["opacities"][chosen]
    copies = (torch.bincount(chosen, minlength=len(params["means"]))[chosen] + 1).clamp_max(_MAX_COPIES)
    opacities, scales = compute_relocation(torch.sigmoid(logits).flatten(), torch.exp(params["scales"][chosen]), copies)
    opacities = opacities.clamp(min_opacity, 1 - torch.finfo(torch.float32).eps)
    return torch.logit(opacities).view_as(logits), torch.log(scales)


_MAX_COPIES = 51
"""gsplat's table of binomials ends here."""


@torch.no_grad()
def _relocate(params: Params, optimizers: Optimizers, min_opacity: float) -> int:
    """Moves Gaussians that have become transparent onto others, drawn in proportion to opacity."""
    opacities = torch.sigmoid(params["opacities"]).flatten()
    dead = torch.nonzero(opacities <= min_opacity).flatten()
    alive = torch.nonzero(opacities > min_opacity).flatten()
    if len(dead) == 0 or len(alive) == 0:
        return 0
    chosen = alive[torch.multinomial(opacities[alive], len(dead), replacement=True)]
    new_values = dict(zip(("opacities", "scales"), _divided(params, chosen, min_opacity), strict=True))

    def moved(name: str, values: Tensor) -> Tensor:
        if name in new_values:
            values[chosen] = new_values[name]
        values[dead] = values[chosen]
        return torch.nn.Parameter(values)

    def forgotten(_key: str, moments: Tensor) -> Tensor:
        moments[chosen] = 0
        return moments

    _update(moved, forgotten, params, optimizers)
    return len(dead)


@torch.no_grad()
def _add(params: Params, optimizers: Optimizers, n: int, min_opacity: float) -> None:
    """Adds n Gaussians in the places of others, drawn in proportion to opacity."""
    if n == 0:
        return
    chosen = torch.multinomial(torch.sigmoid(params["opacities"]).flatten(), n, replacement=True)
    new_values = dict(zip(("opacities", "scales"), _divided(params, chosen, min_opacity), strict=True))

    def extended(name: str, values: Tensor) -> Tensor:
        if name in new_values:
            values[chosen] = new_values[name]
        return torch.nn.Parameter(torch.cat([values, values[chosen]]))

    def padded(_key: str, moments: Tensor) -> Tensor:
        return torch.cat([moments, moments.new_zeros(n, *moments.shape[1:])])

    _update(extended, padded, params, optimizers)


def _update(
    new_parameter: Callable[[str, Tensor], Tensor],
    new_moments: Callable[[str, Tensor], Tensor],
    params: Params,
    optimizers: Optimizers,
) -> None:
    """Replaces parameters and the state of their optimizers."""
    _update_param_with_optimizer(new_parameter, new_moments, params, optimizers)


@torch.no_grad()
def _inject_noise(params: Params, scaler: float) -> None:
    """Langevin noise on the means, shaped by each Gaussian's covariance and mostly on transparent ones (equation 8)."""
    opacities = torch.sigmoid(params["opacities"].flatten())
    reluctance = torch.sigmoid(100 * ((1 - opacities) - 0.995))
    noise = torch.randn_like(params["means"]) * reluctance[:, None] * scaler
    covariances = covariance_matrices(params["quats"], torch.exp(params["scales"]))
    params["means"].add_(torch.einsum("bij,bj->bi", covariances, noise))
