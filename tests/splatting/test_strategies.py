"""Densification: when it happens, what it does to the Gaussians, and that it neither waits for a device nor forgets."""

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
from gaussian_scenes import random_scene
from test_gsplat_agreement import HEIGHT, WIDTH, render, trainable
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from lrf_nerfstudio.splatting import Gaussians, RasterSettings, rasterize
from lrf_nerfstudio.splatting.reference import covariance_matrices
from lrf_nerfstudio.splatting.strategies import (
    DefaultStrategy,
    DensificationConfig,
    MCMCStrategy,
    Schedule,
    add_copies,
    compute_relocation,
    largest,
    make_schedule,
    make_strategy,
    relocate,
)
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import check_options

EACH_STEP = Schedule(start=0, every=1, refinements=1000)


def default_strategy(schedule: Schedule = EACH_STEP, **options: Any) -> DefaultStrategy:
    return DefaultStrategy(DensificationConfig(**({"absgrad": False} | options)), schedule)


def mcmc_strategy(schedule: Schedule = EACH_STEP, **options: Any) -> MCMCStrategy:
    return MCMCStrategy(DensificationConfig(strategy="mcmc", **options), schedule)


def gaussians(n: int, opacity: float = 0.5, scale: float = 0.1):
    """N different Gaussians of the same opacity and size, and optimizers whose moments are not zero."""
    params, optimizers = trainable(random_scene(n=n))
    params["opacities"].data.fill_(math.log(opacity / (1 - opacity)))
    params["scales"].data.fill_(math.log(scale))
    for name, optimizer in optimizers.items():
        params[name].grad = torch.ones_like(params[name])
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
    return params, optimizers


def pulled(gradients: torch.Tensor, visible: torch.Tensor | None = None, absolute: bool = False) -> dict[str, Any]:
    """What a rasterizer reports of a 2 x 2 grid, where a gradient in half pictures is one in pixels.

    Args:
        gradients: [B, N], norms of the centers' gradients.
        visible: [B, N]; None: all are.
        absolute: whether these are the absolute gradients; the signed ones cancel then.
    """
    n_cameras = len(gradients)
    means2d = torch.zeros(*gradients.shape, 2, requires_grad=True)
    directions = torch.tensor([0.6, -0.8]) / n_cameras
    means2d.grad = torch.zeros_like(means2d) if absolute else gradients[..., None] * directions
    if absolute:
        means2d.absgrad = gradients[..., None] * directions.abs()
    radii = torch.ones(gradients.shape, dtype=torch.int32) if visible is None else visible.int()
    return {"means2d": means2d, "radii": radii, "width": 2, "height": 2, "n_cameras": n_cameras}


def after_backward(strategy, params, optimizers, state, step: int, info: dict[str, Any] | None = None, lr: float = 0.0):
    """One step's end, after which parameters and optimizers still belong together."""
    strategy.after_backward(params, optimizers, state, step, info or {}, lr)
    n = len(params["means"])
    for name, optimizer in optimizers.items():
        assert optimizer.param_groups[0]["params"][0] is params[name]
        for moments in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[params[name]][moments].shape == params[name].shape
        assert len(params[name]) == n
    assert all(len(value) == n for value in state.values())


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_gaussians", 3),
        ("max_gaussians", 1 << 25),
        ("start", -0.1),
        ("stop", 1.1),
        ("stop", 0.1),  # not after start
        ("refinements", 0),
        ("opacity_threshold", 0.0),
        ("opacity_threshold", 0.6),
        ("gradient_threshold", -1e-3),
        ("gradient_threshold", math.nan),
        ("split_scale", -1.0),
        ("opacity_resets", -1),
        ("opacity_resets", 12),  # as many as refinements
        ("mcmc_growth", -0.1),
        ("mcmc_noise", math.inf),
        ("mcmc_opacity_weight", -1.0),
        ("mcmc_scale_weight", -1.0),
    ],
)
def test_options_out_of_range_are_named(option, value):
    config = DensificationConfig(start=0.1, refinements=12)
    check_options(config)
    setattr(config, option, value)
    name = option.replace("_", "-")
    with pytest.raises(UserError, match=rf"^--pipeline\.model\.densification\.{name} must be .* it is {value}\.$"):
        check_options(config, "--pipeline.model.densification.")


