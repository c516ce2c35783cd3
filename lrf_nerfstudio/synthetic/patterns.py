"""Procedural patterns: how the four colors of a material are laid out on a surface.

A pattern returns a tone in [0, 3], which blends from the first color (0) to the fourth (3), and a shade, which
multiplies the result. Its coordinates are in units of the material's cell: `p` in space, for patterns that go through a
solid, and (`u`, `v`) along the surface, for those that are printed on it.

`footprint` is the width of a pixel in the same units. What is much finer is replaced by its mean, as a lens does, so
that distant patterns do not alias.
"""

import math
from enum import IntEnum

from lrf_nerfstudio.synthetic.geometry import Vec3, along, compiled, scaled


class Pattern(IntEnum):
    """The patterns."""

    PLAIN = 0
    CLOUDS = 1
    CAMOUFLAGE = 2
    MARBLE = 3
    WOOD = 4
    BRICKS = 5
    CHECKER = 6
    STRIPES = 7
    TARTAN = 8
    DOTS = 9
    MOSAIC = 10
    SCRIPT = 11
    SPRINKLES = 12
    ROSETTE = 13
    PICTURE = 14
    LANDSCAPE = 15
    """Sky (first color at the zenith, second at the horizon), hills (third) and trees (fourth) around the origin."""


@compiled
def _hash(x: int, y: int, z: int) -> float:
    """Return a number in [0, 1) for a lattice point."""
    h = (x * 73856093) ^ (y * 19349663) ^ (z * 83492791)
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 668265263) & 0xFFFFFFFF
    return ((h ^ (h >> 15)) & 0xFFFFFF) / 16777216.0


