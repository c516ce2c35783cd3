"""The demo scene has exact cameras, converged and reproducible pictures, and seed points where pictures show them."""

import json
import math
from pathlib import Path

import cv2
import make_demo_scene as demo
import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from plyfile import PlyData

from lrf_nerfstudio.plugin.dataparser import NerfstudioParser
from lrf_nerfstudio.utils.errors import UserError

SIZE = (100, 132)
FOCAL = 1.3 * 132
NOISE = 0.1
"""How far behind its surface the noise may take a seed point: 0.3 pixels are 0.01 at the objects, more behind them."""


def parse(scene: Path, split: str) -> DataparserOutputs:
    parser = NerfstudioParser(NerfstudioDataParserConfig(data=scene, load_3D_points=True))
    return parser.get_dataparser_outputs(split)


def read_points(scene: Path) -> tuple[np.ndarray, np.ndarray]:
    vertices = PlyData.read(scene / "sparse_pc.ply")["vertex"]
    positions = np.stack([vertices[axis] for axis in "xyz"], axis=-1).astype(np.float64)
    return positions, np.stack([vertices[name] for name in ("red", "green", "blue")], axis=-1)


def test_every_8th_view_is_held_out_starting_with_the_first(demo_scene: Path) -> None:
    train, test = ([path.name for path in parse(demo_scene, split).image_filenames] for split in ("train", "test"))
    assert test == [f"view_{view:03d}.png" for view in (0, 8, 16)]
    assert sorted(train + test) == [f"view_{view:03d}.png" for view in range(24)]


def test_nerfstudio_casts_the_rays_that_made_the_pictures() -> None:
    geometry, camera = demo.demo_geometry(0), demo.demo_cameras(24, 0)[5]
    height, width = SIZE
    cameras = Cameras(torch.tensor(camera[None, :3], dtype=torch.float32), FOCAL, FOCAL, width / 2, height / 2)
    rays = cameras.generate_rays(0, coords=torch.tensor([[0.5, 0.5], [20.5, 99.5], [70.5, 66.5], [99.5, 131.5]]))
    origins, directions = rays.origins.double().numpy(), rays.directions.double().numpy()
    points = origins + demo.cast_rays(geometry, origins, directions)[:, None] * directions
    pixels, depths = demo.project(points, camera, FOCAL, SIZE)
    np.testing.assert_allclose(pixels, [[0.5, 0.5], [99.5, 20.5], [66.5, 70.5], [131.5, 99.5]], atol=1e-3)
    assert (depths > 0).all()


def test_projection_is_opencvs() -> None:
    camera = demo.demo_cameras(24, 0)[3]
    world_to_camera = np.diag([1, -1, -1, 1]) @ np.linalg.inv(camera)  # OpenCV: x right, y down, z ahead
    points = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    K = np.array([[FOCAL, 0, SIZE[1] / 2], [0, FOCAL, SIZE[0] / 2], [0, 0, 1]])
    rotation, _ = cv2.Rodrigues(world_to_camera[:3, :3])
    expected = cv2.projectPoints(points, rotation, world_to_camera[:3, 3], K, None)[0][:, 0]
    np.testing.assert_allclose(demo.project(points, camera, FOCAL, SIZE)[0], expected, atol=1e-9)


def test_seed_points_reproject_onto_their_colours(demo_scene: Path) -> None:
    """Through nerfstudio's parser, as the method reads them, in the held-out views, which did not find the points."""
    positions, colours = read_points(demo_scene)
    outputs = parse(demo_scene, "test")
    moved = outputs.metadata["points3D_xyz"].double().numpy()
    original = demo.demo_cameras(24, 0)[::8]
    shifts = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-2, 0), (2, 0), (0, -2), (0, 2)]
    differences: dict[tuple[int, int], list[np.ndarray]] = {shift: [] for shift in shifts}
    for view, path in enumerate(outputs.image_filenames):
        image = np.asarray(Image.open(path)).astype(float)
        seen = demo.visible(demo.demo_geometry(0), positions, original[view], FOCAL, SIZE, NOISE)
        camera = np.eye(4)
        camera[:3] = outputs.cameras.camera_to_worlds[view].double().numpy()
        pixels, depths = demo.project(moved[seen], camera, float(outputs.cameras.fx[view]), SIZE)
        assert (depths > 0).all()
        columns, rows = np.floor(pixels).astype(int).T
        inside = (pixels > 2).all(-1) & (pixels < [SIZE[1] - 2, SIZE[0] - 2]).all(-1)
        for (dx, dy), found in differences.items():
            shown = image[rows[inside] + dy, columns[inside] + dx]
            found.append(np.abs(shown - colours[seen][inside]).mean(-1))
    error = {shift: float(np.median(np.concatenate(found))) for shift, found in differences.items()}
    assert len(np.concatenate(differences[0, 0])) > 2000
    assert error[0, 0] < 16  # of 255: the points are at edges, 0.3 pixels off, and pixels are sampled without blending
    assert error[0, 0] < 0.6 * min(error[shift] for shift in shifts[5:])
    # No half pixel is lost: one pixel to either side is as bad.
    assert error[0, 0] < 0.85 * min(error[shift] for shift in shifts[1:5])
    for one, other in (((-1, 0), (1, 0)), ((0, -1), (0, 1))):
        assert 0.8 < error[one] / error[other] < 1.25


