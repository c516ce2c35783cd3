"""Tracks are exact: they project onto the surfaces that views show, and hidden points are not in them."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from lrf_nerfstudio.correspondence import CorrespondenceConfig, find_correspondences, load_scene
from lrf_nerfstudio.correspondence.colmap import read_model
from lrf_nerfstudio.correspondence.epipolar import fundamental_matrix, pinhole_matrix, sampson_distance
from lrf_nerfstudio.synthetic.cameras import Cameras, around, look_at
from lrf_nerfstudio.synthetic.correspondences import find_points
from lrf_nerfstudio.synthetic.demo import demo_cameras, demo_scene
from lrf_nerfstudio.synthetic.geometry import Shape
from lrf_nerfstudio.synthetic.patterns import Pattern
from lrf_nerfstudio.synthetic.random_scenes import random_scene
from lrf_nerfstudio.synthetic.raytracer import Scene, cast_rays, render
from lrf_nerfstudio.synthetic.scenes import Light, Material, Object, assemble

CENTER, HALF = np.array([0.0, 0.0, 0.5]), np.array([0.5, 0.3, 0.4])


def box_on_a_floor(metal: bool = False) -> tuple[Scene, Cameras]:
    """A scene that hides some of its floor, and cameras all around it."""
    material = Material(Pattern.CHECKER, [(0.8, 0.1, 0.1), (0.1, 0.6, 0.1), (0.1, 0.1, 0.7), (0.8, 0.8, 0.8)], 0.2)
    box = replace(material, mirror=0.8, metal=True) if metal else material
    objects = [
        Object(Shape.PLANE, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), material),
        Object(Shape.BOX, tuple(HALF), tuple(CENTER), box),
    ]
    scene = assemble(objects, material, Light([], (0.6, 0.6, 0.6), (0.6, 0.6, 0.6)), 0)
    azimuth = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    poses = look_at(around(CENTER, azimuth, np.full(12, 0.4), 3.0), np.tile(CENTER, (12, 1)))
    return scene, Cameras(poses, 80.0, 64, 80)


def blocked_by_the_box(origin: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether the way from an origin [3] to points [N, 3] leads through the inside of the box."""
    way = np.linspace(0, 0.999, 2000)[:, None, None]
    passed = origin + way * (points - origin)
    return (np.abs(passed - CENTER) < HALF - 1e-3).all(-1).any(0)


def test_hidden_points_are_not_seen_and_all_others_are() -> None:
    scene, cameras = box_on_a_floor()
    images = [render(scene, cameras, view, 1) for view in range(len(cameras))]
    points = find_points(scene, cameras, images, range(len(cameras)), 600, seed=0)
    assert len(points.positions) > 500
    hidden_somewhere = 0
    for view in range(len(cameras)):
        pixels, depths = cameras.project(view, points.positions)
        inside = (depths > 0) & (pixels > 0).all(-1) & (pixels < [80, 64]).all(-1)
        blocked = blocked_by_the_box(cameras.poses[view, :3, 3], points.positions)
        blocked |= points.positions[:, 2] < -1e-3  # of the surroundings, which the floor hides
        # All but points at edges, and rays that graze them.
        assert np.mean(points.seen[view] == (inside & ~blocked)) > 0.99
        hidden_somewhere += (inside & blocked).sum()
    assert hidden_somewhere > 300
    assert (points.seen.sum(0) >= 3).all()


def test_metals_have_no_points() -> None:
    for metal in (False, True):
        scene, cameras = box_on_a_floor(metal)
        images = [render(scene, cameras, view, 1) for view in range(len(cameras))]
        points = find_points(scene, cameras, images, range(len(cameras)), 600, seed=0).positions
        on_the_box = (np.abs(np.max(np.abs(points - CENTER) - HALF, axis=-1)) < 1e-3).sum()
        assert on_the_box == 0 if metal else on_the_box > 100


