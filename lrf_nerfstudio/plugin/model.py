"""Gaussians whose colour is a latent: splatfacto with C channels, rendered on the latent grid and decoded by a VAE."""

import math
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from nerfstudio.cameras.camera_optimizers import CameraOptimizer
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.model_components import renderers
from nerfstudio.models.base_model import Model
from nerfstudio.models.splatfacto import RGB2SH, SH2RGB, SplatfactoModel, SplatfactoModelConfig, random_quat_tensor
from nerfstudio.utils.colors import get_color
from nerfstudio.viewer.render_state_machine import RenderStateMachine
from nerfstudio.viewer.viewer_elements import ViewerDropdown
from torch import Tensor
from torch.nn import Parameter, ParameterDict
from tyro.conf import Suppress

from lrf_nerfstudio.evaluation.metrics import ImageMetrics
from lrf_nerfstudio.field.latent_field import LatentField
from lrf_nerfstudio.field.seeding import fair_sample
from lrf_nerfstudio.field.similarity import structural_similarity
from lrf_nerfstudio.splatting import rasterize
from lrf_nerfstudio.splatting.strategies import DensificationConfig, Strategy, make_strategy
from lrf_nerfstudio.utils.errors import UserError, exit_on_user_error
from lrf_nerfstudio.vae import VAE, FieldNormalization, LinearRGB

SH_C0 = 0.28209479177387814
"""The spherical harmonic of degree 0."""

PREVIEW_CELLS = 64
"""Cells along the longer side of the viewer's preview, about as dense as a decoded picture of 512 pixels needs."""


@dataclass
class LatentSplatfactoModelConfig(SplatfactoModelConfig):
    """Configuration of the latent radiance field."""

    _target: type = field(default_factory=lambda: LatentSplatfactoModel)
    densification: DensificationConfig = field(default_factory=DensificationConfig)
    """How Gaussians are added and removed."""
    dilation: float = 0.1
    """Square latent pixels that are added to the covariance of every projected Gaussian. What 3DGS adds to a pixel of a
    photograph, 0.3, blurs a latent, each of whose pixels stands for many of the photograph's: see the README."""
    viewer_preview: Literal["latent_rgb", "decoded"] = "latent_rgb"
    """What the viewer shows while the camera moves: a linear map of the latents (instant) or a small decode."""
    download_lpips: bool = False
    """Whether the weights of LPIPS may be downloaded when they are not in PyTorch's cache; otherwise it is left out."""
    sh_degree_interval: int = 500
    """Every n steps turn on another degree of the spherical harmonics."""
    # Options of splatfacto in whose place `densification` is.
    warmup_length: Suppress[int] = 0
    refine_every: Suppress[int] = 0
    cull_alpha_thresh: Suppress[float] = 0.0
    cull_scale_thresh: Suppress[float] = 0.0
    reset_alpha_every: Suppress[int] = 0
    densify_grad_thresh: Suppress[float] = 0.0
    use_absgrad: Suppress[bool] = False
    densify_size_thresh: Suppress[float] = 0.0
    n_split_samples: Suppress[int] = 0
    cull_screen_size: Suppress[float] = 0.0
    split_screen_size: Suppress[float] = 0.0
    stop_screen_size_at: Suppress[int] = 0
    stop_split_at: Suppress[int] = 0
    # Options of splatfacto that have no meaning on a latent grid.
    resolution_schedule: Suppress[int] = 0
    num_downscales: Suppress[int] = 0
    use_bilateral_grid: Suppress[bool] = False
    grid_shape: Suppress[tuple[int, int, int]] = (16, 16, 8)
    color_corrected_metrics: Suppress[bool] = False
    # And of models that march along rays.
    enable_collider: Suppress[bool] = False
    collider_params: Suppress[dict[str, float] | None] = None
    loss_coefficients: Suppress[dict[str, float]] = field(default_factory=dict)
    eval_num_rays_per_chunk: Suppress[int] = 4096
    prompt: Suppress[str | None] = None