def test_the_configuration_chooses_the_strategy():
    assert isinstance(make_strategy(DensificationConfig(strategy="default"), 100), DefaultStrategy)
    assert isinstance(make_strategy(DensificationConfig(strategy="mcmc"), 100), MCMCStrategy)


# ---------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("steps", [200, 3000, 30_000])
def test_runs_of_any_length_densify_equally_often(steps):
    schedule = make_schedule(DensificationConfig(start=0.1, stop=0.5, refinements=12), steps)
    refined = [step for step in range(steps) if schedule.refines(step)]
    measured = [step for step in range(steps) if schedule.measures(step)]
    assert len(refined) == 12
    assert measured == list(range(measured[0], refined[-1] + 1))  # all that is measured is used
    assert measured[0] == 0.1 * steps
    assert 0.43 * steps < refined[-1] < 0.5 * steps
    assert {later - earlier for earlier, later in itertools.pairwise(refined)} == {len(measured) // 12}


@pytest.mark.parametrize(("steps", "refinements"), [(1, 0), (10, 0), (12, 1), (25, 2), (100, 8), (150, 12)])
def test_the_shortest_runs_densify_less(steps, refinements):
    schedule = make_schedule(DensificationConfig(start=0.1, stop=0.5, refinements=12), steps)
    assert sum(schedule.refines(step) for step in range(steps)) == refinements
    assert schedule.every >= 5 or refinements == 0


def test_start_stop_and_refinements_move_the_schedule():
    config = DensificationConfig(start=0.2, stop=0.6, refinements=4)
    assert make_schedule(config, 1000) == Schedule(start=200, every=100, refinements=4)


@pytest.mark.parametrize(("resets", "after"), [(0, []), (1, [6]), (2, [4, 8]), (3, [3, 6, 9]), (4, [2, 4, 6, 8])])
def test_resets_are_spread_and_never_the_last_thing(resets, after):
    schedule = Schedule(start=7, every=5, refinements=12, opacity_resets=resets)
    steps = [step for step in range(200) if schedule.resets_opacities(step)]
    assert steps == [7 + 5 * number - 1 for number in after]


# ---------------------------------------------------------------------------------------------------- default


def test_thresholds_decide_who_is_removed_duplicated_and_split():
    params, optimizers = gaussians(5, scale=0.05)
    params["opacities"].data[0] = math.log(0.01 / 0.99)
    params["scales"].data[2, 1] = math.log(0.4)
    before = {name: value.detach().clone() for name, value in params.items()}
    strategy = default_strategy(gradient_threshold=0.1, opacity_threshold=0.02, split_scale=0.3)
    state = strategy.initialize_state(5, "cpu")
    # 0 is transparent, 1 small and 2 large and both pulled, 3 hardly pulled, 4 not at all.
    after_backward(strategy, params, optimizers, state, 0, pulled(torch.tensor([[1.0, 0.2, 0.2, 0.05, 0.0]])))
    assert len(params["means"]) == 6
    kept = [1, 3, 4, 1]  # and the halves of 2
    for name, values in params.items():
        torch.testing.assert_close(values[:4].detach(), before[name][kept], rtol=0, atol=0)
    torch.testing.assert_close(params["scales"][4:].detach(), (before["scales"][[2, 2]] - math.log(1.6)))
    assert (params["means"][4] != params["means"][5]).all()
    moments = optimizers["means"].state[params["means"]]["exp_avg"]
    assert (moments[:3] != 0).all() and (moments[3:] == 0).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 8),
        ({"gradient_threshold": 0.3}, 6),
        ({"max_gaussians": 7}, 7),
        ({"max_gaussians": 4}, 4),
        ({"absgrad": True}, 4),  # the absolute gradients are zero here
    ],
)
def test_options_change_the_growth(options, expected):
    params, optimizers = gaussians(4)
    strategy = default_strategy(**({"gradient_threshold": 0.1} | options))
    info = pulled(torch.tensor([[0.2, 0.5, 0.2, 0.5]]))
    info["means2d"].absgrad = torch.zeros(1, 4, 2)
    after_backward(strategy, params, optimizers, strategy.initialize_state(4, "cpu"), 0, info)
    assert len(params["means"]) == expected


