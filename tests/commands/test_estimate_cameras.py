"""The command that makes a scene of a folder of photographs: cameras against the true ones, and what stops it."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from lrf_nerfstudio.commands import estimate_cameras
from lrf_nerfstudio.commands.estimate_cameras import EstimateCameras, estimate
from lrf_nerfstudio.synthetic.demo import demo_cameras, demo_scene
from lrf_nerfstudio.synthetic.raytracer import render
from lrf_nerfstudio.utils.cli import run
from lrf_nerfstudio.utils.errors import UserError

pytestmark = pytest.mark.slow

SIZE = (240, 320)
FOCAL = 1.3 * 320


def read_poses(scene: Path) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Camera-to-world matrices by the name of the photograph, and the rest of transforms.json."""
    meta = json.loads((scene / "transforms.json").read_text())
    return {Path(frame["file_path"]).name: np.array(frame["transform_matrix"]) for frame in meta["frames"]}, meta


def errors(found: list[np.ndarray], true: list[np.ndarray]) -> tuple[float, float]:
    """Largest error of positions over their extent, and of rotations in degrees, after the best similarity."""
    a, b = (np.array([pose[:3, 3] for pose in poses]) for poses in (found, true))
    a_mean, b_mean = a.mean(axis=0), b.mean(axis=0)
    u, scales, vt = np.linalg.svd((b - b_mean).T @ (a - a_mean))
    turn = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt
    scale = np.trace(np.diag(scales) @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])) / np.sum((a - a_mean) ** 2)
    distances = np.linalg.norm(scale * (a - a_mean) @ turn.T - (b - b_mean), axis=1)
    cosines = [(np.trace((turn @ x[:3, :3]).T @ y[:3, :3]) - 1) / 2 for x, y in zip(found, true, strict=True)]
    return distances.max() / np.ptp(b, axis=0).max(), np.degrees(np.arccos(np.clip(cosines, -1, 1))).max()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    """Ten neighbouring views of the demo scene, in two folders and with one that shows something else; the cameras."""
    folder, scene, cameras = tmp_path_factory.mktemp("photographs"), demo_scene(0), demo_cameras(120, 0, SIZE)
    for number in range(10):
        path = folder / ("a" if number < 6 else "b") / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(render(scene, cameras, number, 2)).save(path, quality=95)
    Image.new("RGB", SIZE[::-1], "grey").save(folder / "z.jpg")
    return folder, list(cameras.poses[:10])


def test_cameras_are_the_true_ones(photographs, tmp_path, capsys):
    folder, cameras = photographs
    output = tmp_path / "scene"
    run(estimate_cameras.main, ["--images", str(folder), "--output", str(output), "--threads", "1"])
    assert "Found 10 of 11 cameras" in capsys.readouterr().out
    poses, meta = read_poses(output)
    assert sorted(poses) == [f"frame_{number:05d}.png" for number in range(1, 11)]
    assert sorted(path.name for path in (output / "images").iterdir()) == sorted(poses)
    assert (meta["h"], meta["w"]) == SIZE
    assert meta["fl_x"] == pytest.approx(FOCAL, rel=0.05)
    position, rotation = errors([poses[name] for name in sorted(poses)], cameras)
    assert position < 0.02 and rotation < 1.0
    with Image.open(output / "images" / "frame_00008.png") as copy, Image.open(folder / "b" / "7.jpg") as original:
        assert np.abs(np.asarray(copy, float) - np.asarray(original, float)).mean() < 1.0

    for parser in (NerfstudioDataParserConfig(data=output, load_3D_points=True), ColmapDataParserConfig(data=output)):
        parsed = parser.setup().get_dataparser_outputs("train")
        assert len(parsed.cameras) >= 8 and len(parsed.metadata["points3D_xyz"]) > 100


def test_photographs_are_reduced(photographs, tmp_path):
    options = EstimateCameras(photographs[0], tmp_path / "scene", reduction=2, overlap=4, threads=1)
    _, found, _ = estimate(options)
    poses, meta = read_poses(tmp_path / "scene")
    assert found == len(poses) >= 5 and (meta["h"], meta["w"]) == (SIZE[0] // 2, SIZE[1] // 2)
    picture = cv2.imread(str(tmp_path / "scene" / "images" / min(poses)))
    assert picture.shape == (SIZE[0] // 2, SIZE[1] // 2, 3)


def test_what_stops_it_leaves_nothing(photographs, tmp_path):
    unrelated = tmp_path / "unrelated"
    unrelated.mkdir()
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((160, 120)).save(unrelated / f"{seed}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "file").write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    for images, output, message in (
        (unrelated, "out", "No two photographs"),
        (tmp_path / "empty", "out", "no photographs"),
        (tmp_path / "damaged", "out", "a.jpg is not a readable image"),
        (photographs[0], "unrelated", "there already"),
        (photographs[0], "file/out", "could not be written"),
    ):
        with pytest.raises(UserError, match=message):
            estimate(EstimateCameras(images, tmp_path / output, threads=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.realdata
def test_real_photographs(real_data, tmp_path):
    scene = real_data / "scenes" / "banana"
    _, found, points = estimate(EstimateCameras(scene / "images", tmp_path / "scene", reduction=2, features=8192))
    assert found >= 7 and points > 500
    poses, _ = read_poses(tmp_path / "scene")
    true, _ = read_poses(scene)
    names = sorted(path.name for path in (scene / "images").iterdir())
    numbers = {name: int(name.removeprefix("frame_").removesuffix(".png")) - 1 for name in poses}
    position, rotation = errors(list(poses.values()), [true[names[numbers[name]]] for name in poses])
    assert position < 0.03 and rotation < 2.0