class FieldRender(NamedTuple):
    """What the Gaussians render on a latent grid."""

    field: Tensor  # [h, w, C] field latent, composited with the background
    alpha: Tensor  # [h, w, 1]
    depth: Tensor | None  # [h, w, 1], in scene units


class LatentSplatfactoModel(SplatfactoModel):
    """A latent radiance field: stage II of the method.

    The Gaussians render field latents [h, w, C] with h = ceil(H / f), w = ceil(W / f) and are fitted to the encoded
    training views there; a VAE decodes what they render. Splatfacto is the base class, so nerfstudio's viewer, crop and
    export tools know the model; here nothing assumes three channels, a colour range, or CUDA.

    Args:
        vae: decodes, and fixes the number of channels and the spatial factor. Not a submodule: a checkpoint keeps its
            fingerprint instead of its weights.
        seed_points: positions [N, 3] and field latents [N, C] of the first Gaussians; random where there are none.
        normalization: latent to field latent; None when a checkpoint is going to be loaded.
        linear_rgb: latent to RGB; None when a checkpoint is going to be loaded.
        background_rgb: [3], the colour that transparent photographs were composited over; None if they are opaque.
    """

    config: LatentSplatfactoModelConfig

    def __init__(
        self,
        *args: Any,
        vae: VAE,
        seed_points: tuple[Tensor, Tensor] | None = None,
        normalization: FieldNormalization | None = None,
        linear_rgb: LinearRGB | None = None,
        background_rgb: Tensor | None = None,
        **kwargs: Any,
    ):
        self._vae = (vae,)  # in a tuple, which hides it from nn.Module
        self._initial_maps = (normalization, linear_rgb, background_rgb)
        super().__init__(*args, seed_points=seed_points, **kwargs)

    @property
    def vae(self) -> VAE:
        """The autoencoder that decodes the renders."""
        return self._vae[0]

    def populate_modules(self) -> None:
        channels = self.vae.latent_channels
        normalization, linear_rgb, background_rgb = self._initial_maps
        self.normalization = normalization or FieldNormalization(channels)
        self.linear_rgb = linear_rgb or LinearRGB(channels)
        # The background that belongs to the scene; NaN where the photographs are opaque and it does not matter.
        self.scene_background: Tensor
        self.register_buffer(
            "scene_background", torch.full((3,), math.nan) if background_rgb is None else background_rgb
        )

        if self.seed_points is not None and not self.config.random_init:
            means, field = self.seed_points
        else:
            # A checkpoint that is going to be loaded replaces them: a few will do, and cost no nearest neighbours.
            count = self.config.num_random if normalization is not None else 4
            means = (torch.rand(count, 3) - 0.5) * self.config.random_scale
            field = torch.rand(count, channels)
        kept = fair_sample(len(means), self.config.densification.max_gaussians)
        means, field = means[kept], field[kept]
        distances, _ = self.k_nearest_sklearn(means, 3)
        mean_distance = torch.from_numpy(distances).mean(dim=-1, keepdim=True).clamp(min=1e-7)
        num_bases = (self.config.sh_degree + 1) ** 2
        self.gauss_params = ParameterDict(
            {
                "means": Parameter(means.float()),
                "scales": Parameter(torch.log(mean_distance).repeat(1, 3)),
                "quats": Parameter(random_quat_tensor(len(means))),
                "features_dc": Parameter(field / SH_C0),
                "features_rest": Parameter(torch.zeros(len(means), num_bases - 1, channels)),
                "opacities": Parameter(torch.full((len(means), 1), math.log(0.1 / 0.9))),  # sigmoid gives 0.1
            }
        )
        self.camera_optimizer: CameraOptimizer = self.config.camera_optimizer.setup(
            num_cameras=self.num_train_data, device="cpu"
        )
        self.step = 0
        self.crop_box: OrientedBox | None = None
        # RGB in [0, 1], changed by the viewer; None is the middle of the field's range.
        self.background_color: Tensor | None = None
        if self.config.background_color != "random":
            self.background_color = get_color(self.config.background_color)
        self._background_fields: dict[tuple[float, ...], Tensor] = {}
        self.image_metrics = ImageMetrics(download_lpips=self.config.download_lpips)
        self.viewer_preview = ViewerDropdown(
            "While moving, show", self.config.viewer_preview, ["latent_rgb", "decoded"]
        )

        self.strategy: Strategy | None = None  # until `prepare_training`
        self.strategy_state: dict[str, Tensor] = {}

    def prepare_training(self, steps: int) -> None:
        """Make what only training needs, for a run of so many steps, before a checkpoint is loaded."""
        self.strategy = make_strategy(self.config.densification, steps)
        self.strategy_state = self.strategy.initialize_state(self.num_points, self.device)

    # ---------------------------------------------------------------- state

    def get_extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors of the model: the VAE's identity, and the strategy's statistics."""
        return {
            "vae": {
                "fingerprint": self.vae.fingerprint,
                "source": self.vae.source,
                "latent_channels": self.vae.latent_channels,
                "spatial_factor": self.vae.spatial_factor,
            },
            "strategy": dict(self.strategy_state),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.strategy is None:  # no training: rendering does without
            return
        # A resumed run may have another strategy, which begins anew. The Gaussians are loaded already.
        self.strategy_state = self.strategy.initialize_state(self.num_points, self.device)
        for name in self.strategy_state.keys() & state["strategy"].keys():
            self.strategy_state[name] = state["strategy"][name].to(self.device)

    def update_to_step(self, step: int) -> None:
        self.step = step

    def load_state_dict(self, state: dict[str, Any], **kwargs: Any) -> Any:
        """Load a checkpoint's state, which may have any number of Gaussians.

        Raises:
            UserError: it was trained with another VAE, or with options that change the parameters' shapes.
        """
        trained_with = state["_extra_state"]["vae"]
        if trained_with["fingerprint"] != self.vae.fingerprint:
            raise UserError(
                f"The checkpoint was trained in the latent space of the VAE {trained_with['source']!r} "
                f"({trained_with['latent_channels']} channels, factor {trained_with['spatial_factor']}), not of "
                f"{self.vae.source!r} ({self.vae.latent_channels} channels, factor {self.vae.spatial_factor}). "
                "Set --pipeline.vae.source (pipeline.vae.source in the config.yml of a trained scene) to the VAE it "
                "was trained with, or to one with the same encoder."
            )
        for name, parameter in self.gauss_params.items():
            saved = state[f"gauss_params.{name}"]
            if saved.shape[1:] != parameter.shape[1:]:
                raise UserError(
                    f"The checkpoint's {name} are {tuple(saved.shape[1:])} for a Gaussian, the model's "
                    f"{tuple(parameter.shape[1:])}. Use the --pipeline.model.sh-degree that it was trained with."
                )
            # In place: the optimizers, made before a checkpoint is loaded, hold these very parameters.
            parameter.data = torch.empty_like(saved, device=parameter.device)
        self._background_fields.clear()  # they depend on the normalisation
        return Model.load_state_dict(self, state, **kwargs)

    # ---------------------------------------------------------------- training

    def step_post_backward(self, step: int) -> None:
        assert step == self.step and self.strategy is not None
        learning_rate = self.optimizers["means"].param_groups[0]["lr"]
        self.strategy.after_backward(
            self.gauss_params, self.optimizers, self.strategy_state, step, self.info, learning_rate
        )

    def get_metrics_dict(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
        target = self.normalization.to_field(batch["latent"])
        with torch.no_grad():
            latent_psnr = -10 * torch.log10(F.mse_loss(outputs["field"], target))
        metrics = {"latent_psnr": latent_psnr, "gaussian_count": self.num_points}
        self.camera_optimizer.get_metrics_dict(metrics)
        return metrics

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """(1 - ssim_lambda) L1 + ssim_lambda (1 - SSIM) between rendered and encoded field latents, inside the mask."""
        rendered, target = outputs["field"], self.normalization.to_field(batch["latent"])
        l1 = (rendered - target).abs()
        if "latent_mask" in batch:
            mask = batch["latent_mask"][..., None]
            l1 = (l1 * mask).sum() / (mask.sum() * l1.shape[-1]).clamp(min=1)
            rendered, target = rendered * mask, target * mask
        losses = {"main_loss": (1 - self.config.ssim_lambda) * l1.mean()}
        if self.config.ssim_lambda > 0:
            similarity = structural_similarity(rendered, target)
            losses["main_loss"] = losses["main_loss"] + self.config.ssim_lambda * (1 - similarity)
        if self.config.use_scale_regularization and self.step % 10 == 0:
            extent = torch.exp(self.scales)
            ratio = extent.amax(dim=-1) / extent.amin(dim=-1)
            losses["scale_reg"] = 0.1 * (ratio - self.config.max_gauss_ratio).clamp(min=0).mean()
        if self.strategy is not None:
            losses |= self.strategy.losses(self.gauss_params)
        if self.training:
            self.camera_optimizer.get_loss_dict(losses)
        return losses

    # ---------------------------------------------------------------- rendering

    @property
    def active_sh_degree(self) -> int:
        """Degree of the harmonics at this step: one more every `sh_degree_interval` steps."""
        return min(self.step // self.config.sh_degree_interval, self.config.sh_degree)

    def render_field(self, camera: Cameras, factor: float) -> FieldRender:
        """Rasterize on a grid of ceil(H / factor) x ceil(W / factor) cells.

        Args:
            camera: one perspective camera, intrinsics and size in image pixels.
            factor: image pixels per cell; the VAE's spatial factor gives the grid that it decodes.
        """
        if int(camera.camera_type.flatten()[0]) != CameraType.PERSPECTIVE.value:
            raise UserError("A latent radiance field renders perspective cameras only.")
        height, width = int(camera.height.item()), int(camera.width.item())
        rows, columns = math.ceil(height / factor), math.ceil(width / factor)
        camera_to_world = self.camera_optimizer.apply_to_camera(camera) if self.training else camera.camera_to_worlds
        K = camera.get_intrinsics_matrices() / factor
        K[:, 2, 2] = 1.0

        gaussians = {name: parameter for name, parameter in self.gauss_params.items()}
        if self.crop_box is not None and not self.training:
            inside = self.crop_box.within(self.means).squeeze(-1)
            gaussians = {name: parameter[inside] for name, parameter in gaussians.items()}
        features, depth, alpha, self.info = rasterize(
            means=gaussians["means"],
            quats=gaussians["quats"],
            scales=torch.exp(gaussians["scales"]),
            opacities=torch.sigmoid(gaussians["opacities"]).squeeze(-1),
            features=gaussians["features_dc"],
            features_rest=gaussians["features_rest"],
            viewmats=world_to_camera(camera_to_world),
            Ks=K,
            width=columns,
            height=rows,
            sh_degree=self.active_sh_degree,
            eps2d=self.config.dilation,
            render_depth=not self.training or self.config.output_depth_during_training,
            absgrad=self.training and self.strategy is not None and self.strategy.needs_absgrad(self.step),
            antialiased=self.config.rasterize_mode == "antialiased",
        )
        field = features[0] + (1 - alpha[0]) * self._background_field()
        return FieldRender(field, alpha[0], None if depth is None else depth[0])

    def _background_field(self) -> Tensor:
        """[C] or broadcastable: the field latent behind the Gaussians."""
        if renderers.BACKGROUND_COLOR_OVERRIDE is not None and not self.training:
            return self._encode_color(renderers.BACKGROUND_COLOR_OVERRIDE)
        if torch.isfinite(self.scene_background).all():
            return self._encode_color(self.scene_background)
        if self.training:  # not in `background_color`, which the viewer sets
            if self.config.background_color != "random":
                return self._encode_color(get_color(self.config.background_color))
            # As splatfacto: a background that changes at every step cannot stand in for opaque Gaussians.
            return torch.rand(self.vae.latent_channels, device=self.device)
        if self.background_color is not None:
            return self._encode_color(self.background_color)
        return torch.full((self.vae.latent_channels,), 0.5, device=self.device)

    def _encode_color(self, rgb: Tensor) -> Tensor:
        """[C], the field latent in the middle of a plain picture of a colour."""
        key = tuple(rgb.tolist())
        if key not in self._background_fields:
            # So large that the middle hardly sees the picture's edges, which encoders pad with zeros.
            cells = 32
            side = cells * self.vae.spatial_factor
            with torch.no_grad():
                latent = self.vae.encode(rgb.to(self.device).expand(1, side, side, 3))
                self._background_fields[key] = self.normalization.to_field(latent)[0, cells // 2, cells // 2]
        return self._background_fields[key]

    @exit_on_user_error()
    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> dict[str, Any]:
        """What nerfstudio's commands and viewer render with: `get_outputs`, inside a crop box if there is one."""
        return super().get_outputs_for_camera(camera, obb_box)

    def get_outputs(self, camera: Cameras) -> dict[str, Any]:
        """Render a camera.

        Returns:
            In training `field` [h, w, C] and `accumulation` [h, w, 1] on the latent grid. Otherwise pictures of the
            camera's size: `rgb` (decoded, [0, 1]), `latent_rgb` (a linear map of the latents), `depth`, `accumulation`.
        """
        factor = self.vae.spatial_factor
        if self.training:
            render = self.render_field(camera, factor)
            if self.strategy is not None:
                self.strategy.before_backward(self.info)
            return {"field": render.field, "accumulation": render.alpha, "depth": render.depth}
        rendered = self.render(camera)
        return {name: rendered[name] for name in ("rgb", "latent_rgb", "depth", "accumulation")}

    @torch.no_grad()
    def render(self, camera: Cameras) -> dict[str, Any]:
        """Render and decode a camera.

        Returns:
            The pictures of `get_outputs`, and `latent` [C, h, w] that was decoded, `raster_seconds`, `decode_seconds`.
        """
        height, width = int(camera.height.item()), int(camera.width.item())
        preview = viewer_is_moving() and self.viewer_preview.value == "latent_rgb"
        factor = self.vae.spatial_factor
        cell = min(factor, max(height, width) / PREVIEW_CELLS) if preview else factor

        start = self._now()
        field, alpha, depth = self.render_field(camera, cell)
        latent = self.normalization.to_latent(field)
        rasterized = self._now()
        latent_rgb = resize_from_cells(self.linear_rgb(latent).clamp(0, 1), cell, height, width)
        decode_start = self._now()
        rgb = latent_rgb if preview else self.vae.decode(latent[None], height, width)[0]
        decoded = self._now()
        assert depth is not None
        depth = torch.where(alpha > 0, depth, depth.max())
        return {
            "rgb": rgb,
            "latent_rgb": latent_rgb,
            "depth": resize_from_cells(depth, cell, height, width),
            "accumulation": resize_from_cells(alpha, cell, height, width),
            "latent": latent,
            "raster_seconds": rasterized - start,
            "decode_seconds": decoded - decode_start,
        }

    def _now(self) -> float:
        """Seconds on a clock that has waited for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # ---------------------------------------------------------------- evaluation

    def get_image_metrics_and_images(
        self, outputs: dict[str, Any], batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Compare a rendered held-out view with its photograph, in three families.

        Args:
            outputs: what `render` gives for the view's camera.
            batch: `image` [H, W, 3] in [0, 1], `latent` [C, h, w], and `mask` [H, W] if there is one.

        Returns:
            metrics: `psnr, ssim, lpips` of the decoded render against the photograph; `latent_psnr` of the rendered
                against the encoded field latent (data range 1); `ceiling_psnr, ceiling_ssim, ceiling_lpips` of the
                VAE's reconstruction; `raster_seconds, decode_seconds` of this render. LPIPS where it has weights.
            images: `img`, side by side the photograph, the VAE's reconstruction and the decoded render.
        """
        photograph, latent, mask = batch["image"], batch["latent"], batch.get("mask")
        height, width = photograph.shape[:2]
        with torch.no_grad():
            reconstruction = self.vae.decode(latent[None], height, width)[0]
            rendered = self.normalization.to_field(outputs["latent"])
            latent_error = F.mse_loss(rendered, self.normalization.to_field(latent))
        metrics = self.image_metrics(outputs["rgb"], photograph, mask)
        metrics["latent_psnr"] = float(-10 * torch.log10(latent_error))
        for name, value in self.image_metrics(reconstruction, photograph, mask).items():
            metrics[f"ceiling_{name}"] = value
        metrics |= {name: outputs[name] for name in ("raster_seconds", "decode_seconds")}
        return metrics, {"img": torch.cat([photograph, reconstruction, outputs["rgb"]], dim=1)}

    # ---------------------------------------------------------------- export

    def to_field(self, scene_transform: Tensor, scene_scale: float) -> LatentField:
        """The trained field with all its channels, apart from nerfstudio.

        Args:
            scene_transform: [3, 4], from the data set's coordinates to the scene's, before scaling.
            scene_scale: factor from the data set's lengths to the scene's.
        """
        bases = (self.active_sh_degree + 1) ** 2
        return LatentField(
            means=self.means.detach(),
            quats=self.quats.detach(),
            scales=torch.exp(self.scales.detach()),
            opacities=torch.sigmoid(self.opacities.detach()).squeeze(-1),
            features=torch.cat([self.features_dc[:, None], self.features_rest], dim=1).detach()[:, :bases],
            background=self._background_field(),
            normalization=self.normalization,
            linear_rgb=self.linear_rgb,
            spatial_factor=self.vae.spatial_factor,
            dilation=self.config.dilation,
            vae_source=self.vae.source,
            vae_fingerprint=self.vae.fingerprint,
            scene_transform=scene_transform,
            scene_scale=scene_scale,
        )

    # Colours for tools that know RGB only.

    @property
    def shs_0(self) -> Tensor:
        """[N, 3], degree 0 of the Gaussians' colours through the linear latent-to-RGB map, as ply viewers read them."""
        matrix, bias = self.linear_rgb.for_field(self.normalization)
        return RGB2SH(SH_C0 * self.features_dc @ matrix.T + bias)

    @property
    def shs_rest(self) -> Tensor:
        """[N, K - 1, 3], the higher degrees of the Gaussians' colours through the linear latent-to-RGB map."""
        matrix, _ = self.linear_rgb.for_field(self.normalization)
        return self.features_rest @ matrix.T

    @property
    def colors(self) -> Tensor:
        """[N, 3], the Gaussians' mean colours."""
        return SH2RGB(self.shs_0)


