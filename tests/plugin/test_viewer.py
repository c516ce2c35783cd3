"""nerfstudio's viewer on a trained scene: in a browser, as a user sees it, and its thread that renders."""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from commands import wait_until
from in_process import make_config
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.utils.colormaps import ColormapOptions, apply_colormap
from nerfstudio.utils.eval_utils import eval_setup
from nerfstudio.utils.writer import GLOBAL_BUFFER, EventName
from nerfstudio.viewer.render_state_machine import RenderAction, RenderStateMachine
from nerfstudio.viewer.utils import CameraState, get_camera
from PIL import Image
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from tiny_scenes import look_at_origin

from lrf_nerfstudio.plugin.model import LatentSplatfactoModel
from lrf_nerfstudio.plugin.pipeline import LatentPipeline

pytestmark = [pytest.mark.browser, pytest.mark.slow]

TIMEOUT = 120
"""Seconds after which something that takes one on an idle machine will not happen any more."""
PATIENCE = 25
"""Seconds after which the page is made to ask for another picture."""
MAX_RES = 512
"""The longer side of the pictures that the viewer asks for, unless it is told otherwise."""
BACKGROUND = torch.tensor([38, 42, 55]) / 255
"""The background that the viewer sets, unless it is told otherwise."""


@pytest.fixture(scope="module")
def pipeline(trained) -> LatentPipeline:
    """The trained field and its cameras, with the viewer's background."""
    _, pipeline, _, _ = eval_setup(trained.config)
    pipeline.model.set_background(BACKGROUND)
    return pipeline


@pytest.fixture(scope="module")
def model(pipeline) -> LatentSplatfactoModel:
    return pipeline.model


@contextmanager
def serving(log: Path, command: str, *arguments: object) -> Iterator[str]:
    """The address of the viewer of a command that runs meanwhile; its output goes to a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name(command), *map(str, arguments)),
                *("--viewer.websocket-host", "127.0.0.1", "--viewer.websocket-port", str(port)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def listens() -> bool:
        assert process.poll() is None
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens, TIMEOUT, "the viewer's port")
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None
        # nerfstudio fails on a camera's message from a page that has just been left, and then answers no other page.
        tracebacks = log.read_text().split("Traceback")[1:]
        assert all("self.render_statemachines[client.client_id]" in error for error in tracebacks)
    except AssertionError:
        print(log.read_text())
        raise
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def address(trained, tmp_path) -> Iterator[str]:
    """Where ns-viewer shows the trained scene, to one page."""
    with serving(tmp_path / "log", "ns-viewer", "--load-config", trained.config) as address:
        yield address


@dataclass
class ViewerPage:
    """The viewer's page in a browser."""

    browser: Chrome

    def canvas(self) -> WebElement:
        """What the scene is drawn on, left of the control panel."""
        return min(self.browser.find_elements(By.TAG_NAME, "canvas"), key=lambda canvas: canvas.size["width"])

    def picture(self) -> np.ndarray:
        """What the canvas shows, [H, W, 3] in [0, 1]."""
        with Image.open(io.BytesIO(self.canvas().screenshot_as_png)) as picture:
            return np.asarray(picture.convert("RGB")) / 255

    def text(self) -> str:
        # Selenium's own `text` asks for the visibility of every element, which takes long enough to slow the page down.
        return str(self.browser.execute_script("return document.body.innerText"))

    def press(self, label: str) -> None:
        """Press a button of the control panel."""
        self.browser.find_element(By.XPATH, f"//button[normalize-space()='{label}']").click()

    def hide_cameras(self) -> None:
        """Hide the training cameras, which cover the scene."""
        self.press("Hide Train Cams")

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until the page shows something; where it takes long, have the page ask for another picture.

        nerfstudio's render thread forgets an action that comes between its two looks at the next one
        (`RenderStateMachine.run`), after which the page keeps its picture until the camera moves or the window changes.
        """
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            try:
                return wait_until(condition, PATIENCE, what)
            except AssertionError:
                size = self.browser.get_window_size()
                for more in (40, 0):
                    self.browser.set_window_size(size["width"], size["height"] + more)
                    time.sleep(0.5)
        raise AssertionError(f"{what} did not happen within {TIMEOUT} s")

    def drag(self, *steps: tuple[int, int]) -> None:
        """Press the mouse in the middle of the canvas, move it step by step, let go."""
        chain = ActionChains(self.browser, duration=50).click_and_hold(self.canvas())
        for x, y in steps:
            chain = chain.move_by_offset(x, y)
        chain.release().perform()

    def step(self) -> int:
        """The training step that the page shows, 0 before it shows any."""
        shown = self.text().partition("Step: ")[2].split()
        return int(shown[0]) if shown else 0

    def shows_full_resolution(self) -> bool:
        return f"Resolution: {MAX_RES}x" in self.text()

    def open(self, label: str) -> tuple[WebElement, list[WebElement]]:
        """Open a dropdown of the control panel; it and its options."""
        identifier = self.browser.find_element(By.XPATH, f"//label[normalize-space()='{label}']").get_attribute("for")
        dropdown = self.browser.find_element(By.ID, str(identifier))
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", dropdown)
        dropdown.click()
        listbox = str(dropdown.get_attribute("aria-controls"))
        found: list[WebElement] = []

        def appear() -> bool:
            elements = self.browser.find_elements(By.CSS_SELECTOR, f"#{listbox} [role=option]")
            found[:] = [element for element in elements if element.is_displayed()]
            return bool(found) and all(element.text for element in found)

        wait_until(appear, TIMEOUT, f"the list of {label!r}")
        return dropdown, found

    def options(self, label: str) -> tuple[str, list[str]]:
        """What a dropdown is set to, and all that it offers."""
        dropdown, options = self.open(label)
        return str(dropdown.get_attribute("value")), [option.text for option in options]

    def choose(self, label: str, choice: str) -> None:
        """Set a dropdown."""
        _, options = self.open(label)
        next(option for option in options if option.text == choice).click()


@pytest.fixture
def page(address: str, browser: Chrome) -> ViewerPage:
    """The page when a picture in full resolution has come."""
    browser.get(address)
    page = ViewerPage(browser)
    page.wait_until(page.shows_full_resolution, "a picture in full resolution")
    return page


def seen_from(position: tuple[float, float, float], aspect: float) -> CameraState:
    """The viewer's camera at a position from where it looks at the origin."""
    pose = torch.from_numpy(look_at_origin(position)[:3])
    return CameraState(fov=np.deg2rad(75), aspect=aspect, c2w=pose, camera_type=CameraType.PERSPECTIVE)


