"""Pairs of rendered latents and photographs on disk, for any number of scenes.

    PAIRS/<scene>/index.json                    which views there are, and the files they are in
    PAIRS/<scene>/photographs-<k>.safetensors   photographs [H, W, 3] uint8 and masks [H, W] bool, of some views each
    PAIRS/<scene>/latents-<steps>.safetensors   [C, h k, w k] float32: what the field rendered after so many steps

k is 1 for tuning the decoder of a VAE. Scenes' own decoders see the field on a denser grid.

A view is paired with every snapshot of its scene's field; photographs are kept once. A part of a picture can be read
without the rest of its file, so any number of pairs can be read in any order. An index is replaced as a whole, and only
when the files that it names are complete, so what it lists can be used while other scenes or later snapshots are being
computed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import write_atomically, write_tensors
from lrf_nerfstudio.vae import VAE, FieldNormalization, latent_size

FORMAT = "lrf-nerfstudio pairs 1"
"""Written into every index; an index with another format is refused."""

INDEX = "index.json"
VIEWS_PER_FILE = 16
"""Photographs in a file, which are in memory at once when it is written."""

_HINT = "What is complete is kept: run again."

Kind = Literal["train", "novel"]
ALL = slice(None)


@dataclass(frozen=True)
class PairView:
    """A camera with its photograph.

    Attributes:
        name: file name of the photograph.
        kind: whether the field was fitted to it ("train") or not ("novel").
        height: H of the photograph in pixels, free of lens distortion.
        width: W.
        mask: whether the photograph has a mask.
    """

    name: str
    kind: Kind
    height: int
    width: int
    mask: bool


@dataclass
class ScenePairs:
    """The pairs of a scene.

    Attributes:
        folder: the folder of its files.
        scene: the folder of the data set.
        vae_source: the VAE in whose latent space the field was fitted, as its `--vae`.
        vae_fingerprint: identifies that latent space.
        spatial_factor: f, image pixels per latent pixel along each axis.
        options: how the field was fitted, as JSON types.
        shift: [C], see `FieldNormalization`.
        scale: [C].
        views: the cameras.
        latents: the steps of the field at each snapshot, and the file of its renders, in the order of the steps.
        cost: what the fit took, as `FieldFit.cost`.
        density: k, cells that were rendered in the place of a latent pixel of the VAE, along each axis.
    """

    folder: Path
    scene: str
    vae_source: str
    vae_fingerprint: str
    spatial_factor: int
    options: dict[str, Any]
    shift: list[float]
    scale: list[float]
    views: tuple[PairView, ...]
    latents: dict[int, str] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    density: int = 1

    @property
    def normalization(self) -> FieldNormalization:
        """The map between latents and field latents."""
        normalization = FieldNormalization(len(self.shift))
        normalization.shift.copy_(torch.tensor(self.shift))
        normalization.scale.copy_(torch.tensor(self.scale))
        return normalization

    def of_kind(self, kind: Kind) -> list[int]:
        """Return the indices of the views of a kind."""
        return [index for index, view in enumerate(self.views) if view.kind == kind]

    def grid(self, view: int) -> tuple[int, int]:
        """Return the size (h, w) of a view's latent in cells."""
        return latent_size(self.views[view].height, self.views[view].width, self.spatial_factor)

    def missing_files(self) -> list[Path]:
        """Return the files that the index names but that do not exist."""
        photographs = {_photographs_file(view) for view in range(len(self.views))}
        return [
            file for name in (*sorted(photographs), *self.latents.values()) if not (file := self.folder / name).exists()
        ]

    def latent(self, view: int, steps: int, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Read the latent that the field rendered for a view, or a part of it.

        Args:
            view: index of the view.
            steps: steps of the field at the snapshot.
            rows: of the grid that was rendered.
            columns: likewise.

        Returns:
            [C, h k, w k] float32, unscaled.

        Raises:
            UserError: if its file cannot be read.
        """
        return _read(self.folder / self.latents[steps], _key(view), (ALL, rows, columns))

    def photograph(self, view: int, rows: slice = ALL, columns: slice = ALL) -> tuple[Tensor, Tensor | None]:
        """Read the photograph of a view and its mask, or parts of them.

        Args:
            view: index of the view.
            rows: of the photograph.
            columns: of the photograph.

        Returns:
            [H, W, 3] uint8; [H, W], true where a pixel counts, or None where there is no mask.

        Raises:
            UserError: if their file cannot be read.
        """
        file = self.folder / _photographs_file(view)
        image = _read(file, _key(view), (rows, columns, ALL))
        return image, _read(file, _mask_key(view), (rows, columns)) if self.views[view].mask else None

    def write_photographs(self, first: int, photographs: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Write the photographs of up to `VIEWS_PER_FILE` views into a file.

        Args:
            first: index of the first of these views, a multiple of `VIEWS_PER_FILE`.
            photographs: [H, W, 3] in [0, 1] and, where there are masks, [H, W], true where a pixel counts.

        Raises:
            UserError: if the disk is full or the folder cannot be written to.
        """
        tensors = {}
        for view, (image, mask) in enumerate(photographs, start=first):
            tensors[_key(view)] = (255 * image).round().to(torch.uint8)
            if mask is not None:
                tensors[_mask_key(view)] = mask
        self._write(_photographs_file(first), tensors)

    def write_latents(self, steps: int, latents: Sequence[Tensor]) -> None:
        """Write a snapshot, and add it to the index.

        Args:
            steps: steps of the field.
            latents: [C, h k, w k] each, what the field renders for all views, unscaled.

        Raises:
            UserError: if the disk is full or the folder cannot be written to.
        """
        name = f"latents-{steps:07d}.safetensors"
        self._write(name, {_key(view): latent.float() for view, latent in enumerate(latents)})
        self.latents = dict(sorted({**self.latents, steps: name}.items()))
        self.save()

    def save(self) -> None:
        """Write the index.

        Raises:
            UserError: if the disk is full or the folder cannot be written to.
        """
        content: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        del content["folder"]
        content["latents"] = {str(steps): name for steps, name in self.latents.items()}
        write_atomically(self.folder / INDEX, (json.dumps(content, indent=1) + "\n").encode(), "--output", _HINT)

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        # safetensors takes tensors that are contiguous and share no memory.
        copies = {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
        }
        write_tensors(self.folder / name, copies, "--output", _HINT)

    @classmethod
    def load(cls, folder: Path) -> "ScenePairs":
        """Read the index of a scene.

        Raises:
            UserError: if it is missing, damaged, or of another version.
        """
        try:
            content: dict[str, Any] = json.loads((folder / INDEX).read_text())
            if content.pop("format") != FORMAT:
                raise UserError(f"{folder / INDEX} is not of this version: its format is not {FORMAT!r}.")
            content["views"] = tuple(PairView(**view) for view in content["views"])
            content["latents"] = {int(steps): name for steps, name in content["latents"].items()}
            if any(Path(name).name != name for name in content["latents"].values()):
                raise ValueError("its latents are no files of the folder")
            return cls(folder=folder, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"The index {folder / INDEX} cannot be read: {error}. Delete the folder and build its pairs again."
            ) from error


def read_pairs(folder: Path, vae: VAE, density: int = 1) -> list[ScenePairs]:
    """Read the indices of a folder of pairs, of the scenes that have any pairs yet, sorted by name.

    Args:
        folder: what `lrf pairs` wrote.
        vae: the autoencoder that decodes the pairs' latents.
        density: of the grid that they are to be rendered on.

    Raises:
        UserError: if there are no pairs, if a file is missing, or if the pairs are of another latent space or density.
    """
    indices = sorted(folder.glob(f"*/{INDEX}"))
    scenes = [scene for index in indices if (scene := ScenePairs.load(index.parent)).latents]
    if not scenes:
        raise UserError(f"There are no pairs in {folder} (--pairs). `lrf pairs` makes them.")
    for scene in scenes:
        if scene.vae_fingerprint != vae.fingerprint:
            raise UserError(
                f"The pairs in {scene.folder} were built with the VAE {scene.vae_source!r}, whose latents are not "
                f"those of {vae.source!r} (--vae). Give that VAE or one with the same encoder, or build pairs anew."
            )
        if scene.density != density:
            raise UserError(
                f"The pairs in {scene.folder} were rendered with --density {scene.density}, and --density {density} is "
                "needed here. Build others in another folder."
            )
        if missing := scene.missing_files():
            raise UserError(
                f"{scene.folder / INDEX} names {missing[0].name}, which is missing. Restore the file, or run "
                "`lrf pairs` again with the options of the first time, which makes what is missing."
            )
    return scenes


def check_options(pairs: ScenePairs, expected: Mapping[str, Any]) -> None:
    """Check that the pairs of a scene were built with certain options.

    Args:
        pairs: of the scene.
        expected: values by the names of `pairs.options`, or by "scene", "VAE fingerprint" and "density".

    Raises:
        UserError: if they were built with others; the message names the first difference.
    """
    actual = {
        **pairs.options,
        "scene": pairs.scene,
        "VAE fingerprint": pairs.vae_fingerprint,
        "density": pairs.density,
    }
    for name, value in expected.items():
        if actual.get(name) != value:
            raise UserError(
                f"{pairs.folder} holds pairs of another kind: their {name} is {actual.get(name)}, not {value}. "
                "Use the options of the first time, or another --output."
            )


def _key(view: int) -> str:
    return f"{view:06d}"


def _mask_key(view: int) -> str:
    return f"{view:06d}.mask"


def _photographs_file(view: int) -> str:
    return f"photographs-{view // VIEWS_PER_FILE:04d}.safetensors"


def _read(file: Path, key: str, part: tuple[slice, ...]) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return content.get_slice(key)[part]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}. Delete it and build the pairs of its scene again.") from error
