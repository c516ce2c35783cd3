"""The harness of the papers' tables, from the command line to its files."""

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ForkedCommands, wait_until
from PIL import Image
from tiny_scenes import Lens, edit_transforms, poses_around, textured_photograph, write_colmap_scene, write_scene

from lrf_nerfstudio.commands import benchmark
from lrf_nerfstudio.evaluation.protocol import load_protocol
from lrf_nerfstudio.evaluation.tables import protocol_columns
from lrf_nerfstudio.plugin import measuring
from lrf_nerfstudio.plugin.fitting import FieldFit
from lrf_nerfstudio.plugin.pipeline import LatentPipeline
from lrf_nerfstudio.plugin.trainer import find_checkpoint, load_checkpoint
from lrf_nerfstudio.utils import cli

pytestmark = pytest.mark.slow

METHODS = ["tiny, the scene's decoder", "tiny", "RGB at 1/8, enlarged", "RGB"]


def reduce(scene: Path, factor: int) -> None:
    """Write photographs that are smaller by a factor into images_<factor>."""
    (scene / f"images_{factor}").mkdir()
    for path in (scene / "images").iterdir():
        with Image.open(path) as image:
            size = tuple(-(-length // factor) for length in image.size)
            image.resize(size, Image.Resampling.BOX).save(scene / f"images_{factor}" / path.name)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two scenes for `quick`: of 9 and of 10 views, 50 x 34 at half the size."""
    folder = tmp_path_factory.mktemp("data")
    for name, views in (("a", 9), ("b", 10)):
        reduce(write_scene(folder / name, views=views, lenses=Lens(100, 68)), 2)
    return folder


def run(*arguments: object) -> None:
    cli.run(benchmark.main, [*map(str, arguments)])


def numbers(output: Path) -> list[dict]:
    """The rows without times and memory, which differ from run to run."""
    rows = json.loads((output / "results.json").read_text())["rows"]
    for row in rows:
        row["novel"] = {name: value for name, value in row["novel"].items() if not name.endswith("seconds")}
        row["cost"] = sorted(row["cost"])
    return rows


def test_a_table_of_all_methods_also_after_a_kill(data, tiny_vae, tmp_path, monkeypatch, capsys, forked):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--data", data, "--vae", f"tiny={tiny_vae}", "--steps", 8, "--output"]
    run(*arguments, tmp_path / "whole")
    rows = numbers(tmp_path / "whole")
    assert [(row["scene"], row["method"]) for row in rows] == [(s, m) for s in "ab" for m in METHODS]
    for row in rows:
        assert row["photographs"]["held_out"] == ["000.png", "008.png"] and len(row["photographs"]["train"]) in (7, 8)
        assert ("vae_psnr" in row["novel"]) == ("decoder" in row["method"])
        assert row["cost"] == ["gaussians", "gigabytes", "seconds"]
    by_method = {row["method"]: row["novel"] for row in rows[:4]}
    assert by_method["RGB"]["ceiling_psnr"] > 100 > by_method["RGB at 1/8, enlarged"]["ceiling_psnr"]
    table = (tmp_path / "whole" / "table.md").read_text()
    assert "| scenes: mean of 2 | RGB |" in table and table in capsys.readouterr().out
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 12
    assert r"\begin{tabular}{ll" in (tmp_path / "whole" / "table.tex").read_text()
    with Image.open(tmp_path / "whole" / "figure.png") as figure:
        assert figure.width == 5 * 3 * 150

    # Killed in the first fit, then when a fit is done whose row is not written, then after a row; two processes then
    # share what is left.
    parts = tmp_path / "parts"
    moments = (
        "fits/*/a/*/field/*/run/config.yml",
        "fits/*/a/*/field/*/run/nerfstudio_models/*.ckpt",
        "rows/*/a/*.json",
    )
    for moment in moments:
        process, log = forked.start("lrf", "benchmark", *arguments, parts)
        before = set(parts.glob(moment))
        wait_until(lambda: set(parts.glob(moment)) - before or not process.is_alive(), 200, moment)  # noqa: B023
        assert process.is_alive(), log.read_text()
        process.kill()
        process.join()
    assert not (parts / "table.md").exists()
    for shard in (1, 0):
        run(*arguments, parts, "--num-shards", 2, "--shard-index", shard)
    assert numbers(parts) == rows

    # What is measured is not measured again, and what is asked for is what is there.
    monkeypatch.setattr(benchmark, "measure", None)
    before = (tmp_path / "parts" / "table.md").read_bytes()
    (tmp_path / "parts" / "table.md").unlink()
    run(*arguments, tmp_path / "parts")
    assert (tmp_path / "parts" / "table.md").read_bytes() == before
    with pytest.raises(SystemExit):
        run(*arguments[:-3], "--steps", 9, "--output", tmp_path / "parts")
    assert "steps is 8, not 9" in " ".join(capsys.readouterr().err.split())

    # Nothing of the scenes stays in memory.
    gc.collect()
    # A proxy of what is gone already raises where it is asked for its class.
    assert not [each for each in gc.get_objects() if issubclass(type(each), LatentPipeline)]

    # nerfstudio's own harness gives the same numbers, to the last digit of the table.
    for row in rows[:4]:
        assert_ns_eval_agrees(row, tmp_path / "whole", "quick", forked, tmp_path)


def assert_ns_eval_agrees(row: dict, output: Path, protocol: str, forked: ForkedCommands, folder: Path) -> None:
    """Ask ns-eval about the fit of a row: it says what stands in the table, but for times."""
    columns = [column for column in protocol_columns(load_protocol(protocol)).values() if column.part == "novel"]
    fit = row["vae"]["fingerprint"][:12] + ("-*-decoder-" if row["options"]["scene_decoder"] else "-") + "seed*"
    (config,) = output.glob(f"fits/*/{row['scene']}/{fit}/field/*/run/config.yml")
    forked("ns-eval", "--load-config", config, "--output-path", folder / "eval.json").check()
    found = {"novel": json.loads((folder / "eval.json").read_text())["results"]}
    for column in columns:
        if "seconds" not in column.metric:
            assert column.cell(row) == column.cell(found), f"{column.metric} of {row['method']}"


def test_ns_eval_agrees_on_photographs_that_are_cropped(llff, tiny_vae, tmp_path, monkeypatch, forked):
    monkeypatch.setattr(measuring, "scene_parser", _at_full_size(measuring.scene_parser))
    run(
        *("--protocol", "lrf", "--data", llff, "--vae", f"tiny={tiny_vae}", "--steps", 3),
        *("--rows", "vae", "--output", tmp_path / "out"),
    )
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert len(row["photographs"]["held_out"]) == 2
    assert_ns_eval_agrees(row, tmp_path / "out", "lrf", forked, tmp_path)


def test_vaes_with_one_encoder_share_fits(data, tiny_vae, tmp_path, monkeypatch):
    from lrf_nerfstudio.vae import VAEConfig

    tuned = VAEConfig(str(tiny_vae)).setup()
    tuned.autoencoder.decoder.layers[-1].bias += 0.5
    tuned.save(tmp_path / "tuned", dtype=torch.float32)
    steps, fit_on = [], FieldFit.run

    def counted(self, *arguments):
        steps.append(self.trainer.config.max_num_iterations - self.steps)
        fit_on(self, *arguments)

    monkeypatch.setattr(FieldFit, "run", counted)
    vaes = [f"first={tiny_vae}", f"tuned={tmp_path / 'tuned'}"]
    run("--data", data, "--scenes", "a", "--rows", "vae", "--steps", 3, "--output", tmp_path / "out", "--vae", *vaes)
    first, tuned_row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert steps == [3, 0] and first["cost"] == tuned_row["cost"]
    assert first["novel"]["latent_psnr"] == pytest.approx(tuned_row["novel"]["latent_psnr"], rel=1e-5)
    assert abs(first["novel"]["psnr"] - tuned_row["novel"]["psnr"]) > 0.1
    (config,) = (tmp_path / "out").glob("fits/*/*/*/field/*/run/config.yml")
    assert str(tiny_vae) in config.read_text()  # what ns-eval decodes with
    # Another VAE of the same name is noticed.
    with pytest.raises(SystemExit):
        run(
            *("--data", data, "--scenes", "a", "--rows", "vae", "--steps", 3, "--output", tmp_path / "out"),
            *("--vae", f"first={tmp_path / 'tuned'}"),
        )


def test_what_is_missing_is_named_with_where_to_get_it(data, tiny_vae, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        run("--protocol", "lrf", "--data", data, "--vae", tiny_vae, "--output", tmp_path / "out")
    said = capsys.readouterr()
    for word in ("DL3DV", "gated", "MVImgNet", "by a form", "LLFF", "nerf_llff_data", "360_v2.zip", "images_8"):
        assert word in said.out
    assert "None of the scenes of the protocol lrf is in" in said.err
    shutil.copytree(data / "a", tmp_path / "data" / "a")
    shutil.rmtree(tmp_path / "data" / "a" / "images_2")
    with pytest.raises(SystemExit):
        run("--data", tmp_path / "data", "--vae", tiny_vae, "--output", tmp_path / "out")
    assert "images_2 is missing" in capsys.readouterr().err
    edit_transforms(tmp_path / "data" / "a", train_filenames=["images/001.png"])
    with pytest.raises(SystemExit):
        run("--data", tmp_path / "data", "--vae", tiny_vae, "--output", tmp_path / "out")
    assert "says itself which photographs are held out" in capsys.readouterr().err


@pytest.fixture(scope="module")
def llff(tmp_path_factory) -> Path:
    """LLFF as the protocol `lrf-llff-3` looks for it, with one scene: a textured floor, 12 views of 100 x 75 at 1/8."""
    folder = tmp_path_factory.mktemp("llff")
    scene = write_colmap_scene(folder / "nerf_llff_data" / "fern", views=12)
    for index, pose in enumerate(poses_around(12)[:12], start=1):
        Image.fromarray(textured_photograph(pose, Lens())).convert("RGB").save(scene / "images" / f"{index:03d}.jpg")
    shutil.copytree(scene / "images", scene / "images_8")
    return folder


def test_nothing_of_held_out_photographs_reaches_a_fit(llff, tiny_vae, tmp_path, monkeypatch):
    """Three views of LLFF: with other held-out photographs and another point cloud, the same field comes out."""
    monkeypatch.setattr(measuring, "scene_parser", _at_full_size(measuring.scene_parser))
    other = tmp_path / "other"
    shutil.copytree(llff, other)
    rows = []
    for data, output in ((llff, tmp_path / "first"), (other, tmp_path / "second")):
        scene = data / "nerf_llff_data" / "fern"
        if data == other:
            used = set(rows[0]["photographs"]["train"])
            assert used == {"002.jpg", "006.jpg", "012.jpg"} and len(used) == 3
            for path in [*(scene / "images").iterdir(), *(scene / "images_8").iterdir()]:
                if path.name not in used:
                    Image.fromarray(np.zeros((72, 96, 3), np.uint8)).save(path)
            (scene / "colmap" / "sparse" / "0" / "points3D.bin").unlink()
        run(
            *("--protocol", "lrf-llff-3", "--data", data, "--vae", f"tiny={tiny_vae}", "--steps", 6),
            *("--rows", "scene-decoder", "--output", output),
        )
        rows += json.loads((output / "results.json").read_text())["rows"]
    points = [(tmp_path / name / "points" / "LLFF" / "fern.ply").read_bytes() for name in ("first", "second")]
    assert points[0] == points[1]
    states = []
    for output in (tmp_path / "first", tmp_path / "second"):
        (models,) = output.glob("fits/*/fern/*/field/*/run/nerfstudio_models")
        states.append(load_checkpoint(find_checkpoint(models))["pipeline"])
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, states[1][name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert rows[0]["novel"]["psnr"] != rows[1]["novel"]["psnr"]
    table = (tmp_path / "first" / "table.md").read_text()
    assert "theirs: DropGaussian [4] | 20.76" in table and "[4] DropGaussian (CVPR 2025)" in table


def _at_full_size(scene_parser):
    """The photographs of the tiny scene in images_8 are as large as those in images."""

    def parser(folder, downscale_factor, points=True):
        config = scene_parser(folder, 1, points)
        return config

    return parser