def first_view(pipeline: LatentPipeline, aspect: float) -> CameraState:
    """The first training view as a page shows it that is wider than the photograph: all of its height."""
    camera = pipeline.datamanager.train_dataset.cameras[0]
    assert aspect > camera.width / camera.height
    fov = 2 * torch.arctan(camera.height / 2 / camera.fy)
    return CameraState(float(fov), aspect, camera.camera_to_worlds.double(), CameraType.PERSPECTIVE)


def from_above(pipeline: LatentPipeline, aspect: float) -> CameraState:
    """The first training view, turned around what is in its middle until it looks straight down."""
    camera = first_view(pipeline, aspect)
    right, _, back = camera.c2w[:, :3].unbind(dim=1)
    position = camera.c2w[:, 3]
    distances = (position - pipeline.model.means.detach().cpu().double()) @ back
    distance = distances[distances > 0].quantile(0.5)
    above = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    above = torch.nn.functional.normalize(above - (above @ right) * right, dim=0)
    target = position - distance * back
    columns = [right, torch.linalg.cross(above, right), above, target + distance * above]
    return CameraState(camera.fov, aspect, torch.stack(columns, dim=1), CameraType.PERSPECTIVE)


def middle_rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference inside a margin, where the page draws axes and shadows over the scene.

    It is of means over cells of 16 pixels: the page gets JPEGs, and where drawing is slow it draws fewer pixels.
    """
    inside = np.s_[100:-100, 100:-100]
    height, width = a[inside].shape[:2]
    coarse_a, coarse_b = (
        cv2.resize(picture[inside], (width // 16, height // 16), interpolation=cv2.INTER_AREA) for picture in (a, b)
    )
    return float(np.sqrt(np.square(coarse_a - coarse_b).mean()))


def follows(
    page: ViewerPage,
    compare: Callable[[np.ndarray, dict[str, np.ndarray]], bool],
    pipeline: LatentPipeline,
    seen: Callable[[LatentPipeline, float], CameraState],
):
    """A condition: the page's picture compares with the model's outputs for its camera, in the picture's size.

    The size may change by a few pixels while the page lays out its panel.
    """
    outputs: dict[str, np.ndarray] = {}

    def condition() -> bool:
        picture = page.picture()
        height, width = picture.shape[:2]
        if not outputs or outputs["rgb"].shape != picture.shape:
            camera = get_camera(seen(pipeline, width / height), int(MAX_RES * height / width), MAX_RES)
            for name, output in pipeline.model.get_outputs_for_camera(camera).items():
                colors = apply_colormap(output, ColormapOptions(normalize=True)).numpy()
                outputs[name] = cv2.resize(colors, (width, height))
        return compare(picture, outputs)

    return condition


def test_the_browser_shows_a_view_of_the_data_set_and_follows_the_mouse(page, pipeline):
    page.hide_cameras()

    def is_decoded(picture: np.ndarray, outputs: dict[str, np.ndarray]) -> bool:
        assert outputs["rgb"].std() > 0.1  # something to see
        # By the scene's own decoder, not by the VAE's.
        return middle_rms(picture, outputs["rgb"]) < min(0.01, middle_rms(picture, outputs["vae_rgb"]) / 2)

    page.wait_until(follows(page, is_decoded, pipeline, first_view), "the decoded scene")
    page.drag(*[(0, 20)] * 10)  # which turns the scene until it is seen from straight above
    page.wait_until(follows(page, is_decoded, pipeline, from_above), "the decoded scene from above")


def test_the_control_panel_offers_the_outputs_and_the_preview(page):
    chosen, outputs = page.options("Output type")
    assert chosen == "rgb"
    assert outputs[:4] == ["rgb", "latent_rgb", "depth", "accumulation"]  # nerfstudio adds its depth buffer
    assert "Custom Elements" in page.text()
    assert page.options("While moving, show") == ("auto", ["auto", "latent_rgb", "decoded"])


def figures(text: str) -> dict[str, str]:
    """What the panel says of the last picture."""
    lines = [line.partition(": ") for line in text.splitlines()]
    return {name: value for name, _, value in lines if name in ("Gaussians", "Decoder", "Raster", "Decode")}


def test_the_panel_tells_what_the_last_picture_was_made_of(page, pipeline, tmp_path):
    def tells(decoder: str) -> Callable[[], bool]:
        return lambda: figures(page.text()).get("Decoder") == decoder

    page.wait_until(tells("the scene's own"), "the figures")
    shown = figures(page.text())
    assert int(shown["Gaussians"].replace(",", "")) == pipeline.model.num_points
    assert all(0 < float(shown[name].removesuffix(" ms")) < 1000 * TIMEOUT for name in ("Raster", "Decode"))
    page.choose("Output type", "vae_rgb")
    page.wait_until(tells("the VAE's"), "the VAE's figures")
    page.choose("Output type", "rgb")
    page.wait_until(tells("the scene's own"), "the figures of the scene's decoder")
    page.wait_until(page.shows_full_resolution, "the full picture")
    assert page.browser.save_screenshot(str(tmp_path / "viewer.png"))
    with Image.open(tmp_path / "viewer.png") as screenshot:
        window = np.asarray(screenshot.convert("L"), dtype=float)
    assert window.shape[1] >= 900 and window[:, :-300].std() > 20 and window[:, -300:].std() > 10


def test_every_output_can_be_looked_at(page, pipeline):
    page.hide_cameras()
    for name in ("latent_rgb", "depth", "accumulation", "rgb"):
        page.choose("Output type", name)

        def is_shown(picture: np.ndarray, outputs: dict[str, np.ndarray]) -> bool:
            return middle_rms(picture, outputs[name]) < 0.03  # noqa: B023

        page.wait_until(follows(page, is_shown, pipeline, first_view), f"the picture of {name}")


def test_the_viewer_while_training(floor_scene, browser, tmp_path):
    arguments = ["latent-splatfacto", "--data", floor_scene, "--output-dir", tmp_path, "--vis", "viewer"]
    with serving(tmp_path / "log", "ns-train", *arguments, "--max-num-iterations", 100_000) as address:
        browser.get(address)
        page = ViewerPage(browser)
        page.wait_until(lambda: page.step() > 20, "the field in training")
        page.wait_until(page.shows_full_resolution, "the field in training in full resolution")
        page.hide_cameras()
        page.wait_until(lambda: page.picture().std() > 0.05, "something to see")
        step = page.step()
        page.wait_until(lambda: page.step() > step + 100, "more steps")
        # While training rests, only the mouse changes the picture.
        page.press("Pause Training")
        page.wait_until(lambda: "Resume Training" in page.text(), "the pause")
        before = page.picture()
        page.drag(*[(0, 20)] * 10)

        def view_changed() -> bool:
            picture = page.picture()
            return middle_rms(picture, cv2.resize(before, picture.shape[1::-1])) > 0.02

        page.wait_until(view_changed, "another view")
        # Training goes on, and the picture comes back to full resolution.
        page.press("Resume Training")
        step = page.step()
        page.wait_until(lambda: page.shows_full_resolution() and page.step() > step + 20, "further steps")


class RecordedRenders(RenderStateMachine):
    """The viewer's thread that renders, without a browser to send to."""

    def __init__(self, model: LatentSplatfactoModel, camera: CameraState):
        viewer = SimpleNamespace(
            ready=True,
            step=0,
            train_lock=threading.Lock(),
            include_time=False,
            render_tab_state=SimpleNamespace(preview_render=False),
            control_panel=SimpleNamespace(
                max_res=MAX_RES, crop_viewport=False, layer_depth=False, background_color=(38, 42, 55)
            ),
            get_model=lambda: model,
            get_camera_state=lambda client: camera,
        )
        super().__init__(viewer, 10.0, SimpleNamespace())
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def _send_output_to_viewer(self, outputs: dict[str, Any], static_render: bool = True) -> None:
        self.sent.append((self.state, outputs))


