"""Small scenes with exact cameras for the plugin's tests: a textured floor, seen from all round, in any file format."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from plyfile import PlyData, PlyElement

Array = NDArray[Any]

DISC_RADIUS = 0.8
"""In pictures with transparency, the floor is opaque within this distance of the origin."""


def floor_color(points: Array) -> Array:
    """RGB in [0, 1] of the floor z = 0 at [..., 2]: smooth, different everywhere within three units of the origin."""
    x, y = points[..., 0], points[..., 1]
    red = 0.5 + 0.3 * np.sin(2.1 * x + 0.4) + 0.15 * np.cos(4.3 * y)
    green = 0.5 + 0.3 * np.sin(1.7 * y - 0.9) + 0.15 * np.sin(3.9 * x + 1.0)
    blue = 0.5 + 0.3 * np.cos(1.3 * (x + y)) + 0.15 * np.sin(3.1 * (x - y))
    return np.stack([red, green, blue], axis=-1)


@dataclass
class Lens:
    """A camera's intrinsics; `model` and `distortion` as in transforms.json."""

    width: int = 96
    height: int = 72
    focal: float = 90.0
    center: tuple[float, float] | None = None
    model: str = "OPENCV"
    distortion: dict[str, float] = field(default_factory=dict)

    @property
    def K(self) -> Array:
        """[3, 3], pixel centres at .5."""
        cx, cy = self.center or (self.width / 2, self.height / 2)
        return np.array([[self.focal, 0, cx], [0, self.focal, cy], [0, 0, 1]])

    def as_json(self) -> dict[str, Any]:
        """Keys of transforms.json."""
        K = self.K
        return {
            "camera_model": self.model,
            "fl_x": K[0, 0],
            "fl_y": K[1, 1],
            "cx": K[0, 2],
            "cy": K[1, 2],
            "w": self.width,
            "h": self.height,
            **self.distortion,
        }

    def rays(self) -> Array:
        """Directions [H, W, 3] of the pixel centres in the camera, OpenCV axes, z = 1."""
        x, y = np.meshgrid(np.arange(self.width) + 0.5, np.arange(self.height) + 0.5)
        pixels = np.stack([x, y], axis=-1).reshape(-1, 1, 2)
        params = [self.distortion.get(name, 0.0) for name in ("k1", "k2", "p1", "p2", "k3")]
        if self.model == "OPENCV_FISHEYE":
            params = np.array([self.distortion.get(name, 0.0) for name in ("k1", "k2", "k3", "k4")])
            plane = cv2.fisheye.undistortPoints(pixels, self.K, params)
        else:
            stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 100, 1e-9)
            plane = cv2.undistortPointsIter(pixels, self.K, np.array(params), None, None, stop)
        plane = plane.reshape(self.height, self.width, 2)
        return np.concatenate([plane, np.ones_like(plane[..., :1])], axis=-1)


def look_at_origin(position: Sequence[float]) -> Array:
    """Camera-to-world matrix [4, 4], OpenGL axes, of a camera that looks at the origin, z up."""
    back = np.asarray(position, dtype=np.float64)
    back = back / np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :4] = np.stack([right, np.cross(back, right), back, position], axis=-1)
    return pose


def poses_around(views: int) -> list[Array]:
    """Camera-to-world matrices [4, 4] on a ring, at two heights."""
    angles = 2 * np.pi * np.arange(views) / views
    return [look_at_origin((1.4 * np.cos(a), 1.4 * np.sin(a), 1.8 + 0.5 * (i % 2))) for i, a in enumerate(angles)]


def floor_points(pose: Array, lens: Lens) -> Array:
    """Where the pixel centres' rays meet the floor, [H, W, 2]."""
    directions = lens.rays() * [1, -1, -1] @ pose[:3, :3].T
    distance = -pose[2, 3] / directions[..., 2]
    return pose[:2, 3] + distance[..., None] * directions[..., :2]


def photograph(pose: Array, lens: Lens) -> Array:
    """The picture [H, W, 3] in [0, 1] that a camera takes of the floor."""
    return floor_color(floor_points(pose, lens))


def textured_photograph(pose: Array, lens: Lens) -> Array:
    """What a camera sees of a floor of random stains, [H, W] uint8: features everywhere, each unlike the others."""
    stains = cv2.GaussianBlur(np.random.default_rng(0).uniform(0, 1, (600, 600)).astype(np.float32), (0, 0), 3)
    stains = (stains - stains.min()) / (stains.max() - stains.min())
    where = (floor_points(pose, lens) * 60 + 300).astype(np.float32)
    return (255 * cv2.remap(stains, where[..., 0], where[..., 1], cv2.INTER_LINEAR)).astype(np.uint8)


def to_uint8(picture: Array) -> Array:
    return np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8)


def seed_points(count: int = 400) -> Array:
    """Points [N, 3] on the floor."""
    xy = np.random.default_rng(0).uniform(-1.5, 1.5, (count, 2))
    return np.concatenate([xy, np.zeros((count, 1))], axis=1)


