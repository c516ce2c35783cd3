"""What a field is fitted by: L1 and SSIM, of latent grids and of pictures."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
"""The constants of Wang et al. 2004, as everywhere in Gaussian splatting."""


def fitting_loss(rendered: Tensor, target: Tensor, mask: Tensor | None, ssim_weight: float) -> Tensor:
    """Return (1 - w) L1 + w (1 - SSIM) of latents, inside the masks: the loss of 3DGS (Kerbl et al. 2023) and of LRF.

    Args:
        rendered: [B, h, w, C], field latents.
        target: [B, h, w, C], what they are to be.
        mask: [B, h, w], True where a cell counts; None: everywhere.
        ssim_weight: w.
    """
    l1 = (rendered - target).abs()
    if mask is None:
        loss = l1.mean()
    else:
        weight = mask[..., None]
        loss = (l1 * weight).sum() / (weight.sum() * l1.shape[-1]).clamp(min=1)
        rendered, target = rendered * weight, target * weight
    if ssim_weight == 0:
        return loss
    # The mean over views and channels: SSIM looks at each by itself.
    similarity = structural_similarity(rendered.movedim(0, 2).flatten(2), target.movedim(0, 2).flatten(2))
    return (1 - ssim_weight) * loss + ssim_weight * (1 - similarity)


def picture_loss(picture: Tensor, photograph: Tensor, mask: Tensor | None, ssim_weight: float) -> Tensor:
    """Return (1 - w) L1 + w (1 - SSIM) of a picture and a photograph, inside a mask, as in 3DGS.

    Args:
        picture: [H, W, 3], not necessarily within [0, 1].
        photograph: [H, W, 3] in [0, 1].
        mask: [H, W], True where a pixel counts; None: everywhere.
        ssim_weight: w.
    """
    l1 = (picture - photograph).abs()
    if mask is None:
        loss = l1.mean()
    else:
        weight = mask[..., None]
        loss = (l1 * weight).sum() / (3 * weight.sum()).clamp(min=1)
        picture, photograph = picture * weight, photograph * weight
    if ssim_weight == 0:
        return loss
    measure = structural_similarity if min(picture.shape[:2]) < WINDOW else picture_similarity
    return (1 - ssim_weight) * loss + ssim_weight * (1 - measure(picture, photograph))


def structural_similarity(rendered: Tensor, target: Tensor) -> Tensor:
    """Return the SSIM of field latents, averaged over channels and over the positions where the window fits.

    Equal to `pytorch_msssim.ssim` with data range 1, but blurs all five moments at once, by two products with banded
    matrices: on grids as small as latent ones that is several times as fast as convolutions. On grids smaller than the
    window, the window is cut down to the largest odd number that fits. Computed in float32, also under autocast: the
    variances are small differences of large numbers.

    Args:
        rendered: [h, w, C].
        target: [h, w, C].

    Returns:
        A scalar, 1 for equal latents; differentiable.
    """
    height, width = rendered.shape[:2]
    window = min(WINDOW, height - 1 + height % 2, width - 1 + width % 2)
    products = _products(rendered, target)
    with torch.autocast(products.device.type, enabled=False):
        vertical, horizontal = (_gaussian_band(size, window, products) for size in (height, width))
        return _similarity_of_moments(vertical @ products @ horizontal.T).mean()


def picture_similarity(picture: Tensor, photograph: Tensor, stride: int = 2) -> Tensor:
    """Return the SSIM of pictures as `pytorch_msssim.ssim` with data range 1, at every `stride`-th place of the window.

    Neighboring places of a window of 11 x 11 pixels see almost the same: at every second one along either axis, the
    mean and its gradient are nearly those of all, for less than a third of the time. Computed in float32, also under
    autocast.

    Args:
        picture: [H, W, 3], neither side shorter than the window.
        photograph: [H, W, 3].
        stride: in pixels, along both axes.

    Returns:
        A scalar, 1 for equal pictures; differentiable.
    """
    return _picture_similarity_map(picture, photograph, stride).mean()


def _picture_similarity_map(picture: Tensor, photograph: Tensor, stride: int) -> Tensor:
    """Return the SSIM of the windows that fit: [3, ceil((H - 10) / stride), ceil((W - 10) / stride)]."""
    products = _products(picture, photograph)[None]
    groups = products.shape[1]
    with torch.autocast(products.device.type, enabled=False):
        weights = _gaussian_band(WINDOW, WINDOW, products).expand(groups, 1, WINDOW)
        vertical = F.conv2d(products, weights[..., None].contiguous(), stride=(stride, 1), groups=groups)
        moments = F.conv2d(vertical, weights[:, :, None].contiguous(), stride=(1, stride), groups=groups)
        return _similarity_of_moments(moments[0])


def _products(rendered: Tensor, target: Tensor) -> Tensor:
    """Return what is blurred of two grids x and y [h, w, C]: x, y, x^2, y^2 and x y, [5 C, h, w] float32."""
    x, y = rendered.float().permute(2, 0, 1), target.float().permute(2, 0, 1)
    return torch.cat([x, y, x * x, y * y, x * y])


def _similarity_of_moments(moments: Tensor) -> Tensor:
    """Return the SSIM [C, h, w] of the blurred x, y, x^2, y^2 and x y, [5 C, h, w]."""
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = moments.chunk(5)
    variances = mean_xx - mean_x.square() + mean_yy - mean_y.square()
    covariance = mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x.square() + mean_y.square() + K1**2)
    structure = (2 * covariance + K2**2) / (variances + K2**2)
    return luminance * structure


def _gaussian_band(size: int, window: int, like: Tensor) -> Tensor:
    """Return [size - window + 1, size] float32, the matrix that blurs a line of `size` cells where the window fits.

    It is made once for each device. Fake tensors, which tests and compilers have several kinds of, get their own each
    time.

    Args:
        size: cells of the line.
        window: cells of the window, odd.
        like: what it will be multiplied with.
    """
    if type(like) is not Tensor:
        return _make_gaussian_band(size, window, like.device)
    return _gaussian_band_of(size, window, like.device)


def _make_gaussian_band(size: int, window: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # a band that was made while evaluating must do for training
        cells, rows = (torch.arange(count, device=device) for count in (size, size - window + 1))
        offsets = cells - rows[:, None] - window // 2  # [size - window + 1, size]
        weights = torch.where(offsets.abs() <= window // 2, torch.exp(-offsets.square() / (2 * SIGMA**2)), 0.0)
        return weights / weights.sum(dim=1, keepdim=True)


_gaussian_band_of = lru_cache(maxsize=256)(_make_gaussian_band)
