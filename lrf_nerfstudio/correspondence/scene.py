"""A scene on disk in nerfstudio's formats: photographs, and cameras and tracks where there are any."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrf_nerfstudio.correspondence.colmap import has_model, pose_of, read_model
from lrf_nerfstudio.correspondence.tracks import Tracks, tracks_of_model
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.poses import check_pose

if TYPE_CHECKING:
    import pycolmap

MODEL_FOLDERS = ("colmap/sparse/0", "sparse/0", "sparse")
"""Where a scene's COLMAP model may lie; the first that is there is read."""

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp"}
PERSPECTIVE_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
"""nerfstudio's perspective `camera_model`s; whatever the name, each may carry k1, k2, k3, p1, p2."""


_OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True, eq=False)
class View:
    """One photograph, and its camera where that is known.

    Attributes:
        path: the image file.
        width: of the file, in pixels.
        height: of the file, in pixels.
        camera: intrinsics and distortion in pixels of the file; None without a camera. Principal points count from the
            image's corner: the first pixel's centre is at (0.5, 0.5).
        cam_from_world: [4, 4] float64 world-to-camera, OpenCV axes (x right, y down, z forward); None without a camera.
    """

    path: Path
    width: int
    height: int
    camera: "pycolmap.Camera | None" = None
    cam_from_world: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """Photographs of one place.

    Attributes:
        folder: the scene's folder.
        views: sorted by the photographs' names; either all have a camera or none has.
        tracks: observations of the structure-from-motion model; None where there is none.
    """

    folder: Path
    views: tuple[View, ...]
    tracks: Tracks | None = None

    @property
    def has_cameras(self) -> bool:
        return self.views[0].camera is not None

    @property
    def cams_from_world(self) -> list[np.ndarray]:
        """The views' world-to-camera matrices [4, 4]; empty without cameras."""
        return [view.cam_from_world for view in self.views if view.cam_from_world is not None]


def load_scene(folder: Path, downscale_factor: int = 1) -> Scene:
    """Read a scene: `transforms.json`, a COLMAP model (binary or text), both, or a plain folder of photographs.

    `transforms.json` says which photographs there are. Cameras come from the COLMAP model where there is one, since
    tracks and poses must agree (photographs that it does not know are left out), else from `transforms.json`. The
    photographs of a model without `transforms.json` lie in `images`, as do those of a scene with neither, where not in
    `folder` itself.

    Args:
        folder: the scene's folder.
        downscale_factor: N > 1 takes the photographs from `images_N`, nerfstudio's folder of resized images.

    Raises:
        UserError: nothing readable is there, a photograph is missing, its proportions are not those of its camera, or
            a pose is no rigid motion.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"The scene {folder} does not exist or is no folder.")
    if downscale_factor < 1:
        raise UserError(f"The downscale factor must be 1 or more, not {downscale_factor}.")
    transforms = folder / "transforms.json"
    frames = _read_frames(transforms) if transforms.exists() else None
    for name in MODEL_FOLDERS:
        if has_model(folder / name):
            return _scene_of_model(folder, folder / name, frames, downscale_factor)
    if frames is not None:
        return _scene_of_frames(folder, frames, downscale_factor)
    return _scene_of_photographs(folder, downscale_factor)


def _scene_of_model(folder: Path, model_folder: Path, frames: list[dict] | None, downscale_factor: int) -> Scene:
    model = read_model(model_folder)
    images = {model.image(number).name: model.image(number) for number in model.reg_image_ids()}
    if frames is None:
        files = {folder / "images" / name: name for name in images}
    else:
        files = {_file(folder, frame): _name_in_images(frame) for frame in frames}
    views, seen = [], []
    for file in sorted(files):
        if files[file] in images:
            image = images[files[file]]
            check_pose(pose_of(image), f"{image.name} in {model_folder}")
            path = _resized(folder, file, image.name, downscale_factor)
            views.append(_view(path, model.camera(image.camera_id), pose_of(image)))
            seen.append(image)
    if not views:
        raise UserError(
            f"The COLMAP model {model_folder} knows none of the photographs that {folder / 'transforms.json'} lists. "
            "Remove the one of the two that does not belong to the scene."
        )
    try:
        tracks = tracks_of_model(model, seen, [(view.width, view.height) for view in views])
    except ValueError as error:
        raise UserError(
            f"The files of the COLMAP model {model_folder} do not fit together: {error}. Restore all of its files."
        ) from error
    return Scene(folder, tuple(views), tracks)


def _scene_of_frames(folder: Path, frames: list[dict], downscale_factor: int) -> Scene:
    views = []
    for frame in sorted(frames, key=lambda frame: _file(folder, frame)):
        file = _file(folder, frame)
        name = f"{frame['file_path']} in {folder / 'transforms.json'}"
        try:
            camera_to_world = np.array(frame["transform_matrix"], dtype=np.float64)
            camera = _camera_of_frame(frame, file)
        except KeyError as error:
            raise UserError(f"{error} is missing for {name}.") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"The camera of {name} cannot be read: {error}.") from error
        check_pose(camera_to_world, name)
        camera_to_world = np.vstack([camera_to_world[:3], (0, 0, 0, 1)])
        path = _resized(folder, file, _name_in_images(frame), downscale_factor)
        views.append(_view(path, camera, np.linalg.inv(camera_to_world @ _OPENGL_TO_OPENCV)))
    return Scene(folder, tuple(views))


def _scene_of_photographs(folder: Path, downscale_factor: int) -> Scene:
    name = "images" if downscale_factor == 1 else f"images_{downscale_factor}"
    images = folder / name if downscale_factor > 1 or (folder / name).is_dir() else folder
    if not images.is_dir():
        raise UserError(f"There is no {images}, the folder of photographs resized by {downscale_factor}.")
    paths = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(
            f"{images} has no images. A scene is a folder of photographs, with transforms.json or a COLMAP model (in "
            f"{', '.join(MODEL_FOLDERS)}) where there are cameras."
        )
    return Scene(folder, tuple(View(path, *_image_size(path)) for path in paths))


def _read_frames(transforms: Path) -> list[dict[str, Any]]:
    """The frames of transforms.json; what holds for all of them (intrinsics) is merged into each."""
    try:
        content = json.loads(transforms.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError for bytes that are no UTF-8 and for text that is no JSON
        raise UserError(f"{transforms} cannot be read: {error}.") from error
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames:
        raise UserError(f"{transforms} lists no images: its `frames` are empty or missing.")
    for number, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str) or not frame["file_path"]:
            raise UserError(f"Frame {number} in {transforms} has no `file_path`.")
    common = {key: value for key, value in content.items() if key != "frames"}
    return [{**common, **frame} for frame in frames]


def _file(folder: Path, frame: dict[str, Any]) -> Path:
    return folder / frame["file_path"]


def _name_in_images(frame: dict[str, Any]) -> str:
    """The path of a frame's file within the folder `images`, which is also its name in a COLMAP model."""
    parts = Path(frame["file_path"]).parts
    return "/".join(parts[1:]) if parts[0] == "images" and len(parts) > 1 else parts[-1]


