"""The demo scene: held-out views, points that the others see, and the command that makes it."""

from pathlib import Path

import numpy as np
import pytest
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from lrf_nerfstudio.commands import make_demo_scene
from lrf_nerfstudio.commands.make_demo_scene import DemoScene
from lrf_nerfstudio.correspondence import load_scene
from lrf_nerfstudio.plugin.dataparser import NerfstudioParser
from lrf_nerfstudio.utils.errors import UserError

pytestmark = pytest.mark.slow


def parse(scene: Path, split: str) -> DataparserOutputs:
    parser = NerfstudioParser(NerfstudioDataParserConfig(data=scene, load_3D_points=True))
    return parser.get_dataparser_outputs(split)


def test_every_8th_view_is_held_out_starting_with_the_first(demo_scene: Path) -> None:
    train, test = ([path.name for path in parse(demo_scene, split).image_filenames] for split in ("train", "test"))
    assert test == [f"view_{view:03d}.png" for view in (0, 8, 16)]
    assert sorted(train + test) == [f"view_{view:03d}.png" for view in range(24)]


def test_points_are_seen_by_three_views_that_are_not_held_out(demo_scene: Path) -> None:
    tracks = load_scene(demo_scene).tracks
    assert tracks is not None
    points, views = np.unique(tracks.points[tracks.views % 8 > 0], return_counts=True)
    assert len(points) == 2000 == len(np.unique(tracks.points))
    assert views.min() >= 3


def test_the_plugin_finds_the_points_where_held_out_views_show_them(demo_scene: Path) -> None:
    """Through its parser, which moves poses and points, in views that did not find the points."""
    outputs, tracks = parse(demo_scene, "test"), load_scene(demo_scene).tracks
    assert tracks is not None
    moved = outputs.metadata["points3D_xyz"].double().numpy()
    numbers = np.unique(tracks.points)
    for index, view in enumerate((0, 8, 16)):
        seen = tracks.of_view(view)
        rotation, position = np.split(outputs.cameras.camera_to_worlds[index].double().numpy(), [3], axis=1)
        local = (moved[np.searchsorted(numbers, seen.points)] - position.T) @ rotation * [1, -1, -1]
        focal = outputs.cameras.fx[index].item()
        pixels = focal * local[:, :2] / local[:, 2:] + [66, 50]
        np.testing.assert_allclose(pixels, seen.xy, atol=0.01)
        assert len(seen) > 500


def make(folder: Path, **options: object) -> Path:
    settings = {"views": 9, "size": (24, 32), "samples": 1, "points": 50} | options
    make_demo_scene.main(DemoScene(output=folder, **settings))  # type: ignore[arg-type]
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    first, again = (contents(make(tmp_path / name)) for name in ("first", "again"))
    assert first == again
    other = contents(make(tmp_path / "other", seed=1))
    assert other["images/view_001.png"] != first["images/view_001.png"]


def test_a_scene_that_is_there_is_kept(tmp_path: Path) -> None:
    folder = make(tmp_path / "scene")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make(folder)
    with pytest.raises(UserError, match=r"scene holds something else.*--output"):
        make(folder, views=10)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_pictures_have_the_size_that_was_asked_for(demo_scene: Path) -> None:
    assert {Image.open(path).size for path in (demo_scene / "images").iterdir()} == {(132, 100)}
