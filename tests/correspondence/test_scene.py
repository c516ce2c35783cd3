import json
import shutil

import cv2
import numpy as np
import pycolmap
import pytest
from colmap_scenes import (
    CX,
    CY,
    FX,
    FY,
    HEIGHT,
    K1,
    K2,
    P1,
    P2,
    WIDTH,
    known_scene,
    photograph,
    pinhole,
    write_images,
    write_model,
    write_transforms,
)
from PIL import Image

from lrf_nerfstudio.correspondence import load_scene
from lrf_nerfstudio.correspondence.epipolar import undistort
from lrf_nerfstudio.correspondence.tracks import project
from lrf_nerfstudio.utils.errors import UserError


@pytest.fixture
def known():
    return known_scene(seen_by=[60, 60, 50, 40, 30])


@pytest.fixture
def folder(tmp_path, known):
    write_images(known, tmp_path / "images")
    return tmp_path


@pytest.mark.parametrize("place", ["colmap/sparse/0", "sparse/0", "sparse"])
def test_a_colmap_model_gives_cameras_and_tracks(folder, known, place):
    write_model(known, folder / place)
    scene = load_scene(folder)
    assert [view.path for view in scene.views] == [folder / "images" / name for name in known.names]
    for view, cam, seen in zip(scene.views, known.cams_from_world, known.seen_by, strict=True):
        assert (view.width, view.height) == (WIDTH, HEIGHT)
        assert view.cam_from_world == pytest.approx(cam)
        expected = photograph(cam, known.points)
        assert np.abs(project(view.camera, view.cam_from_world, known.points) - expected).max() < 1e-9
        assert np.abs(undistort(view.camera, expected) - pinhole(cam, known.points)).max() < 1e-4
        observed = scene.tracks.of_view(scene.views.index(view))
        assert len(observed) == seen
        assert observed.xy == pytest.approx(expected[:seen])  # COLMAP numbers points as they are added
    assert scene.tracks.errors.max() < 1e-9


def test_text_and_binary_are_the_same(folder, known):
    write_model(known, folder / "sparse/0")
    binary = load_scene(folder)
    shutil.rmtree(folder / "sparse")
    write_model(known, folder / "sparse/0", text=True)
    text = load_scene(folder)
    assert (text.tracks.views == binary.tracks.views).all() and (text.tracks.points == binary.tracks.points).all()
    assert text.tracks.xy == pytest.approx(binary.tracks.xy)
    for a, b in zip(text.views, binary.views, strict=True):
        assert a.path == b.path and a.cam_from_world == pytest.approx(b.cam_from_world)
        assert a.camera.params == pytest.approx(b.camera.params)


def test_images_that_show_no_points_have_an_empty_line_in_the_text(folder):
    known = known_scene(seen_by=[60, 0, 60, 0, 0])
    write_model(known, folder / "sparse/0", text=True)
    images = folder / "sparse/0/images.txt"
    lines = images.read_text().splitlines()  # keypoints without points, as in newer models, go
    images.write_text("\n".join("" if line == "1 2 -1" else line for line in lines) + "\n")
    scene = load_scene(folder)
    assert [len(scene.tracks.of_view(v)) for v in range(5)] == [60, 0, 60, 0, 0]


