"""The losses of the trainings that are not distances of features.

Those of stage I compare latents in units of their own standard deviation, per channel: shrinking all latents would
otherwise be the easiest way to make corresponding ones agree.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def channel_deviation(latents: Tensor) -> Tensor:
    """Return the standard deviation [C] of each channel of latents [B, C, h, w], over images and positions."""
    return latents.transpose(0, 1).flatten(1).std(dim=1)


def correspondence_loss(
    points_i: Tensor, points_j: Tensor, valid: Tensor, pair_weights: Tensor, deviation: Tensor
) -> Tensor:
    """Return L_corres, the mean difference of latents at corresponding points, in units of the latents' deviation.

    The paper's sum_ij lambda_ij |z_i - z_j|_1 as a mean over pairs, points and channels, with lambda normalized to
    mean 1 over the batch. The gradient passes through `deviation`, so scaling all latents does not change the loss.

    Args:
        points_i: [B, P, C], latents of view i of each pair, sampled at its points.
        points_j: [B, P, C], latents of view j at the corresponding points.
        valid: [B, P], true where there is a point; the others are padding.
        pair_weights: [B], lambda_ij, not all zero.
        deviation: [C], standard deviation of the latents of the batch.

    Returns:
        A scalar; 0 where no pair has a point.
    """
    distances = ((points_i - points_j).abs() / deviation.clamp(min=1e-6)).mean(dim=-1)  # [B, P]
    counts = valid.sum(dim=-1)
    means = torch.where(valid, distances, 0.0).sum(dim=-1) / counts.clamp(min=1)
    weights = torch.where(counts > 0, pair_weights, 0.0)
    return (weights * means).sum() / weights.sum().clamp(min=1e-12)


def regularization_loss(latents: Tensor, original: Tensor) -> Tensor:
    """Return L_reg, the mean difference from the latents of the frozen, original encoder, in units of their deviation.

    Args:
        latents: [B, C, h, w].
        original: [B, C, h, w], of the same images.
    """
    scale = channel_deviation(original).clamp(min=1e-6)[:, None, None]
    return ((latents - original).abs() / scale).mean()


def deviation_loss(deviation: Tensor, original: Tensor) -> Tensor:
    """Return the mean absolute log ratio of the channels' standard deviations [C] to the original latents' [C].

    Diffusion models expect latents of the deviation that they were trained on.
    """
    return (deviation.clamp(min=1e-6) / original.clamp(min=1e-6)).log().abs().mean()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL divergence of the posterior N(mean, exp(logvar)) from N(0, 1).

    Args:
        mean: [B, C, h, w].
        logvar: [B, C, h, w].

    Returns:
        A scalar: the sum over channels and positions, averaged over B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3)).mean()


def range_loss(latents: Tensor, limit: float = 2.0) -> Tensor:
    """Return the mean squared excess of latents beyond -limit and limit."""
    return F.relu(latents.abs() - limit).square().mean()


def gradient_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Return the L1 loss on differences of neighboring pixels, averaged over rows and columns.

    Args:
        decoded: [B, H, W, 3].
        images: [B, H, W, 3].
    """
    error = decoded - images
    return 0.5 * (error.diff(dim=1).abs().mean() + error.diff(dim=2).abs().mean())


def masked_l1(decoded: Tensor, images: Tensor, counts: Tensor) -> Tensor:
    """Return the mean absolute difference of the pixels that count.

    Args:
        decoded: [B, H, W, 3].
        images: [B, H, W, 3].
        counts: [B, H, W], true where a pixel counts.

    Returns:
        A scalar; 0 where no pixel counts.
    """
    differences = torch.where(counts, (decoded - images).abs().mean(dim=-1), 0.0)  # [B, H, W]
    return differences.sum() / counts.sum().clamp(min=1)
