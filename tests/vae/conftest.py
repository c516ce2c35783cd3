"""Fixtures of the autoencoders' tests."""

import pytest
import torch
from tiny_autoencoders import tiny_kl, tiny_taesd

from lrf_nerfstudio.vae import VAE


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
