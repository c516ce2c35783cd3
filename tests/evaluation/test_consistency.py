"""Pictures that show one world agree where both see it; what flickers does not."""

import math

import numpy as np
import pytest
import torch

from lrf_nerfstudio.evaluation.consistency import DepthView, compare, find_in, sample
from lrf_nerfstudio.synthetic.cameras import Cameras, around, look_at
from lrf_nerfstudio.synthetic.geometry import Shape
from lrf_nerfstudio.synthetic.patterns import Pattern
from lrf_nerfstudio.synthetic.raytracer import cast_rays, render
from lrf_nerfstudio.synthetic.scenes import Light, Material, Object, assemble

CENTER = np.array([0.0, 0.0, 0.5])
TOLERANCE = 0.01


@pytest.fixture(scope="module")
def views() -> list[tuple[DepthView, torch.Tensor, torch.Tensor]]:
    """Three views of a box on a floor, a few degrees apart: exact depth, matte pictures, which object is seen."""
    colors = [(0.5, 0.1, 0.1), (0.1, 0.4, 0.1), (0.1, 0.1, 0.5), (0.6, 0.6, 0.6)]
    material = Material(Pattern.CLOUDS, colors, 0.5)
    floor = Object(Shape.PLANE, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), material)
    box = Object(Shape.BOX, (0.5, 0.3, 0.4), (0.0, 0.0, 0.5), material)
    scene = assemble([floor, box], material, Light([], (0.8, 0.8, 0.8), (0.8, 0.8, 0.8)), 0)
    poses = look_at(around(CENTER, np.radians([0.0, 4.0, 40.0]), np.full(3, 0.5), 3.0), np.tile(CENTER, (3, 1)))
    cameras = Cameras(poses, 110.0, 96, 120)
    found = []
    for view in range(3):
        y, x = np.meshgrid(np.arange(96) + 0.5, np.arange(120) + 0.5, indexing="ij")
        origins, directions = cameras.rays(view, np.stack([x, y], axis=-1).reshape(-1, 2))
        distances, objects = cast_rays(scene, origins, directions)
        depth = distances * (directions @ -poses[view, :3, 2])
        viewmat = np.linalg.inv(poses[view] @ np.diag([1, -1, -1, 1]))
        K = torch.tensor([[110.0, 0, 60], [0, 110, 48], [0, 0, 1]])
        depths = torch.from_numpy(depth).float().reshape(96, 120)
        picture = torch.from_numpy(render(scene, cameras, view, 3)).float() / 255
        geometry = DepthView(torch.from_numpy(viewmat).float(), K, depths)
        found.append((geometry, picture, torch.from_numpy(objects).reshape(96, 120)))
    return found


def test_a_view_finds_itself_where_it_is(views):
    view, picture, _ = views[0]
    points, seen = find_in(view, view, TOLERANCE)
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(120) + 0.5, indexing="ij")
    torch.testing.assert_close(points, torch.stack([x, y], dim=-1), atol=1e-3, rtol=0)
    assert seen[2:-2, 2:-2].all()
    assert compare(picture, picture, points, seen).psnr > 60


def test_exact_depth_carries_a_matte_picture_over(views):
    (view, picture, _), (other, there, _), _ = views
    points, seen = find_in(view, other, TOLERANCE)
    assert seen.float().mean() > 0.7
    agreement = compare(picture, there, points, seen)
    unmoved = -10 * math.log10((picture - there)[seen].square().mean())
    assert agreement.psnr > 33 > unmoved + 8
    assert torch.equal(agreement.difference[~seen], torch.zeros_like(agreement.difference[~seen]))
    wrong = DepthView(view.viewmat, view.K, 1.3 * view.depth), DepthView(other.viewmat, other.K, 1.3 * other.depth)
    assert compare(picture, there, *find_in(*wrong, TOLERANCE)).psnr < agreement.psnr - 3


def test_what_flickers_is_measured(views):
    """Noise of its own in each picture adds its variance twice; bicubic weights take a part of one of them."""
    (view, picture, _), (other, there, _), _ = views
    points, seen = find_in(view, other, TOLERANCE)
    generator, sigma = torch.Generator().manual_seed(0), 0.05
    noisy = [image + sigma * torch.randn(image.shape, generator=generator) for image in (picture, there)]
    psnr = compare(*noisy, points, seen).psnr
    assert -10 * math.log10(2 * sigma**2) - 0.5 < psnr < -10 * math.log10(sigma**2)


def test_what_something_else_hides_is_left_out(views):
    (view, picture, objects), _, (other, there, objects_there) = views
    points, seen = find_in(view, other, TOLERANCE)
    same = sample(objects_there[..., None].float(), points, "nearest")[..., 0] == objects
    assert same[seen].float().mean() > 0.995
    inside = (points > 2).all(dim=-1) & (points < torch.tensor([118, 94])).all(dim=-1)
    assert (inside & ~seen).sum() > 100  # the box hides some of the floor
    everywhere = compare(picture, there, points, inside).psnr
    assert compare(picture, there, points, seen).psnr > everywhere + 1


def test_where_there_is_no_surface_nothing_is_compared(views):
    (view, picture, _), (other, there, _), _ = views
    depth = view.depth.clone()
    depth[:, :60] = math.nan
    half = DepthView(view.viewmat, view.K, depth)
    for (first, image), (second, warped) in (((half, picture), (other, there)), ((other, there), (half, picture))):
        points, seen = find_in(first, second, TOLERANCE)
        assert 0 < seen.float().mean() < 0.6
        assert compare(image, warped, points, seen).psnr > 30
    nothing = DepthView(view.viewmat, view.K, torch.full_like(depth, math.nan))
    points, seen = find_in(nothing, other, TOLERANCE)
    assert not seen.any() and math.isnan(compare(picture, there, points, seen).psnr)
