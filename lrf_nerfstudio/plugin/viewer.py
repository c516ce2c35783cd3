"""nerfstudio's viewer: what it shows while the camera moves, and when it renews its picture of a field in training."""

import math
import threading
import time

from nerfstudio.viewer.render_state_machine import RenderStateMachine
from nerfstudio.viewer.viewer import Viewer

PREVIEW_CELLS = 64
"""Cells along the longer side of a preview, about as dense as a decoded picture of 512 pixels needs."""

PICTURE_SECONDS = 30.0
"""The picture of a field in training is renewed after so many seconds at the latest."""


def viewer_is_moving() -> bool:
    """Tell whether the current thread renders a preview for a viewer whose camera moves or has just stopped."""
    thread = threading.current_thread()
    return isinstance(thread, RenderStateMachine) and thread.state != "high"


def preview_cell(height: int, width: int, spatial_factor: int) -> float:
    """Return the pixels per cell of the grid that previews of H x W pixels are rendered on."""
    return min(spatial_factor, max(height, width) / PREVIEW_CELLS)


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
