"""Tiny autoencoders with random weights: the real classes of diffusers, small enough to run in milliseconds."""

from pathlib import Path

import pytest
import torch

from lrf_nerfstudio.vae import VAE

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


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


@pytest.fixture(params=[tiny_kl, tiny_taesd], ids=["kl", "tiny"])
def autoencoder(request):
    return request.param()


@pytest.fixture
def vae(autoencoder):
    return VAE(autoencoder, source="test").eval()


@pytest.fixture
def images():
    """[2, 21, 30, 3]: smooth, and of no size that any factor divides."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, 4, 5, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (21, 30), mode="bilinear")
    return fine.permute(0, 2, 3, 1)


@pytest.fixture
def data():
    """The folder of real photographs and weights beside the checkout."""
    if not DATA.is_dir():
        pytest.skip("no ../shared/data")
    return DATA
