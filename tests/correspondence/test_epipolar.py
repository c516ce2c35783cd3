import math

import numpy as np
import pycolmap
import pytest
from colmap_scenes import CX, CY, FX, FY, HEIGHT, K1, K2, P1, P2, WIDTH, known_scene, photograph, pinhole

from lrf_nerfstudio.correspondence.epipolar import (
    explained_by_one_motion,
    fundamental_matrix,
    pinhole_matrix,
    sampson_distance,
    undistort,
)

K = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])


def moved(x=0.0, y=0.0, z=0.0):
    """World-to-camera of a camera at (x, y, z) that looks along the world's z axis."""
    pose = np.eye(4)
    pose[:3, 3] = (-x, -y, -z)
    return pose


def test_a_camera_moved_sideways_has_horizontal_epipolar_lines():
    f = fundamental_matrix(K, moved(), K, moved(x=2.0))
    # x_j^T F x_i is proportional to v_i - v_j: the row is what counts, the columns may be anything.
    assert f[0] == pytest.approx([0, 0, 0]) and f[:, 0] == pytest.approx([0, 0, 0])
    assert f[1, 1] == pytest.approx(0) and f[2, 2] == pytest.approx(0)
    assert f[1, 2] == pytest.approx(-f[2, 1])
    assert np.linalg.norm(f) == pytest.approx(1)
    points_i = np.array([(10.0, 20.0), (10.0, 20.0)])
    points_j = np.array([(90.0, 20.0), (30.0, 23.0)])
    # Three pixels apart: each of the two moves half of it, 1.5 and 1.5, together 3 / sqrt(2).
    assert sampson_distance(f, points_i, points_j) == pytest.approx([0, 3 / math.sqrt(2)])


def test_a_camera_moved_forward_has_epipolar_lines_through_the_principal_point():
    f = fundamental_matrix(K, moved(), K, moved(z=1.0))
    centre = np.array([50.0, 40.0])
    points_i = centre + np.array([(3.0, 0.0), (3.0, 0.0)])
    points_j = centre + np.array([(6.0, 0.0), (6.0, 4.0)])
    # |d_i x d_j| / sqrt(|d_i|^2 + |d_j|^2) with d from the principal point: 12 / sqrt(9 + 52).
    assert sampson_distance(f, points_i, points_j) == pytest.approx([0, 12 / math.sqrt(61)], abs=1e-12)


def test_f_maps_a_point_to_the_line_of_its_match_whatever_the_two_cameras():
    scene = known_scene()
    k_j = np.array([[90.0, 0, 30], [0, 95, 70], [0, 0, 1]])
    cam_i, cam_j = scene.cams_from_world[0], scene.cams_from_world[3]
    k_i = np.array([[FX, 0, CX], [0, FY, CY], [0, 0, 1]])
    f = fundamental_matrix(k_i, cam_i, k_j, cam_j)
    in_i = pinhole(cam_i, scene.points)
    seen = scene.points @ cam_j[:3, :3].T + cam_j[:3, 3]
    in_j = (seen @ k_j.T)[:, :2] / seen[:, 2:]
    assert sampson_distance(f, in_i, in_j).max() < 1e-9
    assert np.linalg.matrix_rank(f, tol=1e-9) == 2
    # The other way round it is the transpose, and the distance is the same.
    reverse = fundamental_matrix(k_j, cam_j, k_i, cam_i)
    assert abs(abs((reverse * f.T).sum()) - 1) < 1e-9
    wrong = in_j + np.random.default_rng(0).normal(0, 5, in_j.shape)
    assert sampson_distance(reverse, wrong, in_i) == pytest.approx(sampson_distance(f, in_i, wrong))


def test_the_distance_is_in_pixels():
    # To first order it is how far the two pixels must move together to obey F.
    scene = known_scene()
    cam_i, cam_j = scene.cams_from_world[0], scene.cams_from_world[2]
    k = np.array([[FX, 0, CX], [0, FY, CY], [0, 0, 1]])
    f = fundamental_matrix(k, cam_i, k, cam_j)
    in_i, in_j = pinhole(cam_i, scene.points), pinhole(cam_j, scene.points)
    lines_j = np.column_stack([in_i, np.ones(len(in_i))]) @ f.T
    lines_i = np.column_stack([in_j, np.ones(len(in_j))]) @ f
    gradients = np.column_stack([lines_i[:, :2], lines_j[:, :2]])
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    off = 0.01 * gradients
    distances = sampson_distance(f, in_i + off[:, :2], in_j + off[:, 2:])
    assert distances == pytest.approx(np.full(len(in_i), 0.01), rel=1e-3)
    assert sampson_distance(7 * f, in_i + off[:, :2], in_j + off[:, 2:]) == pytest.approx(distances)


