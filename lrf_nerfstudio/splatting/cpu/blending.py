"""Kernels that blend the Gaussians of every tile, and the way back.

The pixels of a tile are the lanes of one vector. Its state (transmittance, accumulated channels) is held while the
Gaussians that touch it pass by in order of depth. One thread works on a tile at a time, nothing is shared.

The backward pass writes a gradient record, as large as the records of `sorting`, for every pair of Gaussian and tile,
in the order of Gaussians, and sums them afterwards: no atomics, the same bits at each run. Such a record holds, with
s = d loss / d form in each pixel, the sums over the pixels of the tile of s, s dx, s dy, |s (2 A dx + B dy)|; of
s dx dx, s dx dy, s dy dy, |s (2 C dy + B dx)|; and the gradients of the channels.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import numpy as np

from lrf_nerfstudio.splatting.cpu.simd import (
    LANES,
    absolute,
    any_lane,
    broadcast,
    broadcast_int,
    exp2,
    fma,
    lane_numbers,
    lane_sums,
    load,
    load_broadcast,
    load_scalar,
    maximum,
    minimum,
    not_above,
    prefetch,
    select,
    store,
    store_scalar,
)
from lrf_nerfstudio.splatting.cpu.sorting import HEADER, LOG2_E, LOWEST_LEVEL, TILE
from lrf_nerfstudio.splatting.cpu.threads import inline, kernel

TILES_AT_ONCE = 16
"""Tiles in a range that is handed to a thread."""

_BATCH = 32
_MAX_ALPHA = 0.999
_MIN_TRANSMITTANCE = 1e-4


@inline
def _exponent(records, at, x, y):
    """Return the offsets from the center, log2 of the unclamped alpha, and the quadratic form."""
    dx = x - load_broadcast(records, at)
    dy = y - load_broadcast(records, at + 1)
    slope = fma(load_broadcast(records, at + 2), dx, load_broadcast(records, at + 3) * dy)
    form = fma(dx, slope, load_broadcast(records, at + 4) * dy * dy)
    return dx, dy, load_broadcast(records, at + 5) - form, form


@kernel
def blend(begin, end, lists, layout, image):
    """Blend tiles begin..end front to back.

    Args:
        begin: First tile.
        end: One after the last.
        lists: records [V, record size], tile_starts [tiles + 1], pair_ranks [M] and pair_slots [M].
        layout: As given to `pack`.
        image: Written, for every pixel: features [H * W * C], depth (not touched without depth), alpha, transmittance
            (1 - alpha, exactly) and the last pair that was blended (-1: none) [H * W].
    """
    records, tile_starts, pair_ranks, _ = lists
    channels, with_depth, width, height = layout
    features, depth, alpha, transmittance, last_pairs = image
    size = records.shape[1]
    groups = (channels + with_depth + 3) // 4
    tiles_x = (width + TILE - 1) // TILE
    column = lane_numbers(1, TILE)
    row = lane_numbers(TILE, TILE)
    sums = np.empty((4 * groups, LANES), np.float32)
    final = np.empty(LANES, np.float32)
    final_pair = np.empty(LANES, np.int32)
    for tile in range(begin, end):
        left = tile % tiles_x * TILE
        top = tile // tiles_x * TILE
        x = column + (left + 0.5)
        y = row + (top + 0.5)
        sums[:] = 0.0
        # The sign of t tells whether light still passes; pixels outside of the image are closed from the start.
        t = select((x < width) & (y < height), broadcast(1.0), -1.0)
        last = broadcast_int(-1)
        end_pair = tile_starts[tile + 1]
        for pair in range(tile_starts[tile], end_pair):
            at = np.int64(load_scalar(pair_ranks, pair)) * size
            prefetch(records, np.int64(load_scalar(pair_ranks, min(pair + 8, end_pair - 1))) * size)
            _, _, power, form = _exponent(records, at, x, y)
            opaque = minimum(exp2(maximum(power, -20.0)), _MAX_ALPHA)
            hit = (power >= LOWEST_LEVEL) & (form >= 0.0)
            after = t - opaque * t
            taken = hit & (after > _MIN_TRANSMITTANCE)
            if any_lane(taken):
                weight = select(taken, opaque * t, 0.0)
                last = select(taken, broadcast_int(pair), last)
                for k in range(4 * groups):
                    store(sums, k * LANES, fma(weight, load_broadcast(records, at + HEADER + k), load(sums, k * LANES)))
            t = select(taken, after, select(hit, -absolute(t), t))
            if not any_lane(t > 0.0):
                break
        store(final, 0, absolute(t))
        store(final_pair, 0, last)
        for lane in range(LANES):
            px = left + lane % TILE
            py = top + lane // TILE
            if px < width and py < height:
                pixel = py * width + px
                through = final[lane]
                transmittance[pixel] = through
                alpha[pixel] = np.float32(1.0) - through
                last_pairs[pixel] = final_pair[lane]
                for k in range(channels):
                    features[pixel * channels + k] = sums[k, lane]
                if with_depth:
                    depth[pixel] = sums[channels, lane] / max(alpha[pixel], np.float32(1e-10))


@kernel
def blend_backward(begin, end, lists, layout, with_abs, image, v_image, v_pairs):
    """Compute the gradient records of the pairs in tiles begin..end.

    Pairs are worked on in batches, back to front: first what depends on the pairs behind (transmittance, color
    behind), then, pair by pair, the sums over pixels. Kept apart, either loop has its next turns under way before one
    is finished.

    Args:
        begin: First tile.
        end: One after the last.
        lists: As given to `blend`.
        layout: Likewise.
        with_abs: Whether sums of absolute values are needed.
        image: depth, alpha, transmittance and last pairs, as `blend` wrote them.
        v_image: Gradients of features, depth and alpha.
        v_pairs: Written, [M, record size]: the gradient record of pair j in row pair_slots[j].
    """
    records, tile_starts, pair_ranks, pair_slots = lists
    channels, with_depth, width, height = layout
    depth, alpha, transmittance, last_pairs = image
    v_features, v_depth, v_alpha = v_image
    size = records.shape[1]
    groups = (channels + with_depth + 3) // 4
    tiles_x = (width + TILE - 1) // TILE
    column = lane_numbers(1, TILE)
    row = lane_numbers(TILE, TILE)
    v_channels = np.empty((4 * groups, LANES), np.float32)
    initial = np.empty((2, LANES), np.float32)
    last_of = np.empty(LANES, np.int32)
    batch = np.empty(_BATCH, np.int64)
    v_forms = np.empty((_BATCH, LANES), np.float32)
    weights = np.empty((_BATCH, LANES), np.float32)
    zero = broadcast(0.0)
    for tile in range(begin, end):
        left = tile % tiles_x * TILE
        top = tile // tiles_x * TILE
        x = column + (left + 0.5)
        y = row + (top + 0.5)
        v_channels[:] = 0.0
        final_pair = -1
        for lane in range(LANES):
            px = left + lane % TILE
            py = top + lane // TILE
            last_of[lane] = -1
            initial[0, lane] = 1.0
            initial[1, lane] = 0.0
            if px < width and py < height:
                pixel = py * width + px
                last_of[lane] = last_pairs[pixel]
                final_pair = max(final_pair, last_pairs[pixel])
                behind = -v_alpha[pixel]
                for k in range(channels):
                    v_channels[k, lane] = v_features[pixel * channels + k]
                if with_depth and alpha[pixel] > np.float32(1e-10):
                    v_channels[channels, lane] = v_depth[pixel] / alpha[pixel]
                    behind += v_depth[pixel] * depth[pixel] / alpha[pixel]
                initial[0, lane] = transmittance[pixel]
                initial[1, lane] = behind * transmittance[pixel]
        t = load(initial, 0)
        behind = load(initial, LANES)  # what lies behind the current Gaussian, weighted with its gradient
        last = load(last_of, 0)
        for pair in range(max(final_pair + 1, tile_starts[tile]), tile_starts[tile + 1]):
            for k in range(0, size, LANES):
                store(v_pairs, np.int64(load_scalar(pair_slots, pair)) * size + k, zero)
        pair = min(final_pair, tile_starts[tile + 1] - 1)
        while pair >= tile_starts[tile]:
            filled = 0
            while filled < _BATCH and pair >= tile_starts[tile]:
                at = np.int64(load_scalar(pair_ranks, pair)) * size
                prefetch(records, np.int64(load_scalar(pair_ranks, max(pair - 8, 0))) * size)
                _, _, power, form = _exponent(records, at, x, y)
                taken = (power >= LOWEST_LEVEL) & (form >= 0.0) & not_above(broadcast_int(pair), last)
                if any_lane(taken):
                    raw = exp2(maximum(power, -20.0))
                    opaque = minimum(raw, _MAX_ALPHA)
                    inverse = 1.0 / (1.0 - opaque)
                    v_weight = zero
                    for k in range(4 * groups):
                        v_weight = fma(load_broadcast(records, at + HEADER + k), load(v_channels, k * LANES), v_weight)
                    t = select(taken, t * inverse, t)
                    weight = select(taken, opaque * t, zero)
                    v_opaque = t * v_weight - behind * inverse
                    behind = fma(weight, v_weight, behind)
                    store(weights, filled * LANES, weight)
                    store(v_forms, filled * LANES, select(taken & (raw <= _MAX_ALPHA), -opaque * v_opaque, zero))
                    store_scalar(batch, filled, pair)
                    filled += 1
                else:
                    for k in range(0, size, LANES):
                        store(v_pairs, np.int64(load_scalar(pair_slots, pair)) * size + k, zero)
                pair -= 1
            for j in range(filled):
                of = load_scalar(batch, j)
                at = np.int64(load_scalar(pair_ranks, of)) * size
                out = np.int64(load_scalar(pair_slots, of)) * size
                dx = x - load_broadcast(records, at)
                dy = y - load_broadcast(records, at + 1)
                weight = load(weights, j * LANES)
                v_form = load(v_forms, j * LANES)
                vx = v_form * dx
                vy = v_form * dy
                abs_x = zero
                abs_y = zero
                if with_abs:
                    cross = load_broadcast(records, at + 3)
                    abs_x = absolute(fma(2.0 * load_broadcast(records, at + 2), vx, cross * vy))
                    abs_y = absolute(fma(2.0 * load_broadcast(records, at + 4), vy, cross * vx))
                store(v_pairs, out, lane_sums((v_form, vx, vy, abs_x)))
                store(v_pairs, out + 4, lane_sums((vx * dx, vx * dy, vy * dy, abs_y)))
                for group in range(groups):
                    at_channel = 4 * group * LANES
                    sums = lane_sums(
                        (
                            weight * load(v_channels, at_channel),
                            weight * load(v_channels, at_channel + LANES),
                            weight * load(v_channels, at_channel + 2 * LANES),
                            weight * load(v_channels, at_channel + 3 * LANES),
                        )
                    )
                    store(v_pairs, out + HEADER + 4 * group, sums)


@kernel
def gather_gradients(begin, end, order, pair_starts, v_pairs, splats, layout, with_abs, v_splats):
    """Sum the gradient records of Gaussians order[begin:end] and turn them into gradients of their parameters.

    Args:
        begin: First rank.
        end: One after the last; all N have one, the visible ones come first.
        order: As given to `pack`, [N].
        pair_starts: What `lay_out_pairs` returned, [V + 1].
        v_pairs: What `blend_backward` wrote.
        splats: As given to `pack`.
        layout: Likewise.
        with_abs: Whether `v_abs` is written.
        v_splats: Written: gradients of means2d, their absolute values v_abs [N * 2], and those of conics, opacities,
            colors and depths.
    """
    _, conics, opacities, _, _ = splats
    channels, with_depth, _, _ = layout
    v_means2d, v_abs, v_conics, v_opacities, v_colors, v_depths = v_splats
    size = v_pairs.shape[1]
    total = np.empty(size, np.float32)
    for rank in range(begin, end):
        i = np.int64(order[rank])
        if rank < len(pair_starts) - 1:
            for k in range(0, size, LANES):
                sums = broadcast(0.0)
                for j in range(pair_starts[rank], pair_starts[rank + 1]):
                    sums += load(v_pairs, j * size + k)
                store(total, k, sums)
            store_scalar(v_opacities, i, -total[0] / opacities[i])
        else:
            total[:] = 0.0
            store_scalar(v_opacities, i, 0.0)
        a = load_scalar(conics, 3 * i)
        b = load_scalar(conics, 3 * i + 1)
        c = load_scalar(conics, 3 * i + 2)
        store_scalar(v_means2d, 2 * i, -(a * total[1] + b * total[2]))
        store_scalar(v_means2d, 2 * i + 1, -(b * total[1] + c * total[2]))
        store_scalar(v_conics, 3 * i, np.float32(0.5) * total[4])
        store_scalar(v_conics, 3 * i + 1, total[5])
        store_scalar(v_conics, 3 * i + 2, np.float32(0.5) * total[6])
        if with_abs:
            store_scalar(v_abs, 2 * i, total[3] / np.float32(LOG2_E))
            store_scalar(v_abs, 2 * i + 1, total[7] / np.float32(LOG2_E))
        for k in range(channels):
            store_scalar(v_colors, i * channels + k, load_scalar(total, HEADER + k))
        store_scalar(v_depths, i, total[HEADER + channels] if with_depth else np.float32(0.0))
