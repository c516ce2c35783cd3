"""The losses of fine-tuning: agreement of corresponding points, nearness to the original latent space.

Latents are compared in units of their own standard deviation, per channel: shrinking all latents would otherwise be the
easiest way to make corresponding ones agree.
"""

import torch
from torch import Tensor


def channel_deviation(latents: Tensor) -> Tensor:
    """Standard deviation of each channel of latents [B, C, h, w], over pictures and positions: [C]."""
    return latents.transpose(0, 1).flatten(1).std(dim=1)


def correspondence_loss(
    points_i: Tensor, points_j: Tensor, valid: Tensor, pair_weights: Tensor, deviation: Tensor
) -> Tensor:
    """L_corres: mean difference of the latents at corresponding points, in units of the latents' deviation.

    sum_ij lambda_ij |z_i - z_j|_1 of the paper, as a mean over pairs, points and channels, with lambda normalised to
    mean 1 over the batch. The gradient passes through `deviation`, so that scaling all latents changes nothing.

    Args:
        points_i: [B, P, C], latents of view i of each pair, sampled at its points.
        points_j: [B, P, C], latents of view j at the corresponding points.
        valid: [B, P], true where there is a point; the rest fills up.
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
    """L_reg: mean difference from the latents of the frozen, original encoder, in units of their deviation.

    Args:
        latents: [B, C, h, w].
        original: [B, C, h, w], of the same images.
    """
    scale = channel_deviation(original).clamp(min=1e-6)[:, None, None]
    return ((latents - original).abs() / scale).mean()


def deviation_loss(deviation: Tensor, original: Tensor) -> Tensor:
    """Mean absolute log ratio of the channels' standard deviations [C] to those of the original latents [C].

    Diffusion models expect latents of the deviation that they were trained on.
    """
    return (deviation.clamp(min=1e-6) / original.clamp(min=1e-6)).log().abs().mean()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of the posterior N(mean, exp(logvar)) from N(0, 1), both [B, C, h, w]: summed, averaged over B."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3)).mean()
