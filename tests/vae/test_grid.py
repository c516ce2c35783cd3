from itertools import pairwise

import pytest
import torch

from lrf_nerfstudio.vae import downsample_mask, latent_size, pad_to_multiple, unpad
from lrf_nerfstudio.vae.grid import _tile_starts, apply_tiled


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