def test_resized_photographs_have_rescaled_cameras_and_tracks(folder, known):
    write_model(known, folder / "sparse/0")
    write_images(known, folder / "images_2", scale=0.5)
    write_transforms(known, folder)
    scene = load_scene(folder, downscale_factor=2)
    for v, (view, cam) in enumerate(zip(scene.views, known.cams_from_world, strict=True)):
        assert view.path.parent.name == "images_2" and (view.width, view.height) == (WIDTH // 2, HEIGHT // 2)
        expected = photograph(cam, known.points) / 2
        assert np.abs(project(view.camera, cam, known.points) - expected).max() < 1e-9
        assert scene.tracks.of_view(v).xy == pytest.approx(expected[: known.seen_by[v]])
    shutil.rmtree(folder / "sparse")
    without_model = load_scene(folder, downscale_factor=2)
    for view, other in zip(without_model.views, scene.views, strict=True):
        assert view.path == other.path
        points = project(view.camera, view.cam_from_world, known.points)
        assert np.abs(points - project(other.camera, other.cam_from_world, known.points)).max() < 1e-6


def test_transforms_give_the_same_cameras_as_the_model(folder, known):
    write_transforms(known, folder)
    scene = load_scene(folder)
    assert scene.tracks is None and scene.has_cameras
    assert [view.path.name for view in scene.views] == known.names  # sorted, not as the file lists them
    for view, cam in zip(scene.views, known.cams_from_world, strict=True):
        assert view.cam_from_world == pytest.approx(cam)
        assert np.abs(project(view.camera, cam, known.points) - photograph(cam, known.points)).max() < 1e-9


def test_intrinsics_of_a_frame_count_before_those_of_all(folder, known):
    content = write_transforms(known, folder)
    content["frames"][0]["fl_x"] = 2 * FX
    del content["w"], content["h"]  # then those of the file
    (folder / "transforms.json").write_text(json.dumps(content))
    scene = load_scene(folder)
    focals = {view.path.name: view.camera.focal_length_x for view in scene.views}
    assert focals.pop(content["frames"][0]["file_path"].removeprefix("images/")) == 2 * FX
    assert set(focals.values()) == {FX}


def test_opencvs_distortion_models_are_opencvs(folder, known):
    rays = np.random.default_rng(0).uniform((-0.6, -0.6, 1), (0.6, 0.6, 1), (50, 3))
    k = np.array([[FX, 0, CX], [0, FY, CY], [0, 0, 1]])
    write_transforms(known, folder, k3=0.03)
    camera = load_scene(folder).views[0].camera
    expected, _ = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), k, np.array([K1, K2, P1, P2, 0.03]))
    assert np.abs(project(camera, np.eye(4), rays) - expected[:, 0]).max() < 1e-9
    write_transforms(known, folder, distortion_params=[K1, K2, 0.03, 0.0, P1, P2])  # nerfstudio's order
    assert load_scene(folder).views[0].camera.params.tolist() == camera.params.tolist()

    write_transforms(known, folder, camera_model="OPENCV_FISHEYE", k3=0.03, k4=-0.01)
    camera = load_scene(folder).views[0].camera
    expected, _ = cv2.fisheye.projectPoints(rays[:, None], np.zeros(3), np.zeros(3), k, np.array([K1, K2, 0.03, -0.01]))
    assert np.abs(project(camera, np.eye(4), rays) - expected[:, 0]).max() < 1e-9
    straight = undistort(camera, expected[:, 0])
    assert np.abs(straight - (rays @ k.T)[:, :2]).max() < 1e-3


def test_transforms_say_which_photographs_of_a_model_there_are(folder, known):
    write_model(known, folder / "colmap/sparse/0")
    content = write_transforms(known, folder)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "unknown.png")
    unknown = {**content["frames"][0], "file_path": "images/unknown.png"}  # the model could not register it
    content["frames"] = [*content["frames"][1:4], unknown]
    (folder / "transforms.json").write_text(json.dumps(content))
    scene = load_scene(folder)
    assert [view.path.name for view in scene.views] == known.names[1:4]
    assert np.unique(scene.tracks.views).tolist() == [0, 1, 2]
    assert scene.tracks.of_view(0).xy == pytest.approx(photograph(known.cams_from_world[1], known.points))
    for frame in content["frames"]:
        frame["file_path"] = "images/unknown.png"
    (folder / "transforms.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="knows none of the photographs"):
        load_scene(folder)


def test_photographs_in_folders_within_images_keep_their_names(tmp_path, known):
    for v, name in enumerate(known.names):
        known_names = f"phone_{v % 2}/{name}"
        (tmp_path / "images" / known_names).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / known_names)
    write_model(known, tmp_path / "sparse/0", text=True)
    images = tmp_path / "sparse/0/images.txt"
    text = images.read_text()
    for v, name in enumerate(known.names):
        text = text.replace(name, f"phone_{v % 2}/{name}")
    images.write_text(text)
    scene = load_scene(tmp_path)
    names = [str(view.path.relative_to(tmp_path / "images")) for view in scene.views]
    assert names == sorted(f"phone_{v % 2}/{name}" for v, name in enumerate(known.names))
    for v, view in enumerate(scene.views):
        cam = known.cams_from_world[known.names.index(view.path.name)]
        observed = scene.tracks.of_view(v)
        assert observed.xy == pytest.approx(photograph(cam, known.points)[: len(observed)])


