"""Which photographs are compared with which, and how much a pair counts: K(i) and lambda_ij of stage I."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrf_nerfstudio.correspondence.tracks import Tracks


@dataclass(frozen=True, eq=False)
class PairMatches:
    """M pixels of two photographs that show the same M points.

    Attributes:
        i: index of the first view in `scene.views`, less than `j`.
        j: index of the second view.
        points_i: [M, 2] float32, pixels of file i as it lies on disk, with its lens distortion; x right, y down, the
            first pixel's centre at (0.5, 0.5).
        points_j: [M, 2] float32, the same points in file j.
    """

    i: int
    j: int
    points_i: np.ndarray
    points_j: np.ndarray


def neighbour_pairs(closeness: np.ndarray, neighbours: int) -> list[tuple[int, int]]:
    """Every view with those closest to it.

    Args:
        closeness: [K, K] symmetric, higher is closer; -inf where a pair is out of the question.
        neighbours: |K(i)|, the number of neighbours of a view. A view may be in more pairs, as others' neighbour.

    Returns:
        Pairs (i, j) with i < j, sorted, each once.
    """
    closeness = closeness.astype(np.float64)
    np.fill_diagonal(closeness, -np.inf)
    pairs: set[tuple[int, int]] = set()
    for i, row in enumerate(closeness):
        closest = np.argsort(-row, kind="stable")[:neighbours]
        pairs.update((min(i, int(j)), max(i, int(j))) for j in closest if row[j] > -np.inf)
    return sorted(pairs)


def shared_points(tracks: Tracks, views: int) -> np.ndarray:
    """[K, K] int64, the number of points that two of K views both observe; 0 on the diagonal."""
    by_point = np.argsort(tracks.points, kind="stable")  # the views of a point stay in ascending order
    point, view = tracks.points[by_point], tracks.views[by_point]
    counts = np.zeros(views * views, np.int64)
    for step in range(1, views):  # each observation with the step-th next one of its point
        same = point[step:] == point[:-step]
        if not same.any():
            break
        counts += np.bincount(view[:-step][same] * views + view[step:][same], minlength=views * views)
    return counts.reshape(views, views) + counts.reshape(views, views).T


def pose_errors(cams_from_world: Sequence[np.ndarray]) -> np.ndarray:
    """How far apart the poses of each two of K views are: APE_ij = || P_i^-1 P_j - I_4 ||_F.

    P is camera-to-world, so the translation of P_i^-1 P_j is as long as the way from one camera to the other. It is
    counted in units of the scene: the cameras' median distance to their centroid, which makes the error independent of
    the scale of the world. Cameras in one place have no such unit and differ by rotation only.

    Args:
        cams_from_world: K world-to-camera matrices [4, 4].

    Returns:
        [K, K] float64, symmetric, 0 on the diagonal.
    """
    poses = np.linalg.inv(np.stack(cams_from_world))  # [K, 4, 4]
    centres = poses[:, :3, 3] - poses[:, :3, 3].mean(0)
    unit = np.median(np.linalg.norm(centres, axis=1))
    poses[:, :3, 3] = centres / unit if unit > 1e-9 * (1 + np.abs(poses[:, :3, 3]).max()) else 0.0
    relative = np.linalg.inv(poses)[:, None] @ poses[None]
    errors = np.linalg.norm(relative - np.eye(4), axis=(2, 3))
    return (errors + errors.T) / 2  # symmetric up to rounding as it is


def exponential_weights(errors: np.ndarray, tau: float) -> np.ndarray:
    """Weights lambda = exp(-APE / tau): 1 for equal poses, 1/e where the pose error is tau; float32."""
    return np.exp(-errors / tau).astype(np.float32)
