"""A trained latent radiance field as one file: everything that rendering needs besides the VAE, without nerfstudio."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrf_nerfstudio.field.cameras import GridCamera
from lrf_nerfstudio.field.decoder import SceneDecoder
from lrf_nerfstudio.splatting import Gaussians, RasterSettings, rasterize
from lrf_nerfstudio.splatting.harmonics import MAX_SH_DEGREE
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import write_atomically
from lrf_nerfstudio.vae import VAE, FieldNormalization, LinearRGB

FORMAT = "lrf-nerfstudio field 1"
"""Written into every file; a reader refuses what it does not know."""

MOST_PIXELS_PER_CELL = 1024
"""No autoencoder has a larger spatial factor."""

GAUSSIANS = ("means", "quats", "scales", "opacities", "features")


@dataclass
class LatentField:
    """Gaussians with latent colours, and what turns their renders into latents.

    Attributes:
        means: [N, 3], in the scene's coordinates as nerfstudio trains them (see `scene_transform`).
        quats: [N, 4], wxyz, not normalised.
        scales: [N, 3], standard deviations along the axes, in scene units.
        opacities: [N], in [0, 1].
        features: [N, K, C], spherical-harmonic coefficients of the field latent, K = (degree + 1)^2.
        background: [C], the field latent behind the Gaussians.
        normalization: field latent to latent.
        linear_rgb: latent to RGB.
        spatial_factor: f, image pixels per latent pixel along each axis.
        dilation: added to the diagonal of projected covariances, in square latent pixels.
        antialiased: whether opacities make up for the dilation (Mip-Splatting).
        vae_source: the VAE that the field was trained with, as its `--pipeline.vae.source`.
        vae_fingerprint: identifies that VAE's latent space.
        scene_transform: [3, 4], from the data set's coordinates to the scene's, before scaling.
        scene_scale: factor from the data set's lengths to the scene's.
        decoder: the scene's own, for pictures without a VAE; None where it was trained without.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    features: Tensor
    background: Tensor
    normalization: FieldNormalization
    linear_rgb: LinearRGB
    spatial_factor: int
    dilation: float
    antialiased: bool
    vae_source: str
    vae_fingerprint: str
    scene_transform: Tensor
    scene_scale: float
    decoder: SceneDecoder | None = None

    @torch.no_grad()
    def render(self, viewmat: Tensor, K: Tensor, width: int, height: int) -> Tensor:
        """Return the latent of a pinhole camera's picture.

        Args:
            viewmat: [4, 4], world-to-camera in the scene's coordinates, OpenCV axes.
            K: [3, 3], intrinsics in image pixels.
            width: of the picture, in image pixels.
            height: of the picture, in image pixels.

        Returns:
            [C, ceil(height / f), ceil(width / f)], the latent that `VAE.decode` takes.
        """
        camera = self._camera(viewmat, K, width, height)
        if self.decoder is None:
            return self.normalization.to_latent(self._render_grid(camera, self.dilation))
        dense = self._render_dense(camera, self.decoder)
        return self.normalization.to_latent(self.decoder.field_latents(dense))

    @torch.no_grad()
    def picture(self, viewmat: Tensor, K: Tensor, width: int, height: int) -> Tensor:
        """Return a pinhole camera's picture [height, width, 3] in [0, 1], by the scene's own decoder, without a VAE.

        Args:
            viewmat: see :meth:`render`, as the others.
            K: [3, 3].
            width: in pixels.
            height: in pixels.

        Raises:
            ValueError: if the field has no decoder.
        """
        if self.decoder is None:
            raise ValueError("this field has no decoder of its own: decode what `render` returns with its VAE")
        dense = self._render_dense(self._camera(viewmat, K, width, height), self.decoder)
        return self.decoder.decode(dense, height, width)

    def _camera(self, viewmat: Tensor, K: Tensor, width: int, height: int) -> GridCamera:
        return GridCamera.of_pictures(viewmat[None], K[None], height, width, self.spatial_factor)

    def _render_dense(self, camera: GridCamera, decoder: SceneDecoder) -> Tensor:
        return self._render_grid(camera.subdivided(decoder.density), decoder.dense_dilation(self.dilation))

    def _render_grid(self, camera: GridCamera, dilation: float) -> Tensor:
        """Return the field latents [rows, columns, C] of a camera, over the background."""
        gaussians = Gaussians(
            self.means, self.quats, self.scales, self.opacities, self.features[:, 0], self.features[:, 1:]
        )
        settings = RasterSettings(
            width=camera.columns,
            height=camera.rows,
            sh_degree=math.isqrt(self.features.shape[1]) - 1,
            eps2d=dilation,
            render_depth=False,
            antialiased=self.antialiased,
        )
        features, _, alpha, _ = rasterize(gaussians, camera.viewmats, camera.Ks, settings)
        return (features + (1 - alpha) * self.background)[0]

    def check_vae(self, vae: VAE) -> None:
        """Check that a VAE decodes this field's latents.

        Raises:
            UserError: its encoder is not the one that the field was trained with.
        """
        if vae.fingerprint != self.vae_fingerprint:
            raise UserError(
                f"The field was trained in the latent space of the VAE {self.vae_source!r}, not of {vae.source!r}."
            )

    def save(self, path: Path) -> None:
        """Write the field as a safetensors file, complete or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        from safetensors.torch import save

        tensors = {name: getattr(self, name) for name in (*GAUSSIANS, "background", "scene_transform")}
        tensors |= {f"normalization.{name}": value for name, value in self.normalization.state_dict().items()}
        tensors |= {f"linear_rgb.{name}": value for name, value in self.linear_rgb.state_dict().items()}
        if self.decoder is not None:
            tensors |= {f"decoder.{name}": value for name, value in self.decoder.state_dict().items()}
        description = {
            "spatial_factor": self.spatial_factor,
            "dilation": self.dilation,
            "antialiased": self.antialiased,
            "vae_source": self.vae_source,
            "vae_fingerprint": self.vae_fingerprint,
            "scene_scale": self.scene_scale,
            "decoder": None if self.decoder is None else self.decoder.config,
        }
        content = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            {"format": FORMAT, "field": json.dumps(description)},
        )
        write_atomically(path, content, option="--output-path")

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "LatentField":
        """Read a field that `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"{path} is not a latent field of this version: its format is not {FORMAT!r}.")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise UserError(f"The field {path} cannot be read: {error}.") from error
        try:
            description = _checked_description(metadata.get("field", ""))
            _check_shapes(tensors)
            channels = tensors["features"].shape[-1]
            normalization, linear_rgb = FieldNormalization(channels), LinearRGB(channels)
            normalization.load_state_dict(_below("normalization.", tensors))
            linear_rgb.load_state_dict(_below("linear_rgb.", tensors))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"The field {path} is damaged: {error}. Export it again with `lrf export`.") from error
        decoder = None
        if (config := description.pop("decoder")) is not None:
            weights = _below("decoder.", tensors)
            decoder = SceneDecoder.restored(config, weights, channels, description["spatial_factor"], str(path))
        return cls(
            **{name: tensors[name] for name in (*GAUSSIANS, "background", "scene_transform")},
            normalization=normalization.to(device),
            linear_rgb=linear_rgb.to(device),
            decoder=decoder,
            **description,
        )


def _checked_description(text: str) -> dict[str, Any]:
    """Return what a file says of a field beside its tensors; ValueError if something is missing or out of range."""
    description: Any = json.loads(text)
    if not isinstance(description, dict) or description.keys() != {*_DESCRIPTION, "decoder"}:
        raise ValueError(f"its description is no mapping of {', '.join(_DESCRIPTION)} and decoder")
    for name, fits in _DESCRIPTION.items():
        if not fits(description[name]):
            raise ValueError(f"its {name} is {description[name]!r}")
    return description


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


_DESCRIPTION: Mapping[str, Callable[[Any], bool]] = {
    "spatial_factor": lambda value: type(value) is int and 1 <= value <= MOST_PIXELS_PER_CELL,
    "dilation": lambda value: _is_number(value) and value >= 0,
    "antialiased": lambda value: isinstance(value, bool),
    "vae_source": lambda value: isinstance(value, str),
    "vae_fingerprint": lambda value: isinstance(value, str),
    "scene_scale": lambda value: _is_number(value) and value > 0,
}
"""What is said of a field beside its tensors and its decoder, and what it may be."""


def _check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Check the tensors of a field but for those of its maps and its decoder; ValueError if one does not fit."""
    names = (*GAUSSIANS, "background", "scene_transform")
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"it has no {missing[0]}")
    features = tensors["features"]
    if features.ndim != 3 or features.shape[1] not in [(degree + 1) ** 2 for degree in range(MAX_SH_DEGREE + 1)]:
        raise ValueError(f"its features are {tuple(features.shape)}")
    count, _, channels = features.shape
    shapes = dict(zip(GAUSSIANS, ((count, 3), (count, 4), (count, 3), (count,), features.shape), strict=True))
    for name, shape in {**shapes, "background": (channels,), "scene_transform": (3, 4)}.items():
        if tensors[name].shape != shape:
            raise ValueError(f"its {name} are {tuple(tensors[name].shape)}, not {tuple(shape)}")
    if wrong := [name for name, tensor in tensors.items() if tensor.dtype != torch.float32]:
        raise ValueError(f"its {wrong[0]} are {tensors[wrong[0]].dtype}")


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
