"""Points of a scene from its photographs and their known cameras, for fields that begin without a point cloud."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lrf_nerfstudio.correspondence.triangulation import PinholeView, TriangulationConfig, triangulate
from lrf_nerfstudio.plugin.cameras import grid_camera
from lrf_nerfstudio.plugin.dataset import PinholeDataset
from lrf_nerfstudio.utils.files import replacing


def triangulated_points(dataset: PinholeDataset, config: TriangulationConfig) -> Tensor:
    """Triangulate points from all photographs of a data set, masks aside.

    Args:
        dataset: photographs and cameras; nothing else is looked at.
        config: options.

    Returns:
        [N, 3] float64, in the scene's coordinates.

    Raises:
        UserError: if a photograph cannot be read.
    """
    views = []
    for index in range(len(dataset)):
        camera = grid_camera(dataset.cameras[index : index + 1], 1, "cpu")
        gray = dataset.photograph(index)[0] @ torch.tensor([0.299, 0.587, 0.114])
        views.append(
            PinholeView(
                (255 * gray).round().clamp(0, 255).to(torch.uint8).numpy(),
                camera.Ks[0].double().numpy(),
                camera.viewmats[0].double().numpy(),
            )
        )
    return torch.from_numpy(triangulate(views, config))


def write_points(file: Path, points: Tensor, option: str = "") -> None:
    """Write positions [N, 3] as a binary ply.

    Raises:
        UserError: if the file cannot be written.
    """
    from plyfile import PlyData, PlyElement

    vertices = np.zeros(len(points), dtype=[(axis, "f4") for axis in "xyz"])
    for axis, column in zip("xyz", points.T, strict=True):
        vertices[axis] = column.numpy()
    with replacing(file, option) as stream:
        PlyData([PlyElement.describe(vertices, "vertex")]).write(stream)
