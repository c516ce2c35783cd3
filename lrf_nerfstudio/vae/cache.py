"""Encoded images on disk, so that the second start on the same data encodes nothing."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrf_nerfstudio.utils.cache import TensorCache, content_hash
from lrf_nerfstudio.utils.files import cache_directory
from lrf_nerfstudio.vae.autoencoder import VAE
from lrf_nerfstudio.vae.grid import latent_size


def default_cache_directory() -> Path:
    """Return `lrf_nerfstudio/latents` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    return cache_directory("latents")


class LatentCache(TensorCache):
    """Latents of images, one file each: `<directory>/<VAE fingerprint>/<key>.safetensors`.

    The key depends on the contents of the image's files, on how they were preprocessed and on the VAE's precision and
    tiling.
    """

    def __init__(self, directory: Path | None, vae: VAE) -> None:
        """Keep what `vae` encodes; `directory` None stands for :func:`default_cache_directory`."""
        root = default_cache_directory() if directory is None else Path(directory)
        super().__init__(root / vae.fingerprint, option="--pipeline.datamanager.latent-cache-dir")
        self.vae = vae

    def load_or_encode(
        self,
        image_paths: Path | Sequence[Path],
        preprocessing: dict[str, Any],
        load_image: Callable[[], Tensor],
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return the latent of an image, from disk if it is there, else encoded and stored.

        Args:
            image_paths: the file, or files, that the image is made from, such as a photograph and its mask.
            preprocessing: all that `load_image` does to them (undistortion, size, background, ...), as JSON types.
            load_image: returns the image [H, W, 3] in [0, 1]; called only when the latent is not there.
            size: (H, W) of the image if known beforehand; a stored latent of another size counts as damaged.

        Returns:
            [C, h, w] float32 on the CPU, the posterior mode, unscaled; the same bits from disk as encoded.

        Raises:
            UserError: an image file cannot be read, or the latent cannot be written (disk full, no permission).
        """
        paths = [image_paths] if isinstance(image_paths, (str, os.PathLike)) else list(image_paths)
        inputs = {
            "images": [content_hash(Path(path)) for path in paths],
            "preprocessing": preprocessing,
            "vae": self.vae.encode_settings,
        }
        grid = (None, None) if size is None else latent_size(*size, self.vae.spatial_factor)
        expected = (self.vae.latent_channels, *grid)

        def encode() -> dict[str, Tensor]:
            with torch.no_grad():
                latent = self.vae.encode(load_image()[None])[0].cpu().contiguous()
            self.vae.check_overflow()
            return {"latent": latent}

        def check(tensors: dict[str, Tensor]) -> None:
            latent = tensors["latent"]
            fits = latent.ndim == 3 and all(n in (None, m) for n, m in zip(expected, latent.shape, strict=True))
            if latent.dtype != torch.float32 or not fits:
                raise ValueError(f"it holds {latent.dtype} {tuple(latent.shape)}")

        return self.load_or_compute(inputs, encode, check)["latent"]
