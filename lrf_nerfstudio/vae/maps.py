"""Maps between the spaces: latent to field latent (affine, per channel), and latent to RGB (linear)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrf_nerfstudio.vae.grid import pad_to_multiple

_PERCENTILES = (0.01, 0.99)


class FieldNormalization(nn.Module):
    """The affine map of each latent channel of a scene that takes its 1st percentile to 0 and its 99th to 1.

    Nothing is clamped: values outside the percentiles keep their order and distance, so what a field renders may leave
    the range of the training views. The map is saved with the checkpoint as two buffers; an object made from the number
    of channels alone is filled by `load_state_dict`.

    Attributes:
        shift: [C], the latent value that becomes 0.
        scale: [C], the latent distance that becomes 1; positive.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        """Start with the identity map for `channels` latent channels."""
        super().__init__()
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    @classmethod
    def from_latents(cls, latents: Iterable[Tensor], max_cells: int = 1 << 18) -> "FieldNormalization":
        """Estimate the map from the latents of the training views.

        Args:
            latents: [C, h, w] each, sizes may differ; read once, so a generator will do.
            max_cells: most cells kept at a time. Of longer streams a random subset, the same at every run, is used.

        Raises:
            ValueError: no latents, or values that are not finite.
        """
        cells = _sample_cells(latents, max_cells)
        low, high = torch.quantile(cells, torch.tensor(_PERCENTILES), dim=1)
        scale = high - low
        # A channel that is constant (up to rounding) carries nothing to be stretched: it is only moved to 0.
        constant = scale <= 1e-6 * torch.maximum(low.abs(), high.abs())
        normalization = cls(len(low))
        normalization.shift.copy_(low)
        normalization.scale.copy_(torch.where(constant, torch.ones_like(scale), scale))
        return normalization

    @classmethod
    def to_scaled(cls, channels: int, scaling_factor: float, shift_factor: float) -> "FieldNormalization":
        """Return the map whose field latents are the scaled latents of a VAE, what diffusion models see."""
        normalization = cls(channels)
        normalization.shift.fill_(shift_factor)
        normalization.scale.fill_(1.0 / scaling_factor)
        return normalization

    def to_field(self, latents: Tensor) -> Tensor:
        """Map latents [..., C, h, w] to field latents [..., h, w, C]; differentiable."""
        return (latents.movedim(-3, -1) - self.shift) / self.scale

    def to_latent(self, field: Tensor) -> Tensor:
        """Map field latents [..., h, w, C] to latents [..., C, h, w], the inverse of :meth:`to_field`."""
        return (field * self.scale + self.shift).movedim(-1, -3)


def _sample_cells(latents: Iterable[Tensor], max_cells: int) -> Tensor:
    """Draw cells evenly from a stream of latents [C, h, w]: [C, n] float32 with n <= max_cells.

    Every `stride`-th cell of the shuffled stream is kept; when the buffer is full, every second kept one is dropped and
    the stride doubles. So every cell of the stream has the same chance, and memory does not grow with its length.
    """
    generator = torch.Generator().manual_seed(0)
    kept: list[Tensor] = []
    count, seen, stride = 0, 0, 1
    for latent in latents:
        cells = latent.detach().flatten(1).float().cpu()  # [C, h * w]
        if not torch.isfinite(cells).all():
            raise ValueError("latents contain values that are not finite")
        order = torch.randperm(cells.shape[1], generator=generator)
        chosen = cells[:, order[-seen % stride :: stride]]
        seen += cells.shape[1]
        kept.append(chosen)
        count += chosen.shape[1]
        while count > max_cells:
            kept = [torch.cat(kept, dim=1)[:, ::2]]
            count = kept[0].shape[1]
            stride *= 2
    if count == 0:
        raise ValueError("no latents to normalise by")
    return torch.cat(kept, dim=1)


class LinearRGB(nn.Module):
    """`rgb = matrix @ latent + bias` for each latent cell, the least-squares fit to the mean colour of its pixels.

    Attributes:
        matrix: [3, C].
        bias: [3].
    """

    matrix: Tensor
    bias: Tensor

    def __init__(self, channels: int) -> None:
        """Map `channels` latent channels to mid gray, until :meth:`fit` or `load_state_dict` says more."""
        super().__init__()
        self.register_buffer("matrix", torch.zeros(3, channels))
        self.register_buffer("bias", torch.full((3,), 0.5))

    @classmethod
    def fit(cls, pairs: Iterable[tuple[Tensor, Tensor]], spatial_factor: int) -> "LinearRGB":
        """Fit the map to images and their latents.

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
        """Map latents [..., C, h, w] to a small picture [..., h, w, 3] of RGB values, not clamped."""
        return latents.movedim(-3, -1) @ self.matrix.T + self.bias

    def for_field(self, normalization: FieldNormalization) -> tuple[Tensor, Tensor]:
        """Return the same map for field latents: `rgb = matrix @ field_latent + bias`.

        Spherical harmonics are linear, so the matrix turns the coefficients of field latents into those of RGB, with
        the bias added to the constant term.

        Returns:
            (matrix [3, C], bias [3]).
        """
        return self.matrix * normalization.scale, self.matrix @ normalization.shift + self.bias
