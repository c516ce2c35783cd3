import json
import subprocess
import sys
import warnings

import cv2
import numpy as np
import pycolmap
import pytest
from colmap_scenes import HEIGHT, WIDTH, known_scene, photograph, pinhole, write_images, write_model, write_transforms
from PIL import Image

from lrf_nerfstudio.correspondence import (
    CorrespondenceConfig,
    Scene,
    View,
    draw_matches,
    find_correspondences,
    load_scene,
    matches_on_disk,
    matching,
)
from lrf_nerfstudio.correspondence.epipolar import fundamental_matrix, pinhole_matrix, sampson_distance, undistort
from lrf_nerfstudio.correspondence.features import Features
from lrf_nerfstudio.correspondence.pairs import pose_errors
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import check_options

BASELINE, FOCAL = 1.0, 300.0
PATCH_I, PATCH_J = (60, 40), (150, 170)  # (x, y) of something that is in two different places


def surface(x, y):
    """Disparity in pixels of a curved surface, at pixels of the second view."""
    return 14 + 5 * np.sin(x / 50) + 6 * np.cos(y / 40)


@pytest.fixture
def stereo(tmp_path):
    """Two photographs of a curved surface by a camera that moves to the right, and a patch that moved on its own."""
    rng = np.random.default_rng(0)
    image = np.zeros((240, 320), np.float32)
    for size in (4, 8, 16, 32):
        coarse = rng.normal(size=(240 // size + 3, 320 // size + 3)).astype(np.float32)
        image += cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_CUBIC) * size**0.5
    image = (128 + 45 * image / image.std()).clip(0, 255).astype(np.uint8)
    x, y = np.meshgrid(np.arange(320, dtype=np.float32), np.arange(240, dtype=np.float32))
    other = cv2.remap(image, x + surface(x, y), y, cv2.INTER_CUBIC)
    patch = rng.normal(size=(12, 12)).astype(np.float32)
    patch = (128 + 60 * cv2.resize(patch, (60, 60), interpolation=cv2.INTER_CUBIC)).clip(0, 255).astype(np.uint8)
    for picture, (left, top), name in ((image, PATCH_I, "a.png"), (other, PATCH_J, "b.png")):
        picture[top : top + 60, left : left + 60] = patch
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "images" / name)
    return tmp_path


def with_cameras(scene):
    views = []
    for n, view in enumerate(scene.views):
        camera = pycolmap.Camera(model="PINHOLE", width=320, height=240, params=[FOCAL, FOCAL, 160, 120])
        pose = np.eye(4)
        pose[0, 3] = -BASELINE * n
        views.append(View(view.path, view.width, view.height, camera, pose))
    return Scene(scene.folder, tuple(views))


def in_box(points, corner, size=60):
    return ((points >= corner) & (points < np.array(corner) + size)).all(axis=1)


def features_config(cache, **options):
    return CorrespondenceConfig(source="features", cache_dir=cache, **options)


@pytest.fixture
def known(tmp_path):
    """A scene with exact geometry, distortion, and photographs at half size."""
    scene = known_scene(views=6, points=80, seen_by=[80, 80, 70, 60, 50, 20])
    write_images(scene, tmp_path / "images")
    write_images(scene, tmp_path / "images_2", scale=0.5)
    write_model(scene, tmp_path / "colmap/sparse/0")
    return scene


def test_matches_on_disk_are_the_same_and_take_no_memory(tmp_path, known):
    found = find_correspondences(load_scene(tmp_path), CorrespondenceConfig())
    on_disk = matches_on_disk(found)
    assert on_disk.scene.views == found.scene.views and on_disk.scene.tracks is None
    assert np.array_equal(on_disk.weights, found.weights)
    for read, pair in zip(on_disk.pairs, found.pairs, strict=True):
        assert (read.i, read.j) == (pair.i, pair.j)
        for of_read, of_pair in ((read.points_i, pair.points_i), (read.points_j, pair.points_j)):
            assert of_read.dtype == np.float32 and np.array_equal(of_read, of_pair)
            assert isinstance(_owner(of_read), np.memmap)
            with pytest.raises(ValueError, match="read-only"):
                of_read[:] = 0


