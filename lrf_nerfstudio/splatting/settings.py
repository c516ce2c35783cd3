"""The arguments of `rasterize` that are not tensors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RasterSettings:
    """See `rasterize` for what they mean."""

    width: int
    height: int
    sh_degree: int | None
    near_plane: float
    far_plane: float
    eps2d: float
    radius_clip: float
    render_depth: bool
    absgrad: bool
    antialiased: bool
