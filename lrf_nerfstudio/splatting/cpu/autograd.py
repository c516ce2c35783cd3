"""The CPU kernels as differentiable PyTorch functions."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function

from lrf_nerfstudio.splatting.cpu import blending, projection, sorting, threads
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


def _or_zeros(gradient: Tensor | None, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu") if gradient is None else gradient


def _flat(*tensors: Tensor) -> tuple[NDArray[Any], ...]:
    """Return tensors as flat arrays, without a copy where they are contiguous."""
    return tuple([tensor.detach().contiguous().numpy().reshape(-1) for tensor in tensors])


def _by_camera(*tensors: Tensor) -> list[tuple[NDArray[Any], ...]]:
    """Return tensors [B, ...] as B tuples of flat arrays, without a copy where they are contiguous."""
    n_cameras = tensors[0].shape[0]
    rows = [tensor.detach().contiguous().numpy().reshape(n_cameras, -1) for tensor in tensors]
    return [tuple([row[b] for row in rows]) for b in range(n_cameras)]


def _camera_rows(viewmats: Tensor, Ks: Tensor, positions: Tensor) -> NDArray[np.float32]:
    """Return what the projection kernels need of cameras [B, CAMERA_SIZE]."""
    poses, intrinsics, places = (tensor.detach().numpy() for tensor in (viewmats, Ks, positions))
    focals_and_centers = intrinsics[:, [0, 1, 0, 1], [0, 1, 2, 2]]
    return np.concatenate([poses[:, :3, :3].reshape(-1, 9), poses[:, :3, 3], focals_and_centers, places], axis=1)


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
        n_cameras, (n, channels) = len(viewmats), features.shape
        gaussians = _flat(means, quats, scales, opacities, features, features_rest)
        cameras = _camera_rows(viewmats, Ks, positions)
        view, harmonics = _view(settings), _harmonics(settings, features_rest)
        radii = _empty(n_cameras, n, dtype=torch.int32)
        means2d, depths, conics = _empty(n_cameras, n, 2), _empty(n_cameras, n), _empty(n_cameras, n, 3)
        compensations = _empty(n_cameras, n)
        colors = _empty(n_cameras, 0 if settings.sh_degree is None else n, channels)
        outputs = radii, means2d, depths, conics, compensations, colors
        ranges = threads.even_ranges(n, projection.CHUNK)
        for camera, projected in zip(cameras, _by_camera(*outputs), strict=True):
            threads.run(projection.project, ranges, gaussians, camera, view, harmonics, projected)
        ctx.save_for_backward(means, quats, scales, opacities, features, features_rest, radii)
        ctx.cameras, ctx.settings = cameras, settings
        ctx.mark_non_differentiable(radii)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *v_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        means, quats, scales, opacities, features, features_rest, radii = ctx.saved_tensors
        n_cameras, n = radii.shape
        channels = features.shape[1]
        plain = ctx.settings.sh_degree is None
        shapes = [(n, 2), (n,), (n, 3), (n,), (0 if plain else n, channels)]
        given = [_or_zeros(v, n_cameras, *shape) for v, shape in zip(v_outputs[1:], shapes, strict=True)]
        gradients = [_empty(*tensor.shape) for tensor in (means, quats, scales, features, features_rest)]
        gaussians = _flat(means, quats, scales, opacities, features, features_rest)
        v_gaussians = _flat(*gradients)
        view, harmonics = _view(ctx.settings), _harmonics(ctx.settings, features_rest)
        ranges = threads.even_ranges(n, projection.CHUNK)
        v_cameras = np.zeros((n_cameras, len(ranges), 15), np.float32)
        by_camera = zip(ctx.cameras, _by_camera(radii), _by_camera(*given), v_cameras, strict=True)
        for b, (camera, (radii_of_b,), v_projected, v_camera) in enumerate(by_camera):
            threads.run(
                projection.project_backward,
                ranges,
                gaussians,
                camera,
                view,
                harmonics,
                radii_of_b,
                v_projected,
                b > 0,
                v_gaussians,
                v_camera,
            )
        v_camera = torch.from_numpy(v_cameras.sum(axis=1))
        v_viewmats = torch.zeros(n_cameras, 4, 4, device="cpu")
        v_viewmats[:, :3, :3] = v_camera[:, :9].view(-1, 3, 3)
        v_viewmats[:, :3, 3] = v_camera[:, 9:12]
        v_means, v_quats, v_scales, v_features, v_features_rest = gradients
        of_features = (None, None) if plain else (v_features, v_features_rest)  # plain ones are blended as they are
        return v_means, v_quats, v_scales, None, *of_features, v_viewmats, v_camera[:, 12:], None, None


def _view(settings: RasterSettings) -> tuple[float, ...]:
    """Return what the projection kernels call `view`."""
    size = float(settings.width), float(settings.height)
    return *size, float(settings.near_plane), float(settings.far_plane), float(settings.eps2d)


def _harmonics(settings: RasterSettings, features_rest: Tensor) -> tuple[int, int, int]:
    """Return what the projection kernels call `harmonics`."""
    return -1 if settings.sh_degree is None else settings.sh_degree, *features_rest.shape[1:]


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
        n_cameras, _, channels = colors.shape
        width, height = settings.width, settings.height
        features = _empty(n_cameras, height, width, channels)
        depth = _empty(n_cameras, height, width if settings.render_depth else 0, 1)
        alpha, transmittances = _empty(n_cameras, height, width, 1), _empty(n_cameras, height, width)
        last_pairs = _empty(n_cameras, height, width, dtype=torch.int32)
        layout = channels, settings.render_depth, width, height
        images = _by_camera(features, depth, alpha, transmittances, last_pairs)
        splats = _by_camera(means2d, conics, opacities, colors, depths)
        sorted_splats = []
        for image, splats_of_b, (radii_of_b,) in zip(images, splats, _by_camera(radii), strict=True):
            tiles = _sort_into_tiles(radii_of_b, splats_of_b, layout)
            threads.run(blending.blend, _tile_ranges(width, height), tiles.lists, layout, image)
            sorted_splats.append(tiles)
        ctx.save_for_backward(means2d, conics, opacities, colors, depths, depth, alpha)
        ctx.buffers = transmittances, last_pairs, sorted_splats
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return features, depth, alpha

    @staticmethod
    def backward(ctx: Any, *v_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        means2d, conics, opacities, colors, depths, depth, alpha = ctx.saved_tensors
        transmittances, last_pairs, sorted_splats = ctx.buffers
        width, height, absgrad = ctx.settings.width, ctx.settings.height, ctx.settings.absgrad
        n_cameras, n, channels = colors.shape
        v_features, v_depth, v_alpha = (
            _or_zeros(v, n_cameras, height, width, size) for v, size in zip(v_outputs, (channels, 1, 1), strict=True)
        )
        v_means2d, v_abs = _empty(n_cameras, n, 2), _empty(n_cameras, n if absgrad else 0, 2)
        v_conics, v_opacities = _empty(n_cameras, n, 3), _empty(n_cameras, n)
        v_colors, v_depths = _empty(n_cameras, n, channels), _empty(n_cameras, n)
        layout = channels, ctx.settings.render_depth, width, height
        of_cameras = zip(
            sorted_splats,
            _by_camera(means2d, conics, opacities, colors, depths),
            _by_camera(depth, alpha, transmittances, last_pairs),
            _by_camera(v_features, v_depth, v_alpha),
            _by_camera(v_means2d, v_abs, v_conics, v_opacities, v_colors, v_depths),
            strict=True,
        )
        for tiles, splats, image, v_image, v_splats in of_cameras:
            v_pairs = _empty(len(tiles.pair_ranks), tiles.records.shape[1]).numpy()
            threads.run(
                blending.blend_backward,
                _tile_ranges(width, height),
                tiles.lists,
                layout,
                absgrad,
                image,
                v_image,
                v_pairs,
            )
            threads.run(
                blending.gather_gradients,
                threads.even_ranges(n, sorting.CHUNK),
                tiles.order,
                tiles.pair_starts,
                v_pairs,
                splats,
                layout,
                absgrad,
                v_splats,
            )
        if absgrad:
            means2d.absgrad = v_abs
        return v_means2d, v_conics, v_opacities, v_colors, v_depths, None, None


class _Tiles(NamedTuple):
    """The visible Gaussians of one camera, sorted by depth and into tiles; see `sorting`."""

    order: NDArray[np.int32]
    """Indices of the Gaussians [N], the V visible ones first, nearest first."""
    records: NDArray[np.float32]
    """[V, record size]."""
    tile_starts: NDArray[np.int32]
    """[tiles + 1]."""
    pair_ranks: NDArray[np.int32]
    """[M]: the Gaussian, as its place in `order`, of each pair of Gaussian and tile."""
    pair_slots: NDArray[np.int32]
    """[M]: where the gradients of each pair go."""
    pair_starts: NDArray[np.int32]
    """[V + 1]."""

    @property
    def lists(self) -> tuple[NDArray[Any], ...]:
        """What the kernels that blend need."""
        return self.records, self.tile_starts, self.pair_ranks, self.pair_slots


def _tile_count(width: int, height: int) -> int:
    tile = sorting.TILE
    return -(-width // tile) * -(-height // tile)


def _tile_ranges(width: int, height: int) -> list[tuple[int, int]]:
    return threads.even_ranges(_tile_count(width, height), blending.TILES_AT_ONCE)


def _sort_into_tiles(
    radii: NDArray[np.int32], splats: tuple[NDArray[np.float32], ...], layout: tuple[int, bool, int, int]
) -> _Tiles:
    """Sort the Gaussians of one camera by depth and into tiles.

    Args:
        radii: [N].
        splats: Flat means2d, conics, opacities, colors and depths.
        layout: C, whether depth is one more channel, width and height of the image.
    """
    _, _, opacities, _, depths = splats
    channels, with_depth, width, height = layout
    order, n_visible = sorting.depth_order(radii, depths, opacities)
    ranges = threads.even_ranges(n_visible, sorting.CHUNK)
    record_size = -(-(sorting.HEADER + channels + with_depth) // LANES) * LANES
    records = _empty(n_visible, record_size).numpy()  # aligned to cache lines
    pair_counts = np.empty(n_visible, np.int32)
    tile_counts = np.empty((len(ranges), _tile_count(width, height)), np.int32)
    pair_tiles = threads.run(sorting.pack, ranges, order, splats, layout, records, pair_counts, tile_counts)
    tile_starts, pair_starts = sorting.lay_out_pairs(pair_counts, tile_counts)
    pair_ranks, pair_slots = np.empty(tile_starts[-1], np.int32), np.empty(tile_starts[-1], np.int32)
    threads.run(sorting.list_pairs, ranges, pair_starts, tile_counts, pair_ranks, pair_slots, of_range=pair_tiles)
    return _Tiles(order, records, tile_starts, pair_ranks, pair_slots, pair_starts)
