import math

import numpy as np
import pytest
from colmap_scenes import look_at_origin

from lrf_nerfstudio.correspondence import Tracks
from lrf_nerfstudio.correspondence.pairs import exponential_weights, neighbour_pairs, pose_errors, shared_points

QUARTER_TURN = np.array([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def world_to_camera(position, rotation=None):
    pose = np.eye(4) if rotation is None else rotation.copy()
    pose[:3, 3] = position
    return np.linalg.inv(pose)


def test_pose_errors_by_hand():
    turned = [np.eye(4), QUARTER_TURN]  # R - I = [[-1, -1], [1, -1]]
    assert pose_errors(turned)[0, 1] == pytest.approx(2)
    half_turn = [np.eye(4), QUARTER_TURN @ QUARTER_TURN]  # R - I = diag(-2, -2, 0)
    assert pose_errors(half_turn)[0, 1] == pytest.approx(2 * math.sqrt(2))
    # Two cameras, each at distance 3 of their centre: 6 apart, which is 2 of the scene's units.
    apart = [world_to_camera((-3, 0, 0)), world_to_camera((3, 0, 0))]
    assert pose_errors(apart)[0, 1] == pytest.approx(2)
    both = [world_to_camera((-3, 0, 0)), world_to_camera((3, 0, 0), QUARTER_TURN)]
    assert pose_errors(both)[0, 1] == pytest.approx(math.sqrt(4 + 4))


def test_pose_errors_do_not_depend_on_the_choice_of_the_world():
    rng = np.random.default_rng(0)
    cams = [look_at_origin(position) for position in rng.normal(0, 3, (6, 3))]
    errors = pose_errors(cams)
    assert (errors == errors.T).all() and np.abs(np.diag(errors)).max() < 1e-12
    move = look_at_origin(np.array([5.0, -7, 2]))
    assert pose_errors([cam @ move for cam in cams]) == pytest.approx(errors)
    scaled = []
    for cam in cams:
        scaled.append(cam.copy())
        scaled[-1][:3, 3] *= 1000
    assert pose_errors(scaled) == pytest.approx(errors)


def test_weights_fall_with_the_pose_error():
    weights = exponential_weights(np.array([0.0, 0.5, 1.0]), tau=0.5)
    assert weights == pytest.approx([1, math.exp(-1), math.exp(-2)])
    assert weights.dtype == np.float32


def test_shared_points_are_counted_for_each_pair():
    seen = {0: [1, 2, 3, 9], 1: [2, 3, 7], 2: [9], 3: []}
    views = np.array([v for v, points in seen.items() for _ in points])
    points = np.array([p for points in seen.values() for p in points])
    tracks = Tracks(views, points, np.zeros((len(views), 2)), np.zeros(len(views)))
    expected = [[len(set(seen[i]) & set(seen[j])) * (i != j) for j in range(4)] for i in range(4)]
    assert shared_points(tracks, 4).tolist() == expected
    assert shared_points(tracks[:0], 4).tolist() == np.zeros((4, 4)).tolist()


def test_every_view_is_with_its_nearest_ones():
    closeness = np.array([[0.0, 5, 1, 4], [5, 0, 2, 3], [1, 2, 0, -np.inf], [4, 3, -np.inf, 0]])
    # 0 -> 1, 1 -> 0, 2 -> 1, 3 -> 0
    assert neighbour_pairs(closeness, 1) == [(0, 1), (0, 3), (1, 2)]
    assert neighbour_pairs(closeness, 9) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]  # (2, 3) is out of the question
    assert closeness[0, 0] == 0  # the argument stays as it was
