"""The command that compares VAEs by the fields in their latent spaces, from the command line to its files."""

import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_scenes import Lens, write_scene
from tiny_vaes import make_vae

from lrf_nerfstudio.commands import compare_vaes
from lrf_nerfstudio.evaluation.decoding import decoding_figure, decoding_table, with_means
from lrf_nerfstudio.plugin.fitting import FieldFit
from lrf_nerfstudio.training.data.scene_pairs import ScenePairs
from lrf_nerfstudio.utils import cli
from lrf_nerfstudio.vae import VAEConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scenes")
    return [write_scene(folder / name, lenses=Lens(*size)) for name, size in (("wide", (99, 67)), ("high", (67, 90)))]


@pytest.fixture(scope="module")
def vaes(tiny_vae, tmp_path_factory) -> list[str]:
    """An autoencoder, one with the same encoder, and one with another."""
    folder = tmp_path_factory.mktemp("vaes")
    tuned = VAEConfig(str(tiny_vae)).setup()
    tuned.autoencoder.decoder.layers[-1].bias += 0.5
    tuned.save(folder / "tuned", dtype=torch.float32)
    return [f"first={tiny_vae}", f"tuned={folder / 'tuned'}", f"other={make_vae(folder / 'other', seed=1)}"]


def run(*arguments: object) -> None:
    cli.run(compare_vaes.main, [*map(str, arguments)])


