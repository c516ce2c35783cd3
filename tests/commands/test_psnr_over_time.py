"""Held-out PSNR against seconds, from the command line to its files."""

import json

import pytest
from tiny_scenes import Lens, write_scene

from lrf_nerfstudio.commands import psnr_over_time
from lrf_nerfstudio.utils import cli


def run(*arguments: object) -> None:
    cli.run(psnr_over_time.main, [*map(str, arguments)])


@pytest.fixture
def arguments(tmp_path, tiny_vae) -> list[object]:
    scene = write_scene(tmp_path / "scene", views=9, lenses=Lens(50, 34))
    return ["--scene", scene, "--vae", tiny_vae, "--downscale-factor", 1, "--output", tmp_path / "output"]


def test_points_and_figure_also_after_an_interruption(arguments, tmp_path, capsys):
    run(*arguments, "--steps", 4, 8, "--rgb-steps", 6)
    points = json.loads((tmp_path / "output" / "points.json").read_text())
    assert [(point["method"] == "RGB", point["steps"]) for point in points] == [(False, 4), (False, 8), (True, 6)]
    assert all(point["seconds"] > 0 and 0 < point["psnr"] < 60 for point in points)
    (tmp_path / "output" / "figure.png").unlink()
    run(*arguments, "--steps", 4, 8, "--rgb-steps", 6)  # nothing is fitted or timed again
    assert json.loads((tmp_path / "output" / "points.json").read_text()) == points
    assert (tmp_path / "output" / "figure.png").stat().st_size > 0


def test_lengths_must_be_positive(arguments, capsys):
    with pytest.raises(SystemExit):
        run(*arguments, "--steps", 0)
    assert "--steps" in capsys.readouterr().err
