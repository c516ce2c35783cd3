"""COLMAP's sparse models, binary and text: cameras, poses, points and where the images show them.

Read here and not with `pycolmap.Reconstruction`, which takes some damaged files for whole ones and never returns from
others; the files are the same since COLMAP 3.0. The format: https://colmap.github.io/format.html
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from lrf_nerfstudio.utils.errors import UserError

if TYPE_CHECKING:
    import pycolmap

_T = TypeVar("_T")
_FILES = ("cameras", "images", "points3D")


@dataclass(frozen=True, eq=False)
class ColmapImage:
    """A registered image.

    Attributes:
        name: path of the file within the folder of images.
        camera_id: its camera's key in `ColmapModel.cameras`.
        cam_from_world: [4, 4] float64 world-to-camera, OpenCV axes.
        xy: [N, 2] float64, where it shows points of the model: pixels, the first one's centre at (0.5, 0.5).
        points: [N] int64, the ids of these points.
    """

    name: str
    camera_id: int
    cam_from_world: np.ndarray
    xy: np.ndarray
    points: np.ndarray


@dataclass(frozen=True, eq=False)
class ColmapModel:
    """A sparse model.

    Attributes:
        cameras: by id.
        images: the registered images.
        points: [P] int64, ids of the points, ascending.
        positions: [P, 3] float64, where the points are in the world.
    """

    cameras: dict[int, "pycolmap.Camera"]
    images: list[ColmapImage]
    points: np.ndarray
    positions: np.ndarray


def has_model(folder: Path) -> bool:
    """Whether a folder has any file of a model."""
    return any((folder / f"{name}{suffix}").exists() for name in _FILES for suffix in (".bin", ".txt"))


def read_model(folder: Path) -> ColmapModel:
    """Read the model in a folder with `cameras`, `images` and `points3D`, all `.bin` or all `.txt`.

    Raises:
        UserError: a file is missing, damaged, or does not fit the others.
    """
    binary = any((folder / f"{name}.bin").exists() for name in _FILES)
    suffix = ".bin" if binary else ".txt"
    cameras = _read(folder / f"cameras{suffix}", _cameras_bin if binary else _cameras_txt)
    images = _read(folder / f"images{suffix}", _images_bin if binary else _images_txt)
    points, positions = _read(folder / f"points3D{suffix}", _points_bin if binary else _points_txt)
    order = np.argsort(points)
    model = ColmapModel(cameras, images, points[order], positions[order])
    _check(model, folder)
    return model


def _read(file: Path, read: Callable[[Path], _T]) -> _T:
    try:
        return read(file)
    except OSError as error:
        raise UserError(f"{file} of the COLMAP model cannot be read: {error.strerror}.") from error
    except (struct.error, ValueError, IndexError, OverflowError, RuntimeError) as error:  # what damage turns into
        raise UserError(f"{file} of the COLMAP model is damaged ({error}). Restore it.") from error


def _check(model: ColmapModel, folder: Path) -> None:
    if not model.images:
        raise UserError(f"The COLMAP model {folder} has no registered images. Reconstruct the scene again.")
    if not np.isfinite(model.positions).all():
        raise UserError(f"The COLMAP model {folder} has points at NaN or infinity. Reconstruct the scene again.")
    for image in model.images:
        if image.camera_id not in model.cameras or not np.isin(image.points, model.points).all():
            raise UserError(
                f"The files of the COLMAP model {folder} do not fit together: image {image.name} refers to a camera or "
                "to points that are not in it. Restore all of its files."
            )


def _camera(model: str, width: int, height: int, params: np.ndarray) -> "pycolmap.Camera":
    import pycolmap

    if model not in pycolmap.CameraModelId.__members__:
        raise ValueError(f"there is no camera model {model}")
    camera = pycolmap.Camera(model=model, width=width, height=height, params=params)
    if not width or not height or not np.isfinite(params).all() or not camera.verify_params():
        raise ValueError(f"a {camera.model_name} camera of {width} x {height} pixels has parameters {params}")
    return camera


def _pose(quaternion_wxyz: np.ndarray, translation: np.ndarray) -> np.ndarray:
    import pycolmap

    pose = np.eye(4)
    w, *xyz = quaternion_wxyz / np.linalg.norm(quaternion_wxyz)
    pose[:3, :3] = pycolmap.Rotation3d(np.array([*xyz, w])).matrix()
    pose[:3, 3] = translation
    return pose


class _Binary:
    """The content of a little-endian binary file, from front to back."""

    def __init__(self, file: Path) -> None:
        self.content = file.read_bytes()
        self.position = 0

    def values(self, types: str) -> tuple:
        """The next values, of types as in the module struct."""
        values = struct.unpack_from("<" + types, self.content, self.position)
        self.position += struct.calcsize("<" + types)
        return values

    def array(self, dtype: np.dtype, length: int) -> np.ndarray:
        values = np.frombuffer(self.content, dtype, length, self.position)
        self.position += values.nbytes
        return values

    def text(self) -> str:
        """The next text, which ends with a zero."""
        end = self.content.index(b"\0", self.position)
        text = self.content[self.position : end].decode()
        self.position = end + 1
        return text

    def check_end(self) -> None:
        if self.position != len(self.content):
            raise ValueError(f"{len(self.content)} bytes where {self.position} were expected")


def _cameras_bin(file: Path) -> dict[int, "pycolmap.Camera"]:
    import pycolmap

    data, cameras = _Binary(file), {}
    # Its second name is the one until pycolmap 4.
    blank = getattr(pycolmap.Camera, "create_from_model_id", None) or pycolmap.Camera.create
    (count,) = data.values("Q")
    for _ in range(count):
        camera_id, number, width, height = data.values("IiQQ")
        model = pycolmap.CameraModelId(number)
        params = data.array(np.dtype("<f8"), len(blank(0, model, 1, 1, 1).params))
        cameras[camera_id] = _camera(model.name, width, height, params)
    data.check_end()
    return cameras


_OBSERVATION = np.dtype([("xy", "<f8", 2), ("point", "<i8")])  # the point is -1 where there is none


def _images_bin(file: Path) -> list[ColmapImage]:
    data, images = _Binary(file), []
    (count,) = data.values("Q")
    for _ in range(count):
        _, *pose, camera_id = data.values("I7dI")
        name = data.text()
        (observations,) = data.values("Q")
        seen = data.array(_OBSERVATION, observations)
        seen = seen[seen["point"] >= 0]
        cam_from_world = _pose(np.array(pose[:4]), np.array(pose[4:]))
        images.append(ColmapImage(name, camera_id, cam_from_world, seen["xy"], seen["point"]))
    data.check_end()
    return images


def _points_bin(file: Path) -> tuple[np.ndarray, np.ndarray]:
    data = _Binary(file)
    (count,) = data.values("Q")
    ids, positions = [], []
    for _ in range(count):
        point, x, y, z, _, _, _, _, track_length = data.values("q3d3BdQ")
        data.position += 8 * track_length
        ids.append(point)
        positions.append((x, y, z))
    data.check_end()
    return np.array(ids, np.int64), np.array(positions, np.float64).reshape(-1, 3)


def _lines(file: Path) -> Iterator[str]:
    return (line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))


def _cameras_txt(file: Path) -> dict[int, "pycolmap.Camera"]:
    cameras = {}
    for line in filter(None, _lines(file)):
        camera_id, model, width, height, *params = line.split()
        cameras[int(camera_id)] = _camera(model, int(width), int(height), np.array(params, np.float64))
    return cameras


def _images_txt(file: Path) -> list[ColmapImage]:
    """Two lines each: pose, camera and name; then x, y and point of each observation, or nothing."""
    images = []
    lines = _lines(file)
    for line in lines:
        if not line:
            continue
        _, *pose, camera_id, name = line.split(maxsplit=9)
        seen = np.array(next(lines, "").split(), np.float64).reshape(-1, 3)
        seen = seen[seen[:, 2] >= 0]
        cam_from_world = _pose(np.array(pose[:4], np.float64), np.array(pose[4:], np.float64))
        images.append(ColmapImage(name, int(camera_id), cam_from_world, seen[:, :2], seen[:, 2].astype(np.int64)))
    return images


def _points_txt(file: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = [line.split(maxsplit=4) for line in _lines(file) if line]
    ids = np.array([int(row[0]) for row in rows], np.int64)
    return ids, np.array([row[1:4] for row in rows], np.float64).reshape(-1, 3)