def test_matte_surfaces_have_one_color_in_all_views() -> None:
    """Without highlights and reflections, views agree at corresponding points, and a pixel beside them they do not."""
    scene, cameras = demo_scene(0), demo_cameras(24, 0, (120, 120))
    materials = scene.materials
    scene = scene._replace(materials=materials._replace(gloss=0 * materials.gloss, mirror=0 * materials.mirror))
    views = list(range(8, 14))
    images = {view: render(scene, cameras, view, 4).astype(np.float32) for view in views}
    points = find_points(scene, cameras, [images.get(v, images[8]).astype(np.uint8) for v in range(24)], views, 3000, 0)

    def colors(view: int, shift: float) -> np.ndarray:
        x, y = (points.pixels[view] + [shift - 0.5, -0.5]).T.astype(np.float32)  # OpenCV's first pixel is at (0, 0)
        return cv2.remap(images[view], x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[:, 0]

    differences: dict[float, list[np.ndarray]] = {0.0: [], 1.0: []}
    for i, j in pairwise(views):
        both = points.seen[i] & points.seen[j]
        for shift, found in differences.items():
            found.append(np.abs(colors(i, 0.0) - colors(j, shift))[both].mean(-1))
    at, beside = (np.concatenate(found) for found in differences.values())
    assert len(at) > 5000
    assert np.median(at) < 3 and np.mean(at < 12) > 0.8  # of 255; the rest lie at edges and where patterns blur
    assert np.mean(at) < 0.55 * np.mean(beside)


def test_tracks_reproject_exactly(training_scene: Path) -> None:
    tracks = load_scene(training_scene).tracks
    assert tracks is not None and len(tracks) > 5000
    assert tracks.errors.max() < 1e-6
    assert (tracks.lengths() >= 3).all()
    # Sub-pixel, and everywhere in a pixel.
    fraction = tracks.xy % 1
    assert np.histogram(fraction, bins=10, range=(0, 1))[0].min() > 0.05 * fraction.size


def test_points_lie_on_the_surfaces_of_the_scene(training_scene: Path) -> None:
    scene, cameras = random_scene(3, 17, (72, 96))
    distances_to_points = []
    model = read_model(training_scene / "colmap" / "sparse" / "0")
    for view, image in enumerate(sorted(model.images.values(), key=lambda image: image.name)):
        points = np.stack([model.points3D[seen.point3D_id].xyz for seen in image.points2D])
        origins, directions = cameras.rays(view, np.stack([seen.xy for seen in image.points2D]))
        distances, _ = cast_rays(scene, origins, directions)
        distances_to_points.append(np.linalg.norm(origins + distances[:, None] * directions - points, axis=-1))
    # All but rays that graze a surface, and miss it by rounding.
    assert np.mean(np.concatenate(distances_to_points) < 5e-3) > 0.997


def test_stage_1_gets_these_correspondences(training_scene: Path) -> None:
    found = find_correspondences(load_scene(training_scene), CorrespondenceConfig())
    assert len(found.pairs) > 30
    for pair in found.pairs:
        (a, b), (x, y) = (found.scene.views[pair.i], found.scene.views[pair.j]), (pair.points_i, pair.points_j)
        f = fundamental_matrix(pinhole_matrix(a.camera), a.cam_from_world, pinhole_matrix(b.camera), b.cam_from_world)
        assert sampson_distance(f, x.astype(np.float64), y.astype(np.float64)).max() < 1e-3


def test_too_few_views_have_no_points() -> None:
    scene, cameras = box_on_a_floor()
    images = [render(scene, cameras, view, 1) for view in range(len(cameras))]
    assert len(find_points(scene, cameras, images, [0, 1], 100, seed=0).positions) == 0


@pytest.mark.parametrize("seed", range(4))
def test_every_layout_has_points_in_all_views(seed: int) -> None:
    scene, cameras = random_scene(seed, 24, (32, 32))
    images = [render(scene, cameras, view, 1) for view in range(24)]
    points = find_points(scene, cameras, images, range(24), 1000, seed=0)
    assert len(points.positions) == 1000
    assert points.seen.sum(1).min() > 100
