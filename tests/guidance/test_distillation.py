"""What each method of score distillation must give, derived for denoisers that know the answer."""

import itertools
import math

import pytest
import torch
from oracle import Oracle, SamePrompt, embed_names, stable_diffusion_schedule

from lrf_nerfstudio.guidance import Conditions, GuidanceConfig, PromptConfig, ScoreGuidance, ViewPrompts
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import check_options

KINDS = ("sds", "csd", "ism")
ALPHAS = stable_diffusion_schedule()
A, B = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
NOTHING = torch.zeros(1, 1, 2)


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(conditions: torch.Tensor, count: int) -> torch.Tensor:
    return conditions.expand(count, -1, -1)


def ratio(t: torch.Tensor) -> torch.Tensor:
    """Return sqrt(a / (1 - a)) [B, 1, 1, 1]."""
    return (ALPHAS[t] / (1 - ALPHAS[t])).sqrt().view(-1, 1, 1, 1)


def guidance(denoiser, prompts=None, **options) -> ScoreGuidance:
    return ScoreGuidance(GuidanceConfig(**options), denoiser, prompts or SamePrompt())


T = torch.tensor([20, 300, 700])
WEIGHTS = {
    "variance": lambda a: 1 - a,
    "latent-nerf": lambda a: a.sqrt() * (1 - a),
    "noise-to-signal": lambda a: ((1 - a) / a).sqrt(),
    "uniform": torch.ones_like,
}


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_sds_points_from_the_truth_to_the_latents(weighting, scale):
    """The noise cancels: w sqrt(a / (1 - a)) (x - z), whatever was drawn and whatever the scale."""
    z, x = latents(1, 3, 4, 5, 6), latents(3, 4, 5, 6, seed=1)
    guide = guidance(Oracle(z), weighting=weighting, guidance_scale=scale)
    gradient = guide.gradient(x, T, SamePrompt().conditions([0.0] * 3, [0.0] * 3), progress=0.0)
    weight = WEIGHTS[weighting](ALPHAS[T]).view(-1, 1, 1, 1)
    torch.testing.assert_close(gradient, weight * ratio(T) * (x - z[0]), rtol=1e-3, atol=1e-3)


def test_weighted_by_noise_to_signal_the_gradient_is_the_distance():
    z, x = latents(1, 3, 4, 5, 6), latents(3, 4, 5, 6, seed=1)
    guide = guidance(Oracle(z), weighting="noise-to-signal")
    gradient = guide.gradient(x, T, SamePrompt().conditions([0.0] * 3, [0.0] * 3), progress=0.0)
    torch.testing.assert_close(gradient, x - z[0], rtol=1e-3, atol=1e-3)


def test_classifier_free_guidance_goes_beyond_the_prompt_away_from_the_negative_prompt():
    """As if the truth were z_B + s (z_A - z_B) for the prompt A and the negative prompt B."""
    z, x = latents(2, 3, 4, 5, 6), latents(3, 4, 5, 6, seed=1)
    conditions = Conditions(of(A, 3), of(B, 3), of(NOTHING, 3))
    guide = guidance(Oracle(z), weighting="noise-to-signal", guidance_scale=7.5)
    target = z[1] + 7.5 * (z[0] - z[1])
    torch.testing.assert_close(guide.gradient(x, T, conditions, 0.0), x - target, rtol=1e-3, atol=1e-2)


def test_csd_is_the_difference_of_two_classifiers():
    """W s sqrt(a / (1 - a)) (z_B - z_A): no noise, and no matter where the latents are."""
    z = latents(2, 3, 4, 5, 6)
    conditions = Conditions(of(A, 3), of(B, 3), of(NOTHING, 3))
    guide = guidance(Oracle(z), kind="csd", weighting="noise-to-signal", guidance_scale=3.0)
    for seed in (1, 2):
        gradient = guide.gradient(latents(3, 4, 5, 6, seed=seed), T, conditions, 0.0)
        torch.testing.assert_close(gradient, 3.0 * (z[1] - z[0]), rtol=1e-3, atol=1e-2)


