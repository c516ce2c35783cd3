"""Points from photographs with known cameras, against the plane that they show."""

import numpy as np
import pytest
from plyfile import PlyData
from tiny_scenes import Lens, look_at_origin, textured_photograph, write_scene

from lrf_nerfstudio.correspondence.triangulation import (
    Observation,
    PinholeView,
    TriangulationConfig,
    tracks_of,
    triangulate,
)

LENS = Lens(240, 180, 220.0)


def view(position: tuple[float, float, float]) -> PinholeView:
    pose = look_at_origin(position)
    return PinholeView(textured_photograph(pose, LENS), LENS.K, np.linalg.inv(pose @ np.diag([1.0, -1, -1, 1])))


VIEWS = [view((0.9, 0.1 * number, 2.0)) for number in (-3, 0, 3)]


def test_points_lie_on_what_the_photographs_show():
    points = triangulate(VIEWS, TriangulationConfig(max_features=1000))
    assert len(points) > 100
    assert np.median(np.abs(points[:, 2])) < 0.01  # about a pixel
    assert (np.abs(points[:, 2]) < 0.05).mean() > 0.97
    assert np.ptp(points[:, :2], axis=0).min() > 1  # all over the floor
    np.testing.assert_array_equal(points, triangulate(VIEWS, TriangulationConfig(max_features=1000)))


def test_cameras_that_are_wrong_give_hardly_any_points():
    turned = VIEWS[1].cam_from_world.copy()
    turned[1, 3] += 0.2
    wrong = [VIEWS[0], VIEWS[1]._replace(cam_from_world=turned)]
    right = triangulate(VIEWS[:2], TriangulationConfig(max_features=1000))
    assert len(triangulate(wrong, TriangulationConfig(max_features=1000))) < 0.3 * len(right)


def test_rays_that_hardly_differ_locate_nothing():
    near = [view((0.9, 0.0, 2.0)), view((0.9, 0.001, 2.0))]
    assert len(triangulate(near, TriangulationConfig(max_features=500))) == 0
    blank = [each._replace(gray=np.full_like(each.gray, 128)) for each in VIEWS]
    assert triangulate(blank, TriangulationConfig()).shape == (0, 3)


def test_tracks_join_matches_and_leave_out_what_contradicts_itself():
    a, b, c, d, e = (Observation(0, 1), Observation(1, 4), Observation(2, 0), Observation(0, 2), Observation(1, 5))
    assert tracks_of([(a, b), (b, c)]) == [[a, b, c]]
    assert tracks_of([(a, b), (d, e)]) == [[a, b], [d, e]]
    assert tracks_of([(a, b), (d, b)]) == []  # one point would be in two places of view 0
    assert tracks_of([]) == []


@pytest.mark.parametrize("named", [False, True])
def test_the_command_writes_points_in_the_data_sets_coordinates(tmp_path, named, capsys):
    from lrf_nerfstudio.commands import triangulate as command
    from lrf_nerfstudio.utils import cli

    scene = write_scene(tmp_path / "scene", views=6, lenses=LENS, points=False, photographs=False)
    from PIL import Image
    from tiny_scenes import poses_around

    for number, pose in enumerate(poses_around(6)):
        Image.fromarray(textured_photograph(pose, LENS)).save(scene / "images" / f"{number:03d}.png")
    images = ["--images", "000.png", "002.png"] if named else []
    if named:
        for number in (1, 3, 4, 5):
            (scene / "images" / f"{number:03d}.png").unlink()  # others are not read
    cli.run(command.main, ["--data", str(scene), "--output", str(tmp_path / "points.ply"), *images])
    vertices = PlyData.read(tmp_path / "points.ply")["vertex"]
    assert f"Triangulated {len(vertices)} points from {2 if named else 6} photographs" in capsys.readouterr().out
    assert len(vertices) > 10 and np.median(np.abs(vertices["z"])) < 0.01

    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    from lrf_nerfstudio.plugin.dataparser import in_dataset_coordinates, with_points

    outputs = NerfstudioDataParserConfig(data=scene, load_3D_points=False, eval_mode="all").setup()
    parsed = with_points(outputs.get_dataparser_outputs("train"), tmp_path / "points.ply")
    points = parsed.metadata["points3D_xyz"]
    assert parsed.dataparser_scale != 1.0
    back = in_dataset_coordinates(points, parsed).numpy()
    np.testing.assert_allclose(back, np.stack([vertices[axis] for axis in "xyz"], axis=1), atol=1e-5)

    with pytest.raises(SystemExit):
        cli.run(command.main, ["--data", str(scene), "--output", "x.ply", "--images", "000.png"])
    assert "two photographs or more" in capsys.readouterr().err
