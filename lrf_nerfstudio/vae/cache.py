"""Encoded images on disk, so that the second start on the same data encodes nothing."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import cache_directory, file_sha256, read_tensors, write_tensors
from lrf_nerfstudio.vae.autoencoder import VAE
from lrf_nerfstudio.vae.grid import latent_size

_FORMAT = 1  # part of every key: raise it when what is stored changes its meaning


def default_cache_directory() -> Path:
    """`lrf_nerfstudio/latents` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    return cache_directory("latents")


class LatentCache:
    """Latents of images, one safetensors file each: `<directory>/<VAE fingerprint>/<key>.safetensors`.

    The key is a hash of the contents of the image's files, of how they were preprocessed and of the VAE's precision and
    tiling: an entry never goes stale, whatever is renamed, moved or edited. Files are complete or absent, also when
    several processes fill one cache at once; a file that is damaged all the same is replaced, with a warning.

    Attributes:
        directory: root of the cache.
        hits: latents read from disk so far.
        misses: images encoded so far.
    """

    def __init__(self, directory: Path | None, vae: VAE) -> None:
        """A cache for what `vae` encodes; `directory` None stands for :func:`default_cache_directory`."""
        self.directory = Path(directory).expanduser() if directory is not None else default_cache_directory()
        self.vae = vae
        self.hits = 0
        self.misses = 0

    def load_or_encode(
        self,
        image_paths: Path | Sequence[Path],
        preprocessing: dict[str, Any],
        load_image: Callable[[], Tensor],
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """The latent of an image, from disk if it is there, else encoded and stored.

        Args:
            image_paths: the file, or files, that the image is made from, such as a photograph and its mask.
            preprocessing: all that `load_image` does to them (undistortion, size, background, ...), as JSON types.
            load_image: gives the image [H, W, 3] in [0, 1]; called only when the latent is not there.
            size: (H, W) of the image if known beforehand; a stored latent of another size counts as damaged.

        Returns:
            [C, h, w] float32 on the CPU, the posterior mode, unscaled; the same bits from disk as encoded.

        Raises:
            UserError: an image file cannot be read, or the latent cannot be written (disk full, no permission).
        """
        paths = [image_paths] if isinstance(image_paths, (str, os.PathLike)) else list(image_paths)
        file = self._file(paths, preprocessing)
        if file.exists():
            try:
                latent = _read(file, self._expected_shape(size))
            except Exception as error:  # a damaged file fails in as many ways as there are kinds of damage
                warnings.warn(f"{file} is damaged ({error}); the image is encoded again.", stacklevel=2)
            else:
                self.hits += 1
                return latent
        with torch.no_grad():
            latent = self.vae.encode(load_image()[None])[0].cpu().contiguous()
        self.misses += 1
        _write(file, latent)
        return latent

    def _file(self, paths: Sequence[Path], preprocessing: dict[str, Any]) -> Path:
        description = {
            "format": _FORMAT,
            "images": [_image_sha256(Path(path)) for path in paths],
            "preprocessing": preprocessing,
            "vae": self.vae.encode_settings,
        }
        key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
        return self.directory / self.vae.fingerprint / f"{key}.safetensors"

    def _expected_shape(self, size: tuple[int, int] | None) -> tuple[int | None, ...]:
        cells = (None, None) if size is None else latent_size(*size, self.vae.spatial_factor)
        return (self.vae.latent_channels, *cells)


def _image_sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"The image {path} cannot be read: {error.strerror}.") from error


def _read(file: Path, expected_shape: tuple[int | None, ...]) -> Tensor:
    """Reads a latent [C, h, w] and checks it; raises KeyError, ValueError, OSError or what safetensors raises."""
    latent = read_tensors(file)["latent"]
    shape_fits = latent.ndim == len(expected_shape) and all(
        expected in (None, n) for n, expected in zip(latent.shape, expected_shape, strict=True)
    )
    if latent.dtype != torch.float32 or not shape_fits:
        raise ValueError(f"holds {latent.dtype} {tuple(latent.shape)}")
    return latent


def _write(file: Path, latent: Tensor) -> None:
    write_tensors(file, {"latent": latent}, option="--pipeline.datamanager.latent-cache-dir")