def test_absolute_gradients_count_where_signed_ones_cancel():
    params, optimizers = gaussians(3)
    strategy = default_strategy(absgrad=True, gradient_threshold=0.1, split_scale=1.0)
    info = pulled(torch.tensor([[0.0, 0.5, 0.0]]), absolute=True)
    after_backward(strategy, params, optimizers, strategy.initialize_state(3, "cpu"), 0, info)
    assert torch.equal(params["means"][3], params["means"][1])
    schedule = Schedule(start=2, every=3, refinements=2)
    assert [default_strategy(schedule, absgrad=True).needs_absgrad(step) for step in (1, 2, 7, 8)] == [0, 1, 1, 0]
    assert not default_strategy(schedule, absgrad=False).needs_absgrad(2)


def test_growth_is_bounded_by_the_largest_gradients():
    params, optimizers = gaussians(50)
    gradients = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.5
    before = params["means"].detach().clone()
    strategy = default_strategy(gradient_threshold=0.1, split_scale=1.0, max_gaussians=57)
    state = strategy.initialize_state(50, "cpu")
    after_backward(strategy, params, optimizers, state, 0, pulled(gradients[None]))
    assert torch.equal(params["means"][50:], before[gradients.topk(7).indices.sort().values])
    after_backward(strategy, params, optimizers, state, 1, pulled(torch.ones(1, 57)))
    assert len(params["means"]) == 57
    # Who is over the bound already, after resuming with a smaller one, stays and does not grow.
    strategy = default_strategy(gradient_threshold=0.1, max_gaussians=20)
    after_backward(strategy, params, optimizers, state, 2, pulled(torch.ones(1, 57)))
    assert len(params["means"]) == 57


@pytest.mark.parametrize("limit", [-2, 0, 1, 2, 9])
def test_largest(limit):
    values = torch.tensor([0.3, 0.9, 0.1, 0.5])
    expected = {-2: [], 0: [], 1: [1], 2: [1, 3], 9: [0, 1, 3]}[limit]
    assert torch.nonzero(largest(values, 0.2, limit)).flatten().tolist() == expected


def test_gradients_are_means_over_the_views_that_show_a_gaussian():
    """Zero gradients of views that look elsewhere do not count."""
    strategy = default_strategy(Schedule(start=0, every=10, refinements=1))
    params, optimizers = gaussians(3)
    state = strategy.initialize_state(3, "cpu")
    visible = torch.tensor([[1, 1, 0], [0, 1, 0]])
    after_backward(
        strategy, params, optimizers, state, 0, pulled(torch.tensor([[0.4, 0.2, 0.0]] * 2) * visible, visible)
    )
    after_backward(strategy, params, optimizers, state, 1, pulled(torch.tensor([[0.0, 0.5, 0.0]])))
    torch.testing.assert_close(state["gradients"], torch.tensor([0.4, 0.9, 0.0]))
    assert state["views"].tolist() == [2, 3, 1]
    start = default_strategy(Schedule(start=5, every=10, refinements=1))
    after_backward(start, params, optimizers, state, 4, pulled(torch.ones(1, 3)))
    assert state["views"].tolist() == [2, 3, 1]  # nothing is measured before the start


