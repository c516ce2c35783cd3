"""Kernels that sort projected Gaussians into tiles, blend them, and differentiate the blending.

A tile is a block of 4 x 4 pixels, one vector. Its state (transmittance, accumulated channels) is held while the
Gaussians that touch it pass by in order of depth. One thread works on a tile at a time, nothing is shared.

A visible Gaussian is packed into a record: centre x and y, the quadratic form A, B, C and the level L, with which alpha
is 2^(L - A dx^2 - B dx dy - C dy^2), the rows of tiles that it touches (first, one after the last), and its channels
(depth is one of them), padded with zeros to whole cache lines. The backward pass writes one gradient record of the same
size for every pair of Gaussian and tile, in the order of Gaussians, and sums them afterwards: no atomics, the same bits
at each run. Such a record holds, with s = d loss / d form in each pixel, the sums over the pixels of the tile of s,
s dx, s dy, |s (2 A dx + B dy)|; of s dx dx, s dx dy, s dy dy, |s (2 C dy + B dx)|; and the gradients of the channels.
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
    ceil,
    exp2,
    floor,
    fma,
    lane_numbers,
    lane_sums,
    load,
    load_broadcast,
    load_scalar,
    log2,
    maximum,
    minimum,
    not_above,
    prefetch,
    select,
    sqrt,
    store,
    store_scalar,
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

_BATCH = 32

_LOG2_E = 1.0 / math.log(2.0)
_LOWEST_LEVEL = -math.log2(255.0)
_MAX_ALPHA = 0.999
_MIN_TRANSMITTANCE = 1e-4


@kernel
def depth_order(radii, depths, opacities):
    """Sorts the Gaussians that can be seen by depth, nearest first; ties in order of index.

    Returns:
        order [N] int32, indices of Gaussians: first the V that can be seen, then the others; and V.
    """
    n = radii.shape[0]
    keys = np.empty(n, np.uint32)
    order = np.empty(n, np.int32)
    bits = depths.view(np.uint32)
    count = 0
    hidden = 0
    others = np.empty(n, np.int32)
    for i in range(n):
        if radii[i] > 0 and opacities[i] * np.float32(255.0) >= np.float32(1.0):
            key = bits[i]  # floats sort like integers once negative ones are mirrored
            keys[count] = ~key if key >> np.uint32(31) else key | np.uint32(0x80000000)
            order[count] = i
            count += 1
        else:
            others[hidden] = i
            hidden += 1
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
    everything = np.empty(n, np.int32)
    everything[:count] = order
    everything[count:] = others[:hidden]
    return everything, count


@inline
def _outlines(scratch, height):
    """For the 16 Gaussians in `scratch`, their headers and the outlines at which alpha is 1/255.

    Rows of `scratch` in: x, y, conic a, b, c, opacity. Out: rows 0-7 become the header of a record (the last two are
    the first row of tiles that the Gaussian touches and the one after the last), rows 8-14 the outline, from which
    `_row_span` cuts slices. A slice at height dy runs from `shear dy - sqrt(width - shrink dy^2)` to
    `shear dy + sqrt(...)`; its right end is furthest at `dy = turn`, its left end at `-turn`. All is widened a little
    for rounding, since too wide only costs time.
    """
    x = load(scratch, 0)
    y = load(scratch, LANES)
    a = 0.5 * _LOG2_E * load(scratch, 2 * LANES)
    b = _LOG2_E * load(scratch, 3 * LANES)
    c = 0.5 * _LOG2_E * load(scratch, 4 * LANES)
    level = log2(load(scratch, 5 * LANES))
    reach = maximum(fma(level - _LOWEST_LEVEL, 1.00001, 1e-4), 0.0)
    square = b * b
    discriminant = fma(4.0 * a, c, -square) - fma(b, b, -square)  # the second term is the rounding error of the square
    definite = discriminant > 0.0  # else the conic lost it to rounding, and the outline is taken to be everywhere
    inverse = 0.5 / a
    width = select(definite, reach / a, 1e16)
    margin = fma(sqrt(width), 1e-3, 1e-3)
    half_height = select(definite, sqrt(4.0 * a * reach / discriminant) * 1.00001 + 1e-3, 1e9)
    top = maximum(ceil(maximum(y - half_height - 0.5, -1.0)), 0.0)
    bottom = floor(minimum(y + half_height - 0.5, height - 1.0))
    touched = bottom >= top
    store(scratch, 2 * LANES, a)
    store(scratch, 3 * LANES, b)
    store(scratch, 4 * LANES, c)
    store(scratch, 5 * LANES, level)
    store(scratch, 6 * LANES, select(touched, floor(top * (1.0 / TILE)), 0.0))
    store(scratch, 7 * LANES, select(touched, floor(bottom * (1.0 / TILE)) + 1.0, 0.0))
    store(scratch, 8 * LANES, x - 0.5 - margin)
    store(scratch, 9 * LANES, x - 0.5 + margin)
    store(scratch, 10 * LANES, y)
    store(scratch, 11 * LANES, select(definite, -b * inverse, 0.0))
    store(scratch, 12 * LANES, width)
    store(scratch, 13 * LANES, select(definite, discriminant * inverse * inverse, 0.0))
    store(scratch, 14 * LANES, select(definite, -b * sqrt(reach / (c * discriminant)), 0.0))


@inline
def _row_span(scratch, lane, row, width):
    """Tiles of a row of tiles (first, one after the last) that hold a pixel with alpha >= 1/255; after `_outlines`.

    The ends of a slice are concave functions of its height: over the band of heights of the row's pixels they are
    furthest out at the height of the ellipse's own extreme point, clamped to the band.
    """
    shear = load_scalar(scratch, 11 * LANES + lane)
    squared_width = load_scalar(scratch, 12 * LANES + lane)
    shrink = load_scalar(scratch, 13 * LANES + lane)
    turn = load_scalar(scratch, 14 * LANES + lane)
    low = np.float32(row * TILE + 0.5) - load_scalar(scratch, 10 * LANES + lane)
    high = low + np.float32(TILE - 1)
    right_y = min(max(turn, low), high)
    left_y = min(max(-turn, low), high)
    zero = np.float32(0.0)
    right = load_scalar(scratch, 9 * LANES + lane) + shear * right_y
    right += math.sqrt(max(squared_width - shrink * right_y * right_y, zero))
    left = load_scalar(scratch, 8 * LANES + lane) + shear * left_y
    left -= math.sqrt(max(squared_width - shrink * left_y * left_y, zero))
    first = max(math.ceil(max(left, np.float32(-1.0))), 0)
    last = math.floor(min(right, np.float32(width - 1)))
    if last < first:
        return 0, 0
    return first // TILE, last // TILE + 1


@kernel
def pack(begin, end, order, splats, layout, records, pair_counts, tile_counts):
    """Pack the Gaussians order[begin:end] into records.

    Args:
        begin: First rank, a multiple of `CHUNK`.
        end: One after the last.
        order: Indices of the Gaussians by depth [V].
        splats: means2d [N * 2], conics [N * 3], opacities [N], colors [N * C] and depths [N].
        layout: C, whether depth is one more channel, width and height of the image.
        records: Written, [V, record size].
        pair_counts: Written, [V]: how many tiles a Gaussian touches.
        tile_counts: Written, [chunks, tiles]: how many Gaussians of this chunk touch a tile.

    Returns:
        The tiles that they touch, one by one, int32.
    """
    means2d, conics, opacities, colors, depths = splats
    channels, with_depth, width, height = layout
    size = records.shape[1]
    tiles_x = (width + TILE - 1) // TILE
    counts = tile_counts[begin // CHUNK]
    counts[:] = 0
    scratch = np.ones((16, LANES), np.float32)
    tiles = np.empty(8 * (end - begin) + tiles_x, np.int32)
    filled = 0
    for start in range(begin, end, LANES):
        count = min(LANES, end - start)
        for lane in range(count):
            i = np.int64(load_scalar(order, start + lane))
            ahead = np.int64(load_scalar(order, min(start + lane + 2 * LANES, end - 1)))
            prefetch(means2d, 2 * ahead)
            prefetch(conics, 3 * ahead)
            prefetch(opacities, ahead)
            prefetch(colors, ahead * channels)
            store_scalar(scratch, lane, load_scalar(means2d, 2 * i))
            store_scalar(scratch, LANES + lane, load_scalar(means2d, 2 * i + 1))
            store_scalar(scratch, 2 * LANES + lane, load_scalar(conics, 3 * i))
            store_scalar(scratch, 3 * LANES + lane, load_scalar(conics, 3 * i + 1))
            store_scalar(scratch, 4 * LANES + lane, load_scalar(conics, 3 * i + 2))
            store_scalar(scratch, 5 * LANES + lane, load_scalar(opacities, i))
        _outlines(scratch, height)
        for lane in range(count):
            rank = start + lane
            i = np.int64(load_scalar(order, rank))
            at = rank * size
            for k in range(HEADER):
                store_scalar(records, at + k, load_scalar(scratch, k * LANES + lane))
            for k in range(channels):
                store_scalar(records, at + HEADER + k, load_scalar(colors, i * channels + k))
            used = HEADER + channels
            if with_depth:
                store_scalar(records, at + used, load_scalar(depths, i))
                used += 1
            for k in range(used, size):
                store_scalar(records, at + k, 0.0)
            before = filled
            first_row = np.int64(load_scalar(scratch, 6 * LANES + lane))
            for row in range(first_row, np.int64(load_scalar(scratch, 7 * LANES + lane))):
                first, last = _row_span(scratch, lane, row, width)
                if filled + last - first > len(tiles):
                    larger = np.empty(2 * len(tiles), np.int32)
                    larger[:filled] = tiles[:filled]
                    tiles = larger
                for tile in range(row * tiles_x + first, row * tiles_x + last):
                    store_scalar(counts, tile, load_scalar(counts, tile) + 1)
                    store_scalar(tiles, filled, tile)
                    filled += 1
            store_scalar(pair_counts, rank, filled - before)
    return tiles[:filled]


@kernel
def lay_out_pairs(pair_counts, tile_counts):
    """Places of pairs in the two orders in which they are kept: by tile, and by Gaussian.

    Turns `tile_counts` [chunks, tiles] in place into the position of the first pair of each chunk in each tile.

    Returns:
        tile_starts [tiles + 1]: the pairs of tile t are tile_starts[t]:tile_starts[t + 1], nearest Gaussian first.
        pair_starts [V + 1]: those of a Gaussian are pair_starts[rank]:pair_starts[rank + 1] in the order by Gaussian.
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
def list_pairs(begin, end, pair_tiles, pair_starts, cursors, pair_ranks, pair_slots):
    """Fills in the Gaussian of every pair, pair_ranks [M], and its place in the order by Gaussian, pair_slots [M].

    `pair_tiles` is what `pack` returned for the same range.
    """
    places = cursors[begin // CHUNK]
    first = np.int64(pair_starts[begin])
    for rank in range(begin, end):
        for slot in range(np.int64(pair_starts[rank]), np.int64(pair_starts[rank + 1])):
            tile = np.int64(load_scalar(pair_tiles, slot - first))
            place = load_scalar(places, tile)
            store_scalar(places, tile, place + 1)
            store_scalar(pair_ranks, place, rank)
            store_scalar(pair_slots, place, slot)


@inline
def _exponent(records, at, x, y):
    """Offsets from the centre, log2 of the unclamped alpha, and the quadratic form."""
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
                taken = (power >= _LOWEST_LEVEL) & (form >= 0.0) & not_above(broadcast_int(pair), last)
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
            store_scalar(v_abs, 2 * i, total[3] / np.float32(_LOG2_E))
            store_scalar(v_abs, 2 * i + 1, total[7] / np.float32(_LOG2_E))
        for k in range(channels):
            store_scalar(v_colors, i * channels + k, load_scalar(total, HEADER + k))
        store_scalar(v_depths, i, total[HEADER + channels] if with_depth else np.float32(0.0))
