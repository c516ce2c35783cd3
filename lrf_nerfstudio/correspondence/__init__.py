"""Which pixels of a scene's photographs show the same point: what stage I compares the latents of."""

from lrf_nerfstudio.correspondence.figure import draw_matches
from lrf_nerfstudio.correspondence.matching import (
    CorrespondenceConfig,
    SceneCorrespondences,
    find_correspondences,
    matches_on_disk,
)
from lrf_nerfstudio.correspondence.pairs import PairMatches
from lrf_nerfstudio.correspondence.scene import Scene, View, load_scene
from lrf_nerfstudio.correspondence.tracks import Tracks

__all__ = [
    "CorrespondenceConfig",
    "PairMatches",
    "Scene",
    "SceneCorrespondences",
    "Tracks",
    "View",
    "draw_matches",
    "find_correspondences",
    "load_scene",
    "matches_on_disk",
]