@pytest.mark.parametrize("absgrad", [False, True])
def test_default_strategy_agrees_with_gsplat(absgrad):
    """Statistics of rendered views, and what becomes of parameters and moments."""
    from gsplat.strategy import DefaultStrategy as Gsplat

    scene = random_scene(n=400, width=WIDTH, height=HEIGHT, n_cameras=2)
    params, optimizers = trainable(scene)
    hidden = render(params, scene)[3]["radii"].flatten(1).amax(0) == 0  # only these are transparent: none of them grows
    params["opacities"].data[hidden] = -8.0
    theirs = Gsplat(
        refine_start_iter=0, refine_every=4, reset_every=1000, grow_grad2d=2.0, grow_scale3d=0.15, absgrad=absgrad
    )
    ours = default_strategy(
        Schedule(start=1, every=4, refinements=1),
        gradient_threshold=2.0,
        split_scale=0.15,
        absgrad=absgrad,
        opacity_threshold=theirs.prune_opa,
    )
    state, their_state = ours.initialize_state(400, "cpu"), theirs.initialize_state()
    for step in range(1, 5):
        image, *_, info = render(params, scene, absgrad=ours.needs_absgrad(step))
        ours.before_backward(info)
        ((image - torch.rand(2, HEIGHT, WIDTH, 4)) ** 2).sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step == 4:
            their_params, their_optimizers = copy.deepcopy((params, optimizers))
            torch.manual_seed(3)
            theirs.step_post_backward(their_params, their_optimizers, their_state, step, info)
            torch.manual_seed(3)
        else:
            theirs.step_post_backward(params, optimizers, their_state, step, info)
        ours.after_backward(params, optimizers, state, step, info, lr=0.0)
        if step < 4:
            torch.testing.assert_close(state["gradients"], their_state["grad2d"])
            assert torch.equal(state["views"], their_state["count"])
    n = len(params["means"])
    assert n not in (400, 400 - int(hidden.sum()))
    for name in params:
        assert torch.equal(params[name], their_params[name]), name
        moments, their_moments = optimizers[name].state[params[name]], their_optimizers[name].state[their_params[name]]
        assert torch.equal(moments["exp_avg"], their_moments["exp_avg"]), name


@pytest.mark.parametrize("resets", [0, 1])
def test_opacities_are_reset_when_asked_for_and_only_then(resets):
    params, optimizers = gaussians(4, opacity=0.9)
    config = DensificationConfig(absgrad=False, opacity_resets=resets, opacity_threshold=0.02, refinements=4)
    strategy = make_strategy(config, 100)
    state = strategy.initialize_state(4, "cpu")
    opacities = []
    for step in range(100):
        after_backward(strategy, params, optimizers, state, step, pulled(torch.zeros(1, 4)))
        opacities.append(torch.sigmoid(params["opacities"]).max().item())
    assert opacities[28] == pytest.approx(0.9)  # the second of four refinements follows step 29
    assert opacities[29] == opacities[-1] == pytest.approx(0.04 if resets else 0.9)
    moments = optimizers["opacities"].state[params["opacities"]]["exp_avg"]
    assert (moments == 0).all() if resets else (moments != 0).all()


def test_a_field_that_loses_all_gaussians_says_why():
    params, optimizers = gaussians(4, opacity=0.1)
    strategy = default_strategy(opacity_threshold=0.2)
    with pytest.raises(UserError, match=r"--pipeline\.model\.densification\.opacity-threshold"):
        after_backward(strategy, params, optimizers, strategy.initialize_state(4, "cpu"), 0, pulled(torch.ones(1, 4)))


# ---------------------------------------------------------------------------------------------------- mcmc


def test_relocation_follows_equation_9():
    opacities = torch.tensor([0.2, 0.7, 0.95, 0.999, 0.5], dtype=torch.float64)
    scales = torch.rand(5, 3, dtype=torch.float64) + 0.1
    copies = torch.tensor([1, 2, 5, 51, 17])
    new_opacities, new_scales = compute_relocation(opacities, scales, copies)
    for j in range(5):
        n, opacity = int(copies[j]), float(opacities[j])
        new = 1 - (1 - opacity) ** (1 / n)
        total = sum(
            math.comb(i - 1, k) * (-1) ** k * new ** (k + 1) / math.sqrt(k + 1)
            for i in range(1, n + 1)
            for k in range(i)
        )
        assert new_opacities[j].item() == pytest.approx(new, rel=1e-9)
        torch.testing.assert_close(new_scales[j], scales[j] * opacity / total, rtol=1e-8, atol=0)
    torch.testing.assert_close(new_scales[0], scales[0], rtol=1e-15, atol=0)  # alone, nothing changes