def test_a_row_for_each_vae_and_scene_and_a_field_for_each_encoder(scenes, vaes, tmp_path, monkeypatch, capsys):
    fits, init = [], FieldFit.__init__
    monkeypatch.setattr(FieldFit, "__init__", lambda self, *a: (fits.append(a[0].data.name), init(self, *a))[1])
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "comparison"
    arguments = ["--vae", *vaes, "--output", output, "--steps", 5, "--scenes"]
    run(*arguments, scenes[0])
    assert fits == ["wide"] * 2  # the first two VAEs have the same encoder
    run(*arguments, *scenes)
    assert fits == ["wide"] * 2 + ["high"] * 2
    rows = json.loads((output / "table.json").read_text())
    assert [(row["scene"], row["vae"]) for row in rows] == [
        (scene, vae) for scene in ("wide", "high", "mean") for vae in ("first", "tuned", "other")
    ]
    by_name = {(row["scene"], row["vae"]): row for row in rows}
    first, tuned, other = (by_name["wide", name] for name in ("first", "tuned", "other"))
    for kind in ("train", "novel"):
        assert first[kind]["latent_psnr"] == pytest.approx(tuned[kind]["latent_psnr"], rel=1e-4)
        assert abs(first[kind]["psnr"] - tuned[kind]["psnr"]) > 0.1
        assert abs(first[kind]["ceiling_psnr"] - tuned[kind]["ceiling_psnr"]) > 0.1
        assert abs(first[kind]["latent_psnr"] - other[kind]["latent_psnr"]) > 0.01
        mean = (first[kind]["psnr"] + by_name["high", "first"][kind]["psnr"]) / 2
        assert by_name["mean", "first"][kind]["psnr"] == pytest.approx(mean)
    table = (output / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 2 + 9
    assert f"| wide | first | {first['novel']['psnr']:.2f} | {first['novel']['ssim']:.3f} |" in table
    assert "LPIPS" not in table  # its weights are not there
    with Image.open(output / "figure.png") as figure:
        assert figure.format == "PNG" and figure.width == 5 * 3 * 150

    pairs = {name: ScenePairs.load(next(output.glob("fields/*/wide"))) for name in ("tuned", "first")}
    loaded = {name: VAEConfig(source).setup() for name, _, source in (vae.partition("=") for vae in vaes[:2])}
    panels = decoding_figure({"wide": pairs, "partly": {"tuned": pairs["tuned"]}}, loaded).axes
    assert [panel.get_title() for panel in panels[:4]] == ["photograph", "ceiling of first", "first", "tuned"]
    assert [len(panel.images) for panel in panels] == [1, 1, 1, 1, 1, 0, 0, 1]
    assert [panels[0].get_ylabel(), panels[4].get_ylabel()] == ["wide", "partly"]

    # A second run computes nothing.
    monkeypatch.setattr(compare_vaes, "measure_decoding", None)
    run(*arguments, *scenes)
    assert len(fits) == 4 and json.loads((output / "table.json").read_text()) == rows


def test_metrics_are_those_of_ns_eval(scenes, vaes, tmp_path, forked):
    source = vaes[0].partition("=")[2]
    run("--vae", source, "--output", tmp_path, "--steps", 5, "--scenes", scenes[0])
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["vae"] == source
    (config,) = tmp_path.glob("fields/*/wide/field/latent-splatfacto/run/config.yml")
    forked("ns-eval", "--load-config", config, "--output-path", tmp_path / "eval.json").check()
    expected = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert row["novel"] == {name: pytest.approx(expected[name], rel=1e-4) for name in row["novel"]}


def test_scenes_that_fail_are_left_out_and_named(scenes, vaes, tmp_path, capsys):
    broken = write_scene(tmp_path / "broken")
    (broken / "images" / "003.png").unlink()
    with pytest.raises(SystemExit) as stopped:
        run("--vae", *vaes[:2], "--output", tmp_path / "out", "--steps", 2, "--scenes", broken, scenes[0])
    assert stopped.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "003.png" in said and "above, to: broken." in said and "Traceback" not in said
    assert {row["scene"] for row in json.loads((tmp_path / "out" / "table.json").read_text())} == {"wide"}


def test_mistakes_are_named(scenes, vaes, tmp_path, capsys):
    for arguments, message in (
        (("--vae", vaes[0]), "one or more each"),
        (("--scenes", scenes[0]), "one or more each"),
        (("--scenes", "a/x", "b/x", "--vae", vaes[0]), "called x"),
        (("--scenes", scenes[0], "--vae", vaes[0], vaes[0]), "same name"),
        (("--scenes", scenes[0], "--vae", "no-such-vae"), "no-such-vae"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments, "--output", tmp_path / "out")
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_table_and_means():
    rows = [
        {"scene": "a", "vae": "x", "train": {"psnr": 20.0}, "novel": {"psnr": 10.0, "lpips": 0.5}, "cost": {}},
        {"scene": "b", "vae": "x", "train": {"psnr": 22.0}, "novel": {"psnr": 13.0}, "cost": {"seconds": 4.0}},
        {"scene": "a", "vae": "y", "train": {"psnr": 1.0}, "novel": {"psnr": 1.0}, "cost": {"seconds": 4.0}},
    ]
    *_, mean = with_means(rows)
    assert mean == {"scene": "mean", "vae": "x", "train": {"psnr": 21.0}, "novel": {"psnr": 11.5}, "cost": {}}
    assert with_means(rows[:1]) == rows[:1]
    assert decoding_table(rows[:2]).splitlines() == [
        "| scene | VAE | novel PSNR | LPIPS | train PSNR | fit, s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| a | x | 10.00 | 0.500 | 20.00 | - |",
        "| b | x | 13.00 | - | 22.00 | 4 |",
    ]


def test_rgb_is_splatted_at_full_resolution_and_costs_are_told(scenes, vaes, tmp_path):
    start = time.perf_counter()
    arguments = ["--output", tmp_path, "--steps", 20, "--scenes", scenes[0], "--vae", vaes[0]]
    run(*arguments)
    assert "recoded" not in (tmp_path / "table.md").read_text()  # there is no field in RGB yet
    run(*arguments, "rgb")
    elapsed = time.perf_counter() - start
    latent, rgb = json.loads((tmp_path / "table.json").read_text())
    assert rgb["novel"]["ceiling_psnr"] > 100 > latent["novel"]["ceiling_psnr"]
    assert rgb["novel"]["psnr"] == pytest.approx(rgb["novel"]["latent_psnr"], abs=5)  # the same, but for the range
    for row in (rgb, latent):
        assert 0.1 < row["cost"]["gigabytes"] < 50
        assert 0 < row["cost"]["seconds"] < elapsed
    table = (tmp_path / "table.md").read_text()
    assert "recoded PSNR | recoded SSIM |" in table and "fit, s | memory, GB |" in table
    (of_rgb,) = [p for f in tmp_path.glob("fields/*/wide") if (p := ScenePairs.load(f)).vae_source == "rgb"]
    assert of_rgb.latent(0, 20).shape == (3, 67, 99)

    # RGB's renders are pictures already; through the VAE they become what its decoder makes of them.
    assert rgb["novel"]["recoded_psnr"] == pytest.approx(rgb["novel"]["psnr"], abs=0.01)
    vae, psnrs = VAEConfig(vaes[0].partition("=")[2]).setup(), []
    for view in of_rgb.of_kind("novel"):
        render = (of_rgb.latent(view, 20).permute(1, 2, 0)[None] / 2 + 0.5).clamp(0, 1)
        recoded = vae.decode(vae.encode(render), 67, 99)[0]
        psnrs.append(-10 * torch.log10((recoded - of_rgb.photograph(view)[0] / 255).square().mean()).item())
    assert latent["novel"]["recoded_psnr"] == pytest.approx(sum(psnrs) / len(psnrs), abs=0.01)
