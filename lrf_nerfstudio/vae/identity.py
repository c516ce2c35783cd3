"""The autoencoder that changes nothing: a field in its latent space is ordinary Gaussian splatting in RGB."""

from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class IdentityAutoencoder(ModelMixin, ConfigMixin):
    """To the rest of the package an AutoencoderTiny of factor 1 with 3 channels; latents are colours in [-1, 1].

    A field of them is what latent radiance fields are to be compared with: the same scene at full resolution, splatted
    by the same code.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        encoder_block_out_channels: tuple[int, ...] = (3,),
        decoder_block_out_channels: tuple[int, ...] = (3,),
        upsampling_scaling_factor: int = 1,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), nn.Identity()
        self.register_buffer("where", torch.zeros(()), persistent=False)  # modules without weights are on no device

    def encode(self, x: Tensor) -> SimpleNamespace:
        """Images [B, 3, H, W] in [-1, 1], as they are, as `latents`."""
        return SimpleNamespace(latents=x)

    def decode(self, z: Tensor) -> SimpleNamespace:
        """Latents [B, 3, H, W], as they are, as `sample`."""
        return SimpleNamespace(sample=z)
