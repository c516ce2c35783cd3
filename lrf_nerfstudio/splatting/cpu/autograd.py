"""The CPU kernels as differentiable PyTorch functions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from lrf_nerfstudio.splatting.cpu import projection_kernels, threads, tile_kernels
from lrf_nerfstudio.splatting.cpu.simd import LANES


@dataclass(frozen=True)
class ProjectionSettings:
    """What a projection depends on besides tensors; see `rasterize`."""

    width: int
    height: int
    near_plane: float
    far_plane: float
    eps2d: float
    radius_clip: float
    sh_degree: int | None


def _flat(tensor: Tensor):
    """A float32 tensor on the CPU as flat numpy array, without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).numpy()


def _camera_arrays(viewmats: Tensor, Ks: Tensor, positions: Tensor):
    """Arrays of CAMERA_SIZE floats for the projection kernels, [B, CAMERA_SIZE]."""
    n_cameras = len(viewmats)
    intrinsics = torch.stack([Ks[:, 0, 0], Ks[:, 1, 1], Ks[:, 0, 2], Ks[:, 1, 2]], dim=-1)
    parts = [viewmats[:, :3, :3].reshape(n_cameras, 9), viewmats[:, :3, 3], intrinsics, positions]
    return torch.cat(parts, dim=-1).detach().numpy()


class Project(Function):
    """EWA projection and harmonics; see `project`."""

    @staticmethod
    def forward(ctx, means, quats, scales, opacities, features, viewmats, positions, Ks, settings: ProjectionSettings):
        n_cameras, n = len(viewmats), len(means)
        with_harmonics = settings.sh_degree is not None
        channels = features.shape[-1]
        degree = settings.sh_degree if with_harmonics else -1
        n_coefficients = features.shape[1] if with_harmonics else 1
        cameras = _camera_arrays(viewmats, Ks, positions)
        radii = torch.empty(n_cameras, n, dtype=torch.int32)
        means2d = torch.empty(n_cameras, n, 2)
        depths = torch.empty(n_cameras, n)
        conics = torch.empty(n_cameras, n, 3)
        compensations = torch.empty(n_cameras, n)
        colors = torch.empty(n_cameras, n if with_harmonics else 0, channels)
        inputs = [_flat(tensor) for tensor in (means, quats, scales, opacities, features)]
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
                float(settings.radius_clip),
                degree,
                n_coefficients,
                channels,
                *(_flat(tensor[b]) for tensor in (radii, means2d, depths, conics, compensations, colors)),
            )
        ctx.save_for_backward(means, quats, scales, features, radii)
        ctx.cameras = cameras
        ctx.settings = settings
        ctx.shape = (degree, n_coefficients, channels)
        ctx.mark_non_differentiable(radii)
        ctx.set_materialize_grads(False)
        return radii, means2d, depths, conics, compensations, colors

    @staticmethod
    def backward(ctx, _v_radii, v_means2d, v_depths, v_conics, v_compensations, v_colors):
        means, quats, scales, features, radii = ctx.saved_tensors
        settings = ctx.settings
        n_cameras, n = radii.shape
        degree, n_coefficients, channels = ctx.shape

        def given(gradient, *shape):
            return gradient if gradient is not None else torch.zeros(n_cameras, n, *shape)

        v_outputs = (given(v_means2d, 2), given(v_depths), given(v_conics, 3), given(v_compensations))
        v_colors = given(v_colors, channels) if degree >= 0 else torch.empty(n_cameras, 0)
        v_means, v_quats, v_scales = torch.empty(n, 3), torch.empty(n, 4), torch.empty(n, 3)
        v_features = torch.empty(features.shape) if degree >= 0 else torch.empty(0)
        ranges = threads.even_ranges(n, projection_kernels.CHUNK)
        v_cameras = torch.zeros(n_cameras, len(ranges), 15)
        inputs = [_flat(tensor) for tensor in (means, quats, scales, features)]
        gradients = [_flat(tensor) for tensor in (v_means, v_quats, v_scales, v_features)]
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
                n_coefficients,
                channels,
                *(_flat(tensor[b]) for tensor in (radii, *v_outputs, v_colors)),
                b > 0,
                *gradients,
                v_cameras[b].numpy(),
            )
        v_viewmats = v_positions = None
        if ctx.needs_input_grad[5] or ctx.needs_input_grad[6]:
            v_camera = v_cameras.sum(dim=1)
            v_viewmats = torch.zeros(n_cameras, 4, 4)
            v_viewmats[:, :3, :3] = v_camera[:, :9].view(-1, 3, 3)
            v_viewmats[:, :3, 3] = v_camera[:, 9:12]
            v_positions = v_camera[:, 12:]
        v_features = v_features if degree >= 0 else None
        return v_means, v_quats, v_scales, None, v_features, v_viewmats, v_positions, None, None


