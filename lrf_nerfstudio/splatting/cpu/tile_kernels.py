"""Kernels that sort projected Gaussians into tiles, blend them, and differentiate the blending.

A tile is a block of 4 x 4 pixels, one vector. Its state (transmittance, accumulated channels) is held while the
Gaussians that touch it pass by in order of depth. One thread works on a tile at a time, nothing is shared.

A visible Gaussian is packed into a record: centre x and y, the quadratic form A, B, C and the level L, with which alpha
is 2^(L - A dx^2 - B dx dy - C dy^2), two unused floats, and its channels (depth is one of them), padded with zeros to
whole cache lines. The backward pass writes one gradient record of the same size for every pair of Gaussian and tile,
and sums those of a Gaussian in a fixed order afterwards: no atomics, the same bits at each run.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import math

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
    select,
    store,
)
from lrf_nerfstudio.splatting.cpu.threads import inline, kernel

TILE = 4
"""Edge of a tile in pixels."""

HEADER = 8
"""Floats of a record before its channels."""

CHUNK = 2048
"""Gaussians per range handed to a thread."""

TILES_AT_ONCE = 16
"""Tiles per range handed to a thread."""

_LOG2_E = 1.0 / math.log(2.0)
_LOWEST_LEVEL = -math.log2(255.0)
_MAX_ALPHA = 0.999
_MIN_TRANSMITTANCE = 1e-4


@kernel
def depth_order(radii, depths, opacities):
    """Sorts the Gaussians that can be seen by depth, nearest first; ties in order of index.

    Returns:
        order [V] int32: indices of Gaussians; ranks [N] int32: its inverse, -1 for the others.
    """
    n = radii.shape[0]
    keys = np.empty(n, np.uint32)
    order = np.empty(n, np.int32)
    bits = depths.view(np.uint32)
    count = 0
    for i in range(n):
        if radii[i] > 0 and opacities[i] * np.float32(255.0) >= np.float32(1.0):
            key = bits[i]  # floats sort like integers once negative ones are mirrored
            keys[count] = ~key if key >> np.uint32(31) else key | np.uint32(0x80000000)
            order[count] = i
            count += 1
    keys = keys[:count].copy()
    order = order[:count].copy()
    other_keys = np.empty_like(keys)
    other_order = np.empty_like(order)
    histogram = np.empty(2048, np.int32)
    for shift in range(0, 33, 11):
        histogram[:] = 0
        for j in range(count):
            histogram[(keys[j] >> np.uint32(shift)) & np.uint32(2047)] += 1
        position = 0
        for bucket in range(2048):
            size = histogram[bucket]
            histogram[bucket] = position
            position += size
        for j in range(count):
            bucket = (keys[j] >> np.uint32(shift)) & np.uint32(2047)
            spot = histogram[bucket]
            histogram[bucket] = spot + 1
            other_keys[spot] = keys[j]
            other_order[spot] = order[j]
        keys, other_keys = other_keys, keys
        order, other_order = other_order, order
    ranks = np.full(n, -1, np.int32)
    for rank in range(count):
        ranks[order[rank]] = rank
    return order, ranks


@inline
def _reach(level):
    """Largest value of the quadratic form at which alpha still reaches 1/255, with a margin for rounding."""
    return (level - _LOWEST_LEVEL) * 1.00001 + 1e-4


@inline
def _ellipse(record):
    """The outline alpha = 1/255 of a record's Gaussian, as numbers from which `_row_span` cuts slices.

    A slice at height dy runs from `shear dy - sqrt(half_width^2 - shrink dy^2)` to `shear dy + sqrt(...)`; its right
    end is furthest at `dy = turn`, its left end at `-turn`. Also the half height.
    """
    a = np.float64(record[2])
    b = np.float64(record[3])
    c = np.float64(record[4])
    reach = _reach(np.float64(record[5]))
    discriminant = 4.0 * a * c - b * b
    if not discriminant > 0.0:  # the conic lost its definiteness to rounding: reach everywhere
        return 0.0, 1e18, 0.0, 0.0, 1e9
    inverse = 1.0 / (2.0 * a)
    half_height = math.sqrt(reach * 4.0 * a / discriminant)
    turn = -b * math.sqrt(reach / (c * discriminant))
    return -b * inverse, reach / a, discriminant * inverse * inverse, turn, half_height


@inline
def _tile_rows(y, half_height, height):
    """Rows of tiles (first, one after the last) with a pixel centre within `half_height` of y."""
    top = max(math.ceil(max(y - half_height - 0.5, -1.0)), 0)
    bottom = math.floor(min(y + half_height - 0.5, height - 1.0))
    if bottom < top:
        return 0, 0
    return top // TILE, bottom // TILE + 1


@inline
def _row_span(ellipse, x, y, row, width):
    """Tiles of a row of tiles (first, one after the last) that hold a pixel with alpha >= 1/255.

    The ends of a slice are concave functions of its height: over the band of heights of the row's pixels they are
    furthest out at the height of the ellipse's own extreme point, clamped to the band.
    """
    shear, squared_half_width, shrink, turn, _ = ellipse
    low = row * TILE + 0.5 - y
    high = low + (TILE - 1)
    right_y = min(max(turn, low), high)
    left_y = min(max(-turn, low), high)
    right = x + shear * right_y + math.sqrt(max(squared_half_width - shrink * right_y * right_y, 0.0))
    left = x + shear * left_y - math.sqrt(max(squared_half_width - shrink * left_y * left_y, 0.0))
    first = max(math.ceil(max(left - 0.5 - 1e-4, -1.0)), 0)
    last = math.floor(min(right - 0.5 + 1e-4, width - 1.0))
    if last < first:
        return 0, 0
    return first // TILE, last // TILE + 1


@kernel
def pack(
    begin,
    end,
    order,  # [V]
    means2d,  # [N * 2]
    conics,  # [N * 3]
    opacities,  # [N]
    colors,  # [N * C]
    depths,  # [N]; the last channel if with_depth
    channels,
    with_depth,
    width,
    height,
    records,  # out [V, record size]
    pair_counts,  # out [V]: tiles that a Gaussian touches
    tile_counts,  # out [chunks, tiles]: Gaussians of this chunk that touch a tile
):
    """Packs the Gaussians order[begin:end] into records and counts the tiles that they touch."""
    size = records.shape[1]
    tiles_x = (width + TILE - 1) // TILE
    counts = tile_counts[begin // CHUNK]
    counts[:] = 0
    for rank in range(begin, end):
        i = np.int64(order[rank])
        record = records[rank]
        record[0] = means2d[2 * i]
        record[1] = means2d[2 * i + 1]
        record[2] = 0.5 * _LOG2_E * np.float64(conics[3 * i])
        record[3] = _LOG2_E * np.float64(conics[3 * i + 1])
        record[4] = 0.5 * _LOG2_E * np.float64(conics[3 * i + 2])
        record[5] = math.log2(np.float64(opacities[i]))
        record[6] = 0.0
        record[7] = 0.0
        for k in range(channels):
            record[HEADER + k] = colors[i * channels + k]
        used = HEADER + channels
        if with_depth:
            record[used] = depths[i]
            used += 1
        for k in range(used, size):
            record[k] = 0.0
        x = np.float64(record[0])
        y = np.float64(record[1])
        ellipse = _ellipse(record)
        first_row, last_row = _tile_rows(y, ellipse[4], height)
        pairs = 0
        for row in range(first_row, last_row):
            first, last = _row_span(ellipse, x, y, row, width)
            pairs += last - first
            for tile in range(row * tiles_x + first, row * tiles_x + last):
                counts[tile] += 1
        pair_counts[rank] = pairs


@kernel
def lay_out_pairs(pair_counts, tile_counts):
    """Places of pairs in the two orders in which they are kept: by tile, and by Gaussian.

    Turns `tile_counts` [chunks, tiles] in place into the position of the first pair of each chunk in each tile.

    Returns:
        tile_starts [tiles + 1]: the pairs of tile t are tile_starts[t]:tile_starts[t + 1], nearest Gaussian first.
        pair_starts [V + 1]: those of a Gaussian are gaussian_pairs[pair_starts[rank]:pair_starts[rank + 1]].
    """
    n_chunks, n_tiles = tile_counts.shape
    tile_starts = np.empty(n_tiles + 1, np.int32)
    total = 0
    for tile in range(n_tiles):
        tile_starts[tile] = total
        for chunk in range(n_chunks):
            count = tile_counts[chunk, tile]
            tile_counts[chunk, tile] = total
            total += count
    tile_starts[n_tiles] = total
    pair_starts = np.empty(len(pair_counts) + 1, np.int32)
    total = 0
    for rank in range(len(pair_counts)):
        pair_starts[rank] = total
        total += pair_counts[rank]
    pair_starts[len(pair_counts)] = total
    return tile_starts, pair_starts


@kernel
def list_pairs(begin, end, records, pair_starts, width, height, cursors, pair_ranks, gaussian_pairs):
    """Fills in the Gaussian of every pair, pair_ranks [M], and the pairs of every Gaussian, gaussian_pairs [M]."""
    tiles_x = (width + TILE - 1) // TILE
    places = cursors[begin // CHUNK]
    for rank in range(begin, end):
        x = np.float64(records[rank, 0])
        y = np.float64(records[rank, 1])
        k = pair_starts[rank]
        ellipse = _ellipse(records[rank])
        first_row, last_row = _tile_rows(y, ellipse[4], height)
        for row in range(first_row, last_row):
            first, last = _row_span(ellipse, x, y, row, width)
            for tile in range(row * tiles_x + first, row * tiles_x + last):
                place = places[tile]
                places[tile] = place + 1
                pair_ranks[place] = rank
                gaussian_pairs[k] = place
                k += 1


@inline
def _exponent(records, at, x, y):
    """Offsets from the centre, log2 of the unclamped alpha, and the quadratic form."""
    dx = x - load_broadcast(records, at)
    dy = y - load_broadcast(records, at + 1)
    slope = fma(load_broadcast(records, at + 2), dx, load_broadcast(records, at + 3) * dy)
    form = fma(dx, slope, load_broadcast(records, at + 4) * dy * dy)
    return dx, dy, load_broadcast(records, at + 5) - form, form


@kernel
def blend(
    begin,
    end,
    records,
    tile_starts,
    pair_ranks,
    background,  # [C]
    channels,
    with_depth,
    width,
    height,
    features,  # out [H * W * C]
    depth,  # out [H * W]; not touched without depth
    alpha,  # out [H * W]
    transmittance,  # out [H * W]: 1 - alpha, exactly
    last_pairs,  # out [H * W]: the last pair that was blended into a pixel, -1: none
):
    """Blends tiles begin..end front to back."""
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
        for pair in range(tile_starts[tile], tile_starts[tile + 1]):
            at = np.int64(pair_ranks[pair]) * size
            _, _, power, form = _exponent(records, at, x, y)
            opaque = minimum(exp2(maximum(power, -20.0)), _MAX_ALPHA)
            hit = (power >= _LOWEST_LEVEL) & (form >= 0.0)
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
                    features[pixel * channels + k] = sums[k, lane] + through * background[k]
                if with_depth:
                    depth[pixel] = sums[channels, lane] / max(alpha[pixel], np.float32(1e-10))


@kernel
def blend_backward(
    begin,
    end,
    records,
    tile_starts,
    pair_ranks,
    background,
    channels,
    with_depth,
    with_abs,
    width,
    height,
    depth,
    alpha,
    transmittance,
    last_pairs,
    v_features,  # [H * W * C]
    v_depth,  # [H * W]
    v_alpha,  # [H * W]
    v_pairs,  # out [M, record size]
):
    """Gradient records of the pairs of tiles begin..end.

    A record holds, summed over the pixels of the tile and with s = d loss / d form: s, s dx, s dy, abs x; s dx dx,
    s dx dy, s dy dy, abs y; and the gradients of the channels. abs x is |s (2 A dx + B dy)|, abs y likewise.
    """
    size = records.shape[1]
    groups = (channels + with_depth + 3) // 4
    tiles_x = (width + TILE - 1) // TILE
    column = lane_numbers(1, TILE)
    row = lane_numbers(TILE, TILE)
    v_channels = np.empty((4 * groups, LANES), np.float32)
    initial = np.empty((2, LANES), np.float32)
    last_of = np.empty(LANES, np.int32)
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
                    behind += background[k] * v_features[pixel * channels + k]
                if with_depth and alpha[pixel] > np.float32(1e-10):
                    v_channels[channels, lane] = v_depth[pixel] / alpha[pixel]
                    behind += v_depth[pixel] * depth[pixel] / alpha[pixel]
                initial[0, lane] = transmittance[pixel]
                initial[1, lane] = behind * transmittance[pixel]
        t = load(initial, 0)
        behind = load(initial, LANES)  # what lies behind the current Gaussian, weighted with its gradient
        last = load(last_of, 0)
        for pair in range(final_pair + 1, tile_starts[tile + 1]):
            for k in range(0, size, LANES):
                store(v_pairs, np.int64(pair) * size + k, zero)
        for pair in range(min(final_pair, tile_starts[tile + 1] - 1), tile_starts[tile] - 1, -1):
            at = np.int64(pair_ranks[pair]) * size
            out = np.int64(pair) * size
            dx, dy, power, form = _exponent(records, at, x, y)
            taken = (power >= _LOWEST_LEVEL) & (form >= 0.0) & not_above(broadcast_int(pair), last)
            if not any_lane(taken):
                for k in range(0, size, LANES):
                    store(v_pairs, out + k, zero)
                continue
            raw = exp2(maximum(power, -20.0))
            opaque = minimum(raw, _MAX_ALPHA)
            inverse = 1.0 / (1.0 - opaque)
            t = select(taken, t * inverse, t)
            weight = select(taken, opaque * t, zero)
            v_weight = zero
            for k in range(4 * groups):
                v_weight = fma(load_broadcast(records, at + HEADER + k), load(v_channels, k * LANES), v_weight)
            v_opaque = t * v_weight - behind * inverse
            behind = fma(weight, v_weight, behind)
            v_form = select(taken & (raw <= _MAX_ALPHA), -opaque * v_opaque, zero)
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
def gather_gradients(
    begin,
    end,
    ranks,  # [N]
    pair_starts,
    gaussian_pairs,
    v_pairs,
    conics,
    opacities,
    channels,
    with_depth,
    with_abs,
    v_means2d,  # out [N * 2]
    v_abs,  # out [N * 2]; touched only with_abs
    v_conics,  # out [N * 3]
    v_opacities,  # out [N]
    v_colors,  # out [N * C]
    v_depths,  # out [N]
):
    """Sums the gradient records of Gaussians begin..end and turns them into gradients of their parameters."""
    size = v_pairs.shape[1]
    total = np.empty(size, np.float32)
    for i in range(begin, end):
        rank = ranks[i]
        if rank >= 0:
            for k in range(0, size, LANES):
                sums = broadcast(0.0)
                for j in range(pair_starts[rank], pair_starts[rank + 1]):
                    sums += load(v_pairs, np.int64(load_scalar(gaussian_pairs, j)) * size + k)
                store(total, k, sums)
            v_opacities[i] = -total[0] / opacities[i]
        else:
            total[:] = 0.0
            v_opacities[i] = 0.0
        a = conics[3 * i]
        b = conics[3 * i + 1]
        c = conics[3 * i + 2]
        v_means2d[2 * i] = -(a * total[1] + b * total[2])
        v_means2d[2 * i + 1] = -(b * total[1] + c * total[2])
        v_conics[3 * i] = np.float32(0.5) * total[4]
        v_conics[3 * i + 1] = total[5]
        v_conics[3 * i + 2] = np.float32(0.5) * total[6]
        if with_abs:
            v_abs[2 * i] = total[3] / np.float32(_LOG2_E)
            v_abs[2 * i + 1] = total[7] / np.float32(_LOG2_E)
        for k in range(channels):
            v_colors[i * channels + k] = total[HEADER + k]
        v_depths[i] = total[HEADER + channels] if with_depth else np.float32(0.0)
