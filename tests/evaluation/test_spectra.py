"""Spectra of signals whose spectra are known."""

import math

import pytest
import torch
import torch.nn.functional as F

from lrf_nerfstudio.evaluation.spectra import (
    RINGS,
    RadialSpectrum,
    detail_power,
    power_spectrum,
    radial_frequencies,
    ring_centres,
    spectrum_figure,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(96, 96), (61, 40)])
def test_white_noise_has_its_variance_at_every_frequency_and_size(size: tuple[int, int]) -> None:
    power = power_spectrum(5.0 + 3.0 * noise(200, *size)).mean(0)
    away_from_zero = power[radial_frequencies(*size) > 3 / min(size)]
    assert away_from_zero.mean() == pytest.approx(9.0, rel=0.02)
    assert away_from_zero.std() < 1.0  # 200 exponentially distributed periodograms: 9 / sqrt(200) = 0.64


def test_frequencies_by_hand() -> None:
    frequencies = radial_frequencies(4, 2)
    expected = [[0.0, 0.5], [0.25, math.hypot(0.25, 0.5)], [0.5, math.sqrt(0.5)], [0.25, math.hypot(0.25, 0.5)]]
    torch.testing.assert_close(frequencies, torch.tensor(expected, dtype=torch.float64))


def test_the_radial_spectrum_of_white_noise_is_flat_over_mixed_sizes() -> None:
    spectrum = RadialSpectrum(2)
    for seed in range(40):
        spectrum.add(torch.tensor([1.0, 2.0])[:, None, None] * noise(2, 128, 96 + 8 * seed, seed=seed))
    flat = torch.tensor([1.0, 4.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close((spectrum.mean() / flat)[:, 2:], torch.ones(2, RINGS - 2).double(), atol=0.1, rtol=0)


@pytest.mark.parametrize("frequency", [0.1, 0.24, 0.4])
def test_a_sinusoid_peaks_in_the_ring_of_its_frequency(frequency: float) -> None:
    x, y = torch.meshgrid(torch.arange(90.0), torch.arange(120.0), indexing="xy")
    angle = 0.7
    wave = torch.sin(2 * math.pi * frequency * (math.cos(angle) * x + math.sin(angle) * y))
    spectrum = RadialSpectrum(1)
    spectrum.add(wave[None])
    peak = spectrum.mean()[0].argmax()
    assert abs(ring_centres()[peak] - frequency) <= 0.25 / RINGS
    assert spectrum.mean()[0].max() > 1e3 * spectrum.mean()[0].median()


def test_rings_without_a_frequency_are_unknown() -> None:
    spectrum = RadialSpectrum(1)
    spectrum.add(noise(1, 4, 4))  # 0.25, 0.25 sqrt(2) and 0.5 cycles per cell
    known = (~spectrum.mean()[0].isnan()).nonzero().flatten().tolist()
    assert known == [7, 11, 15]  # the rings that end at 0.25, 0.3542 and 0.5


def test_detail_is_power_above_half_nyquist() -> None:
    """Noise has it in proportion to its variance, a wave of 0.2 cycles per pixel next to none, one of 0.3 all."""
    image = 0.5 + 0.1 * noise(64, 80, 3)
    assert detail_power(0.5 + 2 * (image - 0.5)) == pytest.approx(4 * detail_power(image))

    def wave(frequency: float) -> torch.Tensor:
        return torch.sin(2 * math.pi * frequency * torch.arange(100.0))[None, :, None].expand(64, 100, 3)

    whole = power_spectrum(wave(0.3)[..., 0]).sum()
    assert detail_power(wave(0.3)) == pytest.approx(float(whole), rel=1e-3)
    assert detail_power(wave(0.2)) < 1e-4 * whole


def test_a_blurred_picture_has_lost_its_detail() -> None:
    image = noise(3, 120, 90)
    box = F.avg_pool2d(F.pad(image[None], (2, 2, 2, 2), mode="replicate"), 5, stride=1)[0]
    assert detail_power(box.permute(1, 2, 0)) < 0.05 * detail_power(image.permute(1, 2, 0))


def test_the_luminance_counts_not_the_colour() -> None:
    """Green and red stripes of equal luminance are no detail."""
    stripes = torch.zeros(32, 32, 3, dtype=torch.float64)
    stripes[:, ::2, 0] = 0.587
    stripes[:, 1::2, 1] = 0.299
    assert detail_power(stripes) < 1e-20
    stripes[:, 1::2, 1] = 0.4
    assert detail_power(stripes) > 1e-3


def test_the_figure_has_a_panel_for_each_scene_and_a_line_for_each_autoencoder() -> None:
    flat: list[float | None] = [1.0] * RINGS
    gap: list[float | None] = [None, *flat[1:]]
    figure = spectrum_figure({scene: {"before": flat, "after": gap} for scene in ("fox", "flower", "plush", "cape")})
    assert [axes.get_title() for axes in figure.axes] == ["fox", "flower", "plush", "cape"]
    for axes in figure.axes:
        before, after = axes.get_lines()
        assert len(before.get_xdata()) == RINGS and len(after.get_xdata()) == RINGS - 1
        assert axes.get_yscale() == "log"
    legend = figure.axes[0].get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["before", "after"]
