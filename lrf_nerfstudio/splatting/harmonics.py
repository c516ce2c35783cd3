"""Real spherical harmonics of degree 0 to 3."""

import torch
from torch import Tensor

MAX_SH_DEGREE = 3
"""Largest degree that `evaluate_sh` and `rasterize` know."""


def sh_basis(degree: int, directions: Tensor) -> Tensor:
    """Evaluate the (degree + 1)^2 real spherical harmonics, in the order and with the signs of 3DGS.

    Args:
        degree: 0 to 3.
        directions: Unit vectors [..., 3].

    Returns:
        [..., (degree + 1)^2]. After Sloan, "Efficient Spherical Harmonic Evaluation", JCGT 2013.
    """
    x, y, z = directions.unbind(-1)
    bases = [torch.full_like(x, 0.2820947917738781)]
    if degree > 0:
        bases += [-0.48860251190292 * y, 0.48860251190292 * z, -0.48860251190292 * x]
    if degree > 1:
        zz, c1, s1 = z * z, x * x - y * y, 2 * x * y
        bases += [
            0.5462742152960395 * s1,
            -1.092548430592079 * z * y,
            0.9461746957575601 * zz - 0.3153915652525201,
            -1.092548430592079 * z * x,
            0.5462742152960395 * c1,
        ]
    if degree > 2:
        radial = 0.4570457994644658 - 2.285228997322329 * zz
        bases += [
            -0.5900435899266435 * (x * s1 + y * c1),
            1.445305721320277 * z * s1,
            radial * y,
            z * (1.865881662950577 * zz - 1.119528997770346),
            radial * x,
            1.445305721320277 * z * c1,
            -0.5900435899266435 * (x * c1 - y * s1),
        ]
    return torch.stack(bases, dim=-1)


def evaluate_sh(degree: int, directions: Tensor, coeffs: Tensor) -> Tensor:
    """Evaluate features that depend on the viewing direction. Differentiable in both tensors.

    Nothing is added or clamped (3DGS adds 0.5 and clamps at 0, which suits RGB but not latents).

    Args:
        degree: 0 to 3.
        directions: Viewing directions [N, 3], camera to Gaussian; need not be normalized.
        coeffs: [N, K, C] with K >= (degree + 1)^2; the rest is ignored.

    Returns:
        Features in field latent space [N, C].
    """
    assert 0 <= degree <= MAX_SH_DEGREE, f"degree must be 0 to {MAX_SH_DEGREE}, not {degree}"
    n_bases = (degree + 1) ** 2
    assert directions.ndim == 2 and directions.shape[1] == 3, f"directions must be [N, 3]: {tuple(directions.shape)}"
    assert coeffs.ndim == 3 and len(coeffs) == len(directions) and coeffs.shape[1] >= n_bases, (
        f"coeffs must be [N, K, C] with N = {len(directions)} and K >= {n_bases}: {tuple(coeffs.shape)}"
    )
    bases = sh_basis(degree, torch.nn.functional.normalize(directions, dim=-1))
    return (bases[..., None] * coeffs[:, :n_bases]).sum(dim=-2)