def test_points_are_seen_by_three_train_views(demo_scene: Path) -> None:
    geometry, cameras = demo.demo_geometry(0), demo.demo_cameras(24, 0)
    positions, _ = read_points(demo_scene)
    assert 1500 < len(positions) <= 2000
    train = [camera for view, camera in enumerate(cameras) if view % 8]
    seen = sum(demo.visible(geometry, positions, camera, FOCAL, SIZE, NOISE).astype(int) for camera in train)
    assert (seen >= 3).mean() > 0.95


def test_pictures_are_converged() -> None:
    geometry, camera = demo.demo_geometry(0), demo.demo_cameras(48, 0)[2]
    usual, fine = (demo.render(geometry, camera, 90.0, (64, 80), samples).astype(float) for samples in (3, 9))
    assert 10 * math.log10(255**2 / ((usual - fine) ** 2).mean()) > 32


def test_torus_is_hit_where_its_quartic_says() -> None:
    major, minor = 0.4, 0.18
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        origin, target = rng.normal(size=3), rng.uniform(-0.5, 0.5, 3) * [1, 1, 0.3]
        origin *= 2 / np.linalg.norm(origin)
        direction = (target - origin) / np.linalg.norm(target - origin)
        # (|p|^2 + R^2 - r^2)^2 = 4 R^2 (x^2 + y^2) on p = origin + t direction
        square = np.polynomial.Polynomial([origin @ origin + major**2 - minor**2, 2 * origin @ direction, 1.0])
        flat = np.polynomial.Polynomial(
            [origin[:2] @ origin[:2], 2 * origin[:2] @ direction[:2], direction[:2] @ direction[:2]]
        )
        roots = (square**2 - 4 * major**2 * flat).roots()
        real = roots[np.abs(roots.imag) < 1e-6].real
        found = demo._hit_torus(tuple(origin), tuple(direction), major, minor)
        if len(real) and abs(np.ptp(real)) > 0.02:  # not at the rim, where both are ill-conditioned
            hits += 1
            assert found == pytest.approx(real.min(), abs=3e-3)
        elif not len(real):
            assert found == math.inf
    assert hits > 100


def make(folder: Path, **options: object) -> Path:
    settings = {"views": 9, "size": (24, 32), "samples": 1, "points": 50} | options
    demo.make_demo_scene(demo.DemoScene(output=folder, **settings))  # type: ignore[arg-type]
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    first, again = (contents(make(tmp_path / name)) for name in ("first", "again"))
    assert first == again
    assert len(first) == 9 + 2
    other = contents(make(tmp_path / "other", seed=1))
    assert other["images/view_001.png"] != first["images/view_001.png"]


def test_a_scene_that_is_there_is_kept(tmp_path: Path) -> None:
    folder = make(tmp_path / "scene")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make(folder)
    with pytest.raises(UserError, match=r"transforms\.json describes another scene.*--output"):
        make(folder, views=10)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_an_interrupted_scene_is_made_anew(tmp_path: Path) -> None:
    folder = make(tmp_path / "scene")
    complete = contents(folder)
    (folder / "transforms.json").unlink()
    (folder / "images" / "view_003.png").write_bytes(b"half a picture")
    assert contents(make(folder)) == complete


@pytest.mark.parametrize(("option", "value"), [("views", 7), ("samples", 0), ("size", (4, 64))])
def test_options_out_of_range_are_named(tmp_path: Path, option: str, value: object) -> None:
    with pytest.raises(UserError, match=f"--{option} must be"):
        make(tmp_path / "scene", **{option: value})
    assert not (tmp_path / "scene").exists()


def test_transforms_hold_what_nerfstudio_documents(demo_scene: Path) -> None:
    meta = json.loads((demo_scene / "transforms.json").read_text())
    assert (meta["w"], meta["h"], meta["cx"], meta["cy"]) == (132, 100, 66, 50)
    for frame in meta["frames"]:
        pose = np.array(frame["transform_matrix"])
        np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-12)
        assert np.linalg.det(pose[:3, :3]) > 0
        assert Image.open(demo_scene / frame["file_path"]).size == (132, 100)
