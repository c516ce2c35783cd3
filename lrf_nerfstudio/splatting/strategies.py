"""Densification: how the number of Gaussians changes while a field is trained.

Two strategies, with the same methods and one implementation for the CPU and CUDA:

- `DefaultStrategy`: Gaussians whose centers are pulled hard in the image are duplicated or split, transparent ones are
  removed ("3D Gaussian Splatting for Real-Time Radiance Field Rendering", Kerbl et al. 2023).
- `MCMCStrategy`: transparent Gaussians move to opaque ones, some are added, and noise makes all of them explore ("3D
  Gaussian Splatting as Markov Chain Monte Carlo", Kheradmand et al. 2024).

Both act at a fixed number of refinements, spread over a part of the run (`Schedule`). Between refinements they read
nothing back from the device. What they remember is a dictionary of tensors, and what they draw comes from PyTorch's
global generator: a checkpoint of both and of the optimizers resumes bit for bit.

Example:
    >>> config = DensificationConfig(max_gaussians=50_000)
    >>> check_options(config)
    >>> strategy = make_strategy(config, steps=3000)
    >>> state = strategy.initialize_state(len(params["means"]), params["means"].device)
    >>> for step in range(3000):
    ...     image, depth, alpha, info = rasterize(..., absgrad=strategy.needs_absgrad(step))
    ...     strategy.before_backward(info)
    ...     sum([loss(image), *strategy.losses(params).values()]).backward()
    ...     ...  # step all optimizers
    ...     strategy.after_backward(params, optimizers, state, step, info, lr=1e-4)
"""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lrf_nerfstudio.splatting.reference import covariance_matrices
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import AtLeastOne, Count, NotNegative, Range

Params = MutableMapping[str, torch.nn.Parameter] | torch.nn.ParameterDict
"""Trainable tensors, N Gaussians along the first axis: `means` [N, 3], `quats` [N, 4] (wxyz), `scales` [N, 3]
(logarithms), `opacities` [N] or [N, 1] (logits), and any others."""
Optimizers = MutableMapping[str, torch.optim.Optimizer]
"""One for each of the `Params`, under the same name."""
State = dict[str, Tensor]
"""What a strategy remembers between steps."""

MAX_COPIES = 51
"""A Gaussian is divided into this many at most in one refinement of the mcmc strategy, as in gsplat."""

MIN_INTERVAL = 5
"""Steps from one refinement to the next at least."""

MAX_CATEGORIES = 1 << 24
"""`torch.multinomial` draws from this many Gaussians at most."""


@dataclass
class DensificationConfig:
    """How Gaussians are added and removed."""

    strategy: Literal["default", "mcmc"] = "default"
    """`default` adds Gaussians where gradients are large and removes transparent ones (3DGS); `mcmc` moves transparent
    ones onto opaque ones and adds noise (3DGS-MCMC)."""
    max_gaussians: Annotated[int, Range(least=4, most=MAX_CATEGORIES)] = 100_000
    """The field never grows beyond this many Gaussians; more seed points than these are thinned out evenly."""
    start: Annotated[float, Range(least=0, below=1)] = 0.1
    """Densification starts after this fraction of the run."""
    stop: Annotated[float, Range(above=0, most=1)] = 0.5
    """Densification stops after this fraction of the run."""
    refinements: AtLeastOne = 12
    """Times that Gaussians are added and removed, spread evenly from start to stop."""
    opacity_threshold: Annotated[float, Range(above=0, below=0.5)] = 0.02
    """Gaussians below this opacity are transparent: the default strategy removes them, mcmc moves them."""
    gradient_threshold: NotNegative = 0.0005
    """The default strategy divides Gaussians in two when the mean norm of the gradient of their projected centers, in
    units of half the picture, is above this. Lower values give more Gaussians, finer fields and longer runs."""
    absgrad: bool = True
    """The default strategy sums the absolute values of that gradient over the pixels (AbsGS) instead of the values,
    which partly cancel. Without it, thresholds are lower: a third or so."""
    split_scale: NotNegative = 0.01
    """The default strategy splits a Gaussian into two smaller ones when its largest standard deviation is above this,
    in units of the scene, and duplicates it otherwise."""
    opacity_resets: Count = 0
    """Times that the default strategy lowers all opacities to twice the threshold, spread evenly over the refinements,
    so that only the Gaussians that are needed become opaque again."""
    mcmc_growth: NotNegative = 0.05
    """Fraction of the Gaussians that mcmc adds at every refinement."""
    mcmc_noise: NotNegative = 5e5
    """Strength of the noise that mcmc adds to the centers, in units of their learning rate."""
    mcmc_opacity_weight: NotNegative = 0.01
    """Weight of the mean opacity in the loss of mcmc, which makes unneeded Gaussians fade."""
    mcmc_scale_weight: NotNegative = 0.01
    """Weight of the mean standard deviation in the loss of mcmc, which makes unneeded Gaussians shrink."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what does not fit the other options; see `check_options`."""
        if self.stop <= self.start:
            yield "stop", f"must be above start, which is {self.start}"
        if self.opacity_resets >= self.refinements:
            yield "opacity_resets", f"must be less than refinements, which are {self.refinements}"


