"""Crops of two photographs that show the same points, from any number of scenes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lrf_nerfstudio.correspondence import SceneCorrespondences, View
from lrf_nerfstudio.training.data.augmentation import cut_square, random_recoloring
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.images import read_image

_ATTEMPTS = 8
_SCALE_DIFFERENCE = 1.25  # largest ratio of the reductions of the two crops of a pair


@dataclass(frozen=True)
class Region:
    """A square of a photograph: its upper left corner and its side, in pixels of the photograph."""

    left: int
    top: int
    side: int

    def to_crop(self, points: NDArray[np.floating], crop: int) -> NDArray[np.float32]:
        """Map points [N, 2] from pixels of the photograph to those of the region, resized to `crop` x `crop`."""
        return ((points - (self.left, self.top)) * (crop / self.side)).astype(np.float32)

    def to_photograph(self, points: NDArray[np.floating], crop: int) -> NDArray[np.float64]:
        """Map points [N, 2] from pixels of the resized region to those of the photograph."""
        return points * (self.side / crop) + (self.left, self.top)


class PairCrops(Dataset[dict[str, Tensor]]):
    """An endless series of pairs of crops; item n is a function of n and the seed alone.

    A pair of views is drawn, then one of its matches, and around it a square from each photograph, reduced by about
    the same factor. Both crops are recolored and mirrored alike, so that corresponding points keep corresponding. A
    share of the pairs is synthetic: both crops come from one photograph, at slightly different places and scales, and
    correspond everywhere.

    Photographs are read when they are needed; the latest ones stay in memory, up to `images_in_memory`.

    An item has:
        images: [2, crop, crop, 3] in [0, 1].
        points: [2, P, 2], (x, y) in pixels of the crops; the center of the first pixel is (0.5, 0.5).
        valid: [P], true for the points that exist; the others are padding.
        to_other: [2, 3]. For synthetic pairs, the point p of crop i lies at `to_other[i, 0] * p + to_other[i, 1:]` in
            the other crop, in pixels; NaN for pairs of two views.
        weight: lambda_ij.
        noise: [2, *noise_shape] standard normal; missing where no `noise_shape` is given.
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
        noise_shape: tuple[int, int, int] | None = None,
    ) -> None:
        """Prepare the series; no photograph is read yet.

        Args:
            scenes: correspondences of at least one scene.
            crop: side of a crop in pixels.
            margin: points nearer than this to the edge of a crop are not used: the encoder sees less around them.
            max_points: P, the largest number of matches of a pair that are used.
            max_reduction: regions up to so many times larger than the crop are reduced to it.
            synthetic_share: probability of a synthetic pair.
            seed: another seed gives another series.
            images_in_memory: number of photographs that are kept decoded.
            noise_shape: [C, h, w] of a crop's latent, for autoencoders whose posterior is sampled.

        Raises:
            UserError: if a photograph is smaller than the crop.
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
        self.noise_shape = noise_shape
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
        item = {
            "images": torch.from_numpy(np.stack(crops)),
            "points": torch.from_numpy(padded),
            "valid": torch.arange(self.max_points) < points.shape[1],
            "to_other": torch.from_numpy(to_other),
            "weight": torch.tensor(weight),
        }
        if self.noise_shape is not None:
            item["noise"] = torch.from_numpy(rng.standard_normal((2, *self.noise_shape), np.float32))
        return item

    def _matched(
        self, views: tuple[View, View], points_i: np.ndarray, points_j: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[Region], np.ndarray]:
        """Return regions around a match, the ones with most matches of several tries, and the matches in them.

        Returns:
            The two regions; [2, n, 2] in pixels of the crops.
        """
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
        """Return two regions of one photograph around a common point, and random points that lie in both.

        Returns:
            The two regions; [2, n, 2] in pixels of the crops.
        """
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
        """Return the region with a point [2] at a relative place [2], moved to lie within the photograph."""
        side = min(max(self.crop, round(self.crop * reduction)), view.width, view.height)
        left, top = np.clip(np.round(point - place * side), 0, (view.width - side, view.height - side))
        return Region(int(left), int(top), side)

    def _inside(self, points: np.ndarray) -> np.ndarray:
        return ((points >= self.margin) & (points <= self.crop - self.margin)).all(axis=-1)

    def _cut(self, view: View, region: Region) -> NDArray[np.float32]:
        return cut_square(self._read(view.path), region.top, region.left, region.side, self.crop)


def _placement(region: Region, other: Region, crop: int) -> NDArray[np.float32]:
    """Return scale and offset [3] from pixels of one region's crop to those of another region's crop."""
    offset = other.to_crop(region.to_photograph(np.zeros(2), crop), crop)
    return np.array([region.side / other.side, *offset], np.float32)


def _scale_difference(rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw two factors whose ratio is between 1 / 1.25 and 1.25."""
    ratio = _SCALE_DIFFERENCE ** rng.uniform(-0.5, 0.5)
    return np.array([ratio, 1.0 / ratio])