def world_to_camera(camera_to_worlds: Tensor) -> Tensor:
    """View matrices [B, 4, 4] (OpenCV axes) of nerfstudio's poses [B, 3, 4] (camera-to-world, OpenGL axes)."""
    rotation = camera_to_worlds[:, :3, :3] * camera_to_worlds.new_tensor([1.0, -1.0, -1.0])
    inverse = rotation.transpose(1, 2)
    translation = -inverse @ camera_to_worlds[:, :3, 3:]
    last_row = camera_to_worlds.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(camera_to_worlds), 1, 4)
    return torch.cat([torch.cat([inverse, translation], dim=2), last_row], dim=1)


def resize_from_cells(picture: Tensor, cell: float, height: int, width: int) -> Tensor:
    """[h, w, c] on a grid of cells of `cell` pixels to [height, width, c], bilinearly.

    The grid may reach beyond the picture on the right and below; what does is cut off.
    """
    size = (round(picture.shape[0] * cell), round(picture.shape[1] * cell))
    enlarged = F.interpolate(picture.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)
    return enlarged[0].permute(1, 2, 0)[:height, :width]


def viewer_is_moving() -> bool:
    """Whether the current thread renders a preview for a viewer whose camera moves (or has just stopped)."""
    thread = threading.current_thread()
    return isinstance(thread, RenderStateMachine) and thread.state != "high"