@pytest.mark.parametrize("copies", [2, 3, 6])
def test_relocation_preserves_what_is_rendered(copies):
    """M equal Gaussians with the new opacity and scale have the old one's center and its integral along a line.

    Equation 9 demands just that; over an image it leaves a difference, far smaller than that of plain copies.
    """
    one = {
        "means": torch.zeros(1, 3),
        "quats": torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        "scales": torch.tensor([[0.15, 0.1, 0.12]]),
        "opacities": torch.tensor([0.9]),
    }
    opacities, scales = compute_relocation(one["opacities"], one["scales"], torch.tensor([copies]))
    plain = {name: value.repeat(copies, *[1] * (value.ndim - 1)) for name, value in one.items()}
    divided = plain | {"opacities": opacities.repeat(copies), "scales": scales.repeat(copies, 1)}
    before, after, naive = (rendered_alpha(gaussians) for gaussians in (one, divided, plain))
    center = before.shape[0] // 2
    torch.testing.assert_close(after[center, center], before[center, center], rtol=1e-3, atol=0)
    torch.testing.assert_close(after[center].sum(), before[center].sum(), rtol=0.02, atol=0)
    assert (after - before).abs().sum() < 0.4 * (naive - before).abs().sum()


def rendered_alpha(gaussians: dict[str, torch.Tensor], size: int = 201) -> torch.Tensor:
    """Alpha [size, size] seen from a distance of 10, without dilation."""
    viewmat = torch.eye(4)
    viewmat[2, 3] = 10.0
    K = torch.tensor([[1500.0, 0.0, size / 2], [0.0, 1500.0, size / 2], [0.0, 0.0, 1.0]])
    whole = Gaussians(**gaussians, features=torch.ones(len(gaussians["means"]), 1))
    return rasterize(whole, viewmat[None], K[None], RasterSettings(size, size, eps2d=0.0)).alpha[0, :, :, 0]


def test_transparent_gaussians_move_onto_opaque_ones():
    params, optimizers = gaussians(10, opacity=0.01)
    params["opacities"].data[3:] = math.log(0.6 / 0.4)
    before = params["means"].detach().clone()
    torch.manual_seed(0)
    relocate(params, optimizers, opacity_threshold=0.02)
    assert torch.equal(params["means"][3:], before[3:])
    total = 0
    for index in range(3, 10):
        here = (params["means"] == before[index]).all(dim=-1)
        count = int(here.sum())
        expected = compute_relocation(torch.tensor([0.6]), torch.full((1, 3), 0.1), torch.tensor([count]))
        torch.testing.assert_close(torch.sigmoid(params["opacities"][here]).flatten(), expected[0].expand(count))
        torch.testing.assert_close(torch.exp(params["scales"][here]), expected[1].expand(count, 3))
        moments = optimizers["means"].state[params["means"]]["exp_avg"][here]
        assert (moments == 0).all() if count > 1 else (moments != 0).all()
        total += count
    assert total == 10


def test_copies_are_drawn_in_proportion_to_opacity():
    params, optimizers = gaussians(2, opacity=0.2)
    params["opacities"].data[1] = math.log(0.8 / 0.2)
    before = params["means"].detach().clone()
    torch.manual_seed(0)
    add_copies(params, optimizers, 10_000, opacity_threshold=0.005)
    assert len(params["means"]) == 10_002
    share = (params["means"] == before[1]).all(dim=-1).float().mean().item()
    assert share == pytest.approx(0.8, abs=0.02)
    assert torch.sigmoid(params["opacities"]).min() >= 0.005 - 1e-6  # divided by thousands, but never dead
    for name, optimizer in optimizers.items():
        assert (optimizer.state[params[name]]["exp_avg"] == 0).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"mcmc_growth": 0.05}, 105), ({"mcmc_growth": 0.5}, 150), ({"mcmc_growth": 0.5, "max_gaussians": 120}, 120)],
)
def test_mcmc_grows_by_a_fraction_up_to_the_bound(options, expected):
    params, optimizers = gaussians(100)
    after_backward(mcmc_strategy(**options), params, optimizers, {}, 0)
    assert len(params["means"]) == expected


