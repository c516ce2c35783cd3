"""Pairs of rendered latents and photographs on disk, for any number of scenes.

    PAIRS/<scene>/index.json                    which views there are, and the files they are in
    PAIRS/<scene>/photographs-<k>.safetensors   photographs, [H, W, 3] uint8, and masks, [H, W] bool; some views a file
    PAIRS/<scene>/latents-<steps>.safetensors   [C, h, w] float32: what the field rendered after so many steps

A view is paired with every snapshot of its scene's field; photographs are kept once. Parts of a picture are read
without the rest of its file, so pairs in any order and number stream from disk. An index is replaced as a whole, and
only when the files that it names are complete: what it lists can be used while other scenes, or later snapshots, are
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
"""Written into every index; a reader refuses what it does not know."""

INDEX = "index.json"
VIEWS_PER_FILE = 16
"""Photographs in a file: so many are in memory at once when they are written."""

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
        mask: whether it has a mask.
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
        folder: where its files are.
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

    @property
    def normalization(self) -> FieldNormalization:
        """Between latents and field latents."""
        normalization = FieldNormalization(len(self.shift))
        normalization.shift.copy_(torch.tensor(self.shift))
        normalization.scale.copy_(torch.tensor(self.scale))
        return normalization

    def of_kind(self, kind: Kind) -> list[int]:
        """Indices of the views of a kind."""
        return [index for index, view in enumerate(self.views) if view.kind == kind]

    def grid(self, view: int) -> tuple[int, int]:
        """(h, w), cells of a view's latent."""
        return latent_size(self.views[view].height, self.views[view].width, self.spatial_factor)

    def missing_files(self) -> list[Path]:
        """The files that the index names and that are not there."""
        photographs = {_photographs_file(view) for view in range(len(self.views))}
        return [
            file for name in (*sorted(photographs), *self.latents.values()) if not (file := self.folder / name).exists()
        ]

    def latent(self, view: int, steps: int, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """What the field rendered for a view after so many steps: [C, h, w] float32, unscaled, or a part of it.

        Raises:
            UserError: its file cannot be read.
        """
        return _read(self.folder / self.latents[steps], _key(view), (ALL, rows, columns))

    def photograph(self, view: int, rows: slice = ALL, columns: slice = ALL) -> tuple[Tensor, Tensor | None]:
        """A view's photograph [H, W, 3] uint8 and, where it has one, its mask [H, W] (true: counts), or parts of them.

        Raises:
            UserError: their file cannot be read.
        """
        file = self.folder / _photographs_file(view)
        image = _read(file, _key(view), (rows, columns, ALL))
        return image, _read(file, _mask_key(view), (rows, columns)) if self.views[view].mask else None

    def write_photographs(self, first: int, photographs: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Writes the file of the views from `first`, a multiple of `VIEWS_PER_FILE`, on.

        Args:
            first: index of the first view.
            photographs: [H, W, 3] in [0, 1] and, where there are masks, [H, W], true where a pixel counts.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        tensors = {}
        for view, (image, mask) in enumerate(photographs, start=first):
            tensors[_key(view)] = (255 * image).round().to(torch.uint8)
            if mask is not None:
                tensors[_mask_key(view)] = mask
        self._write(_photographs_file(first), tensors)

    def write_latents(self, steps: int, latents: Sequence[Tensor]) -> None:
        """Writes what the field renders for all views after so many steps, and enters it into the index.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        name = f"latents-{steps:07d}.safetensors"
        self._write(name, {_key(view): latent.float() for view, latent in enumerate(latents)})
        self.latents = dict(sorted({**self.latents, steps: name}.items()))
        self.save()

    def save(self) -> None:
        """Writes the index.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        content: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        del content["folder"]
        content["latents"] = {str(steps): name for steps, name in self.latents.items()}
        try:
            write_atomically(self.folder / INDEX, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            raise _unwritable(self.folder / INDEX, error) from error

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        try:
            # safetensors takes tensors that are contiguous and share no memory.
            copies = {
                key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for key, tensor in tensors.items()
            }
            write_tensors(self.folder / name, copies)
        except OSError as error:
            raise _unwritable(self.folder / name, error) from error

    @classmethod
    def load(cls, folder: Path) -> "ScenePairs":
        """Reads the index of a scene.

        Raises:
            UserError: it is missing, damaged, or of another version.
        """
        try:
            content: dict[str, Any] = json.loads((folder / INDEX).read_text())
            if content.pop("format") != FORMAT:
                raise UserError(f"{folder / INDEX} is not of this version: its format is not {FORMAT!r}.")
            content["views"] = tuple(PairView(**view) for view in content["views"])
            content["latents"] = {int(steps): name for steps, name in content["latents"].items()}
            return cls(folder=folder, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"The index {folder / INDEX} cannot be read: {error}. Delete the folder and build its pairs again."
            ) from error


def read_pairs(folder: Path, vae: VAE) -> list[ScenePairs]:
    """The scenes of a folder of pairs that have any pairs yet, by name.

    Args:
        folder: what `scripts/build_stage3_pairs.py` wrote.
        vae: the autoencoder that decodes the pairs' latents.

    Raises:
        UserError: there are no pairs, a file is missing, or the pairs are of another latent space than the VAE's.
    """
    indices = sorted(folder.glob(f"*/{INDEX}"))
    scenes = [scene for index in indices if (scene := ScenePairs.load(index.parent)).latents]
    if not scenes:
        raise UserError(f"There are no pairs in {folder} (--pairs). scripts/build_stage3_pairs.py makes them.")
    for scene in scenes:
        if scene.vae_fingerprint != vae.fingerprint:
            raise UserError(
                f"The pairs in {scene.folder} were built with the VAE {scene.vae_source!r}, whose latents are not "
                f"those of {vae.source!r} (--vae). Give that VAE or one with the same encoder, or build pairs anew."
            )
        if missing := scene.missing_files():
            raise UserError(
                f"{scene.folder / INDEX} names {missing[0].name}, which is missing. Restore the file, or run "
                "scripts/build_stage3_pairs.py again with the options of the first time, which makes what is missing."
            )
    return scenes


def check_options(pairs: ScenePairs, expected: Mapping[str, Any]) -> None:
    """Checks that a scene's pairs are those of a configuration.

    Args:
        pairs: of the scene.
        expected: values by name, of `options` or of attributes.

    Raises:
        UserError: they are not; the message says in what they differ.
    """
    actual = {**pairs.options, "scene": pairs.scene, "VAE fingerprint": pairs.vae_fingerprint}
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


def _unwritable(file: Path, error: OSError) -> UserError:
    return UserError(
        f"{file} cannot be written: {error.strerror or error}. Make room, or choose another --output, and run again: "
        "what is complete is kept."
    )
