"""Crops of two photographs in which both show the same points, for any number of scenes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lrf_nerfstudio.correspondence import SceneCorrespondences, View
from lrf_nerfstudio.training.pretrain import random_recoloring
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.images import read_image

_ATTEMPTS = 8
_SCALE_DIFFERENCE = 1.25  # of the regions that the two crops of a pair are reduced from, at most


@dataclass(frozen=True)
class Region:
    """A square of a photograph: its upper left corner and its side, in pixels of the file."""

    left: int
    top: int
    side: int

    def to_crop(self, points: NDArray[np.floating], crop: int) -> NDArray[np.float32]:
        """Points [N, 2] of the photograph in pixels of the region resized to `crop` x `crop`, corner to corner."""
        return ((points - (self.left, self.top)) * (crop / self.side)).astype(np.float32)

    def to_photograph(self, points: NDArray[np.floating], crop: int) -> NDArray[np.float64]:
        """The inverse of :meth:`to_crop`."""
        return points * (self.side / crop) + (self.left, self.top)


class PairCrops(Dataset[dict[str, Tensor]]):
    """An endless series of pairs of crops; item n is a function of n and the seed alone.

    A pair of views is drawn, then one of its matches, and around it a square from either photograph, reduced by about
    the same factor. Both crops are recoloured and mirrored alike, so what corresponded still does. A share of the pairs
    is synthetic: both crops come from one photograph, at slightly different places and scales, and correspond
    everywhere.

    Photographs are read when they are needed; the latest ones stay in memory, up to `images_in_memory`.

    An item has `images` [2, crop, crop, 3] in [0, 1], `points` [2, P, 2] in pixels of the crops (x, y; the first
    pixel's centre at 0.5), `valid` [P] true for the points that exist, `to_other` [2, 3], `weight`, lambda_ij, and
    `index`, n. For synthetic pairs, `to_other[0] * p + to_other[1:]` is where the point p of either crop lies in the
    other one, in pixels; for pairs of two views it is NaN.
    """

    def __init__(
        self,
        scenes: Sequence[SceneCorrespondences],
        crop: int,
        margin: int,
        max_points: int = 128,
        max_reduction: float = 3.0,
        synthetic_share: float = 0.0,
        seed: int = 0,
        images_in_memory: int = 256,
    ) -> None:
        """Prepares the series; reads no photograph.

        Args:
            scenes: what corresponds, at least one scene.
            crop: side of a crop in pixels.
            margin: points nearer than this to the edge of a crop are not used: the encoder sees less around them.
            max_points: P, matches of a pair that are used at most.
            max_reduction: regions up to so many times larger than the crop are reduced to it.
            synthetic_share: probability of a synthetic pair.
            seed: another seed is another series.
            images_in_memory: photographs that are kept decoded.

        Raises:
            UserError: a photograph is smaller than the crop.
        """
        for correspondences in scenes:
            for view in correspondences.scene.views:
                if min(view.width, view.height) < crop:
                    raise UserError(
                        f"{view.path} is {view.width} x {view.height} pixels, smaller than the crop of {crop}. Lower "
                        "--crop, or take larger images of this scene."
                    )
        self.scenes = scenes
        self.crop, self.margin, self.max_points = crop, margin, max_points
        self.max_reduction, self.synthetic_share, self.seed = max_reduction, synthetic_share, seed
        self._first_pair = np.cumsum([0, *(len(scene.pairs) for scene in scenes)])
        self._read = lru_cache(maxsize=images_in_memory)(read_image)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        number = int(rng.integers(self._first_pair[-1]))
        scene = int(np.searchsorted(self._first_pair, number, side="right")) - 1
        correspondences = self.scenes[scene]
        pair_number = number - self._first_pair[scene]
        pair = correspondences.pairs[pair_number]
        if rng.random() < self.synthetic_share:
            view = correspondences.scene.views[pair.i if rng.random() < 0.5 else pair.j]
            views, weight = (view, view), 1.0
            regions, points = self._synthetic(view, rng)
            to_other = np.stack([_placement(a, b, self.crop) for a, b in (regions, regions[::-1])])
        else:
            views = correspondences.scene.views[pair.i], correspondences.scene.views[pair.j]
            weight = float(correspondences.weights[pair_number])
            regions, points = self._matched(views, pair.points_i, pair.points_j, rng)
            to_other = np.full((2, 3), np.nan, np.float32)

        recolor = random_recoloring(rng)
        crops = [recolor(self._cut(view, region)) for view, region in zip(views, regions, strict=True)]
        if rng.random() < 0.5:
            crops = [crop[:, ::-1] for crop in crops]
            points = points * np.array([-1, 1], np.float32) + np.array([self.crop, 0], np.float32)
            to_other[:, 1] = self.crop * (1 - to_other[:, 0]) - to_other[:, 1]
        padded = np.zeros((2, self.max_points, 2), np.float32)
        padded[:, : points.shape[1]] = points
        return {
            "images": torch.from_numpy(np.stack(crops)),
            "points": torch.from_numpy(padded),
            "valid": torch.arange(self.max_points) < points.shape[1],
            "to_other": torch.from_numpy(to_other),
            "weight": torch.tensor(weight),
            "index": torch.tensor(index),
        }

    def _matched(
        self, views: tuple[View, View], points_i: np.ndarray, points_j: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[Region], np.ndarray]:
        """Regions around a match, of several tries the ones with most matches, and these [2, n, 2] in crop pixels."""
        best: tuple[list[Region], np.ndarray] | None = None
        for _ in range(_ATTEMPTS):
            match = int(rng.integers(len(points_i)))
            reduction, place = self.max_reduction ** rng.random(), rng.uniform(0.25, 0.75, 2)
            regions = [
                self._region(view, points[match], place, reduction * scale)
                for view, points, scale in zip(views, (points_i, points_j), _scale_difference(rng), strict=True)
            ]
            in_crops = np.stack([regions[0].to_crop(points_i, self.crop), regions[1].to_crop(points_j, self.crop)])
            in_crops = in_crops[:, self._inside(in_crops).all(axis=0)]
            if best is None or in_crops.shape[1] > best[1].shape[1]:
                best = regions, in_crops
            if in_crops.shape[1] >= self.max_points // 4:
                break
        assert best is not None
        regions, in_crops = best
        return regions, in_crops[:, rng.permutation(in_crops.shape[1])[: self.max_points]]

    def _synthetic(self, view: View, rng: np.random.Generator) -> tuple[list[Region], np.ndarray]:
        """Two regions of one photograph around a common point, and random points [2, n, 2] in both, in crop pixels."""
        point = rng.uniform((0, 0), (view.width, view.height))
        reduction = self.max_reduction ** rng.random()
        regions = [
            self._region(view, point, rng.uniform(0.4, 0.6, 2), reduction * scale) for scale in _scale_difference(rng)
        ]
        first = rng.uniform(self.margin, self.crop - self.margin, (self.max_points, 2))
        second = regions[1].to_crop(regions[0].to_photograph(first, self.crop), self.crop)
        in_crops = np.stack([first.astype(np.float32), second])
        return regions, in_crops[:, self._inside(in_crops).all(axis=0)]

    def _region(self, view: View, point: np.ndarray, place: np.ndarray, reduction: float) -> Region:
        """The region with `point` at the relative place [2], moved to lie within the photograph."""
        side = min(max(self.crop, round(self.crop * reduction)), view.width, view.height)
        left, top = np.clip(np.round(point - place * side), 0, (view.width - side, view.height - side))
        return Region(int(left), int(top), side)

    def _inside(self, points: np.ndarray) -> np.ndarray:
        return ((points >= self.margin) & (points <= self.crop - self.margin)).all(axis=-1)

    def _cut(self, view: View, region: Region) -> NDArray[np.float32]:
        import cv2

        image = self._read(view.path)
        square = image[region.top : region.top + region.side, region.left : region.left + region.side]
        return cv2.resize(square, (self.crop, self.crop), interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0


def _placement(region: Region, other: Region, crop: int) -> NDArray[np.float32]:
    """Factor and offset [3] that take pixels of one region's crop to those of another region's."""
    offset = other.to_crop(region.to_photograph(np.zeros(2), crop), crop)
    return np.array([region.side / other.side, *offset], np.float32)


def _scale_difference(rng: np.random.Generator) -> NDArray[np.float64]:
    """Two factors whose ratio is between 1 / 1.25 and 1.25."""
    ratio = _SCALE_DIFFERENCE ** rng.uniform(-0.5, 0.5)
    return np.array([ratio, 1.0 / ratio])
