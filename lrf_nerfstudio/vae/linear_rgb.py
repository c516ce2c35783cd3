"""A linear map from latents to RGB: an instant preview, and colours for formats that know only RGB."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrf_nerfstudio.vae.grid import pad_to_multiple
from lrf_nerfstudio.vae.normalization import FieldNormalization


class LinearRGB(nn.Module):
    """`rgb = matrix @ latent + bias` for each latent cell, the least-squares fit to the mean colour of its pixels.

    Attributes:
        matrix: [3, C].
        bias: [3].
    """

    matrix: Tensor
    bias: Tensor

    def __init__(self, channels: int) -> None:
        """The map to mid grey for `channels` latent channels, to be filled by `load_state_dict`; see :meth:`fit`."""
        super().__init__()
        self.register_buffer("matrix", torch.zeros(3, channels))
        self.register_buffer("bias", torch.full((3,), 0.5))

    @classmethod
    def fit(cls, pairs: Iterable[tuple[Tensor, Tensor]], spatial_factor: int) -> "LinearRGB":
        """Fits the map to images and their latents.

        Args:
            pairs: (latent [C, h, w], image [H, W, 3] in [0, 1]) with h = ceil(H / f), w = ceil(W / f). Read once and
                not kept: memory does not grow with their number.
            spatial_factor: f, pixels per latent cell and axis.

        Raises:
            ValueError: no pairs.
        """
        gram = moments = None
        for latent, image in pairs:
            pixels = pad_to_multiple(image.detach().permute(2, 0, 1)[None].float(), spatial_factor)
            colors = F.avg_pool2d(pixels, spatial_factor)[0].flatten(1).cpu().double()  # [3, h * w]
            cells = latent.detach().flatten(1).cpu().double()
            cells = torch.cat([cells, torch.ones_like(cells[:1])])  # [C + 1, h * w], the last row is for the bias
            gram = cells @ cells.T + (0.0 if gram is None else gram)
            moments = cells @ colors.T + (0.0 if moments is None else moments)
        if gram is None or moments is None:
            raise ValueError("no latents to fit the linear RGB map to")
        # The pseudo-inverse gives the smallest solution where channels are constant or depend on each other.
        solution = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ moments  # [C + 1, 3]
        linear_rgb = cls(len(gram) - 1)
        linear_rgb.matrix.copy_(solution[:-1].T)
        linear_rgb.bias.copy_(solution[-1])
        return linear_rgb

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [..., C, h, w] to a small picture [..., h, w, 3] of RGB values, not clamped."""
        return latents.movedim(-3, -1) @ self.matrix.T + self.bias

    def for_field(self, normalization: FieldNormalization) -> tuple[Tensor, Tensor]:
        """The same map for field latents: `rgb = matrix @ field_latent + bias`.

        Spherical harmonics are linear, so the matrix turns the coefficients of field latents into those of RGB, with
        the bias added to the constant term.

        Returns:
            (matrix [3, C], bias [3]).
        """
        return self.matrix * normalization.scale, self.matrix @ normalization.shift + self.bias
