"""Autoencoders: load any, encode and decode, map latents to fields and colours, keep latents on disk.

Importing this package costs torch alone; diffusers is imported when an autoencoder is loaded.
"""

from lrf_nerfstudio.vae.autoencoder import VAE, VAEConfig, fingerprints
from lrf_nerfstudio.vae.cache import LatentCache, default_cache_directory
from lrf_nerfstudio.vae.grid import downsample_mask, latent_size, pad_to_multiple, sample_latents, unpad
from lrf_nerfstudio.vae.maps import FieldNormalization, LinearRGB

__all__ = [
    "VAE",
    "FieldNormalization",
    "LatentCache",
    "LinearRGB",
    "VAEConfig",
    "default_cache_directory",
    "downsample_mask",
    "fingerprints",
    "latent_size",
    "pad_to_multiple",
    "sample_latents",
    "unpad",
]
