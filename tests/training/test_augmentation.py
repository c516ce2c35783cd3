from itertools import pairwise

import numpy as np

from lrf_nerfstudio.training.data.augmentation import cut_square, random_crop, random_recoloring


def test_crops_are_cut_from_inside_and_keep_their_range():
    rng = np.random.default_rng(0)
    image = np.zeros((40, 300, 3), np.uint8)
    image[..., 1] = 255
    for _ in range(20):
        crop = random_crop(image, 32, 3.0, rng)
        assert crop.shape == (32, 32, 3) and crop.dtype == np.float32 and 0 <= crop.min() and crop.max() <= 1
        assert (crop == crop[0, 0]).all()


def test_crops_have_many_places_and_scales_and_half_of_them_are_mirrored(monkeypatch):
    """Red says how far right a pixel lies in the image: 1 / 255 for a pixel."""
    augmentation = "lrf_nerfstudio.training.data.augmentation.random_recoloring"
    monkeypatch.setattr(augmentation, lambda rng: lambda pixels: pixels)
    image = np.broadcast_to(np.arange(250, dtype=np.uint8)[None, :, None], (200, 250, 3))
    rng = np.random.default_rng(0)
    crops = [random_crop(np.ascontiguousarray(image), 32, 4.0, rng) for _ in range(200)]
    widths = np.array([255 * (crop[0, -1, 0] - crop[0, 0, 0]) for crop in crops])
    assert 60 < (widths < 0).sum() < 140
    assert np.abs(widths).min() < 40 and 100 < np.abs(widths).max() < 128
    assert np.ptp([crop.mean() for crop in crops]) > 0.5


def test_a_square_is_averaged_to_its_new_size():
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:4, 4:6] = [[[255, 0, 0], [0, 255, 0]], [[0, 255, 0], [255, 0, 0]]]
    square = cut_square(image, top=2, left=4, side=4, size=2)
    np.testing.assert_allclose(square[0, 0], [0.5, 0.5, 0], atol=1e-2)
    assert (square[1:] == 0).all()


def test_recoloring_is_one_map_of_colors():
    """Equal colors stay equal, brighter ones stay brighter, and not all maps are the same."""
    colors = np.random.default_rng(1).random((4, 4, 3), dtype=np.float32)
    recolored = []
    for seed in range(20):
        recolor = random_recoloring(np.random.default_rng(seed))
        result = recolor(colors)
        assert result.dtype == np.float32 and 0 <= result.min() and result.max() <= 1
        np.testing.assert_array_equal(recolor(colors[::-1]), result[::-1])
        assert (recolor(colors * 0.5) <= result).all()
        recolored.append(result)
    assert all(not np.array_equal(one, other) for one, other in pairwise(recolored))
