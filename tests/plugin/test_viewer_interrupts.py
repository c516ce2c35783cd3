"""nerfstudio's viewer stops its render thread at any line of Python when the camera moves; the thread must survive."""

import sys
from types import SimpleNamespace

import pytest
import torch
from in_process import make_pipeline
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.viewer.render_state_machine import RenderStateMachine
from nerfstudio.viewer.utils import CameraState, get_camera
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException, SetTrace
from tiny_scenes import look_at_origin

from lrf_nerfstudio.plugin.model import LatentSplatfactoModel

pytestmark = pytest.mark.slow


class Interrupted(RenderStateMachine):
    """A render thread that is stopped at every so-manieth line of Python of a picture in turn."""

    def __init__(self, model: LatentSplatfactoModel, stops: int):
        super().__init__(SimpleNamespace(ready=True), 10.0, SimpleNamespace())
        self.state, self.model, self.stops = "high", model, stops
        pose = torch.from_numpy(look_at_origin((0.3, 0.3, 0.3))[:3])
        state = CameraState(fov=1.3, aspect=4 / 3, c2w=pose, camera_type=CameraType.PERSPECTIVE)
        self.camera = get_camera(state, 30, 40)
        self.lines, self.stop_at = 0, sys.maxsize
        self.stopped, self.died = 0, list[BaseException]()

    def check_interrupt(self, frame, event, arg):
        if event == "line":
            self.lines += 1
            if self.lines >= self.stop_at:
                self.stop_at = sys.maxsize
                raise IOChangeException
        return self.check_interrupt

    def picture(self) -> torch.Tensor:
        self.lines = 0
        with torch.no_grad(), SetTrace(self.check_interrupt):
            return self.model.get_outputs_for_camera(self.camera)["rgb"]

    def run(self) -> None:
        self.expected = self.picture()
        lines = self.lines
        for number in range(self.stops):
            self.stop_at = 1 + number * lines // self.stops
            try:
                self.picture()
            except IOChangeException:
                self.stopped += 1
            except BaseException as error:
                self.died.append(error)
        self.stop_at = sys.maxsize
        self.actual = self.picture()


@pytest.mark.parametrize("size", [(0, 2), (0, 0), (1, 1)])
@pytest.mark.parametrize("state", ["low_move", "high"])
def test_a_picture_without_pixels_is_one_of_one_pixel(floor_scene, tiny_vae, size, state):
    """The viewer asks for such pictures while a number is typed into its field for the resolution."""
    model = make_pipeline(floor_scene, tiny_vae).model.eval()
    thread = Interrupted(model, stops=0)
    thread.state = state
    thread.camera.height[:], thread.camera.width[:] = size
    thread.start()
    thread.join(300)
    assert thread.actual.shape == (max(1, size[0]), max(1, size[1]), 3)


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["VAE", "scene decoder"])
def test_the_render_thread_survives_wherever_it_is_stopped(floor_scene, tiny_vae, share):
    model = make_pipeline(floor_scene, tiny_vae, scene_decoder__share=share).model.eval()
    model.decoder_is_fitted = share > 0
    thread = Interrupted(model, stops=150)
    thread.start()
    thread.join(300)
    assert not thread.died, thread.died[0]
    assert thread.stopped > 100
    assert torch.equal(thread.actual, thread.expected)
