"""Options of the scene's own decoder, and how a run makes it."""

from dataclasses import dataclass

from lrf_nerfstudio.field.decoder import SceneDecoder
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, FieldNormalization, LinearRGB


@dataclass
class SceneDecoderConfig:
    """The scene's own decoder, which the last part of a run fits with the field to the photographs."""

    share: float = 0.375
    """Fraction of the run that it is fitted in. 0 leaves it out: the VAE decodes, which is the method of the paper."""
    warmup: float = 0.03
    """Fraction of this part in which the decoder is fitted alone, before the Gaussians follow."""
    cell: int = 4
    """Pixels per cell of the grid that it works on, along each axis; divides twice the VAE's factor. VAEs with a
    smaller factor take that."""
    width: int = 32
    """Channels between its convolutions."""
    blocks: int = 2
    """Its residual blocks."""
    latent_weight: float = 0.0
    """Weight of the loss of latents against those of the photographs while field and decoder are fitted. It keeps the
    field's latents what the VAE's decoder and diffusion models know, and is computed in the steps whose grid contains
    the VAE's, which with the default `cell` is every fourth; 0 leaves it out."""

    def check(self, factor: int) -> None:
        """Check that every option is in its range.

        Args:
            factor: of the VAE.

        Raises:
            UserError: if one is not; the message names it.
        """
        option = "--pipeline.model.scene-decoder"
        for name in ("share", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{option}.{name} must be a fraction, 0 to 1; it is {getattr(self, name)}.")
        if not self.latent_weight >= 0:
            raise UserError(f"{option}.latent-weight must be 0 or more; it is {self.latent_weight}.")
        if min(self.cell, self.width, self.blocks + 1) < 1:
            raise UserError(f"{option}.cell and .width must be 1 or more and .blocks 0 or more.")
        if 2 * factor % min(self.cell, factor):
            raise UserError(f"{option}.cell must divide {2 * factor}, twice the factor of the VAE; it is {self.cell}.")

    def setup(self, vae: VAE, linear_rgb: LinearRGB, normalization: FieldNormalization) -> SceneDecoder | None:
        """Make a decoder whose pictures are the linear map of the latents to RGB; None if it is left out.

        Raises:
            UserError: if an option is out of its range.
        """
        self.check(vae.spatial_factor)
        if self.share == 0:
            return None
        cell = min(self.cell, vae.spatial_factor)
        decoder = SceneDecoder(vae.latent_channels, vae.spatial_factor, cell, self.width, self.blocks)
        decoder.start_from(linear_rgb, normalization)
        return decoder
