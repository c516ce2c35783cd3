"""Whether pictures of one scene agree: the picture of a view, warped into another by depth, beside the one there.

A decoder that draws detail by itself draws other detail in the next view: it flickers. Where two views show the same
point, the picture of one, warped, should be that of the other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class DepthView:
    """A pinhole camera and the depth of what it sees.

    Attributes:
        viewmat: [4, 4], world to camera, OpenCV axes.
        K: [3, 3], intrinsics in pixels, the center of the first pixel at (0.5, 0.5).
        depth: [H, W], along the camera's axis, in units of the world; NaN where no surface is seen.
    """

    viewmat: Tensor
    K: Tensor
    depth: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """H and W in pixels."""
        return self.depth.shape[0], self.depth.shape[1]


def find_in(view: DepthView, other: DepthView, tolerance: float) -> tuple[Tensor, Tensor]:
    """Find what a view shows in another one.

    Args:
        view: of H x W pixels.
        other: another view of the same world.
        tolerance: largest relative difference between the depth of a point in the other view and the depth that this
            view has there; where it is larger, something else hides the point.

    Returns:
        points: [H, W, 2], where the points that this view shows lie in the other one, (x, y) in pixels; NaN where this
            view sees no surface.
        seen: [H, W], whether the other view sees them too.
    """
    height, width = view.size
    rows, columns = (torch.arange(length, device=view.depth.device) + 0.5 for length in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ view.K.inverse().T  # [H, W, 3], of depth 1
    to_other = other.viewmat @ view.viewmat.inverse()
    positions = (rays * view.depth[..., None]) @ to_other[:3, :3].T + to_other[:3, 3]
    projected = positions @ other.K.T
    depths = projected[..., 2]
    points = projected[..., :2] / depths[..., None]
    limits = torch.tensor(other.size[::-1], device=points.device)
    # Two pixels from the edge, a bicubic window is inside.
    seen = (depths > 0) & (points > 2).all(dim=-1) & (points < limits - 2).all(dim=-1)
    found = sample(other.depth[..., None], points, "bilinear")[..., 0]  # across an edge it agrees with neither side
    return points, seen & ((found - depths).abs() < tolerance * depths)


def sample(picture: Tensor, points: Tensor, mode: str = "bicubic") -> Tensor:
    """Return the values [H, W, c] of a picture [H', W', c] at points [H, W, 2], (x, y) in pixels; anything at NaN."""
    height, width = picture.shape[:2]
    grid = 2 * torch.nan_to_num(points) / torch.tensor([width, height], device=points.device) - 1
    values = F.grid_sample(picture.permute(2, 0, 1)[None], grid[None], mode, "border", align_corners=False)
    return values[0].permute(1, 2, 0)


@dataclass(frozen=True)
class Agreement:
    """How well a picture agrees with that of another view, warped into its own.

    Attributes:
        warped: [H, W, 3], the other picture in this view; 0 where the other view does not see what this one sees.
        difference: [H, W, 3], absolute, likewise.
        psnr: in dB, where both views see the same; NaN where they do so nowhere.
    """

    warped: Tensor
    difference: Tensor
    psnr: float


def compare(picture: Tensor, other: Tensor, points: Tensor, seen: Tensor) -> Agreement:
    """Warp a picture into another view and compare.

    Args:
        picture: [H, W, 3] in [0, 1].
        other: [H', W', 3] in [0, 1], of the other view.
        points: as :func:`find_in` returns them for the two views.
        seen: likewise.
    """
    warped = sample(other, points).clamp(0, 1) * seen[..., None]
    difference = (warped - picture).abs() * seen[..., None]
    error = difference.square().sum() / (3 * seen.sum())
    return Agreement(warped, difference, float(-10 * torch.log10(error)))
