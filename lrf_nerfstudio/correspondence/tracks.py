"""The observations of a structure-from-motion model: which point of the scene is seen where in which photograph."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lrf_nerfstudio.correspondence.colmap import observations, pose_of

if TYPE_CHECKING:
    import pycolmap


@dataclass(frozen=True, eq=False)
class Tracks:
    """N observations as flat arrays, sorted by view, then point; a view observes a point at most once.

    Attributes:
        views: [N] int64, index of the view.
        points: [N] int64, the point's id in the model.
        xy: [N, 2] float64, where the photograph shows the point: pixels of the file as it lies on disk, with its lens
            distortion; x right, y down, the first pixel's centre at (0.5, 0.5).
        errors: [N] float64, distance between the observation and the point's projection through the model's camera,
            distortion included, in pixels of the images that the model was made from; infinite behind the camera.
    """

    views: np.ndarray
    points: np.ndarray
    xy: np.ndarray
    errors: np.ndarray

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, rows: np.ndarray | slice) -> "Tracks":
        return Tracks(self.views[rows], self.points[rows], self.xy[rows], self.errors[rows])

    def lengths(self) -> np.ndarray:
        """[N] int64, the number of views that observe the point of each observation."""
        _, point, length = np.unique(self.points, return_inverse=True, return_counts=True)
        return length[point]

    def select(self, min_length: int, max_error: float) -> "Tracks":
        """The observations with an error of at most `max_error`, of points that `min_length` views still see."""
        accurate = self[self.errors <= max_error]
        return accurate[accurate.lengths() >= min_length]

    def of_view(self, view: int) -> "Tracks":
        """The observations of one view, sorted by point."""
        return self[slice(*np.searchsorted(self.views, (view, view + 1)))]


def tracks_of_model(
    model: "pycolmap.Reconstruction", images: Sequence["pycolmap.Image"], sizes: Sequence[tuple[int, int]]
) -> Tracks:
    """Return the observations of some images of a model, as far as they lie within the files.

    In undistorted models not all do: what undistortion moves out of an image stays in its list.

    Args:
        model: as :func:`read_model` returns it.
        images: the model's image for each view.
        sizes: (width, height) of each view's file in pixels, to which observations are scaled.

    Raises:
        ValueError: an image refers to points that the model lacks.
    """
    numbers = np.array(sorted(model.point3D_ids()), np.uint64)
    positions = np.array([model.point3D(number).xyz for number in numbers.tolist()]).reshape(-1, 3)
    parts = []
    for view, (image, size) in enumerate(zip(images, sizes, strict=True)):
        camera = model.camera(image.camera_id)
        pixels, seen = observations(image)
        if not np.isin(seen, numbers).all():
            raise ValueError(f"image {image.name} refers to points that are not in it")
        world = positions[np.searchsorted(numbers, seen)]
        errors = np.linalg.norm(project(camera, pose_of(image), world) - pixels, axis=1)
        errors[np.isnan(errors)] = np.inf
        best_first = np.lexsort((errors, seen))  # a model may observe a point twice in an image
        points, first = np.unique(seen[best_first], return_index=True)
        rows = best_first[first]
        xy = pixels[rows] * (np.array(size) / (camera.width, camera.height))
        inside = ((xy >= 0) & (xy <= size)).all(axis=1)
        parts.append(
            Tracks(np.full(inside.sum(), view), points[inside].astype(np.int64), xy[inside], errors[rows][inside])
        )
    return Tracks(
        np.concatenate([part.views for part in parts]),
        np.concatenate([part.points for part in parts]),
        np.concatenate([part.xy for part in parts]),
        np.concatenate([part.errors for part in parts]),
    )


def project(camera: "pycolmap.Camera", cam_from_world: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Pixels [N, 2] of points [N, 3] of the world, distorted as the camera distorts; NaN behind the camera."""
    seen = points @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]
    pixels = np.full((len(points), 2), np.nan)
    in_front = seen[:, 2] > 0
    if in_front.any():
        pixels[in_front] = camera.img_from_cam(seen[in_front])
    return pixels
