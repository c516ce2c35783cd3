"""Random crops and colors of photographs."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def cut_square(image: NDArray[np.uint8], top: int, left: int, side: int, size: int) -> NDArray[np.float32]:
    """Cut a square out of an image and resize it.

    Args:
        image: [H, W, 3], 0 to 255.
        top: first row.
        left: first column.
        side: of the square in pixels of the image.
        size: of the result.

    Returns:
        [size, size, 3] in [0, 1].
    """
    import cv2

    square = image[top : top + side, left : left + side]
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0


def random_crop(
    image: NDArray[np.uint8], size: int, max_reduction: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return a randomly placed, reduced, mirrored and recolored square of an image.

    Args:
        image: [H, W, 3], 0 to 255.
        size: side of the result.
        max_reduction: the square is up to so many times larger, as far as the image allows, and reduced.
        rng: the source of randomness.

    Returns:
        [size, size, 3] in [0, 1].
    """
    side = min(*image.shape[:2], round(size * max_reduction ** rng.random()))
    top, left = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
    pixels = cut_square(image, top, left, side, size)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return random_recoloring(rng)(pixels)


def random_recoloring(rng: np.random.Generator) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Draw a change of the colors of images [H, W, 3] in [0, 1]: channels permuted and scaled, gamma.

    A small collection of photographs has few colors; the network should work with others as well.
    """
    permutation = rng.permutation(3) if rng.random() < 0.5 else np.arange(3)
    gains, gamma = rng.uniform(0.7, 1.3, 3), rng.uniform(0.7, 1.4)

    def recolor(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(np.clip(pixels[..., permutation] * gains, 0.0, 1.0) ** gamma, dtype=np.float32)

    return recolor
