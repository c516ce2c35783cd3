"""The autoencoder that changes nothing: a field in its latent space is ordinary Gaussian splatting in RGB."""

from types import SimpleNamespace

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class IdentityAutoencoder(ModelMixin, ConfigMixin):
    """An AutoencoderTiny of factor 1 with 3 channels to the rest of the package; latents are colors in [-1, 1].

    A field of them is what latent radiance fields are compared with: the same scene at full resolution, splatted by the
    same code.
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

    def encode(self, x: Tensor) -> SimpleNamespace:
        """Return images [B, 3, H, W] in [-1, 1] as they are, as `latents`."""
        return SimpleNamespace(latents=x)

    def decode(self, z: Tensor) -> SimpleNamespace:
        """Return latents [B, 3, H, W] as they are, as `sample`."""
        return SimpleNamespace(sample=z)
