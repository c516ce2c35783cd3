"""A user's mistakes: one message that says what to do, exit code 1, nothing damaged."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from commands import Finished, run
from PIL import Image
from tiny_scenes import Lens, edit_transforms, write_colmap_scene, write_scene

pytestmark = pytest.mark.slow


def ns_train(forked, data: Path, vae: object, output: Path, *more: object, **options) -> Finished:
    return forked(
        *("ns-train", "latent-splatfacto", "--data", data, "--output-dir", output, "--vis", "tensorboard"),
        *("--timestamp", "run", "--max-num-iterations", 3, "--pipeline.vae.source", vae, *more),
        **options,
    )


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_scene(tmp_path / "scene")


# ---------------------------------------------------------------------------------------------------- data


def test_a_missing_folder(tmp_path):
    """The first mistake of all, with the real command."""
    finished = run("ns-train", "latent-splatfacto", "--data", tmp_path / "nowhere", "--output-dir", tmp_path / "out")
    assert f"{tmp_path / 'nowhere'} does not exist" in finished.message
    assert "--data" in finished.message
    assert not (tmp_path / "nowhere").exists()


def no_frames(scene: Path) -> str:
    edit_transforms(scene, frames=[])
    return "transforms.json"


def no_images(scene: Path) -> str:
    for path in (scene / "images").iterdir():
        path.unlink()
    return "images"


def corrupt_image(scene: Path) -> str:
    path = scene / "images" / "004.png"
    path.write_bytes(path.read_bytes()[:2000])
    return str(path)


def corrupt_held_out_image(scene: Path) -> str:
    path = scene / "images" / "008.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    return str(path)


def missing_image(scene: Path) -> str:
    path = scene / "images" / "005.png"
    path.unlink()
    return str(path)


def wrong_size(scene: Path) -> str:
    path = scene / "images" / "003.png"
    with Image.open(path) as picture:
        picture.resize((95, 72)).save(path)
    return str(path)


def nan_pose(scene: Path) -> str:
    frames = json.loads((scene / "transforms.json").read_text())["frames"]
    frames[2]["transform_matrix"][0][3] = float("nan")
    edit_transforms(scene, frames=frames)
    return "images/002.png"


def skewed_pose(scene: Path) -> str:
    frames = json.loads((scene / "transforms.json").read_text())["frames"]
    frames[2]["transform_matrix"][0][0] += 0.5
    edit_transforms(scene, frames=frames)
    return "images/002.png"


def broken_json(scene: Path) -> str:
    path = scene / "transforms.json"
    path.write_text(path.read_text()[:-30])
    return str(scene)


def broken_point_cloud(scene: Path) -> str:
    path = scene / "points.ply"
    path.write_bytes(path.read_bytes()[:400])
    return str(path)


def another_format(scene: Path) -> str:
    (scene / "transforms.json").unlink()
    return "colmap"


@pytest.mark.parametrize(
    "damage",
    [
        *(no_frames, no_images, corrupt_image, corrupt_held_out_image, missing_image, wrong_size),
        *(nan_pose, skewed_pose, broken_json, broken_point_cloud, another_format),
    ],
)
def test_bad_data(scene, tiny_vae, tmp_path, forked, damage):
    named = damage(scene)
    before = contents(scene)
    finished = ns_train(forked, scene, tiny_vae, tmp_path / "out")
    assert named in finished.message.replace("\n", "")
    assert contents(scene) == before
    assert not (tmp_path / "out" / "scene" / "latent-splatfacto" / "run" / "nerfstudio_models").exists()


def test_a_colmap_scene_without_its_images(tiny_vae, tmp_path, forked):
    scene = write_colmap_scene(tmp_path / "scene")
    (scene / "images" / "001.jpg").unlink()
    assert "001.jpg" in ns_train(forked, scene, tiny_vae, tmp_path / "out", "colmap").message


# ---------------------------------------------------------------------------------------------------- autoencoder


def test_a_vae_that_is_not_there(scene, tmp_path, forked):
    message = ns_train(forked, scene, tmp_path / "no_vae", tmp_path / "out").message
    assert "--pipeline.vae.source" in message
    assert str(tmp_path / "no_vae") in message


def test_a_hub_out_of_reach(scene, tmp_path, forked):
    """Not by the hub's own offline switch, but with nobody there."""
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    message = ns_train(forked, scene, "nobody/no-such-vae", tmp_path / "out", env=env).message
    assert "--pipeline.vae.source" in message
    assert "nobody/no-such-vae" in message


