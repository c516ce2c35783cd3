"""A trained field apart from nerfstudio: cameras of the latent grid, the first Gaussians, similarity, one file."""

from lrf_nerfstudio.field.latent_field import LatentField

__all__ = ["LatentField"]
