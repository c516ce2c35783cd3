"""Crops of single photographs."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrf_nerfstudio.training.data.augmentation import random_crop
from lrf_nerfstudio.utils.images import read_image


class PhotoCrops(Dataset[dict[str, Tensor]]):
    """An endless series of crops of photographs; item n is a function of n and the seed alone.

    All photographs come up equally often. They are read when they are needed; the latest ones stay in memory, up to
    `images_in_memory`.

    An item has `image` [crop, crop, 3] in [0, 1].
    """

    def __init__(
        self, paths: Sequence[Path], crop: int, max_reduction: float, seed: int = 0, images_in_memory: int = 256
    ) -> None:
        """Prepare the series; no photograph is read yet.

        Args:
            paths: of the photographs, at least one.
            crop: side of a crop in pixels.
            max_reduction: a crop is cut from a square up to so many times larger and reduced.
            seed: another seed gives another series.
            images_in_memory: number of photographs that are kept decoded.
        """
        self._paths, self._crop, self._max_reduction, self._seed = paths, crop, max_reduction, seed
        self._read = lru_cache(maxsize=images_in_memory)(read_image)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self._seed, index))
        image = self._read(self._paths[int(rng.integers(len(self._paths)))])
        return {"image": torch.from_numpy(random_crop(image, self._crop, self._max_reduction, rng))}
