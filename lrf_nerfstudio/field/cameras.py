"""Cameras of the latent grid, made once per view on the device that renders it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GridCamera:
    """B pinhole cameras of pictures of one size, over a grid of square cells.

    What decides the shape of a render is in Python integers, and everything else on the device, so that rendering never
    waits to read a value back.

    Attributes:
        viewmats: [B, 4, 4], world to camera, OpenCV axes (x right, y down, z forward).
        Ks: [B, 3, 3], intrinsics in cells, the centers of cells at .5.
        height: H of the pictures, in pixels.
        width: W of the pictures, in pixels.
        cell: pixels per cell along each axis; the VAE's spatial factor f gives the grid that it decodes.
        rows: of the grid, which covers the picture and may reach beyond it below.
        columns: of the grid, which covers the picture and may reach beyond it on the right.
        indices: [B], numbers of the training views, whose poses may be optimized; None for other cameras.
    """

    viewmats: Tensor
    Ks: Tensor
    height: int
    width: int
    cell: float
    rows: int
    columns: int
    indices: Tensor | None = None

    @classmethod
    def of_pictures(
        cls,
        viewmats: Tensor,
        Ks: Tensor,
        height: int,
        width: int,
        cell: float,
        indices: Tensor | None = None,
    ) -> "GridCamera":
        """Make cameras from their intrinsics in pixels.

        Args:
            viewmats: [B, 4, 4], world to camera, OpenCV axes.
            Ks: [B, 3, 3], intrinsics in pixels.
            height: H of the pictures, in pixels.
            width: W of the pictures, in pixels.
            cell: pixels per cell.
            indices: [B], numbers of the training views.

        Example:
            >>> import torch
            >>> K = torch.tensor([[[100.0, 0.0, 50.5], [0.0, 100.0, 33.5], [0.0, 0.0, 1.0]]])
            >>> camera = GridCamera.of_pictures(torch.eye(4)[None], K, height=67, width=101, cell=8)
            >>> camera.rows, camera.columns
            (9, 13)
            >>> camera.Ks[0, :2, 2]
            tensor([6.3125, 4.1875])
        """
        rows, columns = math.ceil(height / cell), math.ceil(width / cell)
        in_cells = torch.cat([Ks[:, :2] / cell, Ks[:, 2:]], dim=1)
        return cls(viewmats, in_cells, height, width, cell, rows, columns, indices)

    def subdivided(self, density: int) -> "GridCamera":
        """Return the cameras over a grid with `density` x `density` cells in the place of each."""
        Ks = torch.cat([self.Ks[:, :2] * density, self.Ks[:, 2:]], dim=1)
        rows, columns = self.rows * density, self.columns * density
        return replace(self, Ks=Ks, cell=self.cell / density, rows=rows, columns=columns)

    def cut(self, top: int, left: int, height: int, width: int) -> "GridCamera":
        """Return the cameras of a part of the pictures, over a grid that begins in its corner.

        Args:
            top: row of the part's first pixel.
            left: column of the part's first pixel.
            height: of the part, in pixels.
            width: of the part, in pixels.
        """
        Ks = self.Ks.clone()  # changed by plain numbers, which cost no copy to the device
        Ks[:, 0, 2] -= left / self.cell
        Ks[:, 1, 2] -= top / self.cell
        rows, columns = math.ceil(height / self.cell), math.ceil(width / self.cell)
        return replace(self, Ks=Ks, height=height, width=width, rows=rows, columns=columns)

    def to(self, device: torch.device | str) -> "GridCamera":
        """Return the same cameras on a device."""
        indices = None if self.indices is None else self.indices.to(device)
        return replace(self, viewmats=self.viewmats.to(device), Ks=self.Ks.to(device), indices=indices)

    @staticmethod
    def batch(cameras: Sequence["GridCamera"]) -> "GridCamera":
        """Join cameras whose pictures have one size and whose cells have one size."""
        first = cameras[0]
        if len(cameras) == 1:
            return first
        indices = [camera.indices for camera in cameras if camera.indices is not None]
        return replace(
            first,
            viewmats=torch.cat([camera.viewmats for camera in cameras]),
            Ks=torch.cat([camera.Ks for camera in cameras]),
            indices=torch.cat(indices) if len(indices) == len(cameras) else None,
        )


def world_to_camera(camera_to_worlds: Tensor) -> Tensor:
    """Return the view matrices [B, 4, 4] (OpenCV axes) of poses [B, 3, 4] (camera to world, OpenGL axes).

    OpenGL axes, which nerfstudio's poses have, are x right, y up, z backward. In closed form: R^T and -R^T t.
    """
    rotations = camera_to_worlds[:, :3, :3].float()
    inverses = torch.stack([rotations[..., 0], -rotations[..., 1], -rotations[..., 2]], dim=1)  # [B, 3, 3]
    return _view_matrices(inverses, camera_to_worlds[:, :3, 3].float())


def adjusted(viewmats: Tensor, adjustments: Tensor) -> Tensor:
    """Return view matrices [B, 4, 4] whose cameras are turned and moved; differentiable.

    Args:
        viewmats: [B, 4, 4], world to camera.
        adjustments: [B, 3, 4], a rotation A and a translation a of the world's axes: the camera's orientation R becomes
            A R and its position p becomes p + a, as nerfstudio's camera optimizer has it.
    """
    inverses = viewmats[:, :3, :3]
    positions = -(inverses.transpose(1, 2) @ viewmats[:, :3, 3:])[..., 0]
    return _view_matrices(inverses @ adjustments[:, :3, :3].transpose(1, 2), positions + adjustments[:, :3, 3])


def _view_matrices(inverses: Tensor, positions: Tensor) -> Tensor:
    """Join R^T [B, 3, 3] and camera positions [B, 3] to view matrices [B, 4, 4]."""
    upper = torch.cat([inverses, -inverses @ positions[..., None]], dim=-1)  # [B, 3, 4]
    # Made on the device: a constant from the host would be copied at every call.
    last_row = torch.cat([torch.zeros_like(upper[:, :1, :3]), torch.ones_like(upper[:, :1, 3:])], dim=-1)
    return torch.cat([upper, last_row], dim=1)


def enlarged(render: Tensor, camera: GridCamera) -> Tensor:
    """Return what was rendered on a camera's grid [rows, columns, c] as a picture [H, W, c], bilinearly."""
    size = (round(camera.rows * camera.cell), round(camera.columns * camera.cell))
    picture = F.interpolate(render.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)
    return picture[0].permute(1, 2, 0)[: camera.height, : camera.width]
