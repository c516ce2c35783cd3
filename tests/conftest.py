"""What all tests share: no network, a cache folder of their own, and the fixtures and conditions of the markers."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytest_plugins = ["fake_gsplat", "scene_fixtures"]

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure() -> None:
    # Tests, and the commands that they start, reach no network: hubs know it, and everything else meets a closed port
    # at once where it might wait for an answer. This machine's own servers (viewer, chromedriver) stay reachable.
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        os.environ[name] = os.environ[name.upper()] = "http://127.0.0.1:9"
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "localhost,127.0.0.1"


SLOW_FIXTURES = {"trained", "forked", "browser"}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    for marker, missing in (("cuda", _missing_cuda), ("realdata", _missing_data), ("browser", _missing_browser)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := missing()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA GPU"


def _missing_data() -> str | None:
    return None if REAL_DATA.is_dir() else f"no photographs at {REAL_DATA}"


def _missing_browser() -> str | None:
    missing = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
    return f"{' and '.join(missing)} not on PATH" if missing else None


@pytest.fixture(scope="session", autouse=True)
def user_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder, empty at first: tests neither use nor change what the user has."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("user_cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs and weights; for tests marked `realdata`."""
    return REAL_DATA


@pytest.fixture(scope="session")
def demo_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo scene: 24 views of 100 x 132 (no multiples of 8), 3 of them held out. Tests must not change it."""
    from lrf_nerfstudio.commands import make_demo_scene

    folder = tmp_path_factory.mktemp("demo") / "scene"
    make_demo_scene.main(make_demo_scene.DemoScene(output=folder, views=24, size=(100, 132), samples=2, points=2000))
    return folder


@pytest.fixture
def browser(tmp_path: Path) -> Iterator["Chrome"]:
    """A headless Chromium that draws WebGL in software; for tests marked `browser`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        "--headless=new",
        "--no-sandbox",  # tests run as root in containers
        "--disable-dev-shm-usage",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-quic",
        "--window-size=1000,700",
        f"--user-data-dir={tmp_path / 'chromium'}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()
