"""Autoencoders whose latents are colors: a field in their latent space is ordinary Gaussian splatting in RGB."""

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


class AveragingAutoencoder(ModelMixin, ConfigMixin):
    """An AutoencoderTiny to the rest of the package; latents are mean colors of cells in [-1, 1], enlarged bicubically.

    A field of them is RGB at the latent resolution, what a VAE of the same factor must beat.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        encoder_block_out_channels: tuple[int, ...] = (3, 3, 3),
        decoder_block_out_channels: tuple[int, ...] = (3, 3, 3),
        upsampling_scaling_factor: int = 2,
    ) -> None:
        """Make the autoencoder of factor f.

        Args:
            in_channels: 3, as the next two.
            out_channels: 3.
            latent_channels: 3.
            scaling_factor: of diffusion models, which nobody trains on colors.
            shift_factor: see `scaling_factor`.
            encoder_block_out_channels: as many numbers as make f: f is 2 to the power of their count less one.
            decoder_block_out_channels: as many.
            upsampling_scaling_factor: 2.
        """
        super().__init__()
        factor = 2 ** (len(encoder_block_out_channels) - 1)
        # A convolution, not a pooling: its weights tell the latent spaces of different factors apart.
        self.encoder = nn.Conv2d(3, 3, factor, stride=factor, groups=3, bias=False)
        nn.init.constant_(self.encoder.weight, 1 / factor**2)
        self.decoder = nn.Upsample(scale_factor=factor, mode="bicubic")

    def encode(self, x: Tensor) -> SimpleNamespace:
        """Return the mean colors [B, 3, H / f, W / f] of images [B, 3, H, W] in [-1, 1], as `latents`."""
        return SimpleNamespace(latents=self.encoder(x))

    def decode(self, z: Tensor) -> SimpleNamespace:
        """Return latents [B, 3, h, w], enlarged to [B, 3, f h, f w], as `sample`."""
        return SimpleNamespace(sample=self.decoder(z))
