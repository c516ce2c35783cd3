"""nerfstudio's viewer on a trained scene: in a browser, as a user sees it, and its thread that renders."""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from commands import wait_until
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.utils.eval_utils import eval_setup
from nerfstudio.viewer.render_state_machine import RenderAction, RenderStateMachine
from nerfstudio.viewer.utils import CameraState, get_camera
from PIL import Image
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from tiny_scenes import look_at_origin

from lrf_nerfstudio.model import LatentSplatfactoModel

pytestmark = pytest.mark.browser

TIMEOUT = 120
"""Seconds after which something that takes one on an idle machine will not happen any more."""
MAX_RES = 512
"""The longer side of the pictures that the viewer asks for, unless it is told otherwise."""
BACKGROUND = torch.tensor([38, 42, 55]) / 255
"""The background that the viewer sets, unless it is told otherwise."""


@pytest.fixture(scope="module")
def model(trained) -> LatentSplatfactoModel:
    """The trained field, with the viewer's background."""
    _, pipeline, _, _ = eval_setup(trained.config)
    pipeline.model.set_background(BACKGROUND)
    return pipeline.model


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory) -> Iterator[str]:
    """Where ns-viewer shows the trained scene."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("viewer") / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                Path(sys.executable).with_name("ns-viewer"),
                *("--load-config", trained.config),
                *("--viewer.websocket-host", "127.0.0.1", "--viewer.websocket-port", str(port)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens, TIMEOUT, "the viewer's port")
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
        return self.browser.find_element(By.TAG_NAME, "body").text

    def press(self, button: str) -> None:
        self.browser.find_element(By.XPATH, f"//button[normalize-space()='{button}']").click()

    def drag(self, *steps: tuple[int, int]) -> None:
        """Press the mouse in the middle of the canvas, move it step by step, let go."""
        chain = ActionChains(self.browser, duration=50).click_and_hold(self.canvas())
        for x, y in steps:
            chain = chain.move_by_offset(x, y)
        chain.release().perform()

    def options(self, label: str) -> tuple[str, list[str]]:
        """What a dropdown of the control panel is set to, and all that it offers."""
        identifier = self.browser.find_element(By.XPATH, f"//label[normalize-space()='{label}']").get_attribute("for")
        dropdown = self.browser.find_element(By.ID, str(identifier))
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", dropdown)
        dropdown.click()
        listbox = str(dropdown.get_attribute("aria-controls"))
        found: list[str] = []

        def appear() -> bool:
            elements = self.browser.find_elements(By.CSS_SELECTOR, f"#{listbox} [role=option]")
            found[:] = [element.text for element in elements if element.is_displayed()]
            return bool(found) and all(found)

        wait_until(appear, TIMEOUT, f"the list of {label!r}")
        return str(dropdown.get_attribute("value")), found


@pytest.fixture
def page(address: str, browser: Chrome) -> ViewerPage:
    """The page when a picture in full resolution has come."""
    browser.get(address)
    page = ViewerPage(browser)
    wait_until(lambda: f"Resolution: {MAX_RES}x" in page.text(), TIMEOUT, "a picture in full resolution")
    return page


def seen_from(position: tuple[float, float, float], aspect: float) -> CameraState:
    """The viewer's camera at a position from where it looks at the origin."""
    pose = torch.from_numpy(look_at_origin(position)[:3])
    return CameraState(fov=np.deg2rad(75), aspect=aspect, c2w=pose, camera_type=CameraType.PERSPECTIVE)


def middle_rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference inside a margin, where the page draws axes and shadows over the scene."""
    inside = np.s_[100:-100, 100:-100]
    return float(np.sqrt(np.square(a[inside] - b[inside]).mean()))


def test_the_browser_shows_the_decoded_scene_and_follows_the_mouse(page, model):
    height, width = page.picture().shape[:2]
    page.press("Hide Train Cams")  # they cover the scene

    def shows_decoded(position: tuple[float, float, float]) -> Callable[[], bool]:
        camera = get_camera(seen_from(position, width / height), int(MAX_RES * height / width), MAX_RES)
        outputs = model.get_outputs_for_camera(camera)
        rgb, latent_rgb = (cv2.resize(outputs[name].numpy(), (width, height)) for name in ("rgb", "latent_rgb"))
        assert rgb.std() > 0.1  # something to see

        def condition() -> bool:
            picture = page.picture()
            return middle_rms(picture, rgb) < min(0.01, middle_rms(picture, latent_rgb) / 2)

        return condition

    wait_until(shows_decoded((0.3, 0.3, 0.3)), TIMEOUT, "the decoded scene")
    page.drag(*[(0, 20)] * 10)  # which turns the scene until it is seen from straight above
    wait_until(shows_decoded((1e-6, 1e-6, 0.3 * 3**0.5)), TIMEOUT, "the decoded scene from above")


def test_the_control_panel_offers_the_outputs_and_the_preview(page):
    chosen, outputs = page.options("Output type")
    assert chosen == "rgb"
    assert outputs[:4] == ["rgb", "latent_rgb", "depth", "accumulation"]  # nerfstudio adds its depth buffer
    assert "Custom Elements" in page.text()
    assert page.options("While moving, show") == ("latent_rgb", ["latent_rgb", "decoded"])


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
