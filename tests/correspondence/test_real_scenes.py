import time

import numpy as np
import pytest

from lrf_nerfstudio.correspondence import CorrespondenceConfig, Scene, find_correspondences, load_scene
from lrf_nerfstudio.correspondence.epipolar import fundamental_matrix, pinhole_matrix, sampson_distance, undistort

pytestmark = [pytest.mark.realdata, pytest.mark.slow]


def distances(scene, pair):
    """Sampson distances of a pair's matches under the cameras of another reading of the scene."""
    views = scene.views[pair.i], scene.views[pair.j]
    intrinsics = [pinhole_matrix(view.camera) for view in views]
    f = fundamental_matrix(intrinsics[0], views[0].cam_from_world, intrinsics[1], views[1].cam_from_world)
    return sampson_distance(f, undistort(views[0].camera, pair.points_i), undistort(views[1].camera, pair.points_j))


@pytest.mark.parametrize(("name", "downscale_factor"), [("fox", 1), ("fox", 2), ("flower", 1)])
def test_tracks_agree_with_the_poses_of_transforms_json(real_data, tmp_path, name, downscale_factor):
    folder = real_data / "scenes" / name
    for item in ("transforms.json", "images", "images_2"):
        (tmp_path / item).symlink_to(folder / item)
    from_transforms = load_scene(tmp_path, downscale_factor)
    scene = load_scene(folder, downscale_factor)
    assert [view.path.name for view in scene.views] == [view.path.name for view in from_transforms.views]
    found = find_correspondences(scene, CorrespondenceConfig())
    assert len(found.pairs) > 100
    errors = np.concatenate([distances(from_transforms, pair) for pair in found.pairs]) * downscale_factor
    assert len(errors) > 100_000
    assert np.median(errors) < 0.4
    assert (errors < 3).all()  # two observations, each at most 2 pixels from where the point is
    rng = np.random.default_rng(0)
    for pair in found.pairs[::20]:
        for points, view in ((pair.points_i, scene.views[pair.i]), (pair.points_j, scene.views[pair.j])):
            assert (points >= 0).all() and (points <= (view.width, view.height)).all()
        shuffled = type(pair)(pair.i, pair.j, pair.points_i, rng.permutation(pair.points_j))
        assert np.median(distances(from_transforms, shuffled)) * downscale_factor > 10


def test_the_tracks_of_four_scenes_are_read_in_seconds(real_data):
    start = time.process_time()
    for name in ("banana", "plush", "cape", "kitchen"):
        found = find_correspondences(load_scene(real_data / "scenes" / name), CorrespondenceConfig())
        assert sum(len(pair.points_i) for pair in found.pairs) > 5000
        assert 0.1 < found.weights.mean() < 0.9
    assert time.process_time() - start < 5


@pytest.mark.parametrize("cameras", [True, False])
def test_features_of_banana_match_where_its_cameras_say(real_data, tmp_path, cameras):
    scene = load_scene(real_data / "scenes" / "banana", downscale_factor=2)
    known = Scene(scene.folder, scene.views[:5], scene.tracks[scene.tracks.views < 5])
    matched = known if cameras else load_scene(real_data / "scenes" / "banana" / "images_2")
    matched = Scene(matched.folder, matched.views[:5])
    found = find_correspondences(matched, CorrespondenceConfig(source="features", cache_dir=tmp_path))
    pairs = {(pair.i, pair.j): pair for pair in found.pairs}
    assert {(n, n + 1) for n in range(4)} <= set(pairs)
    errors = np.concatenate([distances(known, pair) for pair in found.pairs])
    assert len(errors) > 800
    # Without cameras F is estimated; what it lets through is what the real cameras would have let through.
    assert np.median(errors) < 0.3
    assert (errors <= 1).mean() >= (1.0 if cameras else 0.95)
    # Where the model has an observation at the same place, it has its match at the same place too.
    tracks = find_correspondences(known, CorrespondenceConfig(source="sfm", min_track_length=2))
    apart = []
    for by_colmap in tracks.pairs:
        if (by_colmap.i, by_colmap.j) in pairs:
            pair = pairs[by_colmap.i, by_colmap.j]
            to_colmap = np.linalg.norm(pair.points_i[:, None] - by_colmap.points_i, axis=2)
            same = to_colmap.min(axis=1) < 0.3
            nearest = by_colmap.points_j[to_colmap.argmin(axis=1)]
            apart.append(np.linalg.norm(pair.points_j - nearest, axis=1)[same])
    apart = np.concatenate(apart)
    assert len(apart) > 200
    assert np.median(apart) < 0.4 and (apart < 2).mean() > 0.98
