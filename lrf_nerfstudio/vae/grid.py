"""The image grid and the latent grid: padding, cutting, masks, and computing a large picture tile by tile.

A latent cell stands for `factor` x `factor` pixels. An image whose sides are not multiples of `factor` is padded right
and below by repeating its last column and row, so that no pixel is lost; the padding is cut off after decoding.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def latent_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """Return the size (h, w) of the latent grid of `height` x `width` pixels: each side divided by f, rounded up."""
    return -(-height // factor), -(-width // factor)


def pad_to_multiple(images: Tensor, factor: int) -> Tensor:
    """Pad [B, ch, H, W] right and below to multiples of `factor` by edge replication; differentiable.

    Returns:
        [B, ch, h * factor, w * factor] with (h, w) = :func:`latent_size`; the input itself when nothing is missing.
    """
    height, width = images.shape[-2:]
    right, below = -width % factor, -height % factor
    if right == 0 and below == 0:
        return images
    return F.pad(images, (0, right, 0, below), mode="replicate")


def unpad(images: Tensor, height: int, width: int) -> Tensor:
    """Cut [..., H', W'] to its upper left [..., height, width]: the inverse of :func:`pad_to_multiple`."""
    return images[..., :height, :width]


def downsample_mask(mask: Tensor, factor: int) -> Tensor:
    """Bring a pixel mask to the latent grid, conservatively.

    Args:
        mask: [H, W], true (or non-zero) where a pixel counts.
        factor: pixels per latent cell and axis.

    Returns:
        [h, w] bool, true where *all* pixels of the cell count. The cells at the right and lower edge that reach beyond
        the image are judged by the pixels that exist.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask must be [H, W], got {tuple(mask.shape)}")
    height, width = mask.shape
    excluded = (mask == 0).to(torch.float32)
    excluded = F.pad(excluded, (0, -width % factor, 0, -height % factor))
    return F.max_pool2d(excluded[None, None], factor)[0, 0] == 0


def sample_latents(
    latents: Tensor, points: Tensor, factor: int, interpolation: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    """Read latents at image points, interpolated between the centers of the nearest cells; differentiable in both.

    Cell (row k, column l) covers the pixels [k f, (k + 1) f) x [l f, (l + 1) f); its center is the image point
    ((l + 0.5) f, (k + 0.5) f). Beyond the outermost centers the outermost cells continue.

    Args:
        latents: [B, C, h, w], the latents of B whole (padded) pictures.
        points: [B, P, 2], (x, y) in pixels, x right, y down, the center of the first pixel at (0.5, 0.5).
        factor: pixels per latent cell and axis.
        interpolation: between the nearest 4 cells, or 16, which blurs less.

    Returns:
        [B, P, C] in the wider of the two dtypes: coordinates in half precision would be off by pixels.
    """
    if latents.ndim != 4 or points.ndim != 3 or points.shape[-1] != 2 or len(points) != len(latents):
        raise ValueError(
            f"need latents [B, C, h, w] and points [B, P, 2], got {tuple(latents.shape)} and {tuple(points.shape)}"
        )
    dtype = torch.promote_types(latents.dtype, points.dtype)
    height, width = latents.shape[-2:]
    # The padded picture spans [-1, 1]. Its size stays in Python: a tensor would be copied to the device each time.
    x, y = points.to(dtype).unbind(-1)
    grid = torch.stack([x * (2 / (width * factor)), y * (2 / (height * factor))], dim=-1) - 1  # [B, P, 2]
    sampled = F.grid_sample(
        latents.to(dtype), grid[:, None], mode=interpolation, padding_mode="border", align_corners=False
    )
    return sampled[:, :, 0].transpose(1, 2)


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return the first cells of tiles of equal size that cover [0, length) and overlap by `overlap` cells or more."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """Return a blending weight [length]: from next to nothing at either end, where a tile lacks its surroundings, to 1.

    It rises over the middle half of the overlap. It is never 0, since at the picture's edge there is no other tile.
    """
    distance_to_end = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    distance_to_end = torch.minimum(distance_to_end, distance_to_end.flip(0))
    return ((distance_to_end - overlap / 4) / max(overlap / 2, 0.5)).clamp(1e-4, 1.0)


def apply_tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    in_samples: int,
    out_samples: int,
) -> Tensor:
    """Apply a fully convolutional `function` to overlapping tiles and blend the results linearly.

    The size of a tile bounds the memory of encoding and decoding. Where one tile alone covers a sample, its value is
    exactly the tile's. Unlike the tiling built into diffusers' AutoencoderTiny, which assumes 4 latent channels and a
    factor of 8, it works for any number of channels and any factor, and gradients pass through.

    Args:
        function: maps [B, c, n * in_samples, m * in_samples] to [B, c', n * out_samples, m * out_samples].
        x: [B, c, h * in_samples, w * in_samples].
        tile: side of a tile in latent cells.
        overlap: least overlap of neighboring tiles in latent cells, smaller than `tile`.
        in_samples: samples of `x` per latent cell and axis (the spatial factor to encode, 1 to decode).
        out_samples: samples of the result per latent cell and axis (1 to encode, the spatial factor to decode).

    Returns:
        [B, c', h * out_samples, w * out_samples].
    """
    height, width = x.shape[-2] // in_samples, x.shape[-1] // in_samples
    if height <= tile and width <= tile:
        return function(x)
    result = total_weight = None
    for top in _tile_starts(height, tile, overlap):
        for left in _tile_starts(width, tile, overlap):
            bottom, right = min(top + tile, height), min(left + tile, width)
            part = function(x[..., top * in_samples : bottom * in_samples, left * in_samples : right * in_samples])
            if result is None or total_weight is None:
                result = part.new_zeros(*part.shape[:2], height * out_samples, width * out_samples)
                total_weight = part.new_zeros(height * out_samples, width * out_samples)
            rows = slice(top * out_samples, bottom * out_samples)
            columns = slice(left * out_samples, right * out_samples)
            ramps = [_ramp(n, overlap * out_samples, part) for n in part.shape[-2:]]
            weight = ramps[0][:, None] * ramps[1]
            result[..., rows, columns] += weight * part
            total_weight[rows, columns] += weight
    assert result is not None and total_weight is not None  # there is at least one tile
    return result / total_weight
