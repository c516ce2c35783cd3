"""Dropout of Gaussians, which keeps a field from explaining few views by what is right before each camera."""

import torch
from torch import Tensor


def dropped_out(opacities: Tensor, rate: float) -> Tensor:
    """Set the opacities of randomly chosen Gaussians to zero, and raise the others to make up for them.

    Gaussians near a camera hide those behind them, which then get no gradient. When a part of the Gaussians is left out
    at each step, others must explain the same pixels (Park, Ryu and Kim, "DropGaussian", CVPR 2025).

    Args:
        opacities: [N], in [0, 1].
        rate: probability that a Gaussian is left out, at least 0 and less than 1.

    Returns:
        [N], in [0, 1]: zero or `opacities / (1 - rate)`, whose expected value is `opacities` where it stays below 1.
    """
    kept = torch.rand_like(opacities) >= rate
    return (opacities * kept / (1 - rate)).clamp(max=1.0)
