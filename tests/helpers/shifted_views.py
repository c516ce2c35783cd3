"""Views of a flat scene that is only shifted between them, so that what corresponds is known exactly."""

from pathlib import Path

import cv2
import numpy as np

from lrf_nerfstudio.correspondence import PairMatches, Scene, SceneCorrespondences, View

SHIFT = 23
"""Pixels by which the scene moves to the left from one view to the next; no multiple of a spatial factor."""


def coordinate_picture(height: int, width: int, offset: int) -> np.ndarray:
    """[height, width, 3] uint8: red is the column in the scene, green the row, blue 0; one unit a pixel."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns + offset, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def textured_picture(height: int, width: int, offset: int) -> np.ndarray:
    """[height, width, 3] uint8: smooth random texture of the scene."""
    noise = np.random.default_rng(0).uniform(0, 255, (height, 512, 3)).astype(np.float32)
    texture = cv2.GaussianBlur(noise, (0, 0), 2.0)
    texture = (texture - texture.mean()) * 6 + 128
    return np.clip(texture[:, offset : offset + width], 0, 255).astype(np.uint8)


def shifted_views(folder: Path, picture=textured_picture, views: int = 3, size=(120, 150)) -> SceneCorrespondences:
    """Writes the views as PNG; pairs of neighbours with a grid of matches, weights 1."""
    height, width = size
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(views)]
    for index, path in enumerate(paths):
        cv2.imwrite(str(path), picture(height, width, index * SHIFT)[..., ::-1])
    scene = Scene(folder, tuple(View(path, width, height) for path in paths))
    columns, rows = np.meshgrid(np.arange(SHIFT + 2.5, width - 2, 5), np.arange(2.5, height - 2, 5))
    points = np.stack([columns.ravel(), rows.ravel()], axis=-1).astype(np.float32)
    shifted = points - np.float32((SHIFT, 0))
    pairs = tuple(PairMatches(i, i + 1, points, shifted) for i in range(views - 1))
    return SceneCorrespondences(scene, pairs, np.ones(len(pairs), np.float32))