def _owner(array: np.ndarray) -> object:
    """The array that an array is a view of, in the end."""
    while isinstance(array.base, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    return array


@pytest.mark.parametrize("downscale_factor", [1, 2])
def test_matches_of_tracks_obey_the_epipolar_constraint_once_distortion_is_removed(tmp_path, known, downscale_factor):
    scene = load_scene(tmp_path, downscale_factor)
    found = find_correspondences(scene, CorrespondenceConfig())
    assert [(pair.i, pair.j) for pair in found.pairs] == [(i, j) for i in range(6) for j in range(i + 1, 6)]
    crooked = []
    for pair in found.pairs:
        shared = min(known.seen_by[pair.i], known.seen_by[pair.j], 70)  # three views see the first 70 points
        assert len(pair.points_i) == len(pair.points_j) == shared
        assert pair.points_i.dtype == pair.points_j.dtype == np.float32
        view_i, view_j = scene.views[pair.i], scene.views[pair.j]
        f = fundamental_matrix(
            pinhole_matrix(view_i.camera), view_i.cam_from_world, pinhole_matrix(view_j.camera), view_j.cam_from_world
        )
        straight = undistort(view_i.camera, pair.points_i), undistort(view_j.camera, pair.points_j)
        assert sampson_distance(f, *straight).max() < 1e-3
        crooked.append(sampson_distance(f, pair.points_i, pair.points_j).max())
        expected = pinhole(known.cams_from_world[pair.i], known.points) / downscale_factor
        assert np.abs(straight[0] - expected[: len(straight[0])]).max() < 1e-3
    assert max(crooked) > 0.1  # distorted pixels do not obey it


def test_pairs_are_those_with_most_points_in_common_or_with_the_nearest_cameras(tmp_path, known):
    scene = load_scene(tmp_path)

    def pairs(**options):
        return [(p.i, p.j) for p in find_correspondences(scene, CorrespondenceConfig(**options)).pairs]

    # Most points in common: with view 0 or, for view 0, with view 1.
    assert pairs(neighbours=1) == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)]
    errors = pose_errors(known.cams_from_world)
    nearest = {tuple(sorted((i, int(row.argsort()[1])))) for i, row in enumerate(errors)}
    assert pairs(neighbours=1, neighbour_selection="pose-distance") == sorted(nearest)
    assert nearest != {(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)}
    assert pairs(min_matches=51) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    # Points that four views see: the first 60. Five: the first 50.
    assert (
        max(len(p.points_i) for p in find_correspondences(scene, CorrespondenceConfig(min_track_length=5)).pairs) == 50
    )


def test_observations_that_are_off_are_left_out(tmp_path, known):
    write_model(known, tmp_path / "colmap/sparse/0", noise={(0, 3): (1.5, 2.0), (1, 7): (0.0, 0.5)})
    scene = load_scene(tmp_path)
    assert len(find_correspondences(scene, CorrespondenceConfig()).pairs[0].points_i) == 69
    assert len(find_correspondences(scene, CorrespondenceConfig(max_reprojection_error=0.4)).pairs[0].points_i) == 68
    assert len(find_correspondences(scene, CorrespondenceConfig(max_reprojection_error=3)).pairs[0].points_i) == 70


def test_weights_of_pairs(tmp_path, known):
    scene = load_scene(tmp_path)
    errors = pose_errors(known.cams_from_world)
    found = find_correspondences(scene, CorrespondenceConfig(pose_weight_tau=0.7))
    expected = [np.exp(-errors[pair.i, pair.j] / 0.7) for pair in found.pairs]
    assert found.weights == pytest.approx(expected, rel=1e-5) and found.weights.dtype == np.float32
    assert len(set(found.weights.tolist())) > 3
    uniform = find_correspondences(scene, CorrespondenceConfig(pose_weights="uniform"))
    assert uniform.weights.tolist() == [1.0] * len(uniform.pairs)


@pytest.mark.parametrize("cameras", [True, False])
def test_feature_matches_are_right_and_wrong_ones_are_removed(tmp_path, stereo, cameras):
    scene = load_scene(stereo)
    if cameras:
        scene = with_cameras(scene)
    unfiltered = find_correspondences(scene, features_config(tmp_path / "cache", max_epipolar_error=1e9))
    of_patch = in_box(unfiltered.pairs[0].points_i, PATCH_I) & in_box(unfiltered.pairs[0].points_j, PATCH_J)
    assert of_patch.sum() >= 8  # they look alike, but the camera's motion does not explain them
    (pair,) = find_correspondences(scene, features_config(tmp_path / "cache")).pairs
    assert (in_box(pair.points_i, PATCH_I) & in_box(pair.points_j, PATCH_J)).sum() <= 1
    assert len(np.unique(np.hstack([pair.points_i, pair.points_j]), axis=0)) == len(pair.points_i)
    x, y = (pair.points_j - 0.5).T
    expected = pair.points_j + np.stack([surface(x, y), np.zeros_like(x)], axis=1)
    errors = np.linalg.norm(pair.points_i - expected, axis=1)
    assert len(errors) > 100 and np.median(errors) < 0.25 and (errors < 1).mean() > 0.97
    assert np.abs(pair.points_i[:, 1] - pair.points_j[:, 1]).max() < 1.0 * np.sqrt(2) * (1 if cameras else 1.5)


