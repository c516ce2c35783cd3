"""SIFT features of photographs, and which of them look alike.

Detected by OpenCV and matched by a matrix product. Measured beside pycolmap 4.2 on kitchen (24 views) and plush (25 of
97), at equal numbers of features: pycolmap's detector gave 4 to 10 % more matches that obey the known cameras, and took
2.3 times the processor time (0.65 to 0.76 s a photograph); its matcher, which needs a database on disk, was as fast as
the product at 2,300 features a photograph and 2.3 times as fast at 5,500. Both together took as long (kitchen) or 2.6
times as long (plush).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrf_nerfstudio.utils.errors import UserError

OVERVIEW_FEATURES = 256
"""Features, the largest ones, that :func:`common_features` compares photographs by."""


@dataclass(frozen=True, eq=False)
class Features:
    """N features of a photograph, the largest first.

    Attributes:
        points: [N, 2] float32 pixels of the file as it lies on disk, the first one's centre at (0.5, 0.5).
        descriptors: [N, 128] uint8, SIFT.
    """

    points: np.ndarray
    descriptors: np.ndarray

    def root_descriptors(self, count: int | None = None) -> np.ndarray:
        """RootSIFT of the first `count` features, [N, 128] float32 of length 1: the root of SIFT divided by its sum.

        Their Euclidean distance is the Hellinger distance of the histograms, which tells features apart better
        (Arandjelovic and Zisserman, "Three things everyone should know to improve object retrieval", CVPR 2012).
        """
        descriptors = self.descriptors[:count].astype(np.float32)
        return np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1))


def detect_features(path: Path, max_features: int) -> Features:
    """The `max_features` features of highest contrast of an image file, as it lies on disk (EXIF does not turn it).

    Raises:
        UserError: the image cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            gray = np.asarray(image.convert("L"))
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for files that are cut off or damaged
        raise UserError(f"The image {path} cannot be read: {error}.") from error
    return features_of(gray, max_features)


def features_of(gray: np.ndarray, max_features: int) -> Features:
    """The `max_features` features of highest contrast of a picture [H, W] uint8."""
    import cv2

    # OpenCV's own values up to three: half its contrast threshold, as COLMAP has it (2.2 times as many matches obey the
    # cameras of plush, 1.2 times as many those of kitchen, and no smaller share); the type of the descriptors; and the
    # cure of a shift of the keypoints by a quarter of a pixel.
    sift = cv2.SIFT.create(max_features, 3, 0.02, 10, 1.6, cv2.CV_8U, enable_precise_upscale=True)
    keypoints, descriptors = sift.detectAndCompute(gray, None)  # type: ignore[call-overload]  # None: no mask
    if not keypoints:
        return Features(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8))
    largest_first = np.argsort([-keypoint.size for keypoint in keypoints], kind="stable")
    points = np.array([keypoint.pt for keypoint in keypoints], np.float32) + 0.5  # OpenCV's 0 is a pixel's centre
    return Features(points[largest_first], descriptors[largest_first])


def match_descriptors(descriptors_i: np.ndarray, descriptors_j: np.ndarray, ratio: float) -> np.ndarray:
    """Pairs of features that are each other's nearest, and clearly so.

    Args:
        descriptors_i: [N, D] float32 of length 1.
        descriptors_j: [M, D].
        ratio: the distance to the nearest is less than `ratio` times that to the second nearest, seen from both sides.

    Returns:
        [P, 2] int64 indices into the two, each at most once, ascending in the first.
    """
    if not len(descriptors_i) or not len(descriptors_j):
        return np.zeros((0, 2), np.int64)
    similarities = descriptors_i @ descriptors_j.T  # cosines; the squared distance is twice what is missing to 1
    nearest = similarities.argmax(1)
    first = similarities[np.arange(len(nearest)), nearest]
    (i,) = np.nonzero(first == similarities.max(0)[nearest])
    j, each_once = np.unique(nearest[i], return_index=True)
    i = i[each_once]
    similarities[i, j] = -np.inf
    second = np.maximum(similarities.max(1)[i], similarities.max(0)[j])
    matches = np.stack([i, j], axis=1)[1 - first[i] < ratio**2 * (1 - second)]
    return matches[matches[:, 0].argsort()]


def common_features(features: list[Features], ratio: float) -> np.ndarray:
    """How much photographs have in common, cheaply: matches among the few largest features of each.

    Such an overview finds the pairs that are worth a full comparison, also where photographs are in no order (Wu,
    "Towards linear-time incremental structure from motion", 3DV 2013).

    Returns:
        [K, K] int64, the number of matches of each two of the K photographs; 0 on the diagonal.
    """
    overviews = [each.root_descriptors(OVERVIEW_FEATURES) for each in features]
    counts = np.zeros((len(features), len(features)), np.int64)
    for j, overview in enumerate(overviews):
        for i in range(j):
            counts[i, j] = counts[j, i] = len(match_descriptors(overviews[i], overview, ratio))
    return counts