def test_a_folder_of_photographs_needs_no_cameras(folder, known):
    for path in (folder, folder / "images"):
        scene = load_scene(path)
        assert [view.path for view in scene.views] == [folder / "images" / name for name in known.names]
        assert scene.tracks is None and not scene.has_cameras and scene.cams_from_world == []
    write_images(known, folder / "images_4", scale=0.25)
    assert {(view.width, view.height) for view in load_scene(folder, 4).views} == {(WIDTH // 4, HEIGHT // 4)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content, folder: "{", "transforms.json cannot be read"),
        (lambda content, folder: "[1]", "lists no images"),
        (lambda content, folder: json.dumps({**content, "frames": []}), "lists no images"),
        (lambda content, folder: json.dumps({**content, "frames": [{}]}), "Frame 0 .* has no `file_path`"),
        (lambda content, folder: json.dumps({k: v for k, v in content.items() if k != "fl_y"}), "'fl_y' is missing"),
        (lambda content, folder: json.dumps({**content, "fl_x": "wide"}), "camera of images/view_0.png .* 'wide'"),
        (lambda content, folder: json.dumps({**content, "cx": float("nan")}), "not finite"),
        (lambda content, folder: json.dumps({**content, "k4": 0.1}), "no fourth radial coefficient"),
        (lambda content, folder: json.dumps({**content, "camera_model": "EQUIRECTANGULAR"}), "EQUIRECTANGULAR"),
        (lambda content, folder: json.dumps({**content, "w": 120, "h": 160}), "120 x 160: other proportions"),
    ],
)
def test_bad_transforms_are_named(folder, known, damage, message):
    content = write_transforms(known, folder)
    (folder / "transforms.json").write_text(damage(content, folder))
    with pytest.raises(UserError, match=message):
        load_scene(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((0, 0, float("nan")), "images/view_4.png in .*transforms.json contains NaN"),
        ((0, 0, 3.0), "view_4.png .* no rigid motion"),
        (None, "view_4.png .* is \\(2, 2\\), not a 4 x 4 matrix"),
    ],
)
def test_a_bad_pose_is_named(folder, known, entry, message):
    content = write_transforms(known, folder)
    if entry is None:
        content["frames"][0]["transform_matrix"] = [[1, 0], [0, 1]]
    else:
        row, column, value = entry
        content["frames"][0]["transform_matrix"][row][column] = value
    (folder / "transforms.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_scene(folder)


@pytest.mark.parametrize("with_model", [True, False])
def test_a_missing_photograph_is_named(folder, known, with_model):
    if with_model:
        write_model(known, folder / "sparse/0")
    else:
        write_transforms(known, folder)
    (folder / "images" / known.names[2]).unlink()
    with pytest.raises(UserError, match=r"view_2.png cannot be read: No such file"):
        load_scene(folder)
    (folder / "images" / known.names[2]).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"view_2.png is no image"):
        load_scene(folder)


def test_photographs_that_were_cropped_do_not_fit_their_cameras(folder, known):
    write_model(known, folder / "sparse/0")
    write_images(known, folder / "images_2", scale=0.5)
    Image.new("RGB", (80, 57)).save(folder / "images_2" / known.names[0])
    with pytest.raises(UserError, match=r"80 x 57 pixels, its camera 160 x 120: other proportions"):
        load_scene(folder, 2)
    Image.new("RGB", (81, 60)).save(folder / "images_2" / known.names[0])  # rounded to whole pixels the other way
    assert load_scene(folder, 2).views[0].width == 81


