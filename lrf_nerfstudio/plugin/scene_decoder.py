"""Options of the scene's own decoder, and how a run makes it."""

from dataclasses import dataclass
from pathlib import Path

from lrf_nerfstudio.field.decoder import SceneDecoder
from lrf_nerfstudio.field.generic_decoder import for_field, load_generic, shipped_generic
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
    start: str = "auto"
    """What it is at first: `linear`, the linear map of the latents to RGB; `generic`, what many scenes taught it, where
    a generic decoder lies beside the VAE or in the package; `auto`, generic where there is one for these options and
    linear where not; or the file of a generic decoder."""
    latent_weight: NotNegative = 0.1
    """Weight of the loss of latents against those of the photographs while field and decoder are fitted. It keeps the
    field's latents what the VAE's decoder and diffusion models know, and is computed in the steps whose grid contains
    the VAE's, which with the default `cell` is every fourth; 0 leaves it out."""

    def setup(self, vae: VAE, linear_rgb: LinearRGB, normalization: FieldNormalization) -> SceneDecoder | None:
        """Make a decoder whose pictures are the linear map of the latents to RGB, whatever `start` says; None if it is
        left out.

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

    def begin(self, decoder: SceneDecoder, vae: VAE, normalization: FieldNormalization) -> None:
        """Give the decoder of a scene the weights that `start` says.

        Args:
            decoder: as :meth:`setup` made it.
            vae: of the scene.
            normalization: of the scene.

        Raises:
            UserError: if the generic decoder is missing, cannot be read, or does not fit the VAE or the other options.
        """
        if self.start == "linear":
            return
        option = "--pipeline.model.scene-decoder"
        path = shipped_generic(vae) if self.start in ("auto", "generic") else Path(self.start).expanduser()
        if path is None:
            if self.start == "generic":
                raise UserError(
                    f"There is no generic decoder for the latents of {vae.source!r} ({option}.start generic). Start "
                    "from `linear`, or train one with `lrf generic-decoder`."
                )
            return
        generic = load_generic(path, vae)
        if generic.config != decoder.config:
            if self.start == "auto":
                return
            differing = [name for name, value in generic.config.items() if value != decoder.config[name]]
            raise UserError(
                f"The generic decoder in {path} has "
                + ", ".join(f"{name} {generic.config[name]}" for name in differing)
                + ", the scene's "
                + ", ".join(f"{name} {decoder.config[name]}" for name in differing)
                + f". Set the options {option} to those of the file, or start from `linear`."
            )
        decoder.load_state_dict(for_field(generic, normalization).state_dict())
