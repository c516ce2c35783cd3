"""Options of the scene's own decoder, and how a run makes it."""

from dataclasses import dataclass

from lrf_nerfstudio.field.decoder import SceneDecoder
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import AtLeastOne, Count, Fraction, NotNegative
from lrf_nerfstudio.vae import VAE, FieldNormalization, LinearRGB


@dataclass
class SceneDecoderConfig:
    """The scene's own decoder, which the last part of a run fits with the field to the photographs."""

    share: Fraction = 0.375
    """Fraction of the run that it is fitted in. 0 leaves it out: the VAE decodes, which is the method of the paper."""
    warmup: Fraction = 0.03
    """Fraction of this part in which the decoder is fitted alone, before the Gaussians follow."""
    cell: AtLeastOne = 4
    """Pixels per cell of the grid that it works on, along each axis; divides twice the VAE's factor. VAEs with a
    smaller factor take that."""
    width: AtLeastOne = 32
    """Channels between its convolutions."""
    blocks: Count = 2
    """Its residual blocks."""
    latent_weight: NotNegative = 0.0
    """Weight of the loss of latents against those of the photographs while field and decoder are fitted. It keeps the
    field's latents what the VAE's decoder and diffusion models know, and is computed in the steps whose grid contains
    the VAE's, which with the default `cell` is every fourth; 0 leaves it out."""

    def setup(self, vae: VAE, linear_rgb: LinearRGB, normalization: FieldNormalization) -> SceneDecoder | None:
        """Make a decoder whose pictures are the linear map of the latents to RGB; None if it is left out.

        Raises:
            UserError: if the cells do not fit the VAE.
        """
        if self.share == 0:
            return None
        cell, twice = min(self.cell, vae.spatial_factor), 2 * vae.spatial_factor
        if twice % cell:
            raise UserError(
                f"--pipeline.model.scene-decoder.cell must divide {twice}, twice the factor of the VAE; "
                f"it is {self.cell}."
            )
        decoder = SceneDecoder(vae.latent_channels, vae.spatial_factor, cell, self.width, self.blocks)
        decoder.start_from(linear_rgb, normalization)
        return decoder
