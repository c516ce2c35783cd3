"""The training photographs for the scene's own decoder: as bytes, in memory or read ahead, in random parts."""

import random
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lrf_nerfstudio.field.cameras import GridCamera
from lrf_nerfstudio.field.decoder import SceneDecoder
from lrf_nerfstudio.plugin.dataset import PinholeDataset


class Photograph(NamedTuple):
    """A photograph on the host."""

    image: Tensor  # [H, W, 3], uint8
    mask: Tensor | None  # [H, W], True where a pixel counts


class Photographs:
    """Photographs of a data set as bytes, those that fit into a budget of memory being read once.

    Args:
        dataset: reads and undistorts.
        budget: bytes of photographs and masks that are kept.
        pinned: whether they are in memory that a GPU reads by itself.
    """

    def __init__(self, dataset: PinholeDataset, budget: float, pinned: bool) -> None:
        self._dataset, self._left, self._pinned = dataset, budget, pinned
        self._kept: dict[int, Photograph] = {}
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="photographs")
        self._ahead: dict[int, Future[Photograph]] = {}

    def take(self, index: int, following: int) -> Photograph:
        """Return a photograph, and begin to read the one that is taken next.

        Raises:
            UserError: if the file is missing, damaged, or of another size than its camera.
        """
        photograph = self._kept.get(index)
        if photograph is None:
            ahead = self._ahead.pop(index, None)
            photograph = self._read(index) if ahead is None else ahead.result()
            size = sum(tensor.nbytes for tensor in photograph if tensor is not None)
            if size <= self._left:
                self._left -= size
                self._kept[index] = photograph
        if following not in self._kept and following not in self._ahead:
            self._ahead = {following: self._reader.submit(self._read, following)}
        return photograph

    def _read(self, index: int) -> Photograph:
        image, mask = self._dataset.photograph(index)
        image = (image * 255).round().to(torch.uint8)
        if self._pinned:
            image, mask = image.pin_memory(), None if mask is None else mask.pin_memory()
        return Photograph(image, mask)


@dataclass(frozen=True)
class Part:
    """A part of a photograph, with as much around it as a decoder must see to decode it as in the whole picture.

    Attributes:
        top, left, height, width: of the part with its surroundings, in pixels of the photograph.
        inside: rows and columns of the part in a picture of these surroundings.
    """

    top: int
    left: int
    height: int
    width: int
    inside: tuple[slice, slice]

    @classmethod
    def random(cls, height: int, width: int, side: int, step: int, margin: int, generator: random.Random) -> "Part":
        """Choose a part of a photograph of H x W pixels.

        Args:
            height: H.
            width: W.
            side: longest side of a part, in pixels.
            step: pixels per cell of the VAE's grid. The part of a photograph that is not longer than `side` begins
                within its first cell, so that the grid lies differently over the pixels from step to step.
            margin: pixels around the part that belong to its surroundings, as far as the photograph reaches.
            generator: of the choice.
        """
        rows, columns = (_span(length, side, step, margin, generator) for length in (height, width))
        return cls(
            rows.outer_start,
            columns.outer_start,
            rows.outer_stop - rows.outer_start,
            columns.outer_stop - columns.outer_start,
            (
                slice(rows.start - rows.outer_start, rows.stop - rows.outer_start),
                slice(columns.start - columns.outer_start, columns.stop - columns.outer_start),
            ),
        )

    def camera(self, whole: GridCamera) -> GridCamera:
        """Return the camera of the part with its surroundings from that of the whole photograph."""
        return whole.cut(self.top, self.left, self.height, self.width)

    def of(self, tensor: Tensor) -> Tensor:
        """Cut the part, without its surroundings, out of what a whole photograph has [H, W, ...]."""
        rows, columns = self.inside
        return tensor[
            self.top + rows.start : self.top + rows.stop, self.left + columns.start : self.left + columns.stop
        ]

    def latent_cells(self, decoder: SceneDecoder) -> tuple["LatentCells", "LatentCells"] | None:
        """Find the cells of the VAE's grid of the whole photograph that lie in the part with its surroundings.

        Returns:
            Along the rows and along the columns; None where the cells of the decoder's dense grid, which begins with
            the part, do not make up the cells of the VAE's.
        """
        rows, columns = LatentCells.of(self.top, self.height, decoder), LatentCells.of(self.left, self.width, decoder)
        return None if rows is None or columns is None else (rows, columns)


class LatentCells(NamedTuple):
    """Whole cells of a photograph's VAE grid in a part of it, along one axis."""

    dense: slice  # of the dense cells of the part
    cells: slice  # of the VAE's cells of the photograph

    @classmethod
    def of(cls, start: int, length: int, decoder: SceneDecoder) -> "LatentCells | None":
        """Find them for a part that begins at a pixel and has a length in pixels."""
        first, to_first = -(-start // decoder.factor), -start % decoder.factor
        skipped, rest = divmod(to_first * decoder.density, decoder.factor)  # dense cells before the first whole one
        if rest:
            return None
        count = -(-length // decoder.factor) - bool(skipped)  # of the dense cells that are left after the skipped ones
        return cls(slice(skipped, skipped + count * decoder.density), slice(first, first + count))


class _Span(NamedTuple):
    """A part along one axis, with its surroundings."""

    start: int
    stop: int
    outer_start: int
    outer_stop: int


def _span(length: int, side: int, step: int, margin: int, generator: random.Random) -> _Span:
    if length <= side:
        start = generator.randrange(min(step, length))
        return _Span(start, length, start, length)
    start = generator.randrange(length - side + 1)
    stop = start + side
    return _Span(start, stop, max(start - margin, 0), min(stop + margin, length))