def _resized(folder: Path, file: Path, name: str, downscale_factor: int) -> Path:
    return file if downscale_factor == 1 else folder / f"images_{downscale_factor}" / name


def _image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, from the file's header."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.size
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no image that can be read.") from error
    except OSError as error:
        raise UserError(f"The image {path} cannot be read: {error.strerror or error}.") from error


def _view(path: Path, camera: "pycolmap.Camera", cam_from_world: np.ndarray) -> View:
    """The view of a file whose camera was calibrated at the same or another size of the image."""
    import pycolmap

    width, height = _image_size(path)
    # A resized image is rounded, or cut, to whole pixels.
    if abs(width / camera.width - height / camera.height) > 1 / camera.width + 1 / camera.height:
        raise UserError(
            f"{path} has {width} x {height} pixels, its camera {camera.width} x {camera.height}: other "
            "proportions. Resize the photographs without cropping or turning them."
        )
    rescaled = pycolmap.Camera(camera.todict())
    rescaled.rescale(width, height)
    return View(path, width, height, rescaled, cam_from_world)


def _camera_of_frame(frame: dict[str, Any], file: Path) -> "pycolmap.Camera":
    """The intrinsics of a frame of transforms.json; raises KeyError, TypeError, ValueError."""
    import pycolmap

    model = frame.get("camera_model", "OPENCV")
    width, height = (frame["w"], frame["h"]) if "w" in frame and "h" in frame else _image_size(file)
    params = [float(frame[name]) for name in ("fl_x", "fl_y", "cx", "cy")]
    names = ("k1", "k2", "k3", "k4", "p1", "p2")
    k1, k2, k3, k4, p1, p2 = frame.get("distortion_params") or [float(frame.get(name, 0.0)) for name in names]
    if model == "OPENCV_FISHEYE":
        params += [k1, k2, k3, k4]
    elif model in PERSPECTIVE_MODELS:
        if k4:
            raise ValueError(f"k4 is {k4}, but {model} has no fourth radial coefficient")
        params += [k1, k2, p1, p2, k3, 0.0, 0.0, 0.0]
        model = "FULL_OPENCV"
    else:
        raise ValueError(f"camera_model {model} is none of {', '.join(PERSPECTIVE_MODELS)}, OPENCV_FISHEYE")
    if not np.isfinite(params).all():
        raise ValueError(f"its intrinsics {params} are not finite")
    return pycolmap.Camera(model=model, width=int(width), height=int(height), params=params)