def test_lens_distortion_is_removed_before_matches_are_checked(tmp_path, known, monkeypatch):
    # Features exactly where the distorted photographs show the points, each with a descriptor of its own.
    descriptors = np.random.default_rng(0).integers(0, 255, (80, 128)).astype(np.uint8)
    points = {
        name: photograph(cam, known.points).astype(np.float32)
        for name, cam in zip(known.names, known.cams_from_world, strict=True)
    }
    monkeypatch.setattr(matching, "detect_features", lambda path, count: Features(points[path.name], descriptors))
    found = find_correspondences(load_scene(tmp_path), features_config(tmp_path / "cache", max_epipolar_error=0.01))
    assert [len(pair.points_i) for pair in found.pairs] == [80] * 15


def test_the_source_is_chosen_by_what_there_is(tmp_path, stereo, known):
    # Tracks where there is a model; both scenes lie in one folder, so the photographs of the model are listed.
    write_transforms(known, tmp_path)
    found = find_correspondences(load_scene(tmp_path), CorrespondenceConfig(cache_dir=tmp_path / "cache"))
    assert len(found.pairs) == 15 and not (tmp_path / "cache").exists()
    found = find_correspondences(load_scene(stereo / "images"), CorrespondenceConfig(cache_dir=tmp_path / "cache"))
    assert found.weights.tolist() == [1.0] * len(found.pairs)  # no poses, no pose errors
    assert [p.i for p in found.pairs] == [0] and (tmp_path / "cache").exists()


@pytest.fixture
def matched_once(tmp_path, stereo):
    """A scene and what was found in it; the cache holds it."""
    scene = load_scene(stereo)
    return scene, find_correspondences(scene, features_config(tmp_path / "cache"))


def assert_same(a, b):
    assert [(p.i, p.j) for p in a.pairs] == [(p.i, p.j) for p in b.pairs]
    for p, q in zip(a.pairs, b.pairs, strict=True):
        assert (p.points_i == q.points_i).all() and (p.points_j == q.points_j).all()
        assert p.points_i.dtype == q.points_i.dtype


def test_the_second_start_matches_nothing(tmp_path, matched_once, monkeypatch):
    scene, found = matched_once

    def never(*arguments):
        raise AssertionError("features were detected again")

    monkeypatch.setattr(matching, "detect_features", never)
    assert_same(find_correspondences(scene, features_config(tmp_path / "cache")), found)
    (scene.folder / "images").rename(scene.folder / "renamed")  # what counts is what the photographs show
    moved = load_scene(scene.folder / "renamed")
    again = find_correspondences(moved, features_config(tmp_path / "cache", pose_weights="uniform"))
    assert_same(again, found)
    for options in ({"ratio": 0.7}, {"max_features": 1000}, {"max_epipolar_error": 0.5}, {"min_matches": 17}):
        with pytest.raises(AssertionError, match="again"):
            find_correspondences(moved, features_config(tmp_path / "cache", **options))
    with pytest.raises(AssertionError, match="again"):
        find_correspondences(with_cameras(moved), features_config(tmp_path / "cache"))
    pixels = np.asarray(Image.open(moved.views[0].path)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(moved.views[0].path)
    with pytest.raises(AssertionError, match="again"):
        find_correspondences(moved, features_config(tmp_path / "cache"))


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-9] + bytes(9)])
def test_a_damaged_file_of_the_cache_is_replaced(tmp_path, matched_once, damage):
    scene, found = matched_once
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=r"is damaged .* computed again"):
        assert_same(find_correspondences(scene, features_config(tmp_path / "cache")), found)
    assert [*(tmp_path / "cache").iterdir()] == [file] and file.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_correspondences(scene, features_config(tmp_path / "cache"))


def test_a_cache_that_cannot_be_written(tmp_path, stereo):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache/.* could not be written: .*\(--correspondence.cache-dir\)"):
        find_correspondences(load_scene(stereo), features_config(tmp_path / "cache"))


