"""The outside judge: NerfBaselines trains, renders and evaluates the method, and agrees with nerfstudio's ns-eval."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ForkedCommands
from tiny_scenes import write_colmap_scene

pytest.importorskip("nerfbaselines", reason="NerfBaselines is not installed (docs/benchmarks.md says how it is)")

from nerfbaselines import build_method_class, get_method_spec
from nerfbaselines.datasets import load_dataset
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from lrf_nerfstudio.plugin import nerfbaselines_spec
from lrf_nerfstudio.plugin.nerfbaselines_method import LatentSplatfacto, overridden, write_dataset

pytestmark = pytest.mark.slow

STEPS = 16


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """NerfBaselines knows this checkout's spec, and its LPIPS has a network: one of random weights."""
    import torchvision

    folder = tmp_path_factory.mktemp("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder))
        patch.setenv("NERFBASELINES_REGISTER", str(Path(nerfbaselines_spec.__file__)))
        (folder / "hub" / "checkpoints").mkdir(parents=True)
        torch.manual_seed(0)
        weights = torchvision.models.alexnet().state_dict()
        torch.save(weights, folder / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
        yield


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 views of the floor as COLMAP's output, every 8th of which NerfBaselines holds out."""
    folder = write_colmap_scene(tmp_path_factory.mktemp("colmap") / "scene", views=12)
    shutil.move(folder / "colmap" / "sparse", folder / "sparse")
    return folder


@pytest.fixture(scope="module")
def output(scene: Path, tiny_vae: Path, forked: ForkedCommands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `nerfbaselines train` writes."""
    folder = tmp_path_factory.mktemp("nerfbaselines") / "output"
    forked(
        *("nerfbaselines", "train", "--method", "latent-splatfacto", "--data", scene, "--backend", "python"),
        *("--output", folder, "--set", f"max-num-iterations={STEPS}", "--set", f"pipeline.vae.source={tiny_vae}"),
    ).check()
    return folder


def psnr(results: Path) -> float:
    return json.loads(results.read_text())["metrics"]["psnr"]


def data(scene: Path, split: str) -> Any:
    return load_dataset(str(scene), split=split, features=frozenset(("color", "points3D_xyz")), load_features=True)


def method_class() -> type[LatentSplatfacto]:
    """The class as NerfBaselines' own commands make it."""
    with build_method_class(get_method_spec("latent-splatfacto"), backend="python") as found:
        return found


def test_nerfbaselines_trains_renders_and_evaluates(output: Path, scene: Path, forked: ForkedCommands) -> None:
    checkpoint = output / f"checkpoint-{STEPS}"
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {"transforms.json", "overrides.json", "nerfstudio_models", "nb-info.json"}
    predictions, results = output.parent / "test.tar.gz", output.parent / "test.json"
    forked(
        *("nerfbaselines", "render", "--checkpoint", checkpoint, "--data", scene, "--split", "test"),
        *("--output", predictions, "--backend", "python"),
    ).check()
    forked("nerfbaselines", "evaluate", predictions, "--output", results).check()
    assert psnr(results) == psnr(output / f"results-{STEPS}.json") > 10


def test_ns_eval_agrees(output: Path, scene: Path, tmp_path: Path, forked: ForkedCommands) -> None:
    """The same field on the same photographs, in a scene whose cameras are where the field's training had put them."""
    checkpoint = output / f"checkpoint-{STEPS}"
    parsed = LatentSplatfacto(checkpoint=str(checkpoint))._pipeline.datamanager.train_dataparser_outputs
    meta: dict[str, Any] = {"frames": []}
    for split in ("train", "test"):
        write_dataset(data(scene, split), tmp_path / "scene" / split)
        frames = json.loads((tmp_path / "scene" / split / "transforms.json").read_text())["frames"]
        for frame in frames:
            frame["file_path"] = f"{split}/{frame['file_path']}"
            pose = np.vstack([parsed.dataparser_transform.double().numpy()[:3], [0, 0, 0, 1]])
            pose = pose @ np.array(frame["transform_matrix"])
            pose[:3, 3] *= parsed.dataparser_scale
            frame["transform_matrix"] = pose.tolist()
        meta["frames"] += frames
        meta[f"{split}_filenames"] = [frame["file_path"] for frame in frames]
    meta["val_filenames"] = meta["test_filenames"]
    (tmp_path / "scene" / "transforms.json").write_text(json.dumps({"camera_model": "PINHOLE", **meta}))

    config = overridden(json.loads((checkpoint / "overrides.json").read_text()))
    config.output_dir, config.experiment_name, config.timestamp = tmp_path, "field", "run"
    config.data = config.pipeline.datamanager.data = tmp_path / "scene"
    config.pipeline.datamanager.dataparser = NerfstudioDataParserConfig(
        downscale_factor=1,
        load_3D_points=False,
        orientation_method="none",
        center_method="none",
        auto_scale_poses=False,
    )
    config.save_config()
    shutil.copytree(checkpoint / "nerfstudio_models", config.get_checkpoint_dir())
    run = config.get_base_dir()
    forked("ns-eval", "--load-config", run / "config.yml", "--output-path", tmp_path / "eval.json").check()
    expected = json.loads((tmp_path / "eval.json").read_text())["results"]["psnr"]
    assert psnr(output / f"results-{STEPS}.json") == pytest.approx(expected, abs=0.01)  # of pictures of 8 bits


def test_a_run_goes_on_from_a_checkpoint(scene: Path, tiny_vae: Path, tmp_path: Path) -> None:
    options = {"max-num-iterations": 6, "pipeline.vae.source": tiny_vae}
    train, camera = data(scene, "train"), data(scene, "test")["cameras"][0]
    kind = method_class()
    whole = kind(train_dataset=train, config_overrides=options)
    assert whole.get_info()["num_iterations"] == 6 and whole.get_info()["loaded_step"] is None
    for step in range(6):
        metrics = whole.train_iteration(step)
        assert bool(metrics) == (step == 5)
        if step == 2:
            whole.save(str(tmp_path / "half"))
    assert metrics["loss"] > 0 and metrics["psnr"] > 0
    expected = whole.render(camera)
    assert {name: picture.shape for name, picture in expected.items()} == {
        "color": (72, 96, 3),
        "depth": (72, 96),
        "accumulation": (72, 96),
    }
    assert set(whole.render(camera, options={"outputs": ("color",)})) == {"color"}
    distance = np.linalg.norm(camera.poses[:, 3])  # of the camera from the middle of the floor, in the data set's units
    assert 0.5 * distance < np.median(expected["depth"]) < 1.5 * distance
    whole.save(str(tmp_path / "whole"))

    resumed = kind(checkpoint=str(tmp_path / "half"), train_dataset=train)
    assert resumed.get_info()["loaded_step"] == 3
    for step in range(3, 6):
        resumed.train_iteration(step)
    loaded = kind(checkpoint=str(tmp_path / "whole"))
    assert loaded.get_info()["loaded_step"] == 6
    for method in (resumed, loaded):
        for name, picture in method.render(camera).items():
            np.testing.assert_allclose(picture, expected[name], atol=1e-5, err_msg=name)
    loaded.save(str(tmp_path / "again"))
    for file in ("transforms.json", "overrides.json", "nerfstudio_models/step-000000005.ckpt"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    for method in (whole, resumed, loaded):
        method.close()


def test_mistakes_are_told(scene: Path, tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(**arguments: Any) -> str:
        with pytest.raises(SystemExit):
            LatentSplatfacto(**arguments)
        said = capsys.readouterr()
        return " ".join((said.out + said.err).split())

    train = data(scene, "train")
    linear = train | {"metadata": train["metadata"] | {"color_space": "linear"}}
    assert "sRGB" in message(train_dataset=linear)
    assert "Give a data set" in message()
    assert "pipeline.vae.sauce" in message(train_dataset=train, config_overrides={"pipeline.vae.sauce": "x"})
    method = LatentSplatfacto(train_dataset=train, config_overrides={"pipeline.vae.source": tiny_vae})
    method.save(str(tmp_path / "checkpoint"))
    moved = train | {"cameras": train["cameras"].replace(poses=train["cameras"].poses + 1)}
    assert "trained on other views" in message(checkpoint=str(tmp_path / "checkpoint"), train_dataset=moved)
