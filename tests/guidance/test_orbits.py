"""Cameras around an object: where they are, what they see, and that they can be repeated."""

import math

import pytest
import torch

from lrf_nerfstudio.guidance import OrbitConfig, evaluation_orbit, random_orbits
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import check_options

CALM = {"position_jitter": 0.0, "target_jitter": 0.0, "roll_jitter": 0.0}


def camera_coordinates(views, point) -> torch.Tensor:
    """A point of the world in the cameras' OpenCV axes [B, 3]."""
    return views.camera.viewmats[:, :3, :3] @ torch.tensor(point) + views.camera.viewmats[:, :3, 3]


def test_azimuth_and_elevation_are_where_the_camera_is():
    views = random_orbits(OrbitConfig(views=20), step=0, cell=8)
    azimuths, elevations = (torch.tensor(angles).deg2rad() for angles in (views.azimuths, views.elevations))
    flat = elevations.cos()
    directions = torch.stack([flat * azimuths.cos(), flat * azimuths.sin(), elevations.sin()], dim=-1)
    positions = views.poses[:, :, 3]
    torch.testing.assert_close(positions / positions.norm(dim=-1, keepdim=True), directions)
    viewmats = views.camera.viewmats
    torch.testing.assert_close(-(viewmats[:, :3, :3].mT @ viewmats[:, :3, 3:])[..., 0], positions)


def test_without_jitter_cameras_look_at_the_origin_upright():
    views = random_orbits(OrbitConfig(views=16, **CALM), step=0, cell=8)
    seen = camera_coordinates(views, [0.0, 0.0, 0.0])
    torch.testing.assert_close(seen[:, :2], torch.zeros(16, 2), atol=1e-5, rtol=0.0)
    assert (seen[:, 2] >= 1.5 - 1e-5).all() and (seen[:, 2] <= 2.0 + 1e-5).all()
    above = camera_coordinates(views, [0.0, 0.0, 0.1])
    assert (above[:, 1] < 0).all()  # y points down
    torch.testing.assert_close(above[:, 0], torch.zeros(16), atol=1e-5, rtol=0.0)


def test_rotations_are_rotations():
    rotations = random_orbits(OrbitConfig(views=16), step=1, cell=8).poses[:, :, :3]
    torch.testing.assert_close(rotations.mT @ rotations, torch.eye(3).expand(16, 3, 3), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(16))


def test_ranges_are_kept_and_filled():
    config = OrbitConfig(views=500, **CALM)
    views = random_orbits(config, step=0, cell=8)
    fovs = [2 * math.degrees(math.atan(0.5 * config.cells / focal)) for focal in views.focals]
    distances = views.poses[:, :, 3].norm(dim=-1).tolist()
    for values, (low, high) in ((fovs, config.fov), (views.elevations, config.elevation), (distances, config.distance)):
        margin = 0.02 * (high - low)
        assert low - 1e-3 <= min(values) < low + margin
        assert high - margin < max(values) <= high + 1e-3


def test_even_azimuths_leave_no_side_unseen():
    for step in range(10):
        azimuths = sorted(random_orbits(OrbitConfig(views=8, **CALM), step, cell=8).azimuths)
        gaps = [(after - before) % 360 for before, after in zip(azimuths, [*azimuths[1:], azimuths[0]], strict=True)]
        assert max(gaps) < 2 * 360 / 8
    alone = [random_orbits(OrbitConfig(views=8, even_azimuths=False, **CALM), step, 8).azimuths for step in range(10)]
    assert max(max(b - a for a, b in zip(sorted(a), sorted(a)[1:], strict=False)) for a in alone) > 2 * 360 / 8


def test_a_step_has_the_same_cameras_in_every_run_and_others_than_the_next():
    first, again, next_one, other = (
        random_orbits(config, step, cell=8)
        for config, step in ((OrbitConfig(), 7), (OrbitConfig(), 7), (OrbitConfig(), 8), (OrbitConfig(seed=1), 7))
    )
    assert torch.equal(first.poses, again.poses) and first.focals == again.focals
    assert first.azimuths == again.azimuths
    assert not torch.isclose(first.poses, next_one.poses).all()
    assert not torch.isclose(first.poses, other.poses).all()


def test_the_grid_of_cells():
    views = random_orbits(OrbitConfig(cells=32), step=0, cell=8)
    assert (views.camera.height, views.camera.width, views.camera.rows, views.camera.columns) == (256, 256, 32, 32)
    torch.testing.assert_close(views.camera.Ks[:, :2, 2], torch.full((4, 2), 16.0))
    torch.testing.assert_close(views.camera.Ks[:, 0, 0], torch.tensor(views.focals))


def test_the_fixed_orbit_is_one_turn_from_the_front():
    views = evaluation_orbit(OrbitConfig(eval_views=8, eval_elevation=20.0), cell=4)
    assert views.azimuths == pytest.approx([0, 45, 90, 135, 180, -135, -90, -45])
    assert views.elevations == pytest.approx([20.0] * 8)
    front = views.poses[0, :, 3]
    assert front[0] > 0 and abs(front[1]) < 1e-6
    # Seen from the front, y is to the right.
    assert camera_coordinates(views, [0.0, 0.1, 0.0])[0, 0] > 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"fov": (70.0, 40.0)}, "fov"),
        ({"elevation": (20.0, 10.0)}, "elevation"),
        ({"distance": (2.0, 1.0)}, "distance"),
    ],
)
def test_impossible_ranges_are_refused(options, name):
    with pytest.raises(UserError, match=f"^--{name} must ascend"):
        check_options(OrbitConfig(**options))