def test_the_cache_is_in_the_users_cache_folder_by_default(stereo, user_cache_folder):
    find_correspondences(load_scene(stereo), features_config(None))
    assert [*(user_cache_folder / "lrf_nerfstudio" / "correspondences").glob("*.safetensors")]


def test_what_is_missing_is_said(tmp_path, stereo, known):
    photographs = load_scene(stereo / "images")
    with pytest.raises(UserError, match=r"no COLMAP model, so there are no tracks .* `features`"):
        find_correspondences(photographs, CorrespondenceConfig(source="sfm"))
    with pytest.raises(UserError, match="no cameras, so neighbours cannot be selected by pose distance"):
        find_correspondences(photographs, features_config(tmp_path, neighbour_selection="pose-distance"))
    (tmp_path / "poses").mkdir()
    (tmp_path / "poses" / "images").symlink_to(tmp_path / "images")
    write_transforms(known, tmp_path / "poses")
    with pytest.raises(UserError, match="no COLMAP model"):  # poses alone are no tracks
        find_correspondences(load_scene(tmp_path / "poses"), CorrespondenceConfig(source="sfm"))


def test_no_pair_with_enough_matches(tmp_path, known):
    scene = load_scene(tmp_path)
    with pytest.raises(UserError, match=r"No two of the 6 photographs .* have 81 matches"):
        find_correspondences(scene, CorrespondenceConfig(min_matches=81))
    with pytest.raises(UserError, match="min_track_length"):
        find_correspondences(scene, CorrespondenceConfig(min_track_length=7))
    noise = load_scene(tmp_path / "images")
    with pytest.raises(UserError, match="No two of the 6 photographs"):
        find_correspondences(noise, features_config(tmp_path / "cache"))
    lonely = Scene(noise.folder, noise.views[:1])
    with pytest.raises(UserError, match="No two of the 1 photographs"):
        find_correspondences(lonely, features_config(tmp_path / "cache"))


@pytest.mark.parametrize(
    "options",
    [
        {"neighbours": 0},
        {"min_matches": 0},
        {"pose_weight_tau": 0.0},
        {"ratio": 1.1},
        {"max_epipolar_error": float("nan")},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(UserError, match=next(iter(options)).replace("_", "-")):
        check_options(CorrespondenceConfig(**options))


def test_the_figure_shows_both_photographs_and_the_matches(tmp_path, known):
    colours = [(200, 30, 30), (30, 30, 200)]
    for name, colour in zip(known.names, colours, strict=False):
        Image.new("RGB", (WIDTH, HEIGHT), colour).save(tmp_path / "images" / name)
    found = find_correspondences(load_scene(tmp_path), CorrespondenceConfig())
    assert (found.pairs[0].i, found.pairs[0].j) == (0, 1)
    draw_matches(found, 0, tmp_path / "figures" / "pair.png", lines=0)
    figure = np.asarray(Image.open(tmp_path / "figures" / "pair.png").convert("RGB")).astype(int)
    height, width = figure.shape[:2]
    assert width == 2 * round(height * WIDTH / HEIGHT)
    halves = figure[:, : width // 2], figure[:, width // 2 :]
    for half, colour, points in zip(halves, colours, (found.pairs[0].points_i, found.pairs[0].points_j), strict=True):
        photograph = np.abs(half - colour).max(axis=2) < 3
        assert photograph.mean() > 0.9
        at = (points * (height / HEIGHT)).astype(int)
        assert not photograph[at[:, 1], at[:, 0]].any()  # there is a dot on every match
    draw_matches(found, 0, tmp_path / "lines.png", lines=20)
    lines = np.asarray(Image.open(tmp_path / "lines.png").convert("RGB")).astype(int)
    changed = (np.abs(lines - figure).max(axis=2) > 20).mean(axis=0)
    assert changed[width // 2 - 20 : width // 2 + 20].min() > 0  # lines go from one photograph to the other
    (tmp_path / "images" / known.names[1]).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"view_1.png cannot be read"):
        draw_matches(found, 0, tmp_path / "lines.png")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"pair\.png could not be written"):
        draw_matches(found, 1, tmp_path / "file" / "pair.png")


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, lrf_nerfstudio.correspondence, json; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    heavy = {"torch", "cv2", "pycolmap", "matplotlib", "nerfstudio", "scipy"}
    assert heavy.isdisjoint(json.loads(output))
