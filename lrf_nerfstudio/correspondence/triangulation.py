"""Points of a scene from photographs with known cameras."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np

from lrf_nerfstudio.correspondence.epipolar import fundamental_matrix, sampson_distance
from lrf_nerfstudio.correspondence.features import Features, features_of, match_descriptors
from lrf_nerfstudio.correspondence.pairs import neighbour_pairs, pose_errors
from lrf_nerfstudio.utils.options import AtLeastOne, Positive, Range

if TYPE_CHECKING:
    import pycolmap


@dataclass
class TriangulationConfig:
    """How points are triangulated."""

    max_features: AtLeastOne = 8192
    """Features of a photograph, those of the highest contrast."""
    ratio: Annotated[float, Range(above=0, most=1)] = 0.9
    """A feature's nearest match is closer than this times the second nearest, else it is not used. Matches must obey
    the known cameras besides, so more may be let through than where the cameras are not known."""
    max_error: Positive = 2.0
    """Largest distance in pixels between a match and what its cameras allow, and between an observation and the
    projection of its point."""
    min_angle: Annotated[float, Range(above=0, below=90)] = 0.5
    """Least angle in degrees between two rays of a point: what is farther away is not located well."""
    neighbours: AtLeastOne = 10
    """Photographs, those of the nearest cameras, that each one is compared with."""


class PinholeView(NamedTuple):
    """A photograph without lens distortion, and its camera."""

    gray: np.ndarray  # [H, W] uint8
    K: np.ndarray  # [3, 3], pixels, the first one's center at (0.5, 0.5)
    cam_from_world: np.ndarray  # [4, 4], OpenCV axes


class Observation(NamedTuple):
    """A feature of a view."""

    view: int
    feature: int


def triangulate(views: Sequence[PinholeView], config: TriangulationConfig) -> np.ndarray:
    """Find points that two or more photographs show.

    SIFT features are matched between neighboring views and kept where they obey the epipolar geometry of the known
    cameras; what matches from view to view is one point, located by pycolmap's robust multi-view triangulation.

    Args:
        views: two or more.
        config: options.

    Returns:
        [N, 3] float64, in the coordinates of the cameras; N may be 0.
    """
    features = [features_of(view.gray, config.max_features) for view in views]
    matches = []
    for i, j in neighbour_pairs(-pose_errors([view.cam_from_world for view in views]), config.neighbours):
        for row_i, row_j in _matches(views[i], views[j], features[i], features[j], config):
            matches.append((Observation(i, int(row_i)), Observation(j, int(row_j))))
    located = (_locate(track, views, features, config) for track in tracks_of(matches))
    points = [point for point in located if point is not None]
    # A keypoint with two orientations is two features, and would be two points in one place.
    return np.unique(np.array(points).reshape(-1, 3).round(9), axis=0)


def tracks_of(matches: Sequence[tuple[Observation, Observation]]) -> list[list[Observation]]:
    """Join matches that share features; sets that would show one view twice are left out, for a match is wrong.

    Returns:
        Sets of two or more features, sorted, each with one feature of a view.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes = sorted({observation for match in matches for observation in match})
    numbers = {observation: number for number, observation in enumerate(nodes)}
    ends = np.array([[numbers[a], numbers[b]] for a, b in matches], dtype=int).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    count, labels = connected_components(graph, directed=False)
    tracks: list[list[Observation]] = [[] for _ in range(count)]
    for observation, label in zip(nodes, labels, strict=True):
        tracks[label].append(observation)
    return [track for track in tracks if len({observation.view for observation in track}) == len(track)]


def _matches(
    view_i: PinholeView, view_j: PinholeView, features_i: Features, features_j: Features, config: TriangulationConfig
) -> np.ndarray:
    """Rows [M, 2] of the features of two views that look alike and obey the cameras."""
    rows = match_descriptors(features_i.root_descriptors(), features_j.root_descriptors(), config.ratio)
    f = fundamental_matrix(view_i.K, view_i.cam_from_world, view_j.K, view_j.cam_from_world)
    distances = sampson_distance(f, features_i.points[rows[:, 0]], features_j.points[rows[:, 1]])
    return rows[distances <= config.max_error]  # NaN, of cameras in one place, is not


def _locate(
    track: Sequence[Observation],
    views: Sequence[PinholeView],
    features: Sequence[Features],
    config: TriangulationConfig,
) -> np.ndarray | None:
    """The point [3] of a track; None where its observations do not meet in front of the cameras."""
    import pycolmap

    options = pycolmap.EstimateTriangulationOptions(
        min_tri_angle=np.radians(config.min_angle), residual_type=pycolmap.TriangulationResidualType.REPROJECTION_ERROR
    )
    options.ransac.max_error = config.max_error
    options.ransac.random_seed = 0
    seen_by = [views[observation.view] for observation in track]
    result = pycolmap.estimate_triangulation(
        np.array([features[view].points[row] for view, row in track], np.float64),
        [pycolmap.Rigid3d(view.cam_from_world[:3]) for view in seen_by],
        [_camera(view) for view in seen_by],
        options,
    )
    return None if result is None else np.asarray(result["xyz"])


def _camera(view: PinholeView) -> "pycolmap.Camera":
    import pycolmap

    height, width = view.gray.shape
    K = view.K
    return pycolmap.Camera(model="PINHOLE", width=width, height=height, params=[K[0, 0], K[1, 1], K[0, 2], K[1, 2]])
