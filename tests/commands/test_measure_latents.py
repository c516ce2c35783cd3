"""The command that measures VAEs on scenes, from the command line to its files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from averaging_vae import averaging_vae
from PIL import Image

from lrf_nerfstudio.commands import measure_latents
from lrf_nerfstudio.utils import cli
from lrf_nerfstudio.vae import VAEConfig

pytestmark = pytest.mark.slow

KEYS = [
    "vae",
    "scene",
    "inconsistency",
    "inconsistency_by_channel",
    "reconstruction_psnr",
    "reconstruction_ssim",
    "detail",
    "latent_drift",
    "original_decoder_psnr",
    "latent_std",
    "latent_std_ratio",
    "spectrum",
    "images",
    "pairs",
    "correspondences",
]


@pytest.fixture(autouse=True)
def one_thread():
    """More than one costs networks of this size more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two folders: an autoencoder that works, and the same with detail channels of other random weights."""
    folder = tmp_path_factory.mktemp("vaes")
    for seed in (0, 1):
        averaging_vae(seed=seed).save(folder / f"seed{seed}", dtype=torch.float32)
    return [str(folder / "seed0"), str(folder / "seed1")]


def run(*arguments: object) -> None:
    cli.run(measure_latents.main, [*map(str, arguments)])


def read(folder: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert sorted(path.name for path in folder.iterdir()) == ["measures.json", "spectrum.png"]
    with Image.open(folder / "spectrum.png") as figure:
        assert figure.format == "PNG" and min(figure.size) > 300
    return json.loads((folder / "measures.json").read_text(), parse_constant=refuse)


def test_a_row_for_each_vae_and_scene(
    demo_scene: Path,
    vaes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new" / "measures"
    monkeypatch.setenv("COLUMNS", "120")
    run("--scenes", demo_scene, "--vae", f"first={vaes[0]}", vaes[1], "--output", output)
    rows = read(output)
    assert [list(row) for row in rows] == [KEYS] * 2
    assert [(row["vae"], row["scene"]) for row in rows] == [("first", "scene"), (vaes[1], "scene")]
    for row in rows:
        assert row["images"] == 24 and row["correspondences"] >= 16 * row["pairs"] > 0
        # Half as far apart as random points at most: the colour of one point seen from two sides.
        assert 0 < row["inconsistency"] < 0.5 and max(row["inconsistency_by_channel"][:3]) < 0.5
        assert 15 < row["reconstruction_psnr"] < 35 and 0.3 < row["reconstruction_ssim"] < 0.95
        assert 0 <= row["detail"] < 0.2
        assert len(row["latent_std"]) == len(row["latent_std_ratio"]) == 4
    assert rows[0]["latent_drift"] == 0 and rows[0]["latent_std_ratio"] == [1] * 4
    assert 0 < rows[1]["latent_drift"] < 2
    assert rows[1]["latent_std_ratio"][:3] == pytest.approx([1] * 3, rel=1e-3)  # the colour channels are the same
    printed = capsys.readouterr().out
    assert "PSNR" in printed and f"{rows[0]['reconstruction_psnr']:.2f}" in printed


def test_another_reference_is_measured_too(demo_scene: Path, vaes: list[str], tmp_path: Path) -> None:
    scene = ("--scenes", demo_scene, "--output", tmp_path / "out", "--vae")
    run(*scene, vaes[0], vaes[1], "--reference", vaes[1])
    first = read(tmp_path / "out")
    assert [row["vae"] for row in first] == vaes and first[1]["latent_drift"] == 0 < first[0]["latent_drift"]
    run(*scene, vaes[0], "--reference", vaes[1])
    second = read(tmp_path / "out")  # replaces the first
    assert {row["vae"]: row for row in second} == {row["vae"]: row for row in first}


def test_names_of_vaes_and_scenes() -> None:
    assert measure_latents.named(["a=b/c", "d/e", "x/lr=0.1/vae"], "--vae") == {
        "a": "b/c",
        "d/e": "d/e",
        "x/lr=0.1/vae": "x/lr=0.1/vae",
    }
    assert measure_latents.scene_names([Path("/x/fox"), Path("/x/y/../flower")]) == ["fox", "flower"]
    assert measure_latents.scene_names([Path("/x/fox"), Path("/y/fox")]) == ["/x/fox", "/y/fox"]


def test_mistakes_are_named_and_end_with_status_1(
    demo_scene: Path,
    vaes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import load_file, save_file

    def fails_with(message: str, *arguments: object) -> None:
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 1
        assert message in " ".join(capsys.readouterr().err.split())

    monkeypatch.setenv("COLUMNS", "400")
    output = ("--output", tmp_path / "out")
    fails_with("one or more each", "--scenes", demo_scene, *output, "--vae")
    fails_with("same name", "--scenes", demo_scene, *output, "--vae", vaes[0], vaes[0])
    fails_with("given twice", "--scenes", demo_scene, demo_scene / ".." / "scene", *output, "--vae", vaes[0])
    fails_with("no-such-scene", "--scenes", tmp_path / "no-such-scene", *output, "--vae", vaes[0])

    decoder_only = tmp_path / "decoder"
    VAEConfig(vaes[0]).setup().save(decoder_only)
    weights = load_file(decoder_only / "diffusion_pytorch_model.safetensors")
    weights = {name: weight for name, weight in weights.items() if name.startswith("decoder")}
    save_file(weights, decoder_only / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    fails_with("missing keys encoder", "--scenes", demo_scene, *output, "--vae", decoder_only)

    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(3):
        Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(flat / f"{number}.png")
    fails_with(str(flat), "--scenes", flat, *output, "--vae", vaes[0])
    assert not (tmp_path / "out").exists()

    (tmp_path / "file").write_text("")
    fails_with("--output", "--scenes", demo_scene, "--output", tmp_path / "file", "--vae", vaes[0])


@pytest.mark.realdata
def test_taesd_on_photographs(real_data: Path, tmp_path: Path) -> None:
    """Half-size photographs of a real scene, correspondences from its structure-from-motion model."""
    scene, taesd = real_data / "scenes" / "banana", real_data / "weights" / "taesd"
    options = ("--downscale-factor", 2, "--device", "cpu")
    run("--scenes", scene, "--vae", f"taesd={taesd}", "--output", tmp_path / "out", *options)
    (row,) = read(tmp_path / "out")
    assert (row["vae"], row["scene"], row["images"]) == ("taesd", "banana", 14)
    assert row["correspondences"] > 1000
    assert 23 < row["reconstruction_psnr"] < 25
    assert 0.2 < row["inconsistency"] < 0.9
    assert 0.3 < row["detail"] < 1.3
    power = row["spectrum"]
    assert None not in power and power[0] > 10 * power[-1] > 0
