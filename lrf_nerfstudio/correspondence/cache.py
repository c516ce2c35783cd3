"""Feature matches on disk, so that the second start on the same photographs compares nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrf_nerfstudio.correspondence.pairs import PairMatches
from lrf_nerfstudio.correspondence.scene import Scene, View
from lrf_nerfstudio.utils.cache import TensorCache, content_hash
from lrf_nerfstudio.utils.files import cache_directory

if TYPE_CHECKING:
    from torch import Tensor


def load_or_match(
    scene: Scene, options: dict[str, Any], match: Callable[[], list[PairMatches]], directory: Path | None = None
) -> list[PairMatches]:
    """Return the matches of a scene, from disk if they are there, else computed and stored.

    One file for each scene and set of options; its key depends on the photographs' contents, their cameras and the
    options.

    Args:
        scene: its photographs and cameras.
        options: all that `match` depends on besides, as JSON types.
        match: computes the matches.
        directory: of the files; None stands for `lrf_nerfstudio/correspondences` in the user's cache folder.

    Raises:
        UserError: an image file cannot be read, or the matches cannot be written (disk full, no permission).
    """
    cache = TensorCache(directory or cache_directory("correspondences"), option="--correspondence.cache-dir")
    inputs = {"views": [_describe(view) for view in scene.views], "options": options}

    def check(tensors: "dict[str, Tensor]") -> None:
        if any(max(pair.i, pair.j) >= len(scene.views) for pair in _from_tensors(tensors)):
            raise ValueError(f"it is of more than {len(scene.views)} photographs")

    return _from_tensors(cache.load_or_compute(inputs, lambda: _to_tensors(match()), check))


def _describe(view: View) -> list[Any]:
    content = content_hash(view.path)
    if view.camera is None or view.cam_from_world is None:
        return [content]
    return [content, view.camera.model_name, view.camera.params.tolist(), view.cam_from_world.tolist()]


def _to_tensors(pairs: list[PairMatches]) -> "dict[str, Tensor]":
    import torch

    none = np.zeros((0, 2), np.float32)
    return {
        "views": torch.tensor([(pair.i, pair.j) for pair in pairs], dtype=torch.int64).reshape(-1, 2),  # [P, 2]
        "counts": torch.tensor([len(pair.points_i) for pair in pairs], dtype=torch.int64),  # [P]
        "points_i": torch.from_numpy(np.concatenate([none, *(pair.points_i for pair in pairs)])),  # [sum of counts, 2]
        "points_j": torch.from_numpy(np.concatenate([none, *(pair.points_j for pair in pairs)])),
    }


def _from_tensors(tensors: "dict[str, Tensor]") -> list[PairMatches]:
    counts = tensors["counts"].tolist()
    of_pairs = zip(
        tensors["views"].tolist(), tensors["points_i"].split(counts), tensors["points_j"].split(counts), strict=True
    )
    return [PairMatches(i, j, points_i.numpy(), points_j.numpy()) for (i, j), points_i, points_j in of_pairs]
