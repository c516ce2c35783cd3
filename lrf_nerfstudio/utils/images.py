"""Photographs on disk: finding and reading them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrf_nerfstudio.utils.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")


def find_images(folders: Sequence[Path]) -> list[Path]:
    """All photographs in `folders` and their subfolders, sorted.

    Raises:
        UserError: a folder does not exist or holds none.
    """
    found: list[Path] = []
    for folder in folders:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"There are no photographs in {folder} (--images or --eval-images).")
        found += files
    return found


def read_image(path: Path) -> NDArray[np.uint8]:
    """A photograph as [H, W, 3] RGB, 0 to 255.

    Raises:
        UserError: the file is not a readable image.
    """
    import cv2

    # As the pixels lie in the file: cameras and SfM models count so, whatever orientation the metadata asks for.
    image = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise UserError(f"{path} is not a readable image; repair it or remove it.")
    return np.ascontiguousarray(image[..., ::-1], dtype=np.uint8)
