"""The CPU kernels as differentiable PyTorch functions."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function

from lrf_nerfstudio.splatting.cpu import projection_kernels, threads, tile_kernels
from lrf_nerfstudio.splatting.cpu.simd import LANES
from lrf_nerfstudio.splatting.rasterization import Gaussians, RasterSettings, Rendering, camera_positions


def rasterize_cpu(gaussians: Gaussians, viewmats: Tensor, Ks: Tensor, settings: RasterSettings) -> Rendering:
    """Render with the kernels of `cpu`; see `rasterize`, which has checked the arguments."""
    means, quats, scales, opacities, features, features_rest = gaussians
    n_cameras, n = len(viewmats), len(means)
    radii, means2d, depths, conics, compensations, colors = Project.apply(
        means, quats, scales, opacities, features, features_rest, viewmats, camera_positions(viewmats), Ks, settings
    )
    opacities = opacities.expand(n_cameras, n)
    if settings.antialiased:
        opacities = opacities * compensations
    if settings.sh_degree is None:
        colors = features.expand(n_cameras, *features.shape)
    image, depth, alpha = Blend.apply(means2d, conics, opacities, colors, depths, radii, settings)
    info = {
        "width": settings.width,
        "height": settings.height,
        "n_cameras": n_cameras,
        "camera_ids": None,
        "gaussian_ids": None,
        "radii": radii,
        "means2d": means2d,
        "depths": depths,
        "conics": conics,
        "opacities": opacities,
    }
    return Rendering(image, depth if settings.render_depth else None, alpha, info)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _rows(tensor: Tensor, n: int) -> NDArray[Any]:
    """A tensor as numpy array of n flat rows, without a copy where it is contiguous."""
    return tensor.detach().contiguous().numpy().reshape(n, -1)


def _flat(tensor: Tensor) -> NDArray[Any]:
    return _rows(tensor, 1)[0]


def _camera_rows(viewmats: Tensor, Ks: Tensor, positions: Tensor) -> NDArray[np.float32]:
    """What the projection kernels need of cameras, [B, CAMERA_SIZE]."""
    poses, intrinsics = _rows(viewmats, len(viewmats)), _rows(Ks, len(Ks))
    parts = [poses[:, [0, 1, 2, 4, 5, 6, 8, 9, 10]], poses[:, [3, 7, 11]], intrinsics[:, [0, 4, 2, 5]]]
    return np.ascontiguousarray(np.concatenate([*parts, _rows(positions, len(positions))], axis=-1))


class Project(Function):
    """EWA projection and harmonics.

    Takes means [N, 3], quats [N, 4], scales [N, 3], opacities [N] (looked at for NaN and inf only), features [N, C],
    features_rest [N, K - 1, C], viewmats [B, 4, 4], camera positions [B, 3], Ks and settings. Gives radii [B, N],
    means2d [B, N, 2], depths [B, N], conics [B, N, 3], antialiasing compensations [B, N], and colors [B, N, C] if
    features are harmonics. Gradients flow to all but opacities (whose gradient comes from blending) and Ks, and to
    plain features not here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        quats: Tensor,
        scales: Tensor,
        opacities: Tensor,
        features: Tensor,
        features_rest: Tensor,
        viewmats: Tensor,
        positions: Tensor,
        Ks: Tensor,
        settings: RasterSettings,
    ) -> tuple[Tensor, ...]:
        n_cameras, n, channels = len(viewmats), len(means), features.shape[-1]
        degree = -1 if settings.sh_degree is None else settings.sh_degree
        n_rest = features_rest.shape[1]
        cameras = _camera_rows(viewmats, Ks, positions)
        radii = _empty(n_cameras, n, dtype=torch.int32)
        means2d, depths, conics = _empty(n_cameras, n, 2), _empty(n_cameras, n), _empty(n_cameras, n, 3)
        compensations = _empty(n_cameras, n)
        colors = _empty(n_cameras, n if degree >= 0 else 0, channels)
        inputs = [_flat(tensor) for tensor in (means, quats, scales, opacities, features, features_rest)]
        outputs = [_rows(tensor, n_cameras) for tensor in (radii, means2d, depths, conics, compensations, colors)]
        for b in range(n_cameras):
            threads.run(
                projection_kernels.project,
                threads.even_ranges(n, projection_kernels.CHUNK),
                *inputs,
                cameras[b],
                float(settings.width),
                float(settings.height),
                float(settings.near_plane),
                float(settings.far_plane),
                float(settings.eps2d),
                degree,
                n_rest,
                channels,
                *(rows[b] for rows in outputs),
            )
        ctx.save_for_backward(means, quats, scales, features, features_rest, radii)
        ctx.cameras, ctx.settings = cameras, settings
        ctx.mark_non_differentiable(radii)
        ctx.set_materialize_grads(False)
        return radii, means2d, depths, conics, compensations, colors

    @staticmethod
    def backward(ctx: Any, *v_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        means, quats, scales, features, features_rest, radii = ctx.saved_tensors
        settings = ctx.settings
        n_cameras, n = radii.shape
        channels = features.shape[-1]
        degree = -1 if settings.sh_degree is None else settings.sh_degree
        n_rest = features_rest.shape[1]
        inputs = [_flat(tensor) for tensor in (means, quats, scales, features, features_rest)]
        shapes = [(n, 2), (n,), (n, 3), (n,), (n, channels) if degree >= 0 else (0, channels)]
        given = [
            gradient if gradient is not None else _zeros(n_cameras, *shape)
            for gradient, shape in zip(v_outputs[1:], shapes, strict=True)
        ]
        outputs = [_rows(tensor, n_cameras) for tensor in (radii, *given)]
        v_means, v_quats, v_scales = _empty(n, 3), _empty(n, 4), _empty(n, 3)
        v_features, v_features_rest = _empty(*features.shape), _empty(*features_rest.shape)
        gradients = [_flat(tensor) for tensor in (v_means, v_quats, v_scales, v_features, v_features_rest)]
        ranges = threads.even_ranges(n, projection_kernels.CHUNK)
        v_cameras = np.zeros((n_cameras, len(ranges), 15), np.float32)
        for b in range(n_cameras):
            threads.run(
                projection_kernels.project_backward,
                ranges,
                *inputs,
                ctx.cameras[b],
                float(settings.width),
                float(settings.height),
                float(settings.eps2d),
                degree,
                n_rest,
                channels,
                *(rows[b] for rows in outputs),
                b > 0,
                *gradients,
                v_cameras[b],
            )
        v_camera = torch.from_numpy(v_cameras.sum(axis=1))
        v_viewmats = _zeros(n_cameras, 4, 4)
        v_viewmats[:, :3, :3] = v_camera[:, :9].view(-1, 3, 3)
        v_viewmats[:, :3, 3] = v_camera[:, 9:12]
        of_features = (v_features, v_features_rest) if degree >= 0 else (None, None)  # plain ones are blended
        return v_means, v_quats, v_scales, None, *of_features, v_viewmats, v_camera[:, 12:], None, None


class Blend(Function):
    """Alpha blending of projected Gaussians.

    Takes means2d [B, N, 2], conics [B, N, 3], opacities [B, N], colors [B, N, C], depths [B, N], radii [B, N] and
    settings. Gives features [B, H, W, C], expected depth [B, H, W, 1] (if asked for) and alpha [B, H, W, 1]. Gradients
    flow to all of the former but radii.
    """

    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        conics: Tensor,
        opacities: Tensor,
        colors: Tensor,
        depths: Tensor,
        radii: Tensor,
        settings: RasterSettings,
    ) -> tuple[Tensor, ...]:
        n_cameras, channels = len(means2d), colors.shape[-1]
        width, height, with_depth = settings.width, settings.height, settings.render_depth
        features = _empty(n_cameras, height, width, channels)
        depth = _empty(n_cameras, height, width if with_depth else 0, 1)
        alpha = _empty(n_cameras, height, width, 1)
        transmittances = np.empty((n_cameras, height * width), np.float32)
        last_pairs = np.empty((n_cameras, height * width), np.int32)
        inputs = [_rows(tensor, n_cameras) for tensor in (means2d, conics, opacities, colors, depths)]
        outputs = [_rows(tensor, n_cameras) for tensor in (features, depth, alpha)]
        radius_rows = _rows(radii, n_cameras)
        lists = []
        for b in range(n_cameras):
            binned = _bin(radius_rows[b], [rows[b] for rows in inputs], channels, settings)
            _, records, tile_starts, pair_ranks, _, _ = binned
            lists.append(binned)
            threads.run(
                tile_kernels.blend,
                _tile_ranges(settings),
                records,
                tile_starts,
                pair_ranks,
                channels,
                with_depth,
                width,
                height,
                *(rows[b] for rows in outputs),
                transmittances[b],
                last_pairs[b],
            )
        ctx.save_for_backward(means2d, conics, opacities, colors, depth, alpha)
        ctx.buffers = (transmittances, last_pairs, lists)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return features, depth, alpha

    @staticmethod
    def backward(ctx: Any, *v_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        means2d, conics, opacities, colors, depth, alpha = ctx.saved_tensors
        transmittances, last_pairs, lists = ctx.buffers
        settings = ctx.settings
        width, height, with_depth, absgrad = settings.width, settings.height, settings.render_depth, settings.absgrad
        n_cameras, n, channels = colors.shape
        v_features, v_depth, v_alpha = (
            gradient if gradient is not None else _zeros(n_cameras, height, width, size)
            for gradient, size in zip(v_outputs, (channels, 1, 1), strict=True)
        )
        inputs = [_rows(tensor, n_cameras) for tensor in (conics, opacities)]
        images = [_rows(tensor, n_cameras) for tensor in (depth, alpha)]
        v_images = [_rows(tensor, n_cameras) for tensor in (v_features, v_depth, v_alpha)]
        v_means2d, v_conics, v_opacities = _empty(n_cameras, n, 2), _empty(n_cameras, n, 3), _empty(n_cameras, n)
        v_colors, v_depths = _empty(n_cameras, n, channels), _empty(n_cameras, n)
        v_abs = _empty(n_cameras, n if absgrad else 0, 2)
        gradients = [
            _rows(tensor, n_cameras) for tensor in (v_means2d, v_abs, v_conics, v_opacities, v_colors, v_depths)
        ]
        for b, (order, records, tile_starts, pair_ranks, pair_slots, pair_starts) in enumerate(lists):
            v_pairs = _empty(len(pair_ranks), records.shape[1]).numpy()
            threads.run(
                tile_kernels.blend_backward,
                _tile_ranges(settings),
                records,
                tile_starts,
                pair_ranks,
                pair_slots,
                channels,
                with_depth,
                absgrad,
                width,
                height,
                *(rows[b] for rows in images),
                transmittances[b],
                last_pairs[b],
                *(rows[b] for rows in v_images),
                v_pairs,
            )
            threads.run(
                tile_kernels.gather_gradients,
                threads.even_ranges(n, tile_kernels.CHUNK),
                order,
                pair_starts,
                v_pairs,
                *(rows[b] for rows in inputs),
                channels,
                with_depth,
                absgrad,
                *(rows[b] for rows in gradients),
            )
        if absgrad:
            means2d.absgrad = v_abs
        return v_means2d, v_conics, v_opacities, v_colors, v_depths, None, None


def _tile_count(settings: RasterSettings) -> int:
    tile = tile_kernels.TILE
    return -(-settings.width // tile) * -(-settings.height // tile)


def _tile_ranges(settings: RasterSettings) -> list[tuple[int, int]]:
    return threads.even_ranges(_tile_count(settings), tile_kernels.TILES_AT_ONCE)


def _bin(
    radii: NDArray[np.int32], gaussians: list[NDArray[np.float32]], channels: int, settings: RasterSettings
) -> tuple[NDArray[Any], ...]:
    """Sorts the Gaussians of one camera by depth and into tiles.

    Args:
        radii: [N].
        gaussians: means2d, conics, opacities, colors and depths, flat.
        channels: C.
        settings: Size of the image, and whether depth is a channel.

    Returns:
        Order [N], records [V, record size], tile starts [tiles + 1], ranks and slots of the pairs of Gaussian and tile
        [M] each, and pair starts [V + 1]; see `tile_kernels`.
    """
    with_depth, width, height = settings.render_depth, settings.width, settings.height
    _, _, opacities, _, depths = gaussians
    order, n_visible = tile_kernels.depth_order(radii, depths, opacities)
    ranges = threads.even_ranges(n_visible, tile_kernels.CHUNK)
    record_size = -(-(tile_kernels.HEADER + channels + with_depth) // LANES) * LANES
    records = _empty(n_visible, record_size).numpy()  # aligned to cache lines
    pair_counts = np.empty(n_visible, np.int32)
    tile_counts = np.empty((len(ranges), _tile_count(settings)), np.int32)
    pair_tiles = threads.run(
        tile_kernels.pack,
        ranges,
        order,
        *gaussians,
        channels,
        with_depth,
        width,
        height,
        records,
        pair_counts,
        tile_counts,
    )
    tile_starts, pair_starts = tile_kernels.lay_out_pairs(pair_counts, tile_counts)
    pair_ranks, pair_slots = np.empty(tile_starts[-1], np.int32), np.empty(tile_starts[-1], np.int32)
    threads.run(tile_kernels.list_pairs, ranges, pair_starts, tile_counts, pair_ranks, pair_slots, of_range=pair_tiles)
    return order, records, tile_starts, pair_ranks, pair_slots, pair_starts
