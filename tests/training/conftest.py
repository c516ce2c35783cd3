"""What the tests of trainings share: fresh accelerate, one thread, the devices, photographs, weights in a cache."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tiny_runs import QUICK


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the state of the process in singletons; each test starts without."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More than one costs networks of this size more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("auto", marks=pytest.mark.cuda, id="cuda")])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device that quick runs train on."""
    monkeypatch.setitem(QUICK, "device", request.param)
    return request.param


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder with two small photographs in a subfolder."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "photographs"
    (folder / "nested").mkdir(parents=True)
    for i in range(2):
        coarse = generator.uniform(0, 255, (5, 7, 3)).astype(np.float32)
        image = cv2.resize(coarse, (70, 50), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / "nested" / f"{i}.png"), image)
    return folder


@pytest.fixture(scope="session")
def torch_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of PyTorch with random weights of the networks of the perceptual losses, in files of the true format."""
    import timm
    import torchvision

    folder = tmp_path_factory.mktemp("torch")
    checkpoints = folder / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0")
    torch.save(network.state_dict(), checkpoints / Path(network.default_cfg["url"]).name)
    torch.save(torchvision.models.vgg16().state_dict(), checkpoints / "vgg16-397923af.pth")
    return folder


@pytest.fixture
def weights_in_cache(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's cache has the weights of `torch_home`."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
