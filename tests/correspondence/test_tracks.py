import numpy as np
import pytest
from colmap_scenes import known_scene, write_images, write_model

from lrf_nerfstudio.correspondence import Tracks, load_scene


def tracks_of(seen, errors=None):
    """Tracks from {view: [points]}; errors from {(view, point): error}, else 0."""
    rows = [(view, point) for view, points in seen.items() for point in points]
    views, points = np.array(rows, np.int64).reshape(-1, 2).T
    return Tracks(views, points, np.zeros((len(rows), 2)), np.array([(errors or {}).get(row, 0.0) for row in rows]))


def left(tracks):
    return sorted(zip(tracks.views.tolist(), tracks.points.tolist(), strict=True))


def test_short_tracks_are_left_out():
    tracks = tracks_of({0: [7, 8], 1: [7, 8, 9], 2: [7]})
    assert tracks.lengths().tolist() == [3, 2, 3, 2, 1, 3]
    assert left(tracks.select(min_length=2, max_error=1)) == [(0, 7), (0, 8), (1, 7), (1, 8), (2, 7)]
    assert left(tracks.select(min_length=3, max_error=1)) == [(0, 7), (1, 7), (2, 7)]
    assert left(tracks.select(min_length=4, max_error=1)) == []


def test_a_track_is_as_long_as_its_accurate_observations_are_many():
    tracks = tracks_of({0: [7, 8], 1: [7, 8], 2: [7, 8]}, {(1, 8): 2.5, (0, 7): 2.0, (2, 8): np.inf})
    assert left(tracks.select(min_length=1, max_error=2.0)) == [(0, 7), (0, 8), (1, 7), (2, 7)]
    assert left(tracks.select(min_length=2, max_error=2.0)) == [(0, 7), (1, 7), (2, 7)]


def test_observations_of_a_view():
    tracks = tracks_of({0: [3, 5], 2: [1]})
    assert [left(tracks.of_view(v)) for v in range(4)] == [[(0, 3), (0, 5)], [], [(2, 1)], []]


def test_the_error_is_the_distance_to_the_distorted_projection_in_pixels_of_the_model(tmp_path):
    known = known_scene()
    write_images(known, tmp_path / "images_2", scale=0.5)
    write_model(known, tmp_path / "sparse/0", noise={(1, 4): (3.0, 4.0), (3, 0): (0.0, -0.5)})
    tracks = load_scene(tmp_path, downscale_factor=2).tracks
    assert tracks.of_view(1).errors[4] == pytest.approx(5)  # not 2.5: resizing makes no match more accurate
    assert tracks.of_view(3).errors[0] == pytest.approx(0.5)
    assert (tracks.errors > 1e-6).sum() == 2


def test_observations_outside_of_the_photograph_are_left_out(tmp_path):
    # COLMAP's undistortion crops images, but not their lists of observations.
    known = known_scene()
    write_images(known, tmp_path / "images")
    write_model(known, tmp_path / "sparse/0", noise={(0, 2): (-200, 0), (1, 5): (0, 150)})
    tracks = load_scene(tmp_path).tracks
    assert len(tracks) == 5 * 60 - 2
    assert 3 not in tracks.of_view(0).points and 6 not in tracks.of_view(1).points  # COLMAP counts from 1


def test_a_point_behind_the_camera_is_infinitely_wrong(tmp_path):
    known = known_scene()
    write_images(known, tmp_path / "images")
    write_model(known, tmp_path / "sparse/0", text=True)
    points = tmp_path / "sparse/0/points3D.txt"
    lines = points.read_text().splitlines()
    row = next(n for n, line in enumerate(lines) if line.startswith("1 "))
    behind = np.linalg.inv(known.cams_from_world[0])[:3] @ (0, 0, -1, 1)
    lines[row] = " ".join(["1", *map(str, behind), *lines[row].split()[4:]])
    points.write_text("\n".join(lines) + "\n")
    of_first = load_scene(tmp_path).tracks.of_view(0)
    assert np.isinf(of_first.errors[0]) and of_first.errors[1:].max() < 1e-9


def test_of_two_observations_of_a_point_in_one_photograph_the_better_one_counts(tmp_path):
    known = known_scene()
    write_images(known, tmp_path / "images")
    write_model(known, tmp_path / "sparse/0", text=True)
    images = tmp_path / "sparse/0/images.txt"
    # The keypoint of no point, at (1, 2), becomes one of point 6 in every photograph.
    images.write_text(images.read_text().replace("1 2 -1", "1 2 6"))
    tracks = load_scene(tmp_path).tracks
    assert len(tracks) == 5 * 60
    assert tracks.errors.max() < 1e-9
