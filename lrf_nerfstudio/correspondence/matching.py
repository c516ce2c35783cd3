"""Correspondences of a scene: for pairs of photographs, the pixels that show the same point."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from lrf_nerfstudio.correspondence.cache import load_or_match
from lrf_nerfstudio.correspondence.epipolar import (
    explained_by_one_motion,
    fundamental_matrix,
    pinhole_matrix,
    sampson_distance,
    undistort,
)
from lrf_nerfstudio.correspondence.features import (
    Features,
    common_features,
    detect_features,
    match_descriptors,
)
from lrf_nerfstudio.correspondence.pairs import (
    PairMatches,
    exponential_weights,
    neighbour_pairs,
    pose_errors,
    shared_points,
)
from lrf_nerfstudio.correspondence.scene import Scene, View
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import unwritable
from lrf_nerfstudio.utils.options import AtLeastOne, Positive, Range


@dataclass
class CorrespondenceConfig:
    """Where correspondences come from, and which are used."""

    source: Literal["auto", "sfm", "features"] = "auto"
    """`sfm`: the tracks of the scene's COLMAP model. `features`: SIFT matches that obey the epipolar constraint.
    `auto`: `sfm` where there is a model, else `features`."""
    neighbours: AtLeastOne = 10
    """Photographs that each one is compared with, |K(i)|."""
    neighbour_selection: Literal["shared-points", "pose-distance"] = "shared-points"
    """What makes photographs neighbours: many points in common (of the tracks, or among a few large features), or close
    cameras."""
    min_matches: AtLeastOne = 16
    """Pairs with fewer matches are not used."""
    min_track_length: Annotated[int, Range(least=2)] = 3
    """Points that fewer photographs show are not used (sfm): two views agree on a wrong point easily."""
    max_reprojection_error: Positive = 2.0
    """Observations further from their point's projection, in pixels of the model's images, are not used (sfm)."""
    max_features: AtLeastOne = 4096
    """Features of a photograph, those of the highest contrast (features)."""
    ratio: Annotated[float, Range(above=0, most=1)] = 0.8
    """A feature's nearest match is closer than this times the second nearest, else it is not used (features)."""
    max_epipolar_error: Positive = 1.0
    """Matches with a larger Sampson distance, in pixels of the files, are not used (features). The fundamental matrix
    comes from the cameras where the scene has them, else it is estimated from the matches."""
    pose_weights: Literal["exponential", "uniform"] = "exponential"
    """How much a pair counts: exp(-APE / tau), less the further apart its cameras are, or all the same."""
    pose_weight_tau: Positive = 1.0
    """tau of the exponential weights; cameras turned by 90 degrees have a pose error APE of 2."""
    cache_dir: Path | None = None
    """Folder of the cache of feature matches; `lrf_nerfstudio/correspondences` in the user's cache folder by default.
    Tracks are read faster than a cache would be."""


@dataclass(frozen=True, eq=False)
class SceneCorrespondences:
    """The correspondences of a scene.

    Attributes:
        scene: the scene.
        pairs: sorted by (i, j); at least one, each with `min_matches` matches or more.
        weights: [len(pairs)] float32 in (0, 1], lambda_ij; 1 where uniform weights were asked for or poses are unknown.
    """

    scene: Scene
    pairs: tuple[PairMatches, ...]
    weights: np.ndarray


def find_correspondences(scene: Scene, config: CorrespondenceConfig) -> SceneCorrespondences:
    """Find what corresponds in the photographs of a scene.

    Raises:
        UserError: an option is out of range, the scene lacks what the options need, a photograph cannot be read, or
            no pair has enough matches.
    """
    use_tracks = config.source == "sfm" or (config.source == "auto" and scene.tracks is not None)
    pairs = pairs_from_tracks(scene, config) if use_tracks else pairs_from_features(scene, config)
    if not pairs:
        limits = "min_matches or min_track_length" if use_tracks else "min_matches or max_epipolar_error"
        raise UserError(
            f"No two of the {len(scene.views)} photographs of {scene.folder} have {config.min_matches} matches. Take "
            f"photographs that overlap more, or relax {limits}."
        )
    weights = np.ones(len(pairs), np.float32)
    if config.pose_weights == "exponential" and scene.has_cameras:
        i, j = [pair.i for pair in pairs], [pair.j for pair in pairs]
        weights = exponential_weights(pose_errors(scene.cams_from_world)[i, j], config.pose_weight_tau)
    return SceneCorrespondences(scene, tuple(pairs), weights)


