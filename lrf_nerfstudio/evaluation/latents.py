"""What fine-tuning a VAE changes: how consistent its latents are between views, and what that costs elsewhere."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lrf_nerfstudio.evaluation.metrics import psnr, psnr_and_ssim
from lrf_nerfstudio.evaluation.spectra import RadialSpectrum, detail_power
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.images import read_image
from lrf_nerfstudio.vae import VAE, sample_latents

if TYPE_CHECKING:
    from lrf_nerfstudio.correspondence import SceneCorrespondences


@dataclass(frozen=True)
class LatentMeasures:
    """One VAE on the photographs of one scene. A quotient that is not defined, such as 0 / 0, is None."""

    inconsistency: float | None
    """Mean |z_i - z_j|_1 of latents at corresponding points, relative to the mean at points that do not correspond: 0
    where views agree, about 1 where they have nothing to do with each other."""
    inconsistency_by_channel: list[float | None]
    """The same for each channel alone."""
    reconstruction_psnr: float | None
    """Of the decoded latent against the photograph in dB, mean of the images; None if one is reproduced exactly."""
    reconstruction_ssim: float | None
    """Likewise."""
    detail: float | None
    """Power of the reconstructions above half the Nyquist frequency over that of the photographs. Both are summed over
    the scene and then divided: a photograph without fine detail, whose quotient says little, weighs little."""
    latent_drift: float | None
    """Mean |z - z_ref| over the mean of the channels' standard deviations of z_ref, the reference VAE's latents. None
    where these have another shape."""
    original_decoder_psnr: float | None
    """What the reference VAE's decoder makes of this VAE's latents, against the photograph in dB, mean of the images:
    what those see who know the reference's latents, such as diffusion models. To be compared with the reference's own
    reconstruction. None where the latents have another shape, or if an image is reproduced exactly."""
    latent_std: list[float]
    """Standard deviation of each channel over all cells of all images."""
    latent_std_ratio: list[float | None] | None
    """The same relative to the reference VAE; None where its latents have another shape."""
    spectrum: list[float | None]
    """Radially averaged power of the latents, each channel relative to its variance, mean of the channels; at
    :func:`lrf_nerfstudio.evaluation.spectra.ring_centres`. White noise has 1 everywhere. None in empty rings."""
    images: int
    """Photographs measured on."""
    pairs: int
    """Pairs of photographs with correspondences."""
    correspondences: int
    """Pairs of corresponding points."""


def measure_scene(
    correspondences: "SceneCorrespondences",
    vaes: Mapping[str, VAE],
    reference: str,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, LatentMeasures]:
    """Measures VAEs on the photographs of a scene, which are read one at a time and encoded once for each VAE.

    Args:
        correspondences: of the scene; the weights of the pairs play no role.
        vaes: by name.
        reference: name of the VAE that the others are compared with.
        advance: called after each image and VAE, `len(scene.views) * len(vaes)` times.

    Returns:
        Measures by name of the VAE, in the order of `vaes`.

    Raises:
        UserError: there are no correspondences, an image cannot be read, or a VAE yields NaN or infinity.
    """
    folder = correspondences.scene.folder
    if not correspondences.pairs:
        raise UserError(f"The scene {folder} has no correspondences, so nothing to compare latents at.")
    sums = {name: _Sums(vae, correspondences) for name, vae in vaes.items()}
    reference_first = sorted(vaes, key=lambda name: name != reference)
    for index, view in enumerate(correspondences.scene.views):
        photograph = torch.from_numpy(read_image(view.path)).float() / 255.0
        reference_latent = None
        for name in reference_first:
            with torch.no_grad():
                latent = vaes[name].encode(photograph[None])[0]
                reconstruction = vaes[name].decode(latent[None], *photograph.shape[:2])[0]
                reference_latent = latent if reference_latent is None else reference_latent
                by_reference = reconstruction if name == reference else None
                if by_reference is None and latent.shape == reference_latent.shape:
                    by_reference = vaes[reference].decode(latent[None], *photograph.shape[:2])[0]
            if not (torch.isfinite(latent).all() and torch.isfinite(reconstruction).all()):
                raise UserError(f"The VAE {name} makes NaN or infinity of {view.path}; its weights are of no use.")
            sums[name].add(index, photograph.to(latent.device), latent, reconstruction, reference_latent, by_reference)
            advance()
    return {name: sums[name].measures(sums[reference]) for name in vaes}


def match_distances(latents_i: Tensor, latents_j: Tensor, seed: int | tuple[int, ...] = 0) -> tuple[Tensor, Tensor]:
    """Distances of latents that correspond, and of the same latents when each meets another one's partner.

    Args:
        latents_i: [M, C] at points of one photograph.
        latents_j: [M, C] at the corresponding points of another.
        seed: of the random partners.

    Returns:
        Two [C] float64, sums over the M points: of |z_i - z_j|, and of |z_i - z_k| with k the partner of another point.
        Partners are exchanged in one random cycle, so that no point keeps its own; with M = 1 there is no other.
    """
    cycle = np.random.default_rng(seed).permutation(len(latents_i))
    at, partner = (torch.from_numpy(order).to(latents_i.device) for order in (cycle, np.roll(cycle, 1)))
    latents_i, latents_j = latents_i.double(), latents_j.double()
    return (latents_i - latents_j).abs().sum(0), (latents_i[at] - latents_j[partner]).abs().sum(0)


class _Sums:
    """Sums over the images of a scene for one VAE. Of latents, only those at points of unfinished pairs are kept."""

    def __init__(self, vae: VAE, correspondences: "SceneCorrespondences") -> None:
        self._correspondences = correspondences
        self._factor = vae.spatial_factor
        self._sampled: dict[int, Tensor] = {}  # pair -> [M, C] at the points of its first image
        self._spectrum = RadialSpectrum(vae.latent_channels)
        zeros = torch.zeros(vae.latent_channels, dtype=torch.float64)
        self._matched, self._shuffled, self._values, self._squares = (zeros.clone() for _ in range(4))
        self._cells = self._images = 0
        self._psnr = self._ssim = self._detail = self._photograph_detail = 0.0
        self._drift: float | None = 0.0
        self._original_decoder_psnr: float | None = 0.0

    def add(
        self,
        index: int,
        photograph: Tensor,
        latent: Tensor,
        reconstruction: Tensor,
        reference_latent: Tensor,
        by_reference: Tensor | None,
    ) -> None:
        """Counts in view number `index`; views come in order.

        Args:
            index: of the view in the scene.
            photograph: [H, W, 3] in [0, 1].
            latent: [C, h, w] of the photograph.
            reconstruction: [H, W, 3], the latent decoded.
            reference_latent: [C', h', w'], what the reference VAE makes of the photograph.
            by_reference: [H, W, 3], the latent decoded by the reference VAE; None where it takes another shape.
        """
        for number, pair in enumerate(self._correspondences.pairs):
            if pair.i == index:
                self._sampled[number] = self._sample(latent, pair.points_i)
            elif pair.j == index:
                first, second = self._sampled.pop(number), self._sample(latent, pair.points_j)
                matched, shuffled = match_distances(first, second, seed=(pair.i, pair.j))
                self._matched += matched.cpu()
                self._shuffled += shuffled.cpu()
        quality = psnr_and_ssim(reconstruction, photograph)
        self._psnr += quality["psnr"]
        self._ssim += quality["ssim"]
        self._detail += detail_power(reconstruction)
        self._photograph_detail += detail_power(photograph)
        self._spectrum.add(latent)
        self._values += latent.double().sum((1, 2)).cpu()
        self._squares += latent.double().square().sum((1, 2)).cpu()
        self._cells += latent[0].numel()
        self._images += 1
        if self._drift is None or latent.shape != reference_latent.shape:
            self._drift = None
        else:
            self._drift += float((latent - reference_latent.to(latent.device)).double().abs().sum())
        if self._original_decoder_psnr is None or by_reference is None:
            self._original_decoder_psnr = None
        else:
            self._original_decoder_psnr += psnr(by_reference, photograph)

    def _sample(self, latent: Tensor, points: np.ndarray) -> Tensor:
        return sample_latents(latent[None], torch.from_numpy(points)[None].to(latent.device), self._factor)[0]

    def measures(self, reference: "_Sums") -> LatentMeasures:
        """What the sums amount to."""
        variance = self._variance()
        drift = std_ratio = None
        if self._drift is not None:
            mean_difference = self._drift / (self._cells * len(variance))
            drift = _quotient(mean_difference, float(reference._variance().sqrt().mean()))
            std_ratio = _quotients(variance.sqrt(), reference._variance().sqrt())
        pairs = self._correspondences.pairs
        return LatentMeasures(
            inconsistency=_quotient(float(self._matched.sum()), float(self._shuffled.sum())),
            inconsistency_by_channel=_quotients(self._matched, self._shuffled),
            reconstruction_psnr=_quotient(self._psnr, self._images),
            reconstruction_ssim=_quotient(self._ssim, self._images),
            detail=_quotient(self._detail, self._photograph_detail),
            latent_drift=drift,
            original_decoder_psnr=(
                None if self._original_decoder_psnr is None else _quotient(self._original_decoder_psnr, self._images)
            ),
            latent_std=variance.sqrt().tolist(),
            latent_std_ratio=std_ratio,
            spectrum=[_finite(power) for power in (self._spectrum.mean() / variance[:, None]).nanmean(0).tolist()],
            images=self._images,
            pairs=len(pairs),
            correspondences=sum(len(pair.points_i) for pair in pairs),
        )

    def _variance(self) -> Tensor:
        """[C] float64."""
        return (self._squares / self._cells - (self._values / self._cells).square()).clamp(min=0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _quotient(numerator: float, denominator: float) -> float | None:
    return _finite(numerator / denominator) if denominator else None


def _quotients(numerators: Tensor, denominators: Tensor) -> list[float | None]:
    return [_quotient(n, d) for n, d in zip(numerators.tolist(), denominators.tolist(), strict=True)]
