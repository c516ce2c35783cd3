"""An autoencoder that works without training: it averages colors to cells of 4 x 4 pixels and interpolates them."""

from pathlib import Path

import torch

from lrf_nerfstudio.training.pretrain import PretrainConfig, build_autoencoder, initialize
from lrf_nerfstudio.vae import VAE


def averaging_vae(latent_channels: int = 4, seed: int = 0) -> VAE:
    """3 latent channels for color, the others for detail; f = 4."""
    config = PretrainConfig(
        images=(),
        output=Path(),
        latent_channels=latent_channels,
        width=8,
        encoder_blocks=(0, 0, 0),
        decoder_blocks=(0, 0, 0),
        crop=32,
        seed=seed,
    )
    autoencoder = build_autoencoder(config)
    initialize(autoencoder, torch.rand(2, 3, 64, 64))
    return VAE(autoencoder).eval().requires_grad_(False)
