"""nerfstudio's cameras as cameras of the latent grid."""

import torch
from nerfstudio.cameras.cameras import Cameras, CameraType

from lrf_nerfstudio.field.cameras import GridCamera, world_to_camera
from lrf_nerfstudio.utils.errors import UserError


def grid_camera(camera: Cameras, cell: float, device: torch.device | str, index: int | None = None) -> GridCamera:
    """Return one perspective camera of nerfstudio as a camera of a grid.

    The one place where cameras are read: a `Cameras` on a GPU is copied to the host once.

    Args:
        camera: one camera, of shape [1]; intrinsics and size in pixels.
        cell: pixels per cell of the grid.
        device: where the result is.
        index: the number of a training view.

    Raises:
        UserError: if it is no perspective camera.
    """
    camera = camera.to("cpu")
    if int(camera.camera_type) != CameraType.PERSPECTIVE.value:
        raise UserError("A latent radiance field renders perspective cameras only.")
    return GridCamera.of_pictures(
        world_to_camera(camera.camera_to_worlds),
        camera.get_intrinsics_matrices(),
        max(1, int(camera.height)),  # the viewer asks for a picture of no rows while a resolution is being typed
        max(1, int(camera.width)),
        cell,
        None if index is None else torch.tensor([index]),
    ).to(device)
