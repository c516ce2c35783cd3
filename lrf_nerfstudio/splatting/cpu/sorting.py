"""Kernels that sort projected Gaussians by depth and into tiles.

A tile is a block of 4 x 4 pixels. A Gaussian that is visible is packed into a record: center x and y, the quadratic
form A, B, C and the level L, with which alpha is 2^(L - A dx^2 - B dx dy - C dy^2), the rows of tiles that it touches
(first, one after the last), and its channels (depth is one of them), padded with zeros to whole cache lines. A pair is
a Gaussian and a tile that it touches.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import math

import numpy as np

from lrf_nerfstudio.splatting.cpu.simd import (
    LANES,
    ceil,
    floor,
    fma,
    load,
    load_scalar,
    log2,
    maximum,
    minimum,
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
"""Gaussians in a range that is handed to a thread."""

LOWEST_LEVEL = -math.log2(255.0)
"""Logarithm to base 2 of the smallest alpha that counts."""

LOG2_E = 1.0 / math.log(2.0)


@kernel
def depth_order(radii, depths, opacities):
    """Sort the Gaussians that can be seen by depth, nearest first; ties in order of index.

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
    """Compute the headers of the 16 Gaussians in `scratch` and the outlines at which their alpha is 1/255.

    Rows of `scratch` in: x, y, conic a, b, c, opacity. Out: rows 0-7 become the header of a record (the last two are
    the first row of tiles that the Gaussian touches and the one after the last), rows 8-14 the outline, from which
    `_row_span` cuts slices. A slice at height dy runs from `shear dy - sqrt(width - shrink dy^2)` to
    `shear dy + sqrt(...)`; its right end is furthest at `dy = turn`, its left end at `-turn`. All is widened a little
    for rounding, since too wide only costs time.
    """
    x = load(scratch, 0)
    y = load(scratch, LANES)
    a = 0.5 * LOG2_E * load(scratch, 2 * LANES)
    b = LOG2_E * load(scratch, 3 * LANES)
    c = 0.5 * LOG2_E * load(scratch, 4 * LANES)
    level = log2(load(scratch, 5 * LANES))
    reach = maximum(fma(level - LOWEST_LEVEL, 1.00001, 1e-4), 0.0)
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
    """Return which tiles of a row (first, one after the last) hold a pixel with alpha >= 1/255; after `_outlines`.

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
    """Lay out the pairs in the two orders in which they are kept: by tile, and by Gaussian.

    Turn `tile_counts` [chunks, tiles] in place into the position of the first pair of each chunk in each tile.

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
    """Fill in the Gaussian of every pair, pair_ranks [M], and its place in the order by Gaussian, pair_slots [M].

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
