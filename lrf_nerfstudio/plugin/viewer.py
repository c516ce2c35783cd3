"""nerfstudio's viewer: where it starts, what it shows while the camera moves, what its panel says of the last picture,
and when it renews its picture of a field in training.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import viser.transforms as vtf
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.viewer.render_state_machine import RenderStateMachine
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from nerfstudio.viewer.viewer_elements import ViewerControl, ViewerElement
from torch import Tensor
from viser import ClientHandle, ViserServer

from lrf_nerfstudio.utils.timing import Stopwatch

PREVIEW_CELLS = 64
"""Cells along the longer side of a preview, about as dense as a decoded picture of 512 pixels needs."""

PICTURE_SECONDS = 30.0
"""The picture of a field in training is renewed after so many seconds at the latest."""


def viewer_is_moving() -> bool:
    """Tell whether the current thread renders a preview for a viewer whose camera moves or has just stopped."""
    thread = threading.current_thread()
    return isinstance(thread, RenderStateMachine) and thread.state != "high"


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep nerfstudio's viewer from stopping its render thread inside of the block.

    When the camera moves, the viewer raises an exception at whatever line of Python the thread is. In one that a
    compiled kernel has called, it becomes a SystemError, of which the thread dies: the page keeps its picture for ever.
    """
    trace = sys.gettrace() if isinstance(threading.current_thread(), RenderStateMachine) else None
    if trace is None:
        yield
        return
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


class StartCamera(ViewerControl):
    """Places the camera of every page that opens where the first training view was taken.

    The viewer's own first camera is near the origin, which in many scenes is empty space.

    Args:
        cameras: of the training views.
        means: gives the centers of the Gaussians [N, 3] as they are when a page opens.
    """

    def __init__(self, cameras: Cameras, means: Callable[[], Tensor]) -> None:
        self._camera, self._means = cameras[0], means

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        viewer.viser_server.on_client_connect(self._place)

    def _place(self, client: ClientHandle) -> None:
        pose = self._camera.camera_to_worlds.cpu().double().numpy()  # [3, 4], OpenGL axes
        position, forward = pose[:, 3], -pose[:, 2]
        # The mouse turns the camera around what lies in the middle of the picture.
        distances = (self._means().detach().cpu().double().numpy() - position) @ forward
        ahead = distances[distances > 0]
        distance = float(np.median(ahead)) if len(ahead) else 1.0
        scale = VISER_NERFSTUDIO_SCALE_RATIO
        with client.atomic():
            client.camera.position = scale * position
            client.camera.look_at = scale * (position + distance * forward)
            client.camera.wxyz = vtf.SO3.from_matrix(pose[:, :3] * [1, -1, -1]).wxyz  # OpenCV axes
            client.camera.fov = vertical_fov(self._camera, client.camera.aspect)


def vertical_fov(camera: Cameras, aspect: float) -> float:
    """Return the vertical field of view, in radians, of a page that shows all that a camera sees.

    Args:
        camera: a single pinhole camera.
        aspect: width of the page divided by its height.
    """
    height = float(camera.height) / (2 * float(camera.fy))  # half of it, at depth 1
    width = float(camera.width) / (2 * float(camera.fx))
    return 2 * math.atan(max(height, width / aspect))


class PictureFigures(ViewerElement[str]):
    """What the viewer's panel says of its last picture: number of Gaussians, decoder, milliseconds."""

    def __init__(self) -> None:
        super().__init__("Last picture")

    def _create_gui_handle(self, viser_server: ViserServer) -> None:
        self.gui_handle = viser_server.gui.add_markdown("")

    def install(self, viser_server: ViserServer) -> None:
        self._create_gui_handle(viser_server)

    def show(self, gaussians: int, decoder: str, times: Stopwatch, begun: str, done: str) -> None:
        """Show the figures of a picture that the viewer's thread has rendered; waits for the device.

        Does nothing in any other thread, in which training may go on.

        Args:
            gaussians: their number.
            decoder: which one made the picture.
            times: with the mark `rasterized`.
            begun: the mark at which the decoder began.
            done: the mark at which it had done.
        """
        if self.gui_handle is None or not isinstance(threading.current_thread(), RenderStateMachine):
            return
        raster, decode = times.seconds("start", "rasterized"), times.seconds(begun, done)
        self.gui_handle.content = (
            f"Gaussians: {gaussians:,}  \nDecoder: {decoder}  \n"
            f"Raster: {1000 * raster:.1f} ms  \nDecode: {1000 * decode:.1f} ms"
        )


def preview_cell(height: int, width: int, spatial_factor: int) -> float:
    """Return the pixels per cell of the grid that previews of H x W pixels are rendered on."""
    return min(spatial_factor, max(height, width, 1) / PREVIEW_CELLS)


class PictureClock:
    """Decides when the viewer renews its picture of a field in training.

    nerfstudio goes by the mean speed of the last renders, to which the first one, small previews and the wait for the
    training step belong. On a slow machine it is so low that a picture would stay for minutes: it is renewed after
    `PICTURE_SECONDS`. On a fast GPU it is so high that a page, which leaves its preview after 0.2 s without a new
    picture, would never leave it: pages in preview are left alone.
    """

    def __init__(self) -> None:
        self._step, self._time = 0.0, -math.inf  # of the last picture

    def prepare(self, viewer: Viewer) -> None:
        """Tell nerfstudio's viewer, through its `last_step`, whether a picture is due; call before its own decision."""
        machines = list(viewer.render_statemachines.values())  # a copy: pages come and go
        if time.monotonic() - self._time > PICTURE_SECONDS:
            viewer.last_step = -math.inf
        elif any(machine.state != "high" for machine in machines):
            viewer.last_step = math.inf
        else:
            viewer.last_step = self._step

    def note(self, viewer: Viewer, step: int) -> None:
        """Note whether the viewer has taken a picture at a step; call after its own decision."""
        if viewer.last_step == step:
            self._step, self._time = step, time.monotonic()
