import pytest
import torch
import torch.nn.functional as F

from lrf_nerfstudio.vae import FieldNormalization, LinearRGB, latent_size


def latents_of_many_sizes(channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.linspace(-5, 5, channels)[:, None, None]
    return [torch.randn(channels, 20 + i, 30, generator=generator) * (1 + offsets.abs()) + offsets for i in range(5)]


def test_percentiles_of_all_views_become_0_and_1():
    latents = latents_of_many_sizes()
    normalization = FieldNormalization.from_latents(latents)
    field = torch.cat([normalization.to_field(latent).flatten(0, 1) for latent in latents])  # [cells, C]
    torch.testing.assert_close((field < 0).float().mean(0), torch.full((3,), 0.01), atol=1e-3, rtol=0)
    torch.testing.assert_close((field > 1).float().mean(0), torch.full((3,), 0.01), atol=1e-3, rtol=0)


def test_the_maps_are_inverse_and_differentiable():
    normalization = FieldNormalization.from_latents(latents_of_many_sizes()).double()
    latent = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    field = normalization.to_field(latent)
    assert field.shape == (2, 4, 5, 3)
    torch.testing.assert_close(normalization.to_latent(field), latent)
    assert torch.autograd.gradcheck(normalization.to_field, latent)
    assert torch.autograd.gradcheck(normalization.to_latent, field.detach().requires_grad_())


def test_a_constant_channel_is_only_moved():
    latents = [torch.cat([latent, torch.full_like(latent[:1], 7.0)]) for latent in latents_of_many_sizes()]
    normalization = FieldNormalization.from_latents(latents)
    field = normalization.to_field(latents[0])
    assert torch.isfinite(field).all() and (field[..., 3] == 0).all()
    assert normalization.scale[3] == 1


def test_a_sample_of_a_long_stream_is_fair_bounded_and_the_same_every_time():
    def stream():
        generator = torch.Generator().manual_seed(3)
        for i in range(200):
            yield torch.randn(2, 32, 32, generator=generator) + i / 100  # drifts: early and late views must both count

    exact = torch.quantile(torch.cat([latent.flatten(1) for latent in stream()], 1), torch.tensor([0.01, 0.99]), dim=1)
    normalization = FieldNormalization.from_latents(stream(), max_cells=8192)
    torch.testing.assert_close(normalization.shift, exact[0], atol=0.15, rtol=0)
    torch.testing.assert_close(normalization.scale, exact[1] - exact[0], atol=0.2, rtol=0)
    again = FieldNormalization.from_latents(stream(), max_cells=8192)
    assert torch.equal(again.shift, normalization.shift) and torch.equal(again.scale, normalization.scale)


def test_no_latents_and_broken_latents_are_refused():
    with pytest.raises(ValueError, match="no latents"):
        FieldNormalization.from_latents([])
    with pytest.raises(ValueError, match="finite"):
        FieldNormalization.from_latents([torch.full((2, 3, 3), torch.nan)])
    with pytest.raises(ValueError, match="no latents"):
        LinearRGB.fit([], 8)


def pairs(matrix, bias, factor, noise=0.0):
    """Latents and images whose cells have exactly the mean colour `matrix @ latent + bias`."""
    generator = torch.Generator().manual_seed(4)
    for height, width in ((16, 24), (21, 30), (9, 8)):
        rows, columns = latent_size(height, width, factor)
        latent = torch.randn(matrix.shape[1], rows, columns, generator=generator)
        color = torch.einsum("rc,chw->rhw", matrix, latent) + bias[:, None, None]
        color = color + noise * torch.randn(color.shape, generator=generator)
        image = F.interpolate(color[None], scale_factor=factor, mode="nearest")[0]
        yield latent, image[:, :height, :width].permute(1, 2, 0)


def test_the_linear_map_is_recovered_exactly_from_linear_data():
    generator = torch.Generator().manual_seed(5)
    matrix, bias = torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator)
    linear_rgb = LinearRGB.fit(pairs(matrix, bias, 8), 8)
    torch.testing.assert_close(linear_rgb.matrix, matrix, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear_rgb.bias, bias, atol=1e-4, rtol=1e-4)
    latent, image = next(pairs(matrix, bias, 8))
    colors = linear_rgb(latent)
    assert colors.shape == (2, 3, 3)
    torch.testing.assert_close(colors, image[::8, ::8], atol=1e-4, rtol=1e-4)


def test_the_linear_map_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(6)
    matrix, bias = torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator)
    data = list(pairs(matrix, bias, 2, noise=0.5))
    linear_rgb = LinearRGB.fit(data, 2)
    residual = torch.cat([(linear_rgb(latent) - image[::2, ::2]).flatten(0, 1) for latent, image in data])
    cells = torch.cat([latent.flatten(1).T for latent, _ in data])
    torch.testing.assert_close(cells.T @ residual / len(cells), torch.zeros(4, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(residual.mean(0), torch.zeros(3), atol=1e-4, rtol=0)


def test_constant_channels_do_not_break_the_fit():
    data = [(torch.cat([latent, torch.full_like(latent[:1], 2.0)]), image) for latent, image in pairs(*_identity(), 2)]
    linear_rgb = LinearRGB.fit(data, 2)
    torch.testing.assert_close(linear_rgb(data[0][0]), data[0][1][::2, ::2], atol=1e-4, rtol=1e-4)


def _identity():
    return torch.eye(3), torch.zeros(3)


def test_the_map_for_fields_gives_the_same_colours():
    normalization = FieldNormalization.from_latents(latents_of_many_sizes())
    linear_rgb = LinearRGB.fit(pairs(torch.randn(3, 3), torch.rand(3), 4), 4)
    latent = latents_of_many_sizes()[0]
    matrix, bias = linear_rgb.for_field(normalization)
    torch.testing.assert_close(
        normalization.to_field(latent) @ matrix.T + bias, linear_rgb(latent), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("module", [FieldNormalization, LinearRGB])
def test_saved_maps_fill_an_object_made_from_the_channel_count(module):
    if module is FieldNormalization:
        fitted = FieldNormalization.from_latents(latents_of_many_sizes())
    else:
        fitted = LinearRGB.fit(pairs(*_identity(), 4), 4)
    restored = module(3)
    restored.load_state_dict(fitted.state_dict())
    for name, value in fitted.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)
