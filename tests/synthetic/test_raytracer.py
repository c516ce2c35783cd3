"""Cameras are nerfstudio's and OpenCV's, light obeys its laws, pictures are converged."""

import math

import cv2
import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras as NerfstudioCameras

from lrf_nerfstudio.synthetic.cameras import Cameras, look_at
from lrf_nerfstudio.synthetic.demo import demo_cameras, demo_scene
from lrf_nerfstudio.synthetic.geometry import Shape
from lrf_nerfstudio.synthetic.patterns import Pattern
from lrf_nerfstudio.synthetic.random_scenes import random_scene
from lrf_nerfstudio.synthetic.raytracer import Scene, cast_rays, render, render_linear
from lrf_nerfstudio.synthetic.scenes import Lamp, Light, Material, Object, assemble

SIZE = (100, 132)
BLACK = (0.0, 0.0, 0.0)


def plain(color: tuple[float, float, float], **finish: float) -> Material:
    return Material(Pattern.PLAIN, [color] * 4, **finish)


def above(height: float) -> Cameras:
    """A camera of one pixel that looks at the origin from nearly above."""
    return Cameras(look_at(np.array([[0.0, -1e-3, height]]), np.zeros((1, 3))), 1e4, 1, 1)


def seen(scene: Scene, cameras: Cameras) -> np.ndarray:
    return render_linear(scene, cameras, 0, samples=3)[0, 0]


def test_nerfstudio_casts_the_rays_that_made_the_pictures() -> None:
    cameras, (height, width) = demo_cameras(24, 0, SIZE), SIZE
    pose = torch.tensor(cameras.poses[5:6, :3], dtype=torch.float32)
    theirs = NerfstudioCameras(pose, cameras.focal, cameras.focal, width / 2, height / 2)
    rays = theirs.generate_rays(0, coords=torch.tensor([[0.5, 0.5], [20.5, 99.5], [70.5, 66.5], [99.5, 131.5]]))
    origins, directions = rays.origins.double().numpy(), rays.directions.double().numpy()
    distances, _ = cast_rays(demo_scene(0), origins, directions)
    pixels, depths = cameras.project(5, origins + distances[:, None] * directions)
    np.testing.assert_allclose(pixels, [[0.5, 0.5], [99.5, 20.5], [66.5, 70.5], [131.5, 99.5]], atol=1e-3)
    assert (depths > 0).all()


def test_projection_is_opencvs_and_the_inverse_of_casting() -> None:
    cameras = demo_cameras(24, 0, SIZE)
    world_to_camera = np.diag([1, -1, -1, 1]) @ np.linalg.inv(cameras.poses[3])  # OpenCV: x right, y down, z ahead
    points = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    K = np.array([[cameras.focal, 0, SIZE[1] / 2], [0, cameras.focal, SIZE[0] / 2], [0, 0, 1]])
    rotation, _ = cv2.Rodrigues(world_to_camera[:3, :3])
    expected = cv2.projectPoints(points, rotation, world_to_camera[:3, 3], K, None)[0][:, 0]
    pixels, _ = cameras.project(3, points)
    np.testing.assert_allclose(pixels, expected, atol=1e-9)
    origins, directions = cameras.rays(3, pixels)
    np.testing.assert_allclose(np.cross(points - origins, directions), 0, atol=1e-12)


def test_a_matte_surface_obeys_lamberts_law() -> None:
    floor = Object(Shape.PLANE, BLACK, BLACK, plain((0.5, 0.25, 0.1)))
    for position, cosine in (((0.0, 0.0, 2.0), 1.0), ((math.sqrt(3), 0.0, 1.0), 0.5)):
        lamp = Lamp(position, 0.0, (1.0, 2.0, 3.0))  # irradiance at the origin, on a surface that faces the lamp
        scene = assemble([floor], plain(BLACK), Light([lamp], BLACK, BLACK), 0)
        np.testing.assert_allclose(seen(scene, above(3.0)), cosine * np.array([0.5, 0.5, 0.3]), rtol=2e-3)


def test_light_falls_off_with_the_square_of_the_distance() -> None:
    lamp, radiance = Lamp((0.0, 0.0, 2.0), 0.0, (1.0, 1.0, 1.0)), []
    for height in (0.0, 1.0):  # two and one units below the lamp
        floor = Object(Shape.PLANE, BLACK, (0.0, 0.0, height), plain((0.5, 0.5, 0.5)))
        scene = assemble([floor], plain(BLACK), Light([lamp], BLACK, BLACK), 0)
        radiance.append(seen(scene, above(1.5))[0])
    assert radiance[1] == pytest.approx(4 * radiance[0], rel=2e-3)


def test_what_is_behind_an_object_gets_no_light_from_the_lamp() -> None:
    floor = Object(Shape.PLANE, BLACK, BLACK, plain((0.5, 0.5, 0.5)))
    ball = Object(Shape.SPHERE, (0.3, 0.0, 0.0), (1.0, 0.0, 1.0), plain(BLACK))
    light = Light([Lamp((2.0, 0.0, 2.0), 0.1, (1.0, 1.0, 1.0))], BLACK, BLACK)
    assert seen(assemble([floor], plain(BLACK), light, 0), above(3.0))[0] > 0.3
    assert seen(assemble([floor, ball], plain(BLACK), light, 0), above(3.0))[0] == 0


def test_the_sky_lights_an_open_surface_fully_and_one_under_a_lid_hardly() -> None:
    floor = Object(Shape.PLANE, BLACK, BLACK, plain((0.5, 0.5, 0.5)))
    lid = Object(Shape.CYLINDER, (2.0, 0.01, 0.0), (0.0, 0.0, 0.5), plain(BLACK))
    light = Light([], (0.6, 0.6, 0.6), (0.6, 0.6, 0.6))
    assert seen(assemble([floor], plain(BLACK), light, 0), above(0.4))[0] == pytest.approx(0.3, rel=1e-3)
    assert seen(assemble([floor, lid], plain(BLACK), light, 0), above(0.4))[0] < 0.03


def test_a_mirror_shows_the_surroundings_in_its_color() -> None:
    mirror = plain((0.2, 0.4, 0.8), mirror=1.0, metal=1.0)
    floor = Object(Shape.PLANE, BLACK, BLACK, mirror)
    scene = assemble([floor], plain((0.5, 0.5, 0.5)), Light([], BLACK, BLACK), 0)
    np.testing.assert_allclose(seen(scene, above(3.0)), [0.1, 0.2, 0.4], rtol=1e-6)


def test_pictures_are_converged() -> None:
    scenes = [(demo_scene(0), demo_cameras(48, 0, (64, 80))), *(random_scene(seed, 24, (48, 64)) for seed in range(3))]
    for scene, cameras in scenes:
        usual, fine = (render(scene, cameras, 2, samples).astype(float) for samples in (3, 9))
        assert 10 * math.log10(255**2 / ((usual - fine) ** 2).mean()) > 30
