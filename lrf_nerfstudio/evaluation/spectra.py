"""Power spectra of pictures, for the detail that a reconstruction keeps, and of latents."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RINGS = 16
"""Rings of equal width into which frequencies up to Nyquist are divided; none is empty on grids of 32 x 32 cells."""


def power_spectrum(x: Tensor) -> Tensor:
    """Power of each frequency under a Hann window, the mean removed.

    Args:
        x: [..., H, W].

    Returns:
        [..., H, W] float64 in the order of fft2, scaled such that white noise of variance s^2 has an expected power of
        s^2 at every frequency, whatever the size.
    """
    x = x.double() - x.double().mean(dim=(-2, -1), keepdim=True)
    columns, rows = (torch.hann_window(n, dtype=torch.float64, device=x.device) for n in x.shape[-2:])
    window = columns[:, None] * rows
    return torch.fft.fft2(window * x).abs().square() / window.square().sum()


def radial_frequencies(height: int, width: int) -> Tensor:
    """[H, W] float64, the distance of each frequency of fft2 from zero, in cycles per sample; 0.5 is Nyquist."""
    vertical, horizontal = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
    return torch.hypot(vertical[:, None], horizontal[None])


def detail_power(image: Tensor) -> float:
    """Power of the luminance of an image [H, W, 3] above half the Nyquist frequency (0.25 cycles per pixel)."""
    luminance = image @ image.new_tensor([0.299, 0.587, 0.114])
    return float(power_spectrum(luminance)[radial_frequencies(*luminance.shape).to(image.device) > 0.25].sum())


class RadialSpectrum:
    """Mean power of latents over rings of equal radial frequency, whatever the sizes of their grids.

    Ring k holds the frequencies from k to k + 1 times 0.5 / RINGS cycles per cell, its upper end included; frequency
    zero and the corners beyond Nyquist belong to none.
    """

    def __init__(self, channels: int) -> None:
        self._power = torch.zeros(channels, RINGS, dtype=torch.float64)
        self._count = torch.zeros(RINGS, dtype=torch.float64)

    def add(self, latent: Tensor) -> None:
        """Counts in a latent [C, h, w]."""
        power = power_spectrum(latent).cpu().flatten(1)
        ring = torch.ceil(radial_frequencies(*latent.shape[-2:]) * 2 * RINGS).long().flatten() - 1
        inside = (ring >= 0) & (ring < RINGS)
        self._power.index_add_(1, ring[inside], power[:, inside])
        self._count += torch.bincount(ring[inside], minlength=RINGS)

    def mean(self) -> Tensor:
        """[C, RINGS] float64; NaN in rings that no grid has a frequency in, which happens to grids of few cells."""
        return self._power / self._count


def ring_centres() -> Tensor:
    """[RINGS] float64, the middle of each ring of :class:`RadialSpectrum` in cycles per cell."""
    return (torch.arange(RINGS, dtype=torch.float64) + 0.5) * 0.5 / RINGS


def spectrum_figure(spectra: Mapping[str, Mapping[str, Sequence[float | None]]]) -> "Figure":
    """Draws the spectra of latents, a panel for each scene and a line for each autoencoder.

    Args:
        spectra: scene -> autoencoder -> [RINGS] power relative to the latents' variance, None where unknown.
    """
    from matplotlib.figure import Figure

    columns = min(len(spectra), 3)
    rows = -(-len(spectra) // columns)
    figure = Figure(figsize=(1 + 4 * columns, 0.8 + 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel, (scene, lines) in zip(panels, spectra.items(), strict=False):
        for name, powers in lines.items():
            known = [(f, power) for f, power in zip(ring_centres().tolist(), powers, strict=True) if power is not None]
            panel.plot(*zip(*known, strict=True), marker=".", label=name)
        panel.set(title=scene, yscale="log", xlim=(0, 0.5))
        panel.grid(alpha=0.3, which="both")
        panel.xaxis.set_tick_params(labelbottom=True)
    for panel in panels[len(spectra) :]:
        panel.remove()
    panels[0].legend()
    figure.supxlabel("frequency, cycles per latent cell")
    figure.supylabel("power / variance")
    return figure