# ---------------------------------------------------------------- schedule


class Schedule(NamedTuple):
    """When a run densifies. Its steps have the numbers 0, 1, ...

    Attributes:
        start: first step whose gradients count.
        every: steps from one refinement to the next, whose gradients decide the latter.
        refinements: how many there are; the last one follows step `start + every * refinements - 1`.
        opacity_resets: how many of them are followed by a reset of the opacities, never the last.
    """

    start: int
    every: int
    refinements: int
    opacity_resets: int = 0

    def measures(self, step: int) -> bool:
        """Return whether the gradients of a step count."""
        return 0 <= step - self.start < self.every * self.refinements

    def refines(self, step: int) -> bool:
        """Return whether a refinement follows a step."""
        return self.measures(step) and (step - self.start + 1) % self.every == 0

    def resets_opacities(self, step: int) -> bool:
        """Return whether the refinement that follows a step ends with a reset of the opacities."""
        if not self.refines(step):
            return False
        between = self.refinements // (self.opacity_resets + 1)
        number, rest = divmod((step - self.start + 1) // self.every, between)
        return rest == 0 and number <= self.opacity_resets


def make_schedule(config: DensificationConfig, steps: int) -> Schedule:
    """Return the schedule of a run of so many steps.

    Everything is relative to the length of the run: short and long runs densify equally often, and in long ones the
    Gaussians have more time in between, and are seen in more views. Runs too short for `MIN_INTERVAL` steps from one
    refinement to the next have fewer.
    """
    start = round(config.start * steps)
    length = round(config.stop * steps) - start
    refinements = min(config.refinements, length // MIN_INTERVAL)
    every = length // max(refinements, 1)
    return Schedule(start, every, refinements, min(config.opacity_resets, max(refinements - 1, 0)))


# ---------------------------------------------------------------- strategies


class Strategy(Protocol):
    """What a training loop calls. All methods leave the state of the strategy to the caller."""

    schedule: Schedule

    def initialize_state(self, n: int, device: torch.device | str) -> State:
        """Return the state in which N Gaussians begin."""
        ...

    def needs_absgrad(self, step: int) -> bool:
        """Return whether the rasterizer must measure absolute gradients at a step."""
        ...

    def before_backward(self, info: dict[str, Any]) -> None:
        """Prepare the backward pass.

        Args:
            info: what `rasterize` returned.
        """
        ...

    def losses(self, params: Params) -> dict[str, Tensor]:
        """Return the terms that the strategy adds to the loss, by name."""
        ...

    def after_backward(
        self, params: Params, optimizers: Optimizers, state: State, step: int, info: dict[str, Any], lr: float
    ) -> None:
        """Measure and, if it is time, refine; called once the optimizers have stepped.

        Args:
            params: changed in place; after a refinement they are other tensors under the same names.
            optimizers: their states follow the Gaussians.
            state: changed in place.
            step: number of the training step, from 0.
            info: what `rasterize` returned at this step, after the backward pass.
            lr: learning rate of the means.
        """
        ...


def make_strategy(config: DensificationConfig, steps: int) -> Strategy:
    """Return the strategy that a configuration asks for, for a run of so many steps."""
    strategy = MCMCStrategy if config.strategy == "mcmc" else DefaultStrategy
    return strategy(config, make_schedule(config, steps))


@dataclass
class DefaultStrategy:
    """Duplicate, split and remove by thresholds (3DGS, section 5.2)."""

    config: DensificationConfig
    schedule: Schedule

    def initialize_state(self, n: int, device: torch.device | str) -> State:
        """Return `gradients` [N], summed over the views that showed a Gaussian, and `views` [N], their number."""
        return {"gradients": torch.zeros(n, device=device), "views": torch.zeros(n, device=device)}

    def needs_absgrad(self, step: int) -> bool:
        return self.config.absgrad and self.schedule.measures(step)

    def before_backward(self, info: dict[str, Any]) -> None:
        info["means2d"].retain_grad()

    def losses(self, params: Params) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def after_backward(
        self, params: Params, optimizers: Optimizers, state: State, step: int, info: dict[str, Any], lr: float
    ) -> None:
        if not self.schedule.measures(step):
            return
        self._measure(state, info)
        if self.schedule.refines(step):
            self._refine(params, optimizers, state)
        if self.schedule.resets_opacities(step):
            from gsplat.strategy.ops import reset_opa

            reset_opa(params, optimizers, {}, value=2 * self.config.opacity_threshold)

    def _measure(self, state: State, info: dict[str, Any]) -> None:
        """Add the gradients of a step, in dense operations on all Gaussians: a list of the visible ones is a read-back.

        The loss is a mean over B cameras and over pixels; times B and in units of half the picture, gradients depend
        neither on B nor on the resolution.
        """
        means2d, visible = info["means2d"], info["radii"] > 0  # [B, N, 2], [B, N]
        gradients = means2d.absgrad if self.config.absgrad else means2d.grad  # [B, N, 2], per pixel
        x, y = (gradients * (info["n_cameras"] / 2)).unbind(-1)
        norms = torch.hypot(x * info["width"], y * info["height"])  # [B, N]
        state["gradients"] += torch.where(visible, norms, 0).sum(dim=0)
        state["views"] += visible.sum(dim=0)

    def _refine(self, params: Params, optimizers: Optimizers, state: State) -> None:
        from gsplat.strategy.ops import duplicate, remove, split

        gradients = state["gradients"] / state["views"].clamp_min(1)
        transparent = torch.sigmoid(params["opacities"]).flatten() < self.config.opacity_threshold
        remove(params, optimizers, {}, transparent)
        n = len(params["means"])
        if n == 0:
            raise UserError(
                f"All Gaussians have become less opaque than {self.config.opacity_threshold} and were removed. "
                "Lower --pipeline.model.densification.opacity-threshold."
            )
        # Duplicating and splitting both add one Gaussian.
        grows = largest(gradients[~transparent], self.config.gradient_threshold, self.config.max_gaussians - n)
        small = torch.exp(params["scales"]).amax(dim=-1) <= self.config.split_scale
        duplicated, splits = grows & small, grows & ~small
        duplicate(params, optimizers, {}, duplicated)
        split(params, optimizers, {}, torch.cat([splits, splits.new_zeros(len(params["means"]) - n)]))
        state.update(self.initialize_state(len(params["means"]), gradients.device))


def largest(values: Tensor, threshold: float, limit: int) -> Tensor:
    """Return a mask [N] of the values [N] above a threshold; of the `limit` largest where there are more."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.topk(max(0, min(limit, len(values)))).indices] = True
    return chosen & (values > threshold)


@dataclass
class MCMCStrategy:
    """Move transparent Gaussians to opaque ones, add some, and add noise to all centers (3DGS-MCMC)."""

    config: DensificationConfig
    schedule: Schedule

    def initialize_state(self, n: int, device: torch.device | str) -> State:
        """Return an empty state: this strategy remembers nothing."""
        return {}

    def needs_absgrad(self, step: int) -> bool:
        return False

    def before_backward(self, info: dict[str, Any]) -> None:
        pass

    def losses(self, params: Params) -> dict[str, Tensor]:
        """Return the mean opacity and the mean standard deviation, weighted (equation 10)."""
        return {
            "mcmc_opacity": self.config.mcmc_opacity_weight * torch.sigmoid(params["opacities"]).mean(),
            "mcmc_scale": self.config.mcmc_scale_weight * torch.exp(params["scales"]).mean(),
        }

    @torch.no_grad()
    def after_backward(
        self, params: Params, optimizers: Optimizers, state: State, step: int, info: dict[str, Any], lr: float
    ) -> None:
        if self.schedule.refines(step):
            n, threshold = len(params["means"]), self.config.opacity_threshold
            relocate(params, optimizers, threshold)
            added = min(int(self.config.mcmc_growth * n), self.config.max_gaussians - n)
            add_copies(params, optimizers, max(added, 0), threshold)
        add_noise(params, lr * self.config.mcmc_noise)


# ---------------------------------------------------------------- the mathematics of 3DGS-MCMC


def compute_relocation(opacities: Tensor, scales: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Return opacity and scales with which M Gaussians in one place look like the single one that they replace.

    Equation 9 of 3DGS-MCMC: the opacity is `1 - (1 - o)^(1 / M)`, the scales are multiplied by
    `o / sum_{i=1..M} sum_{k=0..i-1} binom(i - 1, k) (-1)^k o_new^(k + 1) / sqrt(k + 1)`. The inner sums alternate and
    cancel, so that float32 loses them at large M; they are taken in float64. By the hockey-stick identity the double
    sum is `sum_k binom(M, k + 1) (-1)^k o_new^(k + 1) / sqrt(k + 1)`.

    Args:
        opacities: [N], in (0, 1).
        scales: [N, 3], linear.
        copies: [N], how many Gaussians take the place of each, M, from 1 to `MAX_COPIES`.

    Returns:
        New opacities [N] and scales [N, 3].
    """
    old, m = opacities.double(), copies.double()[:, None]
    new = -torch.expm1(torch.log1p(-old) / copies)
    terms = torch.arange(1, MAX_COPIES + 1, dtype=torch.float64, device=opacities.device)  # k + 1
    log_binomials = torch.lgamma(m + 1) - torch.lgamma(terms + 1) - torch.lgamma((m - terms + 1).clamp_min(1))
    signs = 1 - 2 * ((terms - 1) % 2)
    summands = signs * torch.exp(log_binomials + terms * torch.log(new)[:, None]) / torch.sqrt(terms)  # [N, MAX_COPIES]
    denominators = (summands * (terms <= m)).sum(dim=-1)
    return new.to(opacities), (scales * (old / denominators)[:, None]).to(scales)


@torch.no_grad()
def relocate(params: Params, optimizers: Optimizers, opacity_threshold: float) -> None:
    """Move Gaussians at or below a threshold of opacity onto others, drawn in proportion to opacity."""
    opacities = torch.sigmoid(params["opacities"]).flatten()
    dead = torch.nonzero(opacities <= opacity_threshold).flatten()
    if 0 < len(dead) < len(opacities):
        living = torch.where(opacities > opacity_threshold, opacities, 0)
        chosen = torch.multinomial(living, len(dead), replacement=True)
        _divide(params, optimizers, chosen, dead, opacity_threshold)


@torch.no_grad()
def add_copies(params: Params, optimizers: Optimizers, count: int, opacity_threshold: float) -> None:
    """Add so many Gaussians in the places of others, drawn in proportion to opacity; none gets below the threshold."""
    if count > 0:
        opacities = torch.sigmoid(params["opacities"]).flatten()
        chosen = torch.multinomial(opacities, count, replacement=True)
        new = torch.arange(len(opacities), len(opacities) + count, device=opacities.device)
        _divide(params, optimizers, chosen, new, opacity_threshold, added=count)


def _divide(
    params: Params, optimizers: Optimizers, chosen: Tensor, copies: Tensor, min_opacity: float, added: int = 0
) -> None:
    """Divide Gaussians among themselves and copies of them; all forget their optimizers' moments.

    Args:
        params: changed in place.
        optimizers: changed in place.
        chosen: [M], indices of the Gaussians to divide, with repetition.
        copies: [M], indices of the copies, none of which is among `chosen`.
        min_opacity: no opacity gets smaller than this.
        added: how many Gaussians are added at the end; their indices are among `copies`.
    """
    from gsplat.strategy.ops import _update_param_with_optimizer

    logits = params["opacities"][chosen]
    shares = (torch.bincount(chosen, minlength=len(params["means"]))[chosen] + 1).clamp_max(MAX_COPIES)  # [M]
    opacities, scales = compute_relocation(torch.sigmoid(logits).flatten(), torch.exp(params["scales"][chosen]), shares)
    opacities = opacities.clamp(min_opacity, 1 - torch.finfo(torch.float32).eps)
    divided = {"opacities": torch.logit(opacities).view_as(logits), "scales": torch.log(scales)}

    def new_values(name: str, values: Tensor) -> torch.nn.Parameter:
        values = torch.cat([values, values.new_empty(added, *values.shape[1:])])
        if name in divided:
            values[chosen] = divided[name]
        values[copies] = values[chosen]
        return torch.nn.Parameter(values)

    def new_moments(_key: str, moments: Tensor) -> Tensor:
        moments = torch.cat([moments, moments.new_empty(added, *moments.shape[1:])])
        moments[chosen] = 0
        moments[copies] = 0
        return moments

    _update_param_with_optimizer(new_values, new_moments, params, optimizers)


@torch.no_grad()
def add_noise(params: Params, strength: float) -> None:
    """Add Langevin noise to the means, shaped by the covariances and mostly on transparent Gaussians (equation 8)."""
    opacities = torch.sigmoid(params["opacities"]).flatten()
    reluctance = torch.sigmoid(100 * ((1 - opacities) - 0.995))
    noise = torch.randn_like(params["means"]) * (strength * reluctance)[:, None]
    covariances = covariance_matrices(params["quats"], torch.exp(params["scales"]))  # [N, 3, 3]
    params["means"].add_(torch.einsum("nij,nj->ni", covariances, noise))
