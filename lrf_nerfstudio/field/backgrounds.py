"""What is behind the Gaussians."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lrf_nerfstudio.vae import VAE, FieldNormalization

Color = tuple[float, ...]
"""RGB in [0, 1]."""

CELLS = 32
"""Side of the plain picture that is encoded, in cells: so large that its middle hardly sees the edges, which encoders
pad with zeros."""


class Background(nn.Module):
    """The field latent behind the Gaussians.

    Where photographs are transparent it belongs to the scene. Elsewhere training takes a plain color or, so that a
    background cannot stand in for opaque Gaussians, another random field latent at every step; and rendering takes what
    it is asked for, or else the middle of the field's range.

    Args:
        vae: encodes plain colors. Not a submodule, nor is the normalization: the model owns them.
        normalization: latent to field latent.
        scene_color: [3], RGB that transparent photographs were composited over; None if they are opaque.
        training_color: behind opaque photographs in training; None for a random field latent.

    Attributes:
        scene_color: [3], a buffer; NaN if the photographs are opaque.
        viewer_color: behind what is rendered; None for the middle of the field's range.
    """

    scene_color: Tensor

    def __init__(
        self, vae: VAE, normalization: FieldNormalization, scene_color: Tensor | None, training_color: Color | None
    ) -> None:
        super().__init__()
        self._owned_by_the_model = (vae, normalization)
        self._channels = vae.latent_channels
        self.register_buffer("scene_color", torch.full((3,), math.nan) if scene_color is None else scene_color)
        self._scene_color = None if scene_color is None else plain_color(scene_color)
        self._training_color = self.viewer_color = training_color
        self._fields: dict[Color, Tensor] = {}

    def forward(self, override: Color | None = None, views: int = 1) -> Tensor:
        """Return the field latent [C] or, of each view, [B, 1, 1, C], in training or rendering mode.

        Args:
            override: in place of all other colors when rendering.
            views: B.
        """
        if self.training:
            color = self._scene_color or self._training_color
            if color is None:
                return self.drawn(views)
        else:
            color = override or self._scene_color or self.viewer_color
            if color is None:
                return torch.full((self._channels,), 0.5, device=self.scene_color.device)
        if color not in self._fields:
            self._fields[color] = self._encoded(color)
        return self._fields[color]

    def drawn(self, views: int) -> Tensor:
        """Return a random field latent [C] for training, the same behind all views."""
        return torch.rand(self._channels, device=self.scene_color.device)

    def _encoded(self, color: Color) -> Tensor:
        """Return the field latent [C] of a color."""
        vae, normalization = self._owned_by_the_model
        latents = plain_latents(vae, self.scene_color.new_tensor([color]))
        return normalization.to_field(latents[:, :, None, None])[0, 0, 0]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        loaded = state_dict[f"{prefix}scene_color"]
        self._scene_color = plain_color(loaded) if torch.isfinite(loaded).all() else None
        self._fields.clear()  # they depend on the normalization, which comes with it


class ColorBackground(Background):
    """A background of random plain colors in training, another one behind each view, and white when rendering.

    A diffusion model knows pictures of objects before plain backgrounds, but not constant latents that no picture has.
    Colors are blended from the latents of the eight corners of the RGB cube, without encoding any.

    Attributes:
        corners: [8, C], field latents of black, blue, green, cyan, red, magenta, yellow and white, a buffer; zeros
            until a checkpoint is loaded or `encode_corners` is called.
    """

    corners: Tensor

    def __init__(self, vae: VAE, normalization: FieldNormalization, training_color: Color | None = None) -> None:
        """Begin without corners; arguments as for :class:`Background`."""
        super().__init__(vae, normalization, None, training_color)
        self.register_buffer("corners", torch.zeros(8, vae.latent_channels))
        self.viewer_color = training_color or (1.0, 1.0, 1.0)

    def encode_corners(self) -> None:
        """Encode the colors that `drawn` blends."""
        colors = [plain_color(corner) for corner in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)]
        self.corners.copy_(torch.stack([self._encoded(color) for color in colors]))

    def drawn(self, views: int) -> Tensor:
        """Return the field latents [B, 1, 1, C] of random colors."""
        shares = torch.rand(views, 3, 1, device=self.corners.device)
        red, green, blue = torch.cat([1 - shares, shares], dim=-1).unbind(dim=1)  # [B, 2] each
        weights = torch.einsum("br,bg,bc->brgc", red, green, blue).flatten(1)  # [B, 8]
        return (weights @ self.corners)[:, None, None]


@torch.no_grad()
def plain_latents(vae: VAE, colors: Tensor) -> Tensor:
    """Return the latents [N, C] in the middle of plain pictures of colors [N, 3], RGB in [0, 1], one at a time."""
    side = CELLS * vae.spatial_factor
    latents = [vae.encode(color.expand(1, side, side, 3))[0, :, CELLS // 2, CELLS // 2] for color in colors]
    return torch.stack(latents)


def plain_color(color: Tensor) -> Color:
    """Return a color [3] as plain numbers; reads it back where it is on a GPU."""
    return tuple(color.tolist())
