"""What is behind the Gaussians."""

from torch import Tensor, no_grad

from lrf_nerfstudio.vae import VAE, FieldNormalization

Color = tuple[float, ...]
"""RGB in [0, 1]."""

CELLS = 32
"""Side of the plain picture that is encoded, in cells: so large that its middle hardly sees the edges, which encoders
pad with zeros."""


class Backgrounds:
    """Field latents of plain colors, each encoded once.

    Args:
        vae: encodes.
        normalization: latent to field latent; call :meth:`forget` when it changes.
    """

    def __init__(self, vae: VAE, normalization: FieldNormalization) -> None:
        self._vae, self._normalization = vae, normalization
        self._fields: dict[Color, Tensor] = {}

    @no_grad()
    def of(self, color: Color) -> Tensor:
        """Return the field latent [C] in the middle of a plain picture of a color."""
        if color not in self._fields:
            side = CELLS * self._vae.spatial_factor
            latent = self._vae.encode(self._normalization.shift.new_tensor(color).expand(1, side, side, 3))
            self._fields[color] = self._normalization.to_field(latent)[0, CELLS // 2, CELLS // 2]
        return self._fields[color]

    def forget(self) -> None:
        """Encode anew what is asked for from now on."""
        self._fields.clear()
