"""Scenes as folders that nerfstudio, COLMAP and this package read.

    images/view_000.png ...   the pictures
    transforms.json           cameras, the split (every 8th view is held out, starting with the first), and the settings
    sparse_pc.ply             points of the surfaces, found by the views that are not held out
    colmap/sparse/0           the same cameras and points, with the exact pixel of each point in each view that sees it

A folder appears as a whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numba
import numpy as np
from numpy.typing import NDArray

from lrf_nerfstudio.synthetic.cameras import Cameras
from lrf_nerfstudio.synthetic.correspondences import SurfacePoints, find_points
from lrf_nerfstudio.synthetic.raytracer import Scene, render
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import unwritable
from lrf_nerfstudio.utils.options import AtLeastOne, Range

HOLD_OUT = 8
"""Every so many views, one is held out."""

_OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


Side = Annotated[int, Range(least=16)]
"""Pixels along a side of a picture."""


@dataclass
class PictureConfig:
    """How a scene is photographed."""

    views: Annotated[int, Range(least=8)] = 24
    """Number of cameras."""
    size: tuple[Side, Side] = (256, 256)
    """Height and width of the pictures in pixels."""
    samples: AtLeastOne = 3
    """Rays in a pixel along each axis."""
    points: AtLeastOne = 6000
    """Number of surface points at most; fewer when fewer are seen by three views."""


def settings_of(config: PictureConfig, scene: str, seed: int) -> dict[str, Any]:
    """Return what makes a scene what it is, as JSON types: what is drawn, its seed, and how it is photographed."""
    pictures = {"views": config.views, "size": list(config.size), "samples": config.samples, "points": config.points}
    return {"scene": scene, "seed": seed, **pictures}


def is_there(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether a folder holds the scene of these settings.

    Raises:
        UserError: The folder holds something else.
    """
    transforms = folder / "transforms.json"
    if transforms.exists() and json.loads(transforms.read_text()).get("settings") == settings:
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something else than this scene. Choose another --output, or delete it first.")
    return False


def write_scene(
    folder: Path,
    scene: Scene,
    cameras: Cameras,
    settings: dict[str, Any],
    on_view: Callable[[], object] = lambda: None,
) -> int:
    """Ray-trace a scene and write it.

    Args:
        folder: Where to; empty or not there.
        scene: What there is to see.
        cameras: From where.
        settings: See `settings_of`; kept with the scene.
        on_view: Called after each view.

    Returns:
        The number of surface points.

    Raises:
        UserError: No point is seen by three views, or the folder cannot be written.
    """
    from PIL import Image

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    names = [f"view_{view:03d}.png" for view in range(len(cameras))]
    try:
        (partial / "images").mkdir(parents=True)
        images = list[NDArray[np.uint8]]()
        with ThreadPoolExecutor(numba.config.NUMBA_NUM_THREADS) as pool:
            for image in pool.map(lambda view: render(scene, cameras, view, settings["samples"]), range(len(cameras))):
                Image.fromarray(image).save(partial / "images" / names[len(images)])
                images.append(image)
                on_view()
        train = [view for view in range(len(cameras)) if view % HOLD_OUT]
        found = find_points(scene, cameras, images, train, settings["points"], settings["seed"])
        if len(found.positions) == 0:
            raise UserError(f"No point of the scene {folder} is seen by three views. Make more views.")
        _write_transforms(partial / "transforms.json", cameras, names, settings)
        _write_ply(partial / "sparse_pc.ply", found)
        _write_colmap(partial / "colmap" / "sparse" / "0", cameras, names, found)
        os.replace(partial, folder)
    except OSError as error:
        raise unwritable(folder, error, "--output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(found.positions)


def _write_transforms(file: Path, cameras: Cameras, names: list[str], settings: dict[str, Any]) -> None:
    paths = [f"images/{name}" for name in names]
    held_out = paths[::HOLD_OUT]
    content = {
        "camera_model": "OPENCV",
        "fl_x": cameras.focal,
        "fl_y": cameras.focal,
        "cx": 0.5 * cameras.width,
        "cy": 0.5 * cameras.height,
        "w": cameras.width,
        "h": cameras.height,
        "ply_file_path": "sparse_pc.ply",
        "train_filenames": [path for path in paths if path not in held_out],
        "val_filenames": held_out,
        "test_filenames": held_out,
        "frames": [
            {"file_path": path, "transform_matrix": pose.tolist()}
            for path, pose in zip(paths, cameras.poses, strict=True)
        ],
        "settings": settings,
    }
    file.write_text(json.dumps(content, indent=2))


def _write_ply(file: Path, points: SurfacePoints) -> None:
    from plyfile import PlyData, PlyElement

    fields = [(name, "f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    vertices = np.empty(len(points.positions), dtype=fields)
    for i, (position, color) in enumerate((("x", "red"), ("y", "green"), ("z", "blue"))):
        vertices[position], vertices[color] = points.positions[:, i], points.colors[:, i]
    PlyData([PlyElement.describe(vertices, "vertex")]).write(str(file))


def _write_colmap(folder: Path, cameras: Cameras, names: list[str], points: SurfacePoints) -> None:
    import pycolmap

    model = pycolmap.Reconstruction()
    intrinsics = [cameras.focal, 0.5 * cameras.width, 0.5 * cameras.height]
    model.add_camera_with_trivial_rig(
        pycolmap.Camera(
            model="SIMPLE_PINHOLE", width=cameras.width, height=cameras.height, params=intrinsics, camera_id=1
        )
    )
    tracks = [pycolmap.Track() for _ in points.positions]
    for view, name in enumerate(names):
        seen = np.flatnonzero(points.seen[view])
        image = pycolmap.Image(name=name, keypoints=points.pixels[view, seen], camera_id=1, image_id=view + 1)
        cam_from_world = np.linalg.inv(cameras.poses[view] @ _OPENGL_TO_OPENCV)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(cam_from_world[:3]))
        for keypoint, point in enumerate(seen):
            tracks[point].add_element(view + 1, keypoint)
    for position, track, color in zip(points.positions, tracks, points.colors, strict=True):
        model.add_point3D(position, track, color)
    folder.mkdir(parents=True)
    model.write_binary(str(folder))