def write_ply(path: Path, points: Array) -> None:
    vertices = np.zeros(
        len(points), dtype=[(name, "f4") for name in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")]
    )
    for axis, name in enumerate("xyz"):
        vertices[name] = points[:, axis]
    PlyData([PlyElement.describe(vertices, "vertex")]).write(str(path))


def write_scene(
    folder: Path,
    views: int = 9,
    lenses: Lens | Sequence[Lens] | None = None,
    transparent: bool = False,
    masked: bool = False,
    points: bool = True,
    photographs: bool = True,
) -> Path:
    """Write a scene in nerfstudio's format and return its folder.

    Args:
        folder: where to.
        views: number of photographs `images/000.png` and so on; every 8th is held out by the default split.
        lenses: of all views, or in turn; with several, each frame carries its own intrinsics.
        transparent: whether the photographs have an alpha channel, zero beyond DISC_RADIUS.
        masked: whether each view has a mask that leaves out the left third.
        points: whether there is a point cloud.
        photographs: whether to write the photographs; else the caller does.
    """
    lenses = [lenses or Lens()] if lenses is None or isinstance(lenses, Lens) else list(lenses)
    (folder / "images").mkdir(parents=True)
    frames = []
    for index, pose in enumerate(poses_around(views)):
        lens = lenses[index % len(lenses)]
        name = f"{index:03d}.png"
        if photographs:
            picture = to_uint8(photograph(pose, lens))
            if transparent:
                inside = np.linalg.norm(floor_points(pose, lens), axis=-1) < DISC_RADIUS
                picture = np.dstack([picture, to_uint8(inside)])
            Image.fromarray(picture).save(folder / "images" / name)
        frame: dict[str, Any] = {"file_path": f"images/{name}", "transform_matrix": pose.tolist()}
        if len(lenses) > 1:
            frame |= lens.as_json()
        if masked:
            (folder / "masks").mkdir(exist_ok=True)
            mask = np.full((lens.height, lens.width), 255, dtype=np.uint8)
            mask[:, : lens.width // 3] = 0
            Image.fromarray(mask).save(folder / "masks" / name)
            frame["mask_path"] = f"masks/{name}"
        frames.append(frame)
    meta: dict[str, Any] = {"frames": frames}
    if len(lenses) == 1:
        meta = lenses[0].as_json() | meta
    if points:
        write_ply(folder / "points.ply", seed_points())
        meta["ply_file_path"] = "points.ply"
    (folder / "transforms.json").write_text(json.dumps(meta, indent=1))
    return folder


def edit_transforms(scene: Path, **changes: Any) -> None:
    """Change top-level keys of a scene's transforms.json."""
    path = scene / "transforms.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_colmap_scene(folder: Path, views: int = 9) -> Path:
    """Write a scene as COLMAP's binary model in the place that nerfstudio's colmap parser looks in."""
    import pycolmap

    lens = Lens()
    (folder / "images").mkdir(parents=True)
    reconstruction = pycolmap.Reconstruction()
    camera = pycolmap.Camera(
        model="PINHOLE",
        width=lens.width,
        height=lens.height,
        params=[lens.focal, lens.focal, *lens.K[:2, 2]],
        camera_id=1,
    )
    reconstruction.add_camera_with_trivial_rig(camera)
    points = seed_points()
    for index, pose in enumerate(poses_around(views), start=1):
        name = f"{index:03d}.jpg"
        Image.fromarray(to_uint8(photograph(pose, lens))).save(folder / "images" / name, quality=95)
        rotation = (pose[:3, :3] * [1, -1, -1]).T  # OpenGL's camera axes to OpenCV's, inverted
        world_to_camera = np.column_stack([rotation, -rotation @ pose[:3, 3]])
        local = points @ rotation.T + world_to_camera[:, 3]
        keypoints = (local[:, :2] / local[:, 2:]) * lens.focal + lens.K[:2, 2]
        image = pycolmap.Image(name=name, keypoints=keypoints, camera_id=1, image_id=index)
        reconstruction.add_image_with_trivial_frame(image, pycolmap.Rigid3d(world_to_camera))
    for index, (point, color) in enumerate(zip(points, to_uint8(floor_color(points[:, :2])), strict=True)):
        track = pycolmap.Track()
        for image_id in range(1, views + 1):
            track.add_element(image_id, index)
        reconstruction.add_point3D(point, track, color)
    model = folder / "colmap" / "sparse" / "0"
    model.mkdir(parents=True)
    reconstruction.write_binary(str(model))
    return folder


def write_blender_scene(folder: Path, views: int = 9) -> Path:
    """Write a scene as the NeRF authors' Blender data: PNGs with alpha and one json file a split."""
    lens = Lens()
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        frames = []
        for index, pose in enumerate(poses_around(views) if split == "train" else poses_around(3)):
            inside = np.linalg.norm(floor_points(pose, lens), axis=-1) < DISC_RADIUS
            picture = np.dstack([to_uint8(photograph(pose, lens)), to_uint8(inside)])
            Image.fromarray(picture).save(folder / split / f"r_{index}.png")
            frames.append({"file_path": f"./{split}/r_{index}", "transform_matrix": pose.tolist()})
        meta = {"camera_angle_x": 2 * np.arctan(lens.width / 2 / lens.focal), "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(meta))
    return folder


def write_instant_ngp_scene(folder: Path, views: int = 20) -> Path:
    """Write a scene in instant-ngp's format; nerfstudio's parser cannot read one with a single held-out view."""
    write_scene(folder, views, points=False)
    meta = json.loads((folder / "transforms.json").read_text())
    lens = Lens()
    meta = {
        "camera_angle_x": 2 * np.arctan(lens.width / 2 / lens.focal),
        "w": lens.width,
        "h": lens.height,
        "aabb_scale": 4,
        "frames": [{**frame, "file_path": frame["file_path"].removesuffix(".png")} for frame in meta["frames"]],
    }
    (folder / "transforms.json").write_text(json.dumps(meta))
    return folder
