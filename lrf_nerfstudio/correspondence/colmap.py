"""COLMAP's sparse models, binary and text, as `pycolmap.Reconstruction` reads them."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrf_nerfstudio.utils.errors import UserError

if TYPE_CHECKING:
    import pycolmap

_FILES = ("cameras", "images", "points3D")


def has_model(folder: Path) -> bool:
    """Tell whether a folder has any file of a model."""
    return any((folder / f"{name}{suffix}").exists() for name in _FILES for suffix in (".bin", ".txt"))


def read_model(folder: Path) -> "pycolmap.Reconstruction":
    """Read the model in a folder with `cameras`, `images` and `points3D`, all `.bin` or all `.txt`.

    The files `rigs` and `frames`, which models have since COLMAP 3.12, are read where they are.

    Raises:
        UserError: a file is missing, damaged, or does not fit the others; observations of points that are not there are
            left to :func:`lrf_nerfstudio.correspondence.tracks.tracks_of_model`.
    """
    import pycolmap

    binary = any((folder / f"{name}.bin").exists() for name in _FILES)
    for name in _FILES:
        file = folder / f"{name}{'.bin' if binary else '.txt'}"
        if not file.is_file():
            raise UserError(f"{file} of the COLMAP model is missing. Restore it.")
    model, level = pycolmap.Reconstruction(), pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value  # what is wrong is in the exception
    try:
        if binary:
            for name, find_end in _ENDS.items():
                _check_size(folder / f"{name}.bin", find_end)
            model.read_binary(folder)
        else:
            model.read_text(folder)
        _check(model, folder)
    except (ValueError, IndexError, RuntimeError, OSError) as error:  # what pycolmap's checks and streams turn into
        raise UserError(f"The COLMAP model {folder} is damaged ({error}). Restore its files.") from error
    finally:
        pycolmap.logging.minloglevel = level
    return model


def pose_of(image: "pycolmap.Image") -> np.ndarray:
    """Return the world-to-camera matrix [4, 4] float64 of an image of a model, OpenCV axes."""
    return np.vstack([image.cam_from_world().matrix(), (0.0, 0.0, 0.0, 1.0)])


def observations(image: "pycolmap.Image") -> tuple[np.ndarray, np.ndarray]:
    """Return where an image of a model shows points of it.

    Returns:
        xy: [N, 2] float64, pixels, the first one's center at (0.5, 0.5).
        points: [N] uint64, the ids of these points.
    """
    seen = image.get_observation_points2D()
    xy = np.array([point.xy for point in seen], np.float64).reshape(-1, 2)
    return xy, np.array([point.point3D_id for point in seen], np.uint64)


def _check(model: "pycolmap.Reconstruction", folder: Path) -> None:
    if not model.num_images():
        raise UserError(f"The COLMAP model {folder} has no registered images. Reconstruct the scene again.")
    if len({image.name for image in model.images.values()}) < model.num_images():
        raise UserError(f"The COLMAP model {folder} has two images of the same name. Reconstruct the scene again.")
    for camera in model.cameras.values():
        if not camera.width or not camera.height or not np.isfinite(camera.params).all() or not camera.verify_params():
            raise UserError(
                f"The COLMAP model {folder} is damaged (a {camera.model_name} camera of {camera.width} x "
                f"{camera.height} pixels has parameters {camera.params}). Restore its files."
            )
    if not all(np.isfinite(point.xyz).all() for point in model.points3D.values()):
        raise UserError(f"The COLMAP model {folder} has points at NaN or infinity. Reconstruct the scene again.")


# pycolmap 4.2 takes a file's counts at their word: of files that end early it makes points without end, or aborts the
# process. So the counts are compared with the size first. The format: https://colmap.github.io/format.html


def _check_size(file: Path, find_end: Callable[[bytes], int]) -> None:
    """Check that a binary file is as long as the counts in it say; ValueError if not, OSError if it cannot be read."""
    if not file.exists():
        return  # rigs and frames
    content = file.read_bytes()
    try:
        end = find_end(content)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"{file.name} ends early") from error
    if end != len(content):
        raise ValueError(f"{file.name} has {len(content)} bytes where {end} were expected")


def _unpack(types: str, content: bytes, position: int) -> tuple[int, ...]:
    return struct.unpack_from("<" + types, content, position)


def _cameras_end(content: bytes) -> int:
    """Per camera: id, model, width, height, parameters."""
    import pycolmap

    position = 8
    for _ in range(*_unpack("Q", content, 0)):
        _, model = _unpack("Ii", content, position)
        blank = pycolmap.Camera.create_from_model_id(0, pycolmap.CameraModelId(model), 1.0, 1, 1)
        position += 24 + 8 * len(blank.params)
    return position


def _images_end(content: bytes) -> int:
    """Per image: id, pose, camera, name up to a zero byte, number of observations, x, y and point of each."""
    position = 8
    for _ in range(*_unpack("Q", content, 0)):
        position = content.find(b"\0", position + 64) + 1 or len(content)
        (seen,) = _unpack("Q", content, position)
        position += 8 + 24 * seen
    return position


def _points_end(content: bytes) -> int:
    """Per point: id, position, color, error, number of observations, image and index of each."""
    position = 8
    for _ in range(*_unpack("Q", content, 0)):
        (seen,) = _unpack("Q", content, position + 43)
        position += 51 + 8 * seen
    return position


def _rigs_end(content: bytes) -> int:
    """Per rig: id, number of sensors, type and id of the first; of the others also whether and where they are."""
    position = 8
    for _ in range(*_unpack("Q", content, 0)):
        _, sensors = _unpack("II", content, position)
        position += 16 if sensors else 8
        for _ in range(sensors - 1):
            _, _, posed = _unpack("iIB", content, position)
            position += 65 if posed else 9
    return position


def _frames_end(content: bytes) -> int:
    """Per frame: id, rig, pose, number of images, type and id of the sensor and number of each."""
    position = 8
    for _ in range(*_unpack("Q", content, 0)):
        (images,) = _unpack("I", content, position + 64)
        position += 68 + 16 * images
    return position


_ENDS = {
    "cameras": _cameras_end,
    "images": _images_end,
    "points3D": _points_end,
    "rigs": _rigs_end,
    "frames": _frames_end,
}