class Blend(Function):
    """Alpha blending of projected Gaussians; see `blend`."""

    @staticmethod
    def forward(ctx, means2d, conics, opacities, colors, depths, backgrounds, radii, size, with_depth, absgrad):
        width, height = size
        n_cameras = len(means2d)
        channels = colors.shape[-1]
        record_size = -(-(tile_kernels.HEADER + channels + with_depth) // LANES) * LANES
        features = torch.empty(n_cameras, height, width, channels)
        depth = torch.empty(n_cameras, height, width if with_depth else 0, 1)
        alpha = torch.empty(n_cameras, height, width, 1)
        transmittance = torch.empty(n_cameras, height, width)
        last_pairs = torch.empty(n_cameras, height, width, dtype=torch.int32)
        background = backgrounds if backgrounds is not None else torch.zeros(n_cameras, channels)
        n_tiles = -(-width // tile_kernels.TILE) * -(-height // tile_kernels.TILE)
        tile_ranges = threads.even_ranges(n_tiles, tile_kernels.TILES_AT_ONCE)
        lists = []
        for b in range(n_cameras):
            order, ranks = tile_kernels.depth_order(_flat(radii[b]), _flat(depths[b]), _flat(opacities[b]))
            ranges = threads.even_ranges(len(order), tile_kernels.CHUNK)
            records = torch.empty(len(order), record_size).numpy()
            pair_counts = np.empty(len(order), np.int32)
            tile_counts = np.empty((len(ranges), n_tiles), np.int32)
            threads.run(
                tile_kernels.pack,
                ranges,
                order,
                *(_flat(tensor[b]) for tensor in (means2d, conics, opacities, colors, depths)),
                channels,
                with_depth,
                width,
                height,
                records,
                pair_counts,
                tile_counts,
            )
            tile_starts, pair_starts = tile_kernels.lay_out_pairs(pair_counts, tile_counts)
            pair_ranks = np.empty(tile_starts[-1], np.int32)
            gaussian_pairs = np.empty(tile_starts[-1], np.int32)
            threads.run(
                tile_kernels.list_pairs,
                ranges,
                records,
                pair_starts,
                width,
                height,
                tile_counts,
                pair_ranks,
                gaussian_pairs,
            )
            threads.run(
                tile_kernels.blend,
                tile_ranges,
                records,
                tile_starts,
                pair_ranks,
                _flat(background[b]),
                channels,
                with_depth,
                width,
                height,
                *(_flat(tensor[b]) for tensor in (features, depth, alpha, transmittance, last_pairs)),
            )
            lists.append((ranks, records, tile_starts, pair_ranks, pair_starts, gaussian_pairs))
        ctx.save_for_backward(means2d, conics, opacities, colors, depth, alpha, background)
        ctx.buffers = (transmittance, last_pairs, lists)
        ctx.options = (width, height, with_depth, absgrad)
        ctx.set_materialize_grads(False)
        return features, depth, alpha

    @staticmethod
    def backward(ctx, v_features, v_depth, v_alpha):
        means2d, conics, opacities, colors, depth, alpha, background = ctx.saved_tensors
        transmittance, last_pairs, lists = ctx.buffers
        width, height, with_depth, absgrad = ctx.options
        n_cameras, n, channels = colors.shape

        def given(gradient, *shape):
            return gradient if gradient is not None else torch.zeros(n_cameras, height, width, *shape)

        v_features, v_depth, v_alpha = given(v_features, channels), given(v_depth, 1), given(v_alpha, 1)
        v_means2d, v_conics = torch.empty(n_cameras, n, 2), torch.empty(n_cameras, n, 3)
        v_opacities, v_depths = torch.empty(n_cameras, n), torch.empty(n_cameras, n)
        v_colors = torch.empty(n_cameras, n, channels)
        v_abs = torch.empty(n_cameras, n if absgrad else 0, 2)
        n_tiles = -(-width // tile_kernels.TILE) * -(-height // tile_kernels.TILE)
        tile_ranges = threads.even_ranges(n_tiles, tile_kernels.TILES_AT_ONCE)
        for b, (ranks, records, tile_starts, pair_ranks, pair_starts, gaussian_pairs) in enumerate(lists):
            v_pairs = torch.empty(len(pair_ranks), records.shape[1]).numpy()
            threads.run(
                tile_kernels.blend_backward,
                tile_ranges,
                records,
                tile_starts,
                pair_ranks,
                _flat(background[b]),
                channels,
                with_depth,
                absgrad,
                width,
                height,
                *(_flat(tensor[b]) for tensor in (depth, alpha, transmittance, last_pairs)),
                *(_flat(tensor[b]) for tensor in (v_features, v_depth, v_alpha)),
                v_pairs,
            )
            threads.run(
                tile_kernels.gather_gradients,
                threads.even_ranges(n, tile_kernels.CHUNK),
                ranks,
                pair_starts,
                gaussian_pairs,
                v_pairs,
                _flat(conics[b]),
                _flat(opacities[b]),
                channels,
                with_depth,
                absgrad,
                *(_flat(tensor[b]) for tensor in (v_means2d, v_abs, v_conics, v_opacities, v_colors, v_depths)),
            )
        if absgrad:
            means2d.absgrad = v_abs
        v_backgrounds = None
        if ctx.needs_input_grad[5]:
            v_backgrounds = torch.einsum("bhw,bhwc->bc", transmittance, v_features)
        return v_means2d, v_conics, v_opacities, v_colors, v_depths, v_backgrounds, None, None, None, None
