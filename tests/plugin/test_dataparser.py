"""nerfstudio's data formats: poses are checked, problems are named, points are read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.instant_ngp_dataparser import InstantNGPDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from tiny_scenes import (
    Lens,
    edit_transforms,
    look_at_origin,
    poses_around,
    seed_points,
    write_blender_scene,
    write_colmap_scene,
    write_instant_ngp_scene,
    write_ply,
    write_scene,
)

from lrf_nerfstudio.plugin.dataparser import parse, scene_parser, select_images, setup_dataparser
from lrf_nerfstudio.plugin.dataset import PinholeDataset
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.poses import check_pose


def parse_scene(scene: Path, split: str = "train", **options):
    config = NerfstudioDataParserConfig(data=scene, load_3D_points=True, eval_mode="interval", **options)
    return parse(setup_dataparser(config), scene, split)


def edit_pose(scene: Path, index: int, edit) -> str:
    """Change a frame's pose; returns the frame's file path."""
    frames = json.loads((scene / "transforms.json").read_text())["frames"]
    pose = np.array(frames[index]["transform_matrix"])
    edit(pose)
    frames[index]["transform_matrix"] = pose.tolist()
    edit_transforms(scene, frames=frames)
    return frames[index]["file_path"]


def set_nan(pose: np.ndarray) -> None:
    pose[1, 2] = np.nan


def set_infinite(pose: np.ndarray) -> None:
    pose[0, 3] = np.inf


def scale_rotation(pose: np.ndarray) -> None:
    pose[:3, :3] *= 1.2


def shear(pose: np.ndarray) -> None:
    pose[:3, 0] += 0.3 * pose[:3, 1]


@pytest.mark.parametrize("edit", [set_nan, set_infinite, scale_rotation, shear])
@pytest.mark.parametrize("index", [0, 5])  # the first is held out
def test_a_bad_pose_is_named(tmp_path, edit, index):
    scene = write_scene(tmp_path / "scene")
    name = edit_pose(scene, index, edit)
    with pytest.raises(UserError, match="pose") as error:
        parse_scene(scene)
    assert name in str(error.value)
    assert str(scene / "transforms.json") in str(error.value)


def test_a_mirrored_pose_is_refused():
    pose = look_at_origin((1.0, 2.0, 3.0))
    check_pose(pose, "frame")
    pose[:3, 0] *= -1
    with pytest.raises(UserError, match="frame"):
        check_pose(pose, "frame")


def test_poses_of_four_decimals_pass():
    for pose in poses_around(7):
        check_pose(np.round(pose, 4), "frame")
        check_pose(pose[:3], "frame")


@pytest.mark.parametrize(
    "damage", ["folder", "transforms", "frames", "no frames", "json", "pose", "keys", "intrinsics"]
)
def test_a_bad_data_set_is_named(tmp_path, damage):
    scene = write_scene(tmp_path / "scene")
    transforms = scene / "transforms.json"
    meta = json.loads(transforms.read_text())
    if damage == "folder":
        scene = tmp_path / "nowhere"
    elif damage == "transforms":
        transforms.unlink()
    elif damage == "frames":
        edit_transforms(scene, frames=[])
    elif damage == "no frames":
        del meta["frames"]
        transforms.write_text(json.dumps(meta))
    elif damage == "json":
        transforms.write_text(transforms.read_text()[:300])
    elif damage == "pose":
        edit_transforms(scene, frames=[{"file_path": "images/000.png", "transform_matrix": [[1, 2], [3, 4]]}])
    elif damage == "keys":
        edit_transforms(scene, frames=[{"file_path": "images/000.png"}])
    elif damage == "intrinsics":
        del meta["fl_x"]
        transforms.write_text(json.dumps(meta))
    with pytest.raises(UserError) as error:
        parse_scene(scene)
    assert str(scene) in str(error.value)


def test_points_are_read_without_open3d(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open3d", None)  # importing it raises
    scene = write_scene(tmp_path / "scene")
    outputs = parse_scene(scene)
    points = outputs.metadata["points3D_xyz"]
    world = torch.from_numpy(seed_points()).float()
    transform = outputs.dataparser_transform
    expected = (world @ transform[:3, :3].T + transform[:3, 3]) * outputs.dataparser_scale
    assert torch.allclose(points, expected, atol=1e-5)
    # They lie where the cameras look: every camera's centre was moved in the same way.
    centers = torch.tensor(np.array(poses_around(9))[1:8, :3, 3]).float()
    expected = (centers @ transform[:3, :3].T + transform[:3, 3]) * outputs.dataparser_scale
    assert torch.allclose(outputs.cameras.camera_to_worlds[:, :, 3], expected, atol=1e-5)


def test_a_scene_without_points(tmp_path):
    assert "points3D_xyz" not in parse_scene(write_scene(tmp_path / "scene", points=False)).metadata


def test_an_empty_point_cloud_counts_as_none(tmp_path):
    scene = write_scene(tmp_path / "scene")
    write_ply(scene / "points.ply", np.zeros((0, 3)))
    assert "points3D_xyz" not in parse_scene(scene).metadata


@pytest.mark.parametrize("damage", ["missing", "text", "truncated", "without coordinates"])
def test_a_bad_point_cloud_is_named(tmp_path, damage):
    scene = write_scene(tmp_path / "scene")
    path = scene / "points.ply"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("not a ply")
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "without coordinates":
        path.write_bytes(content.replace(b"float x", b"float a"))
    with pytest.raises(UserError) as error:
        parse_scene(scene)
    assert str(path) in str(error.value)


def test_every_eighth_view_is_held_out(tmp_path):
    scene = write_scene(tmp_path / "scene", views=17)
    train, held_out = (parse_scene(scene, split).image_filenames for split in ("train", "test"))
    assert [path.name for path in held_out] == ["000.png", "008.png", "016.png"]
    assert len(train) == 14


# ---------------------------------------------------------------------------------------------------- other formats

FORMATS = {
    "colmap": (write_colmap_scene, ColmapDataParserConfig),
    "blender-data": (write_blender_scene, BlenderDataParserConfig),
    "instant-ngp-data": (write_instant_ngp_scene, InstantNGPDataParserConfig),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_parse(tmp_path, name):
    write, config_type = FORMATS[name]
    scene = write(tmp_path / "scene")
    parser = setup_dataparser(config_type(data=scene))
    for split in ("train", "val", "test"):
        dataset = PinholeDataset(parse(parser, scene, split))
        dataset.check_sizes()
        image, _ = dataset.photograph(0)
        assert image.shape == (72, 96, 3)
        assert dataset.cameras.fx[0].item() == pytest.approx(Lens().focal, rel=1e-4)
    assert (dataset.background_rgb is not None) == (name == "blender-data")


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_train(tmp_path, name, forked, tiny_vae):
    scene = FORMATS[name][0](tmp_path / "scene")
    forked(
        *("ns-train", "latent-splatfacto", "--data", scene, "--output-dir", tmp_path / "out", "--timestamp", "run"),
        *("--vis", "tensorboard", "--max-num-iterations", 5, "--pipeline.vae.source", tiny_vae, name),
    ).check()
    checkpoint = tmp_path / "out/scene/latent-splatfacto/run/nerfstudio_models/step-000000004.ckpt"
    state = torch.load(checkpoint, weights_only=True)["pipeline"]
    assert all(torch.isfinite(value).all() for key, value in state.items() if "gauss_params" in key)
    assert torch.isfinite(state["_model.background.scene_color"]).all() == (name == "blender-data")


def test_the_wrong_format_is_explained(tmp_path):
    scene = write_colmap_scene(tmp_path / "scene")
    with pytest.raises(UserError, match="colmap"):
        parse_scene(scene)


def test_photographs_are_chosen_by_name(tmp_path):
    scene = write_scene(tmp_path / "scene", views=9, masked=True)
    parser = setup_dataparser(NerfstudioDataParserConfig(data=scene, eval_mode="all"))
    outputs = parse(parser, scene, "train")
    chosen = select_images(outputs, ["007.png", "002.png"])
    assert [path.name for path in chosen.image_filenames] == ["007.png", "002.png"]
    assert [path.name for path in chosen.mask_filenames] == ["007.png", "002.png"]
    assert torch.equal(chosen.cameras.camera_to_worlds, outputs.cameras.camera_to_worlds[[7, 2]])
    with pytest.raises(UserError, match=r"No photographs .* called 009.png"):
        select_images(outputs, ["009.png"])


def test_parsers_by_what_is_in_the_folder(tmp_path):
    scene = write_scene(tmp_path / "scene", views=2)
    assert isinstance(scene_parser(scene, 2), NerfstudioDataParserConfig)
    model = write_colmap_scene(tmp_path / "model", views=3)
    assert isinstance(scene_parser(model, None), ColmapDataParserConfig)
    (model / "colmap" / "sparse").rename(model / "sparse")
    assert len(parse(setup_dataparser(scene_parser(model, 1)), model, "train").image_filenames) == 2
    with pytest.raises(UserError, match=r"neither transforms\.json nor a COLMAP model"):
        scene_parser(tmp_path, None)
