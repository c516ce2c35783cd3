"""Feature matches on disk, so that the second start on the same photographs compares nothing."""

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lrf_nerfstudio.correspondence.pairs import PairMatches
from lrf_nerfstudio.correspondence.scene import Scene, View
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import cache_directory, file_sha256, read_tensors, write_tensors

_FORMAT = 1  # part of every key: raise it when what is stored changes its meaning


def load_or_match(
    scene: Scene, options: dict[str, Any], match: Callable[[], list[PairMatches]], directory: Path | None = None
) -> list[PairMatches]:
    """The matches of a scene, from disk if they are there, else computed and stored.

    One file for each scene and set of options. Its name is a hash of the photographs' contents, their cameras and the
    options: an entry never goes stale, whatever is renamed, moved or edited. A damaged file is replaced, with a
    warning.

    Args:
        scene: its photographs and cameras.
        options: all that `match` depends on besides, as JSON types.
        match: computes the matches.
        directory: where the files lie; None stands for `lrf_nerfstudio/correspondences` in the user's cache folder.

    Raises:
        UserError: an image file cannot be read, or the matches cannot be written (disk full, no permission).
    """
    directory = cache_directory("correspondences") if directory is None else Path(directory).expanduser()
    description = {"format": _FORMAT, "views": [_describe(view) for view in scene.views], "options": options}
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
    file = directory / f"{key}.safetensors"
    if file.exists():
        try:
            return _read(file, len(scene.views))
        except Exception as error:  # a damaged file fails in as many ways as there are kinds of damage
            warnings.warn(f"{file} is damaged ({error}); the photographs are matched again.", stacklevel=2)
    pairs = match()
    _write(file, pairs)
    return pairs


def _describe(view: View) -> list[Any]:
    try:
        content = file_sha256(view.path)
    except OSError as error:
        raise UserError(f"The image {view.path} cannot be read: {error.strerror}.") from error
    if view.camera is None or view.cam_from_world is None:
        return [content]
    return [content, view.camera.model_name, view.camera.params.tolist(), view.cam_from_world.tolist()]


def _write(file: Path, pairs: list[PairMatches]) -> None:
    import torch

    tensors = {
        "views": torch.tensor([(pair.i, pair.j) for pair in pairs], dtype=torch.int64).reshape(-1, 2),
        "counts": torch.tensor([len(pair.points_i) for pair in pairs], dtype=torch.int64),
        "points_i": torch.from_numpy(np.concatenate([np.zeros((0, 2), np.float32), *(p.points_i for p in pairs)])),
        "points_j": torch.from_numpy(np.concatenate([np.zeros((0, 2), np.float32), *(p.points_j for p in pairs)])),
    }
    write_tensors(file, tensors, option="--correspondence.cache-dir")


def _read(file: Path, views: int) -> list[PairMatches]:
    """Reads matches; raises KeyError, ValueError, OSError or what safetensors raises."""
    tensors = {name: tensor.numpy() for name, tensor in read_tensors(file).items()}
    ends = np.cumsum(tensors["counts"])[:-1]
    points_i, points_j = np.split(tensors["points_i"], ends), np.split(tensors["points_j"], ends)
    if (tensors["views"] >= views).any():
        raise ValueError(f"it is of more than {views} photographs")
    return [
        PairMatches(int(i), int(j), of_i, of_j)
        for (i, j), of_i, of_j in zip(tensors["views"], points_i, points_j, strict=bool(len(tensors["views"])))
    ]