def matches_on_disk(correspondences: SceneCorrespondences) -> SceneCorrespondences:
    """Move the matches of a scene to a temporary file, which the system maps into memory as they are read.

    The scene's tracks, which the matches were taken from, are dropped. The file is gone when the matches are.

    Raises:
        UserError: there is no space for the file.
    """
    pairs = correspondences.pairs
    points = [pair.points_i for pair in pairs] + [pair.points_j for pair in pairs]
    try:
        with tempfile.TemporaryFile() as file:
            np.concatenate(points).tofile(file)
            file.flush()
            mapped = np.asarray(np.memmap(file, np.float32, "r")).reshape(-1, 2)
    except OSError as error:
        raise unwritable(Path(tempfile.gettempdir()), error, "TMPDIR") from error
    parts = np.split(mapped, np.cumsum([len(part) for part in points])[:-1])
    of_pairs = zip(pairs, parts[: len(pairs)], parts[len(pairs) :], strict=True)
    return replace(
        correspondences,
        scene=replace(correspondences.scene, tracks=None),
        pairs=tuple(PairMatches(pair.i, pair.j, points_i, points_j) for pair, points_i, points_j in of_pairs),
    )


def pairs_from_tracks(scene: Scene, config: CorrespondenceConfig) -> list[PairMatches]:
    """What two photographs show of the same points of the scene's COLMAP model.

    Raises:
        UserError: the scene has no model.
    """
    if scene.tracks is None:
        raise UserError(
            f"The scene {scene.folder} has no COLMAP model, so there are no tracks to take correspondences from. Set "
            "the source of correspondences to `features`, which needs none, or add the model (colmap/sparse/0)."
        )
    tracks = scene.tracks.select(config.min_track_length, config.max_reprojection_error)
    shared = shared_points(tracks, len(scene.views))
    closeness = -pose_errors(scene.cams_from_world) if config.neighbour_selection == "pose-distance" else shared
    closeness = np.where(shared >= config.min_matches, closeness, -np.inf)
    observations = [tracks.of_view(view) for view in range(len(scene.views))]
    pairs = []
    for i, j in neighbour_pairs(closeness, config.neighbours):
        of_i, of_j = observations[i], observations[j]
        _, rows_i, rows_j = np.intersect1d(of_i.points, of_j.points, assume_unique=True, return_indices=True)
        pairs.append(PairMatches(i, j, of_i.xy[rows_i].astype(np.float32), of_j.xy[rows_j].astype(np.float32)))
    return pairs


def pairs_from_features(scene: Scene, config: CorrespondenceConfig) -> list[PairMatches]:
    """SIFT matches that obey the epipolar constraint, from the cache where it has them.

    Raises:
        UserError: neighbours by pose were asked for and there are no cameras, or a photograph cannot be read.
    """
    if config.neighbour_selection == "pose-distance" and not scene.has_cameras:
        raise UserError(
            f"The scene {scene.folder} has no cameras, so neighbours cannot be selected by pose distance. Select them "
            "by shared points."
        )
    names = ("neighbours", "neighbour_selection", "min_matches", "max_features", "ratio", "max_epipolar_error")
    options = {name: getattr(config, name) for name in names}
    return load_or_match(scene, options, lambda: _match_features(scene, config), config.cache_dir)


def _match_features(scene: Scene, config: CorrespondenceConfig) -> list[PairMatches]:
    features = [detect_features(view.path, config.max_features) for view in scene.views]
    if config.neighbour_selection == "pose-distance":
        closeness = -pose_errors(scene.cams_from_world)
    else:
        closeness = common_features(features, config.ratio)
    pairs = []
    for i, j in neighbour_pairs(closeness, config.neighbours):
        points_i, points_j = _match_pair(features[i], features[j], config.ratio)
        obey = _obey_epipolar_constraint(scene.views[i], scene.views[j], points_i, points_j, config)
        if obey.sum() >= config.min_matches:
            pairs.append(PairMatches(i, j, points_i[obey], points_j[obey]))
    return pairs


def _match_pair(features_i: Features, features_j: Features, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    rows = match_descriptors(features_i.root_descriptors(), features_j.root_descriptors(), ratio)
    points = np.column_stack([features_i.points[rows[:, 0]], features_j.points[rows[:, 1]]])
    points = np.unique(points, axis=0)  # a keypoint with two orientations is two features
    return points[:, :2], points[:, 2:]


def _obey_epipolar_constraint(
    view_i: View, view_j: View, points_i: np.ndarray, points_j: np.ndarray, config: CorrespondenceConfig
) -> np.ndarray:
    """Tell which matches obey F, [M] bool; F comes from the cameras, else from the matches."""
    if view_i.camera is None or view_j.camera is None or view_i.cam_from_world is None or view_j.cam_from_world is None:
        sizes = (view_i.width, view_i.height), (view_j.width, view_j.height)
        return explained_by_one_motion(points_i, points_j, sizes, config.max_epipolar_error, config.min_matches)
    points_i, points_j = undistort(view_i.camera, points_i), undistort(view_j.camera, points_j)
    k_i, k_j = pinhole_matrix(view_i.camera), pinhole_matrix(view_j.camera)
    f = fundamental_matrix(k_i, view_i.cam_from_world, k_j, view_j.cam_from_world)
    return sampson_distance(f, points_i, points_j) <= config.max_epipolar_error