def test_csd_against_a_prior():
    """In the mean over the noise, s r [(x - z) - (1 - a) x / (a spread^2 + 1 - a)] with r = sqrt(a / (1 - a))."""
    z, x = latents(1, 1, 4, 4, 4), latents(1, 4, 4, 4, seed=1)
    count, spread = 20000, 2.0
    t = torch.full((count,), 400)
    conditions = Conditions(torch.ones(count, 1, 1), torch.zeros(count, 1, 1), torch.zeros(count, 1, 1))
    guide = guidance(Oracle(z, spread), kind="csd", weighting="uniform", guidance_scale=1.0)
    gradient = guide.gradient(x.expand(count, -1, -1, -1), t, conditions, 0.0, torch.Generator().manual_seed(0))
    a = ALPHAS[400]
    expected = (a / (1 - a)).sqrt() * ((x[0] - z[0, 0]) - (1 - a) * x[0] / (a * spread**2 + 1 - a))
    noise = a * spread**2 / (a * spread**2 + 1 - a)  # its standard deviation in one draw
    assert (gradient.mean(dim=0) - expected).abs().max() < 5 * noise / math.sqrt(count)
    assert gradient.std(dim=0).mean() == pytest.approx(float(noise), rel=0.02)


def test_ism_on_the_inverted_path():
    """Against a prior of spread 1, a DDIM step from a to a' turns x to x cos(angle' - angle), where cos^2(angle) = a.

    The noise of the prior is sqrt(1 - a) x_t, and that of the prompt (x_t - sqrt(a) z) / sqrt(1 - a).
    """
    z, x = latents(1, 3, 4, 5, 6), latents(3, 4, 5, 6, seed=1)
    ones, zeros = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
    guide = guidance(Oracle(z), kind="ism", weighting="uniform", guidance_scale=7.5, ism_steps=3, ism_interval=(60, 60))
    gradient = guide.gradient(x, T, Conditions(ones, zeros, zeros), progress=0.0)
    for index, t in enumerate(T.tolist()):
        s = max(0, t - 60)
        levels = [s // 3, 2 * s // 3, s, t]
        angles = [math.acos(math.sqrt(ALPHAS[level])) for level in levels]
        first = math.sqrt(ALPHAS[levels[0]]) + math.sqrt((1 - ALPHAS[levels[0]]) * (1 - ALPHAS[0]))
        at_s = x[index] * first * math.prod(math.cos(b - a) for a, b in itertools.pairwise(angles[:-1]))
        at_t = at_s * math.cos(angles[-1] - angles[-2])
        a = ALPHAS[t]
        prior, prompt = (1 - a).sqrt() * at_t, (at_t - a.sqrt() * z[0, index]) / (1 - a).sqrt()
        expected = prior + 7.5 * (prompt - prior) - (1 - ALPHAS[s]).sqrt() * at_s
        torch.testing.assert_close(gradient[index], expected, rtol=1e-3, atol=1e-3)


def test_ism_of_a_denoiser_that_knows_the_truth_without_a_prompt_is_zero():
    """On its inverted path the noise is the same at s and t, so nothing remains."""
    z, x = latents(1, 3, 4, 5, 6), latents(3, 4, 5, 6, seed=1)
    gradient = guidance(Oracle(z), kind="ism", weighting="noise-to-signal").gradient(
        x, T, SamePrompt().conditions([0.0] * 3, [0.0] * 3), 0.0
    )
    assert gradient.abs().max() < 1e-2


def test_ism_asks_at_the_timesteps_of_the_inversion():
    oracle = Oracle(latents(1, 2, 4, 4, 4))
    guide = guidance(oracle, kind="ism", ism_steps=4, ism_interval=(80, 50), anneal=(0.0, 0.5))
    conditions = SamePrompt().conditions([0.0] * 2, [0.0] * 2)
    guide.gradient(latents(2, 4, 4, 4), torch.tensor([480, 30]), conditions, progress=0.0)
    assert [t.tolist() for t in oracle.asked] == [
        *[[0, 0], [100, 0], [200, 0], [300, 0], [400, 0]],
        [480, 30, 480, 30],
    ]
    oracle.asked.clear()
    guide.gradient(latents(2, 4, 4, 4), torch.tensor([480, 30]), conditions, progress=0.5)
    assert oracle.asked[-2].tolist() == [430, 0]


def test_ism_draws_nothing_but_the_timestep():
    z, x = latents(1, 1, 4, 4, 4), latents(1, 4, 4, 4, seed=1)
    ones, zeros = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    gradients = [
        guidance(Oracle(z), kind=kind).gradient(
            x, torch.tensor([400]), Conditions(ones, zeros, zeros), 0.0, torch.Generator().manual_seed(seed)
        )
        for kind in ("ism", "csd")
        for seed in (0, 1)
    ]
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[2], gradients[3])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_has_the_gradient_of_the_guidance(kind):
    """Averaged over views; drawn with a generator, so that the same draws can be repeated."""
    z, x = latents(1, 2, 4, 5, 6), latents(2, 4, 5, 6, seed=1).requires_grad_()
    ones, zeros = torch.ones(2, 1, 1), torch.zeros(2, 1, 1)

    class Prompts:
        def conditions(self, azimuths, elevations):
            return Conditions(ones, zeros, zeros)

    guide = guidance(Oracle(z), Prompts(), kind=kind, gradient_clip=0.0)
    result = guide(x, [0.0, 0.0], [0.0, 0.0], 0.1, torch.Generator().manual_seed(3))
    result.loss.backward()

    generator = torch.Generator().manual_seed(3)
    low, high = guide.timesteps(0.1)
    assert (low, high) == result.timesteps
    t = torch.randint(low, high + 1, (2,), generator=generator)
    expected = guide.gradient(x.detach(), t, Conditions(ones, zeros, zeros), 0.1, generator)
    torch.testing.assert_close(x.grad, expected / 2, rtol=1e-4, atol=1e-6 * expected.abs().max())
    torch.testing.assert_close(result.loss, 0.5 * expected.square().sum() / 2, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(result.metrics["gradient_norm"], expected.flatten(1).norm(dim=1).mean())


def test_long_gradients_are_shortened_cell_by_cell():
    z, x = torch.zeros(1, 1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    x[0, :, 0, 0] = torch.tensor([3.0, 0.0, 4.0, 0.0])  # a norm of 5
    x[0, :, 1, 1] = torch.tensor([0.0, 0.1, 0.0, 0.0])
    x.requires_grad_()
    guide = guidance(Oracle(z), weighting="noise-to-signal", gradient_clip=2.0)
    result = guide(x, [0.0], [0.0], 0.0)
    result.loss.backward()
    torch.testing.assert_close(x.grad[0, :, 0, 0], torch.tensor([1.2, 0.0, 1.6, 0.0]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x.grad[0, :, 1, 1], torch.tensor([0.0, 0.1, 0.0, 0.0]), rtol=1e-2, atol=1e-3)
    assert result.metrics["clipped"] == 0.25
    assert result.metrics["not_finite"] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_overflows_counts_as_zero_and_is_reported(bad):
    z = torch.zeros(1, 1, 4, 2, 2)
    z[0, 0, 1, 0, 1] = bad
    x = torch.ones(1, 4, 2, 2, requires_grad=True)
    result = guidance(Oracle(z))(x, [0.0], [0.0], 0.0)
    result.loss.backward()
    assert x.grad[0, 1, 0, 1] == 0.0
    assert x.grad.isfinite().all()
    assert (x.grad == 0.0).sum() == 1
    assert result.loss.isfinite()
    assert result.metrics["not_finite"] == pytest.approx(1 / 16)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_alone_converge_to_the_truth(kind):
    """With a wide prior, beside which CSD and ISM have no other optimum: see the next test."""
    z = latents(1, 2, 4, 6, 6)
    ones, zeros = torch.ones(2, 1, 1), torch.zeros(2, 1, 1)

    class Prompts:
        def conditions(self, azimuths, elevations):
            return Conditions(ones, zeros, zeros)

    guide = guidance(Oracle(z, spread=100.0), Prompts(), kind=kind, guidance_scale=1.0, t_max=(0.6, 0.1))
    x = torch.zeros(2, 4, 6, 6, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    steps, generator = 400, torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        guide(x, [0.0, 0.0], [0.0, 0.0], step / steps, generator).loss.backward()
        optimizer.step()
    assert (x.detach() - z[0]).square().mean().sqrt() < 0.05


def test_csd_overshoots_where_the_prior_is_narrow():
    """The optimum of p(prompt | x_t) is not that of p(x_t | prompt): it is x = z (1 + (1 - a) / (a spread^2))."""
    z, spread, count = latents(1, 1, 4, 3, 3), 1.0, 20000
    t, a = torch.full((count,), 300), ALPHAS[300]
    conditions = Conditions(torch.ones(count, 1, 1), torch.zeros(count, 1, 1), torch.zeros(count, 1, 1))
    guide = guidance(Oracle(z, spread), kind="csd", weighting="uniform", guidance_scale=1.0)

    def mean_gradient(x):
        generator = torch.Generator().manual_seed(0)
        return guide.gradient(x.expand(count, -1, -1, -1), t, conditions, 0.0, generator).mean(dim=0)

    assert mean_gradient(z[0] * (1 + (1 - a) / (a * spread**2))).abs().max() < 5 / math.sqrt(count)
    assert mean_gradient(z[0]).norm() > 0.3 * z.norm()


def test_the_range_of_timesteps_narrows():
    guide = guidance(Oracle(torch.zeros(1, 1, 4, 2, 2)), t_min=(0.02, 0.1), t_max=(0.98, 0.5), anneal=(0.2, 0.6))
    assert guide.timesteps(0.0) == guide.timesteps(0.2) == (20, 980)
    assert guide.timesteps(0.4) == (60, 740)
    assert guide.timesteps(0.6) == guide.timesteps(1.0) == (100, 500)
    at_once = guidance(Oracle(torch.zeros(1, 1, 4, 2, 2)), anneal=(0.3, 0.3))
    assert (at_once.timesteps(0.29), at_once.timesteps(0.3)) == ((20, 980), (20, 500))


def test_timesteps_are_drawn_from_the_whole_range():
    oracle = Oracle(torch.zeros(1, 400, 4, 1, 1))
    guide = guidance(oracle, t_min=(0.1, 0.1), t_max=(0.11, 0.11))
    guide(torch.zeros(400, 4, 1, 1), [0.0] * 400, [0.0] * 400, 0.0, torch.Generator().manual_seed(0))
    assert set(oracle.asked[0].tolist()) == set(range(100, 111))


def test_front_and_back_are_guided_to_their_own_latents():
    names = ["front", "back", "side", "overhead"]
    z, x = latents(4, 4, 4, 3, 3), latents(4, 4, 3, 3, seed=1)
    prompts = ViewPrompts(PromptConfig(prompt="a face"), embed_names(names))
    guide = guidance(Oracle(z, spread=1e4), prompts, weighting="noise-to-signal", guidance_scale=1.0)
    conditions = prompts.conditions([10.0, -170.0, 90.0, 0.0], [0.0, 0.0, 0.0, 80.0])
    gradient = guide.gradient(x, torch.full((4,), 300), conditions, 0.0)
    truth = torch.stack([z[names.index(name), view] for view, name in enumerate(names)])
    torch.testing.assert_close(gradient, x - truth, rtol=1e-3, atol=1e-2)


def test_perp_neg_departs_from_other_views_only_across_the_prompt():
    """The direction from the prior to the prompt stays, and at right angles to it the views that are not seen count."""
    names = ["front", "back", "side", "overhead"]
    z, x, t = latents(4, 1, 4, 3, 3), latents(1, 4, 3, 3, seed=1), torch.tensor([300])
    embed = embed_names(names)
    plain = ViewPrompts(PromptConfig(prompt="a face"), embed)
    perp_neg = ViewPrompts(PromptConfig(prompt="a face", perp_neg=True), embed)
    oracle = Oracle(z)
    guides = [
        guidance(oracle, prompts, kind="csd", weighting="uniform", guidance_scale=1.0) for prompts in (plain, perp_neg)
    ]
    for azimuth, seen, other in ((0.0, "front", "side"), (180.0, "back", "front")):
        directions = []
        for guide, prompts in zip(guides, (plain, perp_neg), strict=True):
            generator = torch.Generator().manual_seed(0)
            directions.append(guide.gradient(x, t, prompts.conditions([azimuth], [0.0]), 0.0, generator).flatten())
        correction = directions[1] - directions[0]
        assert correction.norm() > 0.1 * directions[0].norm()
        assert abs(correction @ directions[0]) < 1e-3 * correction.norm() * directions[0].norm()
        away = (z[names.index(other)] - z[names.index(seen)]).flatten()  # a descent moves latents against the gradient
        assert -correction @ away < 0
    overhead = [
        guide.gradient(x, t, prompts.conditions([0.0], [80.0]), 0.0, torch.Generator().manual_seed(0))
        for guide, prompts in zip(guides, (plain, perp_neg), strict=True)
    ]
    torch.testing.assert_close(overhead[1], overhead[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"t_min": (0.6, 0.6)}, "t-min must not be above t-max"), ({"anneal": (0.5, 0.2)}, "anneal must ascend")],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=f"^--{message}"):
        check_options(GuidanceConfig(**options))
