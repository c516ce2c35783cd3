"""The affine map between latents and field latents."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_PERCENTILES = (0.01, 0.99)


class FieldNormalization(nn.Module):
    """Maps each latent channel of a scene affinely so that its 1st percentile becomes 0 and its 99th becomes 1.

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
        """The identity map for `channels` latent channels."""
        super().__init__()
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    @classmethod
    def from_latents(cls, latents: Iterable[Tensor], max_cells: int = 1 << 18) -> "FieldNormalization":
        """Estimates the map from the latents of the training views.

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

    def to_field(self, latents: Tensor) -> Tensor:
        """Latents [..., C, h, w] to field latents [..., h, w, C]; differentiable."""
        return (latents.movedim(-3, -1) - self.shift) / self.scale

    def to_latent(self, field: Tensor) -> Tensor:
        """Field latents [..., h, w, C] to latents [..., C, h, w]; differentiable, the inverse of :meth:`to_field`."""
        return (field * self.scale + self.shift).movedim(-1, -3)


def _sample_cells(latents: Iterable[Tensor], max_cells: int) -> Tensor:
    """Evenly drawn cells of a stream of latents [C, h, w]: [C, n] float32 with n <= max_cells.

    Every `stride`-th cell of the shuffled stream is kept; when the buffer is full, every second kept one is dropped and
    the stride doubles. So each cell of the stream has the same chance, and memory does not grow with its length.
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