def test_previews_while_moving_are_not_decoded_and_the_decoded_picture_follows(model):
    camera = seen_from((0.3, 0.3, 0.3), aspect=4 / 3)
    machine = RecordedRenders(model, camera)
    model.viewer_preview.value = "latent_rgb"
    machine.start()
    try:
        machine.action(RenderAction("move", camera))
        wait_until(lambda: machine.sent and machine.sent[-1][0] == "high", TIMEOUT, "the full picture")
    finally:
        machine.running = False
        machine.join(TIMEOUT)
    *previews, (_, full) = machine.sent
    assert [state for state, _ in previews] == ["low_move", "low_static"]
    for _, preview in previews:
        assert torch.equal(preview["rgb"], preview["latent_rgb"])
    assert full["rgb"].shape == (384, MAX_RES, 3)
    decoded = model.get_outputs_for_camera(get_camera(camera, 384, MAX_RES))["rgb"]
    torch.testing.assert_close(full["rgb"], decoded)
    assert not torch.equal(full["rgb"], full["latent_rgb"])


@pytest.mark.parametrize("rays_per_second", [1e9, 1e-3], ids=["fast", "slow"])
def test_a_field_in_training_is_shown_in_full_however_fast_its_renders_are(
    floor_scene, tiny_vae, tmp_path, monkeypatch, rays_per_second
):
    monkeypatch.setattr("lrf_nerfstudio.plugin.viewer.PICTURE_SECONDS", 2.0)
    config = make_config(floor_scene, tiny_vae, tmp_path)
    config.vis = "viewer"
    config.save_config()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    viewer, camera = trainer.viewer_state, seen_from((0.3, 0.3, 0.3), aspect=4 / 3)
    machine = RecordedRenders(trainer.pipeline.model, camera)
    monkeypatch.setattr(viewer, "render_statemachines", {0: machine})
    monkeypatch.setattr(viewer, "get_camera_state", lambda client: camera)
    monkeypatch.setattr(viewer.viser_server, "get_clients", lambda: {0: None})
    trainer._init_viewer_state()
    machine.start()
    machine.action(RenderAction("move", camera))
    steps = count()

    def third_full_picture() -> bool:
        for event, speed in ((EventName.VIS_RAYS_PER_SEC, rays_per_second), (EventName.TRAIN_RAYS_PER_SEC, 1e6)):
            GLOBAL_BUFFER["events"][event.value] = {"buffer": [speed], "avg": speed}
        trainer._update_viewer_state(next(steps))
        return [state for state, _ in machine.sent].count("high") >= 3

    try:
        wait_until(third_full_picture, TIMEOUT, "the third full picture")
    finally:
        machine.running = False
        machine.join(TIMEOUT)
        trainer.shutdown()
