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

    def forward(self, override: Color | None = None) -> Tensor:
        """Return the field latent [C], in training or rendering mode.

        Args:
            override: in place of all other colors when rendering.
        """
        if self.training:
            color = self._scene_color or self._training_color
            if color is None:
                return torch.rand(self._channels, device=self.scene_color.device)
        else:
            color = override or self._scene_color or self.viewer_color
            if color is None:
                return torch.full((self._channels,), 0.5, device=self.scene_color.device)
        if color not in self._fields:
            self._fields[color] = self._encoded(color)
        return self._fields[color]

    @torch.no_grad()
    def _encoded(self, color: Color) -> Tensor:
        """Return the field latent [C] in the middle of a plain picture of a color."""
        vae, normalization = self._owned_by_the_model
        side = CELLS * vae.spatial_factor
        latent = vae.encode(self.scene_color.new_tensor(color).expand(1, side, side, 3))
        return normalization.to_field(latent)[0, CELLS // 2, CELLS // 2]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        loaded = state_dict[f"{prefix}scene_color"]
        self._scene_color = plain_color(loaded) if torch.isfinite(loaded).all() else None
        self._fields.clear()  # they depend on the normalization, which comes with it


def plain_color(color: Tensor) -> Color:
    """Return a color [3] as plain numbers; reads it back where it is on a GPU."""
    return tuple(color.tolist())