def test_no_scene_at_all(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_scene(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no images"):
        load_scene(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"There is no .*images_2"):
        load_scene(tmp_path, 2)
    with pytest.raises(UserError, match="must be 1 or more"):
        load_scene(tmp_path, 0)


BINARY = [f"{name}.bin" for name in ("cameras", "images", "points3D", "rigs", "frames")]


@pytest.mark.parametrize("file", BINARY)
def test_a_damaged_binary_model_is_named_wherever_it_ends(folder, known, file):
    write_model(known, folder / "sparse/0")
    path = folder / "sparse/0" / file
    content = path.read_bytes()
    for length in {0, 4, 8, 20, *range(0, len(content), -(-len(content) // 50)), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=rf"sparse/0 is damaged \({file} (ends early|has \d+ bytes)"):
            load_scene(folder)
    path.write_bytes(content + b"more")
    with pytest.raises(UserError, match=rf"{file} has {len(content) + 4} bytes where {len(content)} were expected"):
        load_scene(folder)


@pytest.mark.parametrize("text", [False, True])
def test_a_missing_file_of_a_model_is_named(folder, known, text):
    for name in ("cameras", "images", "points3D"):
        write_model(known, folder / "sparse/0", text=text)
        file = folder / "sparse/0" / f"{name}{'.txt' if text else '.bin'}"
        file.unlink()
        with pytest.raises(UserError, match=f"{file} of the COLMAP model is missing"):
            load_scene(folder)


@pytest.mark.parametrize("seed", range(5))
def test_noise_in_place_of_a_binary_model_is_reported(folder, known, seed):
    rng = np.random.default_rng(seed)
    for file in BINARY:
        write_model(known, folder / "sparse/0")
        path = folder / "sparse/0" / file
        path.write_bytes(rng.bytes(len(path.read_bytes())))
        with pytest.raises(UserError, match=r"sparse/0 is damaged \("):
            load_scene(folder)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers out of all proportion
@pytest.mark.parametrize("file", [*BINARY, *(name.replace(".bin", ".txt") for name in BINARY)])
def test_damage_in_the_middle_is_reported_or_harmless(folder, known, file):
    """Whatever a few bytes become, reading ends with a scene or a message: it never hangs or aborts."""
    write_model(known, folder / "sparse/0", text=file.endswith(".txt"))
    path = folder / "sparse/0" / file
    content, reported, rng = path.read_bytes(), 0, np.random.default_rng(0)
    for _ in range(40):
        start, length = rng.integers(0, len(content)), rng.choice([1, 8])
        path.write_bytes(content[:start] + rng.bytes(length) + content[start + length :])
        try:
            load_scene(folder)
        except UserError as error:
            assert "COLMAP model" in str(error) or "sparse/0" in str(error) or "proportions" in str(error), error
            reported += 1
    assert reported


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("cameras.txt", "OPENCV", "OPENSEA", "Camera model does not exist"),
        ("cameras.txt", "150", "nan", "VerifyParams"),
        ("images.txt", "view_0.png", "", "image.Name"),
        ("points3D.txt", "\n1 ", "\n1 x", "point3D.xyz"),
    ],
)
def test_a_damaged_text_model_is_named(folder, known, file, old, new, reason):
    write_model(known, folder / "sparse/0", text=True)
    path = folder / "sparse/0" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=rf"sparse/0 is damaged \(.*{reason}"):
        load_scene(folder)


def test_files_of_two_models_do_not_fit_together(folder, known):
    write_model(known, folder / "sparse/0", text=True)
    points = folder / "sparse/0/points3D.txt"
    points.write_text("\n".join(points.read_text().splitlines()[:-5]) + "\n")
    with pytest.raises(UserError, match="do not fit together"):
        load_scene(folder)
    for file in (folder / "sparse/0").iterdir():
        if file.name in ("images.txt", "points3D.txt"):
            file.write_text("# nothing\n")
    with pytest.raises(UserError, match="no registered images"):
        load_scene(folder)


def test_old_models_without_rigs_and_frames_are_read(folder, known):
    write_model(known, folder / "sparse/0")
    new = load_scene(folder)
    for name in ("rigs.bin", "frames.bin"):
        (folder / "sparse/0" / name).unlink()
    assert (load_scene(folder).tracks.xy == new.tracks.xy).all()
    assert pycolmap.Reconstruction(str(folder / "sparse/0")).num_points3D() == 60