def test_mcmc_moves_what_is_below_the_threshold():
    for threshold, moved in ((0.1, 0), (0.3, 5)):
        params, optimizers = gaussians(20, opacity=0.9)
        params["opacities"].data[:5] = math.log(0.2 / 0.8)
        before = params["means"].detach().clone()
        strategy = mcmc_strategy(opacity_threshold=threshold, mcmc_growth=0.0)
        after_backward(strategy, params, optimizers, {}, 0)
        assert (params["means"] != before).any(dim=-1).sum() == moved


def test_noise_has_the_covariance_of_the_paper():
    """Sigma eta sigmoid(-k (o - 0.005)) with eta ~ N(0, lr * noise): covariance Sigma Sigma^T times its square."""
    torch.manual_seed(0)
    n = 40_000
    scene = random_scene(n=1)
    params, optimizers = trainable(scene)
    for name in params:
        params[name] = torch.nn.Parameter(params[name].detach().repeat(n, *[1] * (params[name].ndim - 1)))
    params["opacities"].data.fill_(math.log(0.004 / 0.996))
    start = params["means"].detach().clone()
    between = Schedule(start=0, every=10, refinements=1)
    mcmc_strategy(between, mcmc_noise=5e3).after_backward(params, optimizers, {}, 1, {}, lr=1e-3)
    moved = (params["means"].detach() - start).double()
    covariance = covariance_matrices(scene["quats"], scene["scales"])[0]
    strength = 5.0 / (1 + math.exp(-100 * (0.996 - 0.995)))
    expected = covariance @ covariance * strength**2
    assert moved.mean(0).abs().max() < 0.05 * expected.diagonal().max().sqrt()
    assert (moved.T @ moved / n - expected).abs().max() < 0.03 * expected.abs().max()


def test_only_mcmc_adds_to_the_loss():
    params, _ = gaussians(7, opacity=0.25, scale=0.3)
    assert default_strategy().losses(params) == {}
    losses = mcmc_strategy(mcmc_opacity_weight=2.0, mcmc_scale_weight=10.0).losses(params)
    assert {name: pytest.approx(value.item()) for name, value in losses.items()} == {
        "mcmc_opacity": 0.5,
        "mcmc_scale": 3.0,
    }
    sum(losses.values()).backward()
    assert (params["opacities"].grad > 0).all() and (params["scales"].grad > 0).all()


# ---------------------------------------------------------------------------------------------------- both


class Run:
    """A small field that is fitted to a picture of itself, shifted by a pixel."""

    def __init__(self, strategy) -> None:
        self.scene = random_scene(n=300, width=WIDTH, height=HEIGHT)
        self.params, self.optimizers = trainable(self.scene)
        self.params["opacities"].data[:40] = -7.0
        self.target = render(self.params, self.scene)[0].detach().roll(1, dims=2)
        self.strategy, self.state = strategy, strategy.initialize_state(300, "cpu")
        self.losses: list[float] = []

    def train(self, steps: range) -> None:
        for step in steps:
            image, _, _, info = render(self.params, self.scene, absgrad=self.strategy.needs_absgrad(step))
            self.strategy.before_backward(info)
            loss = ((image - self.target) ** 2).mean()
            sum([loss, *self.strategy.losses(self.params).values()]).backward()
            for optimizer in self.optimizers.values():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            after_backward(self.strategy, self.params, self.optimizers, self.state, step, info, lr=1e-3)
            self.losses.append(loss.item())

    def checkpoint(self) -> bytes:
        file = io.BytesIO()
        saved = {
            "params": dict(self.params),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "state": self.state,
            "rng": torch.get_rng_state(),
        }
        torch.save(saved, file)
        return file.getvalue()

    def load(self, checkpoint: bytes) -> None:
        saved = torch.load(io.BytesIO(checkpoint), weights_only=True)
        for name, values in saved["params"].items():
            self.params[name] = torch.nn.Parameter(values)
            self.optimizers[name] = torch.optim.Adam([self.params[name]], lr=1e-3, eps=1e-15)
            self.optimizers[name].load_state_dict(saved["optimizers"][name])
        self.state = saved["state"]
        torch.set_rng_state(saved["rng"])


