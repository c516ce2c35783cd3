"""Fixtures of tests that train scenes: tiny autoencoders, tiny scenes, and one scene that is trained for all."""

from pathlib import Path

import pytest
import torch
from commands import ForkedCommands, TrainedScene, run
from tiny_scenes import Lens, write_scene
from tiny_vaes import make_vae


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test trains and renders: on the CPU and, where there is one, on the GPU."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an AutoencoderTiny with random weights, 4 channels, f = 8."""
    return make_vae(tmp_path_factory.mktemp("tiny_vae"))


@pytest.fixture(scope="session")
def floor_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 views of the floor; their size is no multiple of 8. Tests must not change it."""
    return write_scene(tmp_path_factory.mktemp("scene") / "floor", views=17, lenses=Lens(width=101, height=67))


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory, user_cache_folder: Path) -> ForkedCommands:
    return ForkedCommands(tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, user_cache_folder: Path, device: str) -> TrainedScene:
    """17 views of 199 x 149, trained for 400 steps with the package's own autoencoder. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    scene = write_scene(folder / "floor", views=17, lenses=Lens(199, 149, 180.0))
    finished = run(
        *("ns-train", "latent-splatfacto", "--data", scene, "--output-dir", folder, "--timestamp", "run"),
        *("--max-num-iterations", 400, "--vis", "tensorboard"),
        *(("--machine.device-type", device) if torch.cuda.is_available() else ()),  # else it finds out by itself
    )
    finished.check()
    return TrainedScene(scene, folder / "floor" / "latent-splatfacto" / "run", finished.output)
