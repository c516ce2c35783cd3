"""What a camera pose must be, whatever file it comes from."""

import numpy as np

from lrf_nerfstudio.utils.errors import UserError

ORTHONORMAL_TOLERANCE = 1e-2
"""Largest entry of |R^T R - I| that still passes for a rotation; files often carry four decimals."""


def check_pose(pose: np.ndarray, name: str) -> None:
    """Check that a camera's matrix [3, 4] or [4, 4], of either direction, is finite and its rotation a rotation.

    Raises:
        UserError: it is not; the message says which frame (`name`).
    """
    if pose.shape not in ((3, 4), (4, 4)):
        raise UserError(f"The pose of {name} is {pose.shape}, not a 4 x 4 matrix.")
    if not np.isfinite(pose).all():
        raise UserError(f"The pose of {name} contains NaN or infinity. Remove that frame, or estimate its pose again.")
    rotation = pose[:3, :3]
    if np.abs(rotation.T @ rotation - np.eye(3)).max() > ORTHONORMAL_TOLERANCE or np.linalg.det(rotation) < 0:
        raise UserError(
            f"The pose of {name} is no rigid motion: the columns of its rotation are not orthonormal and right-handed. "
            "Remove that frame, or write its pose without scale, shear or mirroring."
        )
