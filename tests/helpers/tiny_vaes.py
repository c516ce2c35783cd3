"""An untrained autoencoder, small enough to encode a scene in no time."""

from pathlib import Path

import torch


def make_vae(folder: Path, channels: int = 4, seed: int = 0) -> Path:
    """Write an untrained AutoencoderTiny with f = 8."""
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        autoencoder = AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        )
    autoencoder.save_pretrained(folder)
    return folder
