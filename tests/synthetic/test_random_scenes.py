"""Random scenes are the same for a seed, differ between seeds, can be seen, and have colors of the whole gamut."""

import colorsys

import numpy as np
import pytest

from lrf_nerfstudio.synthetic.random_scenes import random_scene
from lrf_nerfstudio.synthetic.raytracer import cast_rays, render

SEEDS = range(16)


@pytest.fixture(scope="module")
def pictures() -> dict[int, np.ndarray]:
    """Three views [3, 48, 48, 3] of each of some seeds."""
    found = {}
    for seed in SEEDS:
        scene, cameras = random_scene(seed, 24, (48, 48))
        found[seed] = np.stack([render(scene, cameras, view, 2) for view in (0, 9, 17)])
    return found


def test_a_seed_always_gives_the_same_scene(pictures: dict[int, np.ndarray]) -> None:
    scene, cameras = random_scene(5, 24, (48, 48))
    np.testing.assert_array_equal(render(scene, cameras, 9, 2), pictures[5][1])


def test_seeds_differ(pictures: dict[int, np.ndarray]) -> None:
    for seed in SEEDS:
        for other in range(seed):
            assert np.abs(pictures[seed].astype(int) - pictures[other]).mean() > 15


def test_pictures_are_exposed_and_textured(pictures: dict[int, np.ndarray]) -> None:
    for views in pictures.values():
        assert 30 < views.mean() < 200
        assert (views.max(-1) > 250).mean() < 0.2
        for view in views:
            gray = view.mean(-1)
            assert np.abs(np.diff(gray, axis=0)).mean() + np.abs(np.diff(gray, axis=1)).mean() > 5


def test_saturated_colors_of_all_hues_occur(pictures: dict[int, np.ndarray]) -> None:
    pixels = np.concatenate([views.reshape(-1, 3) for views in pictures.values()])[::7] / 255
    hue, saturation, value = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels]).T
    vivid = (saturation > 0.7) & (value > 0.3)
    share = np.histogram(hue[vivid], bins=6, range=(0, 1))[0] / len(pixels)
    assert (share > 0.004).all()
    assert 0.4 < (saturation < 0.5).mean() < 0.9  # most of what one sees is muted, as in photographs


@pytest.mark.parametrize("seed", range(24))
def test_cameras_keep_their_distance_and_look_at_something(seed: int) -> None:
    scene, cameras = random_scene(seed, 24, (16, 16))
    pixels = np.stack(np.meshgrid(np.arange(16) + 0.5, np.arange(16) + 0.5), axis=-1).reshape(-1, 2)
    for view in range(len(cameras)):
        distances, objects = cast_rays(scene, *cameras.rays(view, pixels))
        assert distances.min() > 0.4
        assert (objects < len(scene.geometry.shapes) - 1).mean() > 0.35  # not the surroundings
    assert len(np.unique(np.round(cameras.poses[:, :3, 3], 3), axis=0)) == len(cameras)
