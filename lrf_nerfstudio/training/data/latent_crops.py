"""Crops of rendered latents, with the parts of the photographs that they should be decoded to."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrf_nerfstudio.training.data.augmentation import random_recoloring
from lrf_nerfstudio.training.data.scene_pairs import Kind, ScenePairs
from lrf_nerfstudio.utils.errors import UserError

KINDS: tuple[Kind, Kind] = ("train", "novel")


class LatentCrops(Dataset[dict[str, Tensor]]):
    """An endless series of crops; item n is a function of n and the seed alone.

    Even items show training views, odd ones held-out views; within a kind, every pair (a view of a scene, a snapshot of
    its field) comes up equally often. Crops lie on the grid of latent cells. Around the cells that are compared, the
    decoder is given a margin, so that it sees as much as inside a whole picture; at the edge of the photograph, where
    there are no more cells, it sees the edge, as in a whole picture. A rendered latent's photograph is neither mirrored
    nor recolored, because the field does not tell what the latent of the changed photograph would be.

    A share of the items is clean: its latent is to be encoded from the photograph, which is mirrored and recolored at
    random.

    An item has:
        latent: [C, (n + 2 m) k, (n + 2 m) k], what the field rendered, of pairs of density k.
        place: [2], row and column of the first of the n x n cells that are compared.
        image: [n f, n f, 3] in [0, 1], the photograph at these cells; its edge is repeated beyond it.
        counts: [n f, n f], of these pixels: false beyond the photograph and outside its mask.
        novel: whether the view was held out.
        clean: whether the latent of `surroundings` takes the place of the rendered one; missing where no item is clean.
        surroundings: [(n + 2 m) f, (n + 2 m) f, 3], the photograph with the margin; missing where no item is clean.
    """

    def __init__(
        self, scenes: Sequence[ScenePairs], cells: int, margin: int, seed: int = 0, clean_share: float = 0.0
    ) -> None:
        """Prepare the series; no pair is read yet.

        Args:
            scenes: what :func:`~lrf_nerfstudio.training.data.scene_pairs.read_pairs` returns.
            cells: n, side of the square that is compared, in latent cells.
            margin: m, cells around it.
            seed: another seed gives another series.
            clean_share: probability of a clean item.

        Raises:
            UserError: if there is no view of a kind, or if a picture is smaller than the crop with its margin.
        """
        self.scenes, self.cells, self.margin = scenes, cells, margin
        self.seed, self.clean_share = seed, clean_share
        side = cells + 2 * margin
        for scene in scenes:
            for index, view in enumerate(scene.views):
                if min(scene.grid(index)) < side:
                    raise UserError(
                        f"{view.name} of {scene.scene} is {view.width} x {view.height} pixels, smaller than a crop "
                        f"with its margin, {side * scene.spatial_factor}. Lower --crop or --margin."
                    )
        self._views = {kind: [scene.of_kind(kind) for scene in scenes] for kind in KINDS}
        self._first_pair = {
            kind: np.cumsum([0, *(len(v) * len(s.latents) for v, s in zip(self._views[kind], scenes, strict=True))])
            for kind in KINDS
        }
        for kind, first in self._first_pair.items():
            if first[-1] == 0:
                raise UserError(f"There are no {kind} views among the pairs (--pairs); both kinds are needed.")

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        kind = KINDS[index % 2]
        scene, view, steps = self._pair(kind, int(rng.integers(self._first_pair[kind][-1])))
        n, factor, side = self.cells, scene.spatial_factor, self.cells + 2 * self.margin
        grid = np.array(scene.grid(view))
        inner = rng.integers(0, grid - n, endpoint=True)  # first row and column that are compared
        outer = np.clip(inner - self.margin, 0, grid - side)
        k = scene.density
        latent = scene.latent(view, steps, *(slice(int(start) * k, (int(start) + side) * k) for start in outer))
        pixels = [slice(int(start) * factor, (int(start) + side) * factor) for start in outer]  # cut off at the edge
        photograph, mask = scene.photograph(view, *pixels)
        height, width = photograph.shape[:2]
        counts = torch.zeros(side * factor, side * factor, dtype=torch.bool)
        counts[:height, :width] = True if mask is None else mask
        beyond = (0, side * factor - height), (0, side * factor - width), (0, 0)
        surroundings = np.pad(photograph.numpy(), beyond, mode="edge").astype(np.float32) / 255.0
        place: np.ndarray = inner - outer
        is_clean = self.clean_share > 0 and rng.random() < self.clean_share
        if is_clean:
            surroundings = random_recoloring(rng)(surroundings)
            if rng.random() < 0.5:
                surroundings, counts = np.ascontiguousarray(surroundings[:, ::-1]), counts.flip(1)
                place[1] = side - n - place[1]
        rows, columns = (slice(int(start) * factor, (int(start) + n) * factor) for start in place)
        item = {
            "latent": latent,
            "place": torch.from_numpy(place),
            "image": torch.from_numpy(surroundings[rows, columns]),
            "counts": counts[rows, columns],
            "novel": torch.tensor(kind == "novel"),
        }
        if self.clean_share > 0:
            item |= {"clean": torch.tensor(is_clean), "surroundings": torch.from_numpy(surroundings)}
        return item

    def _pair(self, kind: Kind, number: int) -> tuple[ScenePairs, int, int]:
        """Return the scene, the view and the steps of the pair with a number, counted over all scenes."""
        first = self._first_pair[kind]
        position = int(np.searchsorted(first, number, side="right")) - 1
        scene, views = self.scenes[position], self._views[kind][position]
        snapshot, view = divmod(number - int(first[position]), len(views))
        return scene, views[view], list(scene.latents)[snapshot]


def cut(pictures: Tensor, places: Tensor, cells: int, factor: int) -> Tensor:
    """Cut out of decoded crops the parts that are compared.

    The places are not read back: they are indices that stay on the device of the pictures.

    Args:
        pictures: [B, H, W, 3], decoded with margin.
        places: [B, 2], row and column in cells where the part begins.
        cells: side of the part.
        factor: pixels per cell.

    Returns:
        [B, cells * factor, cells * factor, 3].
    """
    side, width = cells * factor, pictures.shape[2]
    steps = torch.arange(side, device=pictures.device)
    rows, columns = (places.T[:, :, None] * factor + steps).unbind()  # [B, side] each
    pixels = (rows[:, :, None] * width + columns[:, None]).flatten(1)  # [B, side * side]
    parts = pictures.flatten(1, 2).gather(1, pixels[..., None].expand(-1, -1, 3))
    return parts.unflatten(1, (side, side))