def test_cameras_in_one_place_say_nothing_about_matches():
    turned = np.eye(4)
    turned[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    f = fundamental_matrix(K, moved(), K, turned)
    distances = sampson_distance(f, np.array([(1.0, 2.0)]), np.array([(5.0, 2.0)]))
    assert np.isnan(distances).all()
    assert not (distances <= 1.0).any()


def test_undistortion_undoes_the_lens():
    scene = known_scene()
    camera = pycolmap.Camera(model="OPENCV", width=WIDTH, height=HEIGHT, params=[FX, FY, CX, CY, K1, K2, P1, P2])
    cam = scene.cams_from_world[1]
    distorted, straight = photograph(cam, scene.points), pinhole(cam, scene.points)
    assert np.abs(distorted - straight).max() > 0.3
    assert np.abs(undistort(camera, distorted) - straight).max() < 1e-4
    assert pinhole_matrix(camera).tolist() == [[FX, 0, CX], [0, FY, CY], [0, 0, 1]]
    assert undistort(camera, np.zeros((0, 2))).shape == (0, 2)


SIZES = ((WIDTH, HEIGHT), (WIDTH, HEIGHT))


def test_matches_of_one_motion_are_found_among_wrong_ones_and_the_same_every_time():
    scene = known_scene(points=200)
    rng = np.random.default_rng(1)
    in_i, in_j = (pinhole(scene.cams_from_world[v], scene.points) for v in (0, 2))
    in_i, in_j = in_i + rng.normal(0, 0.2, in_i.shape), in_j + rng.normal(0, 0.2, in_j.shape)
    wrong = np.arange(0, 200, 3)
    in_j[wrong] = rng.uniform((0, 0), (WIDTH, HEIGHT), (len(wrong), 2))
    explained = explained_by_one_motion(in_i, in_j, SIZES, 1.0, 16)
    k = np.array([[FX, 0, CX], [0, FY, CY], [0, 0, 1]])
    true = fundamental_matrix(k, scene.cams_from_world[0], k, scene.cams_from_world[2])
    obeys_truth = sampson_distance(true, in_i, in_j) <= 1.0
    right = np.setdiff1d(np.arange(200), wrong)
    assert explained[right].mean() > 0.95
    assert (explained & ~obeys_truth).sum() <= 2  # of 67 wrong ones
    assert (explained_by_one_motion(in_i, in_j, SIZES, 1.0, 16) == explained).all()
    assert not explained_by_one_motion(in_i, in_j, SIZES, 1.0, 150).any()


def test_matches_of_a_plane_obey_a_homography():
    """A plane determines no F: many fit, and each lets matches pass that only happen to lie on its lines."""
    scene = known_scene(points=200)
    rng = np.random.default_rng(1)
    plane = scene.points * (1, 1, 0)
    in_i, in_j = (pinhole(scene.cams_from_world[v], plane) for v in (0, 2))
    in_i, in_j = in_i + rng.normal(0, 0.1, in_i.shape), in_j + rng.normal(0, 0.1, in_j.shape)
    wrong = np.arange(0, 200, 10)
    in_j[wrong] += rng.choice([-6, 6], (len(wrong), 2))
    explained = explained_by_one_motion(in_i, in_j, SIZES, 1.0, 16)
    assert explained[np.setdiff1d(np.arange(200), wrong)].mean() > 0.95
    assert not explained[wrong].any()


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_matches_have_no_motion(count):
    points = np.random.default_rng(0).uniform(0, 100, (count, 2))
    assert explained_by_one_motion(points, points + 1, SIZES, 1.0, 16).tolist() == [False] * count


def test_matches_that_are_all_the_same_are_no_crash():
    points = np.full((20, 2), 5.0)
    assert explained_by_one_motion(points, points, SIZES, 1.0, 16).shape == (20,)