def test_a_folder_that_is_no_vae(scene, tmp_path, forked):
    message = ns_train(forked, scene, scene, tmp_path / "out").message
    assert "--pipeline.vae.source" in message


# ---------------------------------------------------------------------------------------------------- cache


def latent_files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def tampered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def test_damaged_latents_are_encoded_again(scene, tiny_vae, tmp_path, forked):
    cache = tmp_path / "latents"
    option = ("--pipeline.datamanager.latent-cache-dir", cache)
    ns_train(forked, scene, tiny_vae, tmp_path / "out", *option).check()
    good = contents(cache)
    assert len(good) == 9  # the held-out views too, which the run reports on
    files = latent_files(cache)
    for damage, path in zip((truncated, tampered, emptied), files, strict=False):
        damage(path)
    output = ns_train(forked, scene, tiny_vae, tmp_path / "out", *option).check().output
    for path in files[:3]:
        assert output.count(str(path)) == 1  # one warning each
    assert contents(cache) == good


def test_two_runs_fill_one_cache_at_once(tiny_vae, tmp_path, forked):
    scene = write_scene(tmp_path / "scene", views=33, lenses=Lens(400, 300, 375.0))
    cache = tmp_path / "latents"
    arguments = [
        *("ns-train", "latent-splatfacto", "--data", scene, "--vis", "tensorboard", "--timestamp", "run"),
        *("--max-num-iterations", 3, "--pipeline.vae.source", tiny_vae),
        *("--pipeline.datamanager.latent-cache-dir", cache),
    ]
    started = [forked.start(*arguments, "--output-dir", tmp_path / name) for name in ("a", "b")]
    for process, log in started:
        process.join(300)
        assert process.exitcode == 0, log.read_text()
        assert "damaged" not in log.read_text()
    assert len(latent_files(cache)) == len(contents(cache)) == 33
    # A third run finds all of them in order.
    filled = contents(cache)
    output = forked(*arguments, "--output-dir", tmp_path / "c").check().output
    assert "damaged" not in output
    assert contents(cache) == filled


def test_an_unwritable_cache(scene, tiny_vae, tmp_path, forked):
    """A file where the folder should be: also an obstacle for the administrator, who may write everywhere."""
    obstacle = tmp_path / "file"
    obstacle.write_text("in the way")
    option = ("--pipeline.datamanager.latent-cache-dir", obstacle / "latents")
    message = ns_train(forked, scene, tiny_vae, tmp_path / "out", *option).message
    assert "--pipeline.datamanager.latent-cache-dir" in message
    assert obstacle.read_text() == "in the way"


# ---------------------------------------------------------------------------------------------------- options


def test_an_option_of_densification_out_of_range(scene, tiny_vae, tmp_path, forked):
    cache = tmp_path / "latents"
    more = ("--pipeline.model.densification.stop", 50, "--pipeline.datamanager.latent-cache-dir", cache)
    message = ns_train(forked, scene, tiny_vae, tmp_path / "out", *more).message
    assert "--pipeline.model.densification.stop" in message
    assert not cache.exists()  # said before anything is encoded


def test_several_devices(scene, tiny_vae, tmp_path):
    from in_process import make_config

    config = make_config(scene, tiny_vae, tmp_path)
    with pytest.raises(SystemExit):
        config.pipeline.setup(device="cpu", test_mode="val", world_size=2)


def test_a_scene_of_one_colour_trains(tiny_vae, tmp_path, forked):
    """Constant latents: nothing to stretch, nothing to fit colours to, and no harm done."""
    scene = write_scene(tmp_path / "scene")
    for path in (scene / "images").iterdir():
        Image.fromarray(np.full((72, 96, 3), 128, dtype=np.uint8)).save(path)
    ns_train(forked, scene, tiny_vae, tmp_path / "out").check()
