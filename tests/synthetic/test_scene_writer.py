"""nerfstudio reads the scenes, through either of its parsers, and a folder is whole or not there."""

import json
from pathlib import Path

import numpy as np
import pytest
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from plyfile import PlyData

from lrf_nerfstudio.correspondence.colmap import read_model
from lrf_nerfstudio.synthetic.random_scenes import random_scene
from lrf_nerfstudio.synthetic.writer import PictureConfig, is_there, settings_of, write_scene
from lrf_nerfstudio.utils.errors import UserError

SMALL = PictureConfig(views=9, size=(24, 32), samples=1, points=50)


def test_nerfstudio_reads_cameras_points_and_split(training_scene: Path) -> None:
    parser = NerfstudioDataParserConfig(
        data=training_scene,
        load_3D_points=True,
        orientation_method="none",
        center_method="none",
        auto_scale_poses=False,
    ).setup()
    train, test = (parser.get_dataparser_outputs(split) for split in ("train", "test"))
    assert [path.name for path in test.image_filenames] == [f"view_{view:03d}.png" for view in (0, 8, 16)]
    assert len(train.image_filenames) == 14
    _, cameras = random_scene(3, 17, (72, 96))
    np.testing.assert_allclose(test.cameras.camera_to_worlds.numpy(), cameras.poses[::8, :3], atol=1e-6)
    assert float(test.cameras.fx[0]) == pytest.approx(cameras.focal)
    vertices = PlyData.read(training_scene / "sparse_pc.ply")["vertex"]
    assert len(vertices) == 1500
    points = np.stack([vertices[axis] for axis in "xyz"], axis=-1)
    np.testing.assert_allclose(train.metadata["points3D_xyz"].numpy(), points, atol=1e-5)
    colors = np.stack([vertices[name] for name in ("red", "green", "blue")], axis=-1)
    np.testing.assert_array_equal(train.metadata["points3D_rgb"].numpy(), colors)


def test_nerfstudio_reads_the_colmap_model(training_scene: Path) -> None:
    options = {"orientation_method": "none", "center_method": "none", "auto_scale_poses": False}
    parser = ColmapDataParserConfig(data=training_scene, load_3D_points=True, eval_mode="all", **options).setup()
    outputs = parser.get_dataparser_outputs("train")
    assert len(outputs.image_filenames) == 17 and len(outputs.metadata["points3D_xyz"]) == 1500
    _, cameras = random_scene(3, 17, (72, 96))
    # Its world is turned: x, y, z of COLMAP are x, z, -y of nerfstudio's.
    turned = parser.transform_matrix if hasattr(parser, "transform_matrix") else outputs.dataparser_transform
    theirs = outputs.cameras.camera_to_worlds.double().numpy()
    expected = turned.double().numpy()[:3, :3] @ cameras.poses[:, :3, 3:]
    np.testing.assert_allclose(theirs[..., 3:], expected, atol=1e-5)


def test_points_have_the_mean_color_of_the_pixels_that_show_them(training_scene: Path) -> None:
    vertices = PlyData.read(training_scene / "sparse_pc.ply")["vertex"]
    colors = np.stack([vertices[name] for name in ("red", "green", "blue")], axis=-1)
    model = read_model(training_scene / "colmap" / "sparse" / "0")
    totals, counts = np.zeros(colors.shape), np.zeros(len(colors))
    for image in model.images.values():
        picture = np.asarray(Image.open(training_scene / "images" / image.name))
        rows = np.searchsorted(sorted(model.points3D), [seen.point3D_id for seen in image.points2D])
        column, line = np.stack([seen.xy for seen in image.points2D]).astype(int).T
        totals[rows] += picture[line, column]
        counts[rows] += 1
    np.testing.assert_allclose(totals / counts[:, None], colors, atol=0.51)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    settings, (scene, cameras) = settings_of(SMALL, "random", 0), random_scene(0, 9, (24, 32))
    views = iter(range(4))

    def fail() -> None:
        if next(views) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scene(tmp_path / "scene", scene, cameras, settings, fail)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_no_part_of_the_scene(tmp_path: Path) -> None:
    left = tmp_path / ".scene.partial" / "images"
    left.mkdir(parents=True)
    (left / "view_100.png").write_bytes(b"half a picture")
    settings = settings_of(SMALL, "random", 0)
    assert not is_there(tmp_path / "scene", settings)
    write_scene(tmp_path / "scene", *random_scene(0, 9, (24, 32)), settings)
    assert is_there(tmp_path / "scene", settings)
    assert len(list((tmp_path / "scene" / "images").iterdir())) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["scene"]


def test_another_scene_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"scene holds something else.*--output"):
        is_there(tmp_path / "scene", settings_of(SMALL, "random", 0))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/scene could not be written.*--output"):
        write_scene(tmp_path / "file" / "scene", *random_scene(0, 9, (24, 32)), settings_of(SMALL, "random", 0))


def test_transforms_hold_what_nerfstudio_documents(training_scene: Path) -> None:
    meta = json.loads((training_scene / "transforms.json").read_text())
    assert (meta["w"], meta["h"], meta["cx"], meta["cy"]) == (96, 72, 48, 36)
    for frame in meta["frames"]:
        pose = np.array(frame["transform_matrix"])
        np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-12)
        assert np.linalg.det(pose[:3, :3]) > 0
        assert Image.open(training_scene / frame["file_path"]).size == (96, 72)
