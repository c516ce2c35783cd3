"""A scene whose geometry is known exactly, written as nerfstudio and COLMAP write scenes."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycolmap
from PIL import Image

WIDTH, HEIGHT = 160, 120
FX, FY, CX, CY = 150.0, 140.0, 83.0, 57.0
K1, K2, P1, P2 = -0.2, 0.05, 0.004, -0.003


def distort(x, y):
    """COLMAP's and OpenCV's radial and tangential distortion of coordinates at depth 1, by its formula."""
    r2 = x**2 + y**2
    radial = 1 + K1 * r2 + K2 * r2**2
    return (
        x * radial + 2 * P1 * x * y + P2 * (r2 + 2 * x**2),
        y * radial + 2 * P2 * x * y + P1 * (r2 + 2 * y**2),
    )


def photograph(cam_from_world, points):
    """Distorted pixels [N, 2] of points [N, 3] of the world."""
    x, y, z = (points @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]).T
    u, v = distort(x / z, y / z)
    return np.stack([FX * u + CX, FY * v + CY], axis=1)


def pinhole(cam_from_world, points):
    """Undistorted pixels [N, 2] of points [N, 3] of the world."""
    x, y, z = (points @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]).T
    return np.stack([FX * x / z + CX, FY * y / z + CY], axis=1)


def look_at_origin(position):
    """World-to-camera of a camera that looks at the origin, y of the image downwards along the world's -z."""
    forward = -position / np.linalg.norm(position)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = (right, np.cross(forward, right), forward)
    pose[:3, 3] = -pose[:3, :3] @ position
    return pose


@dataclass
class KnownScene:
    """Cameras on an arc around points; view v sees the points with index below `seen_by[v]`."""

    cams_from_world: list[np.ndarray]
    points: np.ndarray
    seen_by: list[int]

    @property
    def names(self):
        return [f"view_{v}.png" for v in range(len(self.seen_by))]


def known_scene(views=5, points=60, seen_by=None):
    rng = np.random.default_rng(3)
    angles = np.linspace(0, 1.2, views)
    cams = [look_at_origin(np.array([2.6 * np.cos(a), 2.6 * np.sin(a), 0.8 + 0.3 * a])) for a in angles]
    return KnownScene(cams, rng.uniform(-0.8, 0.8, (points, 3)), seen_by or [points] * views)


def write_images(scene, folder, scale=1.0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    for name in scene.names:
        size = (round(HEIGHT * scale), round(WIDTH * scale), 3)
        Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(folder / name)


def write_model(scene, folder, text=False, noise=None):
    """Writes the model; `noise` maps (view, point) to an offset of that observation in pixels."""
    model = pycolmap.Reconstruction()
    params = [FX, FY, CX, CY, K1, K2, P1, P2]
    model.add_camera_with_trivial_rig(
        pycolmap.Camera(model="OPENCV", width=WIDTH, height=HEIGHT, params=params, camera_id=1)
    )
    for v, (cam, name) in enumerate(zip(scene.cams_from_world, scene.names, strict=True)):
        keypoints = photograph(cam, scene.points[: scene.seen_by[v]])
        for (view, point), offset in (noise or {}).items():
            if view == v:
                keypoints[point] += offset
        keypoints = np.concatenate([[(1.0, 2.0)], keypoints])  # the first is an observation of no point
        image = pycolmap.Image(name=name, keypoints=keypoints, camera_id=1, image_id=v + 1)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(cam[:3]))
    for p, position in enumerate(scene.points):
        elements = [pycolmap.TrackElement(v + 1, p + 1) for v, seen in enumerate(scene.seen_by) if p < seen]
        model.add_point3D(position, pycolmap.Track(elements))
    folder.mkdir(parents=True, exist_ok=True)
    if text:
        model.write_text(str(folder))
    else:
        model.write_binary(str(folder))


def write_transforms(scene, folder: Path, **more):
    """Writes transforms.json: OpenGL camera-to-world, one set of intrinsics for all."""
    frames = [
        {
            "file_path": f"images/{name}",
            "transform_matrix": (np.linalg.inv(cam) @ np.diag([1.0, -1.0, -1.0, 1.0])).tolist(),
        }
        for cam, name in zip(scene.cams_from_world, scene.names, strict=True)
    ]
    intrinsics = {"fl_x": FX, "fl_y": FY, "cx": CX, "cy": CY, "w": WIDTH, "h": HEIGHT}
    distortion = {"k1": K1, "k2": K2, "p1": P1, "p2": P2}
    content = {"camera_model": "OPENCV", **intrinsics, **distortion, "frames": frames[::-1], **more}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "transforms.json").write_text(json.dumps(content))
    return content