@compiled
def smoothstep(low: float, high: float, x: float) -> float:
    t = min(max((x - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


@compiled
def _noise(p: Vec3, seed: int) -> float:
    """Return value noise in [0, 1], one lattice cell a unit."""
    i, j, k = math.floor(p[0]), math.floor(p[1]), math.floor(p[2])
    u, v, w = smoothstep(0.0, 1.0, p[0] - i), smoothstep(0.0, 1.0, p[1] - j), smoothstep(0.0, 1.0, p[2] - k)
    total = 0.0
    for corner in range(8):
        a, b, c = corner & 1, (corner >> 1) & 1, corner >> 2
        weight = (u if a else 1.0 - u) * (v if b else 1.0 - v) * (w if c else 1.0 - w)
        total += weight * _hash(i + a + 101 * seed, j + b, k + c)
    return total


@compiled
def fractal(p: Vec3, footprint: float, seed: int) -> float:
    """Return up to six octaves of value noise, [0, 1]; those finer than a pixel fade to their mean."""
    total, amplitude = 0.5, 0.5
    for _ in range(6):
        amplitude *= 1.0 - smoothstep(0.5, 1.0, footprint)
        if amplitude == 0.0:
            break
        total += amplitude * (_noise(p, seed) - 0.5)
        p = 2.03 * p[0] + 7.1, 2.01 * p[1] + 3.3, 2.02 * p[2] + 5.7
        amplitude, footprint = 0.5 * amplitude, 2.0 * footprint
    return total


@compiled
def _bricks(u: float, v: float, seed: int) -> tuple[float, float]:
    """Bricks of two cells by one, the fourth color between them."""
    line = math.floor(v)
    u = 0.5 * u + 0.5 * (line % 2)
    column = math.floor(u)
    mortar = min(2.0 * min(u - column, 1.0 - u + column), min(v - line, 1.0 - v + line))
    tone = _hash(column, line, seed)
    return (2.0 * tone, 0.75 + 0.5 * _hash(line, column, seed)) if mortar > 0.06 else (3.0, 1.0)


@compiled
def _wood(p: Vec3, u: float, v: float, footprint: float, seed: int) -> tuple[float, float]:
    """Planks as wide as a cell; the grain runs along them."""
    plank = math.floor(v)
    seam = abs(v - plank - 0.5) > 0.47
    tone = _hash(plank, 3, seed)
    grain = fractal((0.7 * u + 9.0 * plank, 6.0 * v, 0.5 * p[2]), 3.0 * footprint, seed)
    return 2.5 * smoothstep(0.25, 0.75, grain), (0.35 if seam else 0.7 + 0.5 * tone)


@compiled
def _tartan(u: float, v: float, seed: int) -> tuple[float, float]:
    """Woven bands; threads of both directions take turns."""
    across, down = math.floor(4.0 * u), math.floor(4.0 * v)
    warp = math.floor(4.0 * _hash(across % 5, 1, seed))
    weft = math.floor(4.0 * _hash(down % 5, 1, seed))
    over = (math.floor(30.0 * u) + math.floor(30.0 * v)) % 4 < 2
    return (warp, 1.0) if over else (weft, 0.85)


@compiled
def _dots(u: float, v: float, seed: int) -> tuple[float, float]:
    i, j = math.floor(u), math.floor(v)
    radius = 0.15 + 0.25 * _hash(i, j, seed)
    x = u - i - 0.4 - 0.2 * _hash(i, j, seed + 1)
    y = v - j - 0.4 - 0.2 * _hash(i, j, seed + 2)
    return (1.0 + math.floor(3.0 * _hash(i, j, seed + 3)), 1.0) if math.hypot(x, y) < radius else (0.0, 1.0)


@compiled
def _mosaic(u: float, v: float, seed: int) -> tuple[float, float]:
    """Cells about scattered centers (Worley 1996), the fourth color between them."""
    nearest, second, tone, shade = 9.0, 9.0, 0.0, 1.0
    for step in range(9):
        i, j = math.floor(u) + step % 3 - 1, math.floor(v) + step // 3 - 1
        distance = math.hypot(i + _hash(i, j, seed) - u, j + _hash(i, j, seed + 1) - v)
        if distance < nearest:
            nearest, second = distance, nearest
            tone, shade = math.floor(3.0 * _hash(i, j, seed + 2)), 0.7 + 0.6 * _hash(i, j, seed + 3)
        else:
            second = min(second, distance)
    return (tone, shade) if second - nearest > 0.07 else (3.0, 1.0)


@compiled
def _script(u: float, v: float, seed: int) -> tuple[float, float]:
    """Lines of invented letters in the first two colors on paper of the fourth."""
    column, line = math.floor(u), math.floor(v / 1.8)
    x, y = int((u - column) * 4.0), int((v / 1.8 - line) * 7.0)
    written = x < 3 and y < 5 and _hash(column, line, seed) > 0.2
    if written and _hash(4 * column + x, 8 * line + y, seed + 1) < 0.58:
        return (1.0 if _hash(line, 0, seed) < 0.3 else 0.0), 1.0
    return 3.0, 1.0


@compiled
def _sprinkles(u: float, v: float, seed: int) -> tuple[float, float]:
    """Short strokes of three colors on the first."""
    i, j = math.floor(u), math.floor(v)
    turn = math.pi * _hash(i, j, seed)
    x = u - i - 0.35 - 0.3 * _hash(i, j, seed + 1)
    y = v - j - 0.35 - 0.3 * _hash(i, j, seed + 2)
    stroke = abs(math.cos(turn) * x + math.sin(turn) * y) < 0.3 and abs(math.cos(turn) * y - math.sin(turn) * x) < 0.1
    return (1.0 + math.floor(3.0 * _hash(i, j, seed + 3)), 1.0) if stroke else (0.0, 1.0)


@compiled
def _rosette(u: float, v: float, seed: int) -> tuple[float, float]:
    """Rings one cell wide about the origin, with teeth or beads in turn."""
    radius, angle = math.hypot(u, v), math.atan2(v, u) / (2.0 * math.pi)
    ring = math.floor(radius)
    wave = abs(angle * (5.0 + 5.0 * ring) % 1.0 - 0.5)  # 0 to 0.5 and back, around the ring
    first = math.floor(4.0 * _hash(ring, 0, seed))
    second = (first + 1.0 + math.floor(3.0 * _hash(ring, 1, seed))) % 4.0
    if ring % 2 == 1:
        return (first, 1.0) if 2.0 * wave > radius - ring else (second, 1.0)
    bead = math.hypot(wave * 6.28 * radius / (5.0 + 5.0 * ring), radius - ring - 0.5) < 0.22
    return (second, 1.0) if bead and ring > 0 else (first, 1.0)


@compiled
def _picture(u: float, v: float, footprint: float, seed: int) -> tuple[float, float]:
    """A framed painting of one cell: hills under a sun, a caption below."""
    if max(abs(u), abs(v)) > 0.46:
        return 3.0, 0.5 + fractal((3.0 * u, 20.0 * v, 0.0), 20.0 * footprint, seed)
    if v < -0.3:
        return _script(20.0 * u, -16.0 * (v + 0.3), seed)
    far = 0.12 * math.sin(7.0 * u + seed) + 0.3 * fractal((4.0 * u, 0.0, 5.0), 4.0 * footprint, seed) - 0.1
    near = 0.1 * math.sin(5.0 * u + 2.0 * seed) + 0.25 * fractal((6.0 * u, 3.0, 5.0), 6.0 * footprint, seed) - 0.25
    detail = 0.6 + 0.8 * fractal((20.0 * u, 20.0 * v, 9.0), 20.0 * footprint, seed)
    if v < near:
        return 2.0, detail
    if v < far:
        return 1.5, detail
    sun = math.hypot(u - 0.5 * (_hash(seed, 1, 1) - 0.5), v - 0.3) < 0.09
    return (3.0, 1.0) if sun else (0.9 * (0.46 - v), 1.0)


@compiled
def _landscape(p: Vec3, seed: int) -> tuple[float, float]:
    """What surrounds a scene: all scales are angles, and none is finer than a pixel."""
    d = scaled(p, 1.0 / math.sqrt(p[0] ** 2 + p[1] ** 2 + p[2] ** 2))
    flat = math.hypot(d[0], d[1]) + 1e-9
    x, y, elevation = d[0] / flat, d[1] / flat, math.asin(min(max(d[2], -1.0), 1.0))
    bark = 0.6 + 0.8 * fractal((30.0 * x, 30.0 * y, 40.0 * elevation), 0.1, seed)
    if elevation < 0.05 + 0.06 * fractal((14.0 * x, 14.0 * y, 3.0), 0.1, seed):
        return 3.0, bark
    if elevation < 0.05 + 0.16 * fractal((3.0 * x + 5.0, 3.0 * y, 1.0), 0.1, seed):
        return 2.4, 0.5 + 0.5 * bark
    if elevation < 0.1 + 0.27 * fractal((2.2 * x, 2.2 * y + 7.0, 2.0), 0.1, seed):
        return 2.0, 0.6 + 0.4 * bark
    cloud = fractal(scaled((d[0], d[1], 2.0), 2.4 / (abs(d[2]) + 0.35)), 0.1, seed)
    return 1.0 - smoothstep(0.05, 0.9, elevation), 1.0 + 0.8 * smoothstep(0.5, 0.75, cloud)


@compiled
def pattern(kind: int, p: Vec3, u: float, v: float, footprint: float, seed: int) -> tuple[float, float]:
    """Return tone and shade of a pattern at a point; see the module for the arguments."""
    if kind == Pattern.CLOUDS:
        return 3.0 * smoothstep(0.25, 0.75, fractal(p, footprint, seed)), 1.0
    if kind == Pattern.CAMOUFLAGE:
        return math.floor(4.0 * smoothstep(0.3, 0.7, fractal(p, footprint, seed)) * 0.999), 1.0
    if kind == Pattern.MARBLE:
        swirl = fractal(along(p, 8.0, (0.0, 0.0, 1.0)), footprint, seed)
        vein = abs(math.sin(2.0 * (p[0] + 0.6 * p[2]) + 11.0 * swirl))
        return 3.0 - (3.0 - 2.0 * smoothstep(0.3, 0.7, swirl)) * smoothstep(0.05, 0.35, vein), 1.0
    if kind == Pattern.WOOD:
        return _wood(p, u, v, footprint, seed)
    if kind == Pattern.BRICKS:
        return _bricks(u, v, seed)
    if kind == Pattern.CHECKER:
        i, j = math.floor(u), math.floor(v)
        return (i + j) % 2 + 2.0 * (_hash(i, j, seed) < 0.15), 0.85 + 0.3 * _hash(j, i, seed)
    if kind == Pattern.STRIPES:
        wave = 0.8 * _hash(seed, 0, 0) * math.sin(2.0 * v)
        return math.floor(4.0 * _hash(math.floor(2.0 * (u + wave)), 5, seed)), 1.0
    if kind == Pattern.TARTAN:
        return _tartan(u, v, seed)
    if kind == Pattern.DOTS:
        return _dots(u, v, seed)
    if kind == Pattern.MOSAIC:
        return _mosaic(u, v, seed)
    if kind == Pattern.SCRIPT:
        return _script(4.0 * u, -4.0 * v, seed)
    if kind == Pattern.SPRINKLES:
        return _sprinkles(u, v, seed)
    if kind == Pattern.ROSETTE:
        return _rosette(u, v, seed)
    if kind == Pattern.PICTURE:
        return _picture(u, v, footprint, seed)
    if kind == Pattern.LANDSCAPE:
        return _landscape(p, seed)
    return 0.0, 1.0
