"""Tiny autoencoders with random weights: the real classes of diffusers, small enough to run in milliseconds."""

import torch


def tiny_kl(**options):
    """AutoencoderKL with 3 latent channels and f = 2, which no default assumes."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    defaults = {
        "block_out_channels": (2, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "latent_channels": 3,
        "shift_factor": 0.25,
    }
    return AutoencoderKL(**(defaults | options))


def tiny_taesd(**options):
    """AutoencoderTiny with 5 latent channels and f = 4."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    defaults = {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (0, 1, 1),
        "num_decoder_blocks": (1, 1, 0),
        "latent_channels": 5,
    }
    return AutoencoderTiny(**(defaults | options))
