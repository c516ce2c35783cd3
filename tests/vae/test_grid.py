from itertools import pairwise

import pytest
import torch

from lrf_nerfstudio.vae import downsample_mask, latent_size, pad_to_multiple, unpad
from lrf_nerfstudio.vae.grid import _tile_starts, apply_tiled, sample_latents


@pytest.mark.parametrize(("height", "width", "factor"), [(265, 473, 8), (8, 8, 8), (1, 1, 8), (3, 17, 4), (30, 21, 1)])
def test_padding_repeats_the_edge_and_is_undone_exactly(height, width, factor):
    images = torch.rand(2, 3, height, width)
    padded = pad_to_multiple(images, factor)
    assert tuple(padded.shape[-2:]) == tuple(factor * n for n in latent_size(height, width, factor))
    assert torch.equal(unpad(padded, height, width), images)
    rows = torch.arange(padded.shape[-2]).clamp(max=height - 1)
    columns = torch.arange(padded.shape[-1]).clamp(max=width - 1)
    assert torch.equal(padded, images[..., rows[:, None], columns])


def test_an_edge_pixel_receives_the_gradient_of_its_copies():
    image = torch.zeros(1, 1, 1, 3, requires_grad=True)
    pad_to_multiple(image, 4).sum().backward()
    assert image.grad is not None
    assert image.grad.flatten().tolist() == [4.0, 4.0, 8.0]


@pytest.mark.parametrize(("height", "width", "factor"), [(16, 24, 8), (21, 30, 8), (7, 5, 2), (3, 3, 4)])
def test_a_cell_counts_only_when_all_its_pixels_do(height, width, factor):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(height, width, generator=generator) < 0.98
    rows, columns = latent_size(height, width, factor)
    expected = [
        [mask[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].all().item() for j in range(columns)]
        for i in range(rows)
    ]
    assert downsample_mask(mask, factor).tolist() == expected
    assert downsample_mask(mask.to(torch.uint8) * 255, factor).tolist() == expected
    assert downsample_mask(torch.ones_like(mask), factor).all()


def test_a_linear_ramp_is_sampled_exactly_between_cell_centres():
    """Latent = 3 + 2 x - y at the centres; at any point between centres bilinear sampling gives just that."""
    factor, height, width = 8, 5, 7
    y, x = torch.meshgrid((torch.arange(height) + 0.5) * factor, (torch.arange(width) + 0.5) * factor, indexing="ij")
    latents = torch.stack([3 + 2 * x - y, x])[None].double().repeat(2, 1, 1, 1)
    latents[1] *= -1
    points = 4 + torch.rand(2, 50, 2, dtype=torch.float64) * torch.tensor([48.0, 32.0])
    points[:, 0] = torch.tensor([12.0, 4.0])  # the centre of column 1, row 0
    sampled = sample_latents(latents, points, factor)
    x, y = points.unbind(-1)
    expected = torch.stack([3 + 2 * x - y, x], dim=-1) * torch.tensor([1.0, -1.0])[:, None, None]
    torch.testing.assert_close(sampled, expected)


def test_sampling_continues_the_outermost_cells():
    latents = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    points = torch.tensor([[[0.0, 0.0], [15.9, 0.2], [-50.0, 16.0], [16.0, 16.0], [8.0, 8.0], [6.0, 0.0]]])
    sampled = sample_latents(latents, points, 8)
    torch.testing.assert_close(sampled, torch.tensor([1.0, 2.0, 3.0, 4.0, 2.5, 1.25])[None, :, None])


def test_sampling_has_gradients_and_keeps_coordinates_in_full_precision():
    latents = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    points = 1 + 6 * torch.rand(2, 6, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: sample_latents(z, points, 2), latents)
    ramp = torch.arange(128, dtype=torch.bfloat16).expand(1, 1, 2, 128)
    sampled = sample_latents(ramp, torch.tensor([[[1001.0, 8.0]]]), 8)
    torch.testing.assert_close(sampled.flatten(), torch.tensor([1001 / 8 - 0.5]))  # bfloat16 would round x to 1000


@pytest.mark.parametrize("points", [torch.zeros(1, 3, 2), torch.zeros(2, 3, 3), torch.zeros(3, 2)])
def test_sampling_names_shapes_that_do_not_fit(points):
    with pytest.raises(ValueError, match=r"points \[B, P, 2\], got \(2, 4, 3, 3\)"):
        sample_latents(torch.zeros(2, 4, 3, 3), points, 8)


def test_tiles_cover_all_and_overlap_enough():
    for length in range(1, 60):
        starts = _tile_starts(length, 8, 3)
        assert starts[0] == 0 and max(starts[-1] + 8, length) == max(length, 8)
        assert all(0 < after - before <= 5 for before, after in pairwise(starts))


@pytest.mark.parametrize(("in_samples", "out_samples"), [(1, 4), (4, 1), (2, 2)])
def test_tiling_a_pointwise_function_changes_nothing(in_samples, out_samples):
    def function(x):
        pooled = torch.nn.functional.avg_pool2d(x, in_samples)
        return torch.nn.functional.interpolate(pooled, scale_factor=out_samples, mode="nearest") ** 2

    x = torch.rand(2, 3, 19 * in_samples, 23 * in_samples, dtype=torch.float64, requires_grad=True)
    tiled, whole = apply_tiled(function, x, 8, 2, in_samples, out_samples), function(x)
    torch.testing.assert_close(tiled, whole)
    direction = torch.rand_like(whole)
    gradients = [torch.autograd.grad((y * direction).sum(), x)[0] for y in (tiled, whole)]
    torch.testing.assert_close(*gradients)