STRATEGIES = {
    "default": {"strategy": "default", "gradient_threshold": 0.003, "absgrad": False, "opacity_resets": 1},
    "absgrad": {"strategy": "default", "gradient_threshold": 0.05, "absgrad": True, "max_gaussians": 330},
    "mcmc": {"strategy": "mcmc", "mcmc_noise": 10.0, "max_gaussians": 330},
}


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_training_resumes_bit_for_bit(options):
    config = DensificationConfig(**options, start=0.0, stop=0.9, refinements=4)
    check_options(config)
    torch.manual_seed(0)
    straight = Run(make_strategy(config, 40))
    straight.train(range(10))
    checkpoint = straight.checkpoint()  # in the middle of an interval
    assert not straight.strategy.schedule.refines(9)
    straight.train(range(10, 40))
    assert len(straight.params["means"]) == 330 if "max_gaussians" in options else 300 < len(straight.params["means"])
    assert all(torch.isfinite(value).all() for value in straight.params.values())

    resumed = Run(make_strategy(config, 40))
    resumed.load(checkpoint)
    resumed.train(range(10, 40))
    assert resumed.losses == straight.losses[10:]
    for name in straight.params:
        assert torch.equal(resumed.params[name], straight.params[name]), name
    assert resumed.state.keys() == straight.state.keys()
    assert all(torch.equal(resumed.state[name], straight.state[name]) for name in straight.state)


def on_fake_cuda(n: int, n_cameras: int):
    """Parameters, and what the rasterizer reports, on a GPU that refuses to be read."""
    params = {
        "means": torch.nn.Parameter(torch.empty(n, 3, device="cuda")),
        "scales": torch.nn.Parameter(torch.empty(n, 3, device="cuda")),
        "quats": torch.nn.Parameter(torch.empty(n, 4, device="cuda")),
        "opacities": torch.nn.Parameter(torch.empty(n, 1, device="cuda")),
    }
    means2d = torch.empty(n_cameras, n, 2, device="cuda", requires_grad=True)
    means2d.grad = means2d.absgrad = torch.empty(n_cameras, n, 2, device="cuda")
    radii = torch.empty(n_cameras, n, dtype=torch.int32, device="cuda")
    info = {"means2d": means2d, "radii": radii, "width": 23, "height": 17, "n_cameras": n_cameras}
    return params, info | {"gaussian_ids": None}


@pytest.mark.parametrize("n_cameras", [1, 3])
@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_no_step_between_refinements_waits_for_a_gpu(options, n_cameras):
    with FakeTensorMode():
        params, info = on_fake_cuda(100, n_cameras)
        strategy = make_strategy(DensificationConfig(**options), 3000)
        state = strategy.initialize_state(100, "cuda")
        for step in (0, 400, 2999):  # before, within and after densification
            assert not strategy.schedule.refines(step)
            strategy.needs_absgrad(step)
            strategy.before_backward(info)
            losses = strategy.losses(params)
            strategy.after_backward(params, {}, state, step, info, lr=1e-4)
            assert all(loss.device.type == "cuda" for loss in losses.values())
        assert strategy.schedule.measures(400)
        assert all(value.device.type == "cuda" and value.shape == (100,) for value in state.values())


def test_the_fake_gpu_notices_read_backs():
    from gsplat.strategy import DefaultStrategy as Gsplat

    with FakeTensorMode():
        params, info = on_fake_cuda(100, 1)
        with pytest.raises(DynamicOutputShapeException):
            Gsplat()._update_state(params, Gsplat().initialize_state(), info)
