"""Gaussians whose color is a latent: splatfacto with C channels, rendered on the latent grid and decoded by a VAE."""

import sys
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from nerfstudio.cameras.camera_optimizers import CameraOptimizer
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.model_components import renderers
from nerfstudio.models.base_model import Model
from nerfstudio.models.splatfacto import RGB2SH, SH2RGB, SplatfactoModel
from nerfstudio.utils.colors import get_color
from nerfstudio.viewer.viewer_elements import ViewerDropdown
from torch import Tensor
from torch.nn import Parameter, ParameterDict

from lrf_nerfstudio.evaluation.metrics import ImageMetrics
from lrf_nerfstudio.evaluation.views import compare_view
from lrf_nerfstudio.field.backgrounds import Background, Color, plain_color
from lrf_nerfstudio.field.cameras import GridCamera, adjusted, enlarged
from lrf_nerfstudio.field.dropout import dropped_out
from lrf_nerfstudio.field.seeding import SH_C0, fair_sample, first_gaussians
from lrf_nerfstudio.field.similarity import fitting_loss, picture_loss
from lrf_nerfstudio.plugin.cameras import grid_camera
from lrf_nerfstudio.plugin.outputs import Outputs
from lrf_nerfstudio.plugin.scene_decoder import SceneDecoderConfig
from lrf_nerfstudio.plugin.splatfacto import ReducedSplatfactoModelConfig
from lrf_nerfstudio.plugin.viewer import PictureFigures, preview_cell, uninterrupted, viewer_is_moving
from lrf_nerfstudio.splatting import Gaussians, RasterSettings, rasterize
from lrf_nerfstudio.splatting.strategies import DensificationConfig, Strategy, make_strategy
from lrf_nerfstudio.utils.errors import UserError, exit_on_user_error
from lrf_nerfstudio.utils.options import AtLeastOne, NotNegative, Range
from lrf_nerfstudio.utils.timing import Stopwatch
from lrf_nerfstudio.vae import VAE, FieldNormalization, LinearRGB

FEWEST_GAUSSIANS = 4
"""The first Gaussians are as large as the distance to their three nearest neighbors."""


@dataclass
class LatentSplatfactoModelConfig(ReducedSplatfactoModelConfig):
    """Configuration of the latent radiance field."""

    _target: type = field(default_factory=lambda: LatentSplatfactoModel)
    densification: DensificationConfig = field(default_factory=DensificationConfig)
    """How Gaussians are added and removed."""
    dilation: NotNegative = 0.1
    """Square latent pixels that are added to the covariance of every projected Gaussian. What 3DGS adds to a pixel of a
    photograph, 0.3, blurs a latent, each of whose pixels stands for many of the photograph's: see docs/results.md."""
    opacity_dropout: Annotated[float, Range(least=0, below=1)] = 0.0
    """Against overfitting to few views: fraction of the Gaussians that a training step leaves out at the end of the
    run, growing from 0; the others' opacities make up for them."""
    scene_decoder: SceneDecoderConfig = field(default_factory=SceneDecoderConfig)
    """The scene's own decoder."""
    viewer_preview: Literal["auto", "latent_rgb", "decoded"] = "auto"
    """What the viewer shows while the camera moves: a linear map of the latents (instant) or a small decode; `auto`
    decodes where the scene has a decoder of its own, which is fast."""
    download_lpips: bool = False
    """Whether the weights of LPIPS may be downloaded when they are not in PyTorch's cache; otherwise it is left out."""
    lpips_network: Literal["alex", "vgg"] = "alex"
    """The network whose features LPIPS compares; numbers of different networks cannot be compared."""
    sh_degree_interval: AtLeastOne = 500
    """Every n steps turn on another degree of the spherical harmonics."""


class FieldRender(NamedTuple):
    """What the Gaussians render on the grids of B cameras."""

    field: Tensor  # [B, h, w, C] field latents, composited with the background
    alpha: Tensor  # [B, h, w, 1]
    depth: Tensor | None  # [B, h, w, 1], in scene units


class LatentSplatfactoModel(SplatfactoModel):
    """A latent radiance field: stage II of the method.

    The Gaussians render field latents [h, w, C] with h = ceil(H / f), w = ceil(W / f) and are fitted to the encoded
    training views there; a VAE decodes what they render. Splatfacto is the base class, so nerfstudio's viewer, crop and
    export tools know the model; here nothing assumes three channels, a color range, or CUDA.

    Args:
        vae: decodes, and fixes the number of channels and the spatial factor. Not a submodule: a checkpoint keeps its
            fingerprint instead of its weights.
        seed_points: positions [N, 3] and field latents [N, C] of the first Gaussians; random where there are none.
        normalization: latent to field latent; None when a checkpoint is going to be loaded.
        linear_rgb: latent to RGB; None when a checkpoint is going to be loaded.
        background_rgb: [3], the color that transparent photographs were composited over; None if they are opaque.
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
        random_color = self.config.background_color == "random"
        training_color = None if random_color else plain_color(get_color(self.config.background_color))
        self.background = self.make_background(background_rgb, training_color)
        # A checkpoint that is going to be loaded replaces them: a few will do, and cost no nearest neighbors.
        gaussians = self.first_gaussians(FEWEST_GAUSSIANS if normalization is None else None)
        self.gauss_params = ParameterDict({name: Parameter(tensor) for name, tensor in gaussians.items()})
        self.camera_optimizer: CameraOptimizer = self.config.camera_optimizer.setup(
            num_cameras=self.num_train_data, device="cpu"
        )
        self.scene_decoder = self.config.scene_decoder.setup(self.vae, self.linear_rgb, self.normalization)
        self.latent_steps = self.joint_steps = self.total_steps = sys.maxsize  # until `prepare_training`
        self.decoder_is_fitted = False
        self.step = 0
        self.crop_box: OrientedBox | None = None
        self.image_metrics = ImageMetrics(self.config.download_lpips, network=self.config.lpips_network)
        self.viewer_preview = ViewerDropdown(
            "While moving, show", self.config.viewer_preview, ["auto", "latent_rgb", "decoded"]
        )
        self.viewer_figures = PictureFigures()
        self.strategy: Strategy | None = None  # until `prepare_training`
        self.strategy_state: dict[str, Tensor] = {}

    def make_background(self, scene_color: Tensor | None, training_color: Color | None) -> Background:
        """Return what is behind the Gaussians; arguments as for :class:`Background`."""
        return Background(self.vae, self.normalization, scene_color, training_color)

    def first_gaussians(self, count: int | None) -> dict[str, Tensor]:
        """Return the Gaussians that training starts from, see :func:`first_gaussians`.

        Args:
            count: how many random ones suffice, because a checkpoint replaces them; None to train with.
        """
        if self.seed_points is not None and not self.config.random_init:
            means, latents = self.seed_points
        else:
            number = self.config.num_random if count is None else count
            means = (torch.rand(number, 3) - 0.5) * self.config.random_scale
            latents = torch.rand(number, self.vae.latent_channels)
        kept = fair_sample(len(means), self.config.densification.max_gaussians)
        return first_gaussians(means[kept], latents[kept], self.config.sh_degree)

    def prepare_training(self, steps: int) -> None:
        """Make what only training needs, for a run of so many steps, before a checkpoint is loaded.

        The run has up to three parts: steps below `latent_steps` fit the field to latents, steps from `joint_steps` on
        fit field and decoder to photographs, and between them the decoder is fitted alone.
        """
        if not 0 <= self.config.opacity_dropout < 1:
            raise UserError(
                "--pipeline.model.opacity-dropout must be at least 0 and less than 1; it is "
                f"{self.config.opacity_dropout}."
            )
        options = self.config.scene_decoder
        self.total_steps = steps
        self.latent_steps = steps - round(options.share * steps)
        self.joint_steps = self.latent_steps + round(options.warmup * (steps - self.latent_steps))
        if self.scene_decoder is not None:
            options.begin(self.scene_decoder, self.vae, self.normalization)
        self.strategy = make_strategy(self.config.densification, self.latent_steps)
        self.strategy_state = self.strategy.initialize_state(self.num_points, self.device)

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        groups = super().get_param_groups()
        if self.scene_decoder is not None:
            groups["scene_decoder"] = list(self.scene_decoder.parameters())
        return groups

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
            "scene_decoder": None if self.scene_decoder is None else self.scene_decoder.config,
            "decoder_is_fitted": self.decoder_is_fitted,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.decoder_is_fitted = state["decoder_is_fitted"]
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
        decoder = None if self.scene_decoder is None else self.scene_decoder.config
        if (saved_decoder := state["_extra_state"]["scene_decoder"]) != decoder:
            raise UserError(
                f"The checkpoint has {_described(saved_decoder)}, the configuration {_described(decoder)}. Use the "
                "--pipeline.model.scene-decoder options that it was trained with."
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
        return Model.load_state_dict(self, state, **kwargs)

    # ---------------------------------------------------------------- training

    @property
    def active_sh_degree(self) -> int:
        """Degree of the harmonics at this step: one more every `sh_degree_interval` steps."""
        return min(self.step // self.config.sh_degree_interval, self.config.sh_degree)

    def get_outputs(self, camera: GridCamera) -> dict[str, Any]:
        """Render what a training step compares.

        Returns:
            On latents `field` [B, h, w, C], `accumulation` [B, h, w, 1] and, if asked for, `depth` [B, h, w, 1]; on
            photographs the decoded `picture` [H, W, 3], not limited to [0, 1], and the field latents on the dense grid
            `dense` [h k, w k, C] that it was decoded from.
        """
        camera = self.optimized(camera)
        if self.scene_decoder is not None and self.step >= self.latent_steps:
            self.decoder_is_fitted = True
            with torch.set_grad_enabled(self.step >= self.joint_steps):
                dense = self.render_field(camera, self.scene_decoder.dense_dilation(self.config.dilation)).field[0]
            picture = self.scene_decoder(dense).float()[: camera.height, : camera.width]
            return {"picture": picture, "dense": dense}
        render = self.render_field(camera, self.config.dilation)
        if self.strategy is not None:
            self.strategy.before_backward(self.info)
        return {"field": render.field, "accumulation": render.alpha, "depth": render.depth}

    def optimized(self, camera: GridCamera) -> GridCamera:
        """Return the cameras of training views as the camera optimizer has moved them."""
        if self.camera_optimizer.config.mode == "off" or camera.indices is None:
            return camera
        with self._full_precision():
            return replace(camera, viewmats=adjusted(camera.viewmats, self.camera_optimizer(camera.indices)))

    def get_metrics_dict(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
        """Return what a training step reports besides its losses, on the device.

        Returns:
            `latent_psnr` of the rendered against the encoded field latents (data range 1) or, on photographs, `psnr` of
            the picture, both as they are fitted and without masks; `gaussian_count`; and, with a camera optimizer,
            `camera_opt_translation_mean, ..._max` in scene units and `camera_opt_rotation_mean, ..._max` in degrees
            (nerfstudio's own method of these names waits for the GPU).
        """
        with torch.no_grad():
            if "picture" in outputs:
                error = F.mse_loss(outputs["picture"][batch["inside"]], batch["photograph"] / 255)
            else:
                error = F.mse_loss(outputs["field"], batch["target"])
            psnr = -10 * torch.log10(error)
        metrics = {"psnr" if "picture" in outputs else "latent_psnr": psnr, "gaussian_count": self.num_points}
        if self.camera_optimizer.config.mode != "off":
            translations, rotations = self.camera_optimizer.pose_adjustment.detach().split(3, dim=1)  # [views, 3] each
            lengths = {"translation": translations.norm(dim=1), "rotation": torch.rad2deg(rotations.norm(dim=1))}
            for name, values in lengths.items():
                metrics |= {f"camera_opt_{name}_mean": values.mean(), f"camera_opt_{name}_max": values.max()}
        return metrics

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Return (1 - ssim_lambda) L1 + ssim_lambda (1 - SSIM), inside the masks, and regularizers.

        Args:
            outputs: of :meth:`get_outputs`.
            batch: on latents `target` [B, h, w, C], the field latents of the photographs, and `mask` [B, h, w] if there
                is one; on photographs `photograph` [h, w, 3] (bytes), `inside`, its rows and columns in the decoded
                picture, and `mask` [h, w] if there is one. With photographs whose latents are compared too, also
                `target` [1, h', w', C], `dense`, its rows and columns on the dense grid, and `target_mask` [1, h', w']
                if there is one.
            metrics_dict: not used.
        """
        mask, weight = batch.get("mask"), self.config.ssim_lambda
        with self._full_precision():
            if "picture" in outputs:
                losses = {
                    "main_loss": picture_loss(
                        outputs["picture"][batch["inside"]], batch["photograph"] / 255, mask, weight
                    )
                }
                if self.step < self.joint_steps:
                    return losses
                if "target" in batch:
                    assert self.scene_decoder is not None
                    latents = self.scene_decoder.field_latents(outputs["dense"][batch["dense"]])[None]
                    latent_loss = fitting_loss(latents, batch["target"], batch.get("target_mask"), weight)
                    losses["latent_loss"] = self.config.scene_decoder.latent_weight * latent_loss
            else:
                losses = {"main_loss": fitting_loss(outputs["field"], batch["target"], mask, weight)}
                if self.strategy is not None:
                    losses |= self.strategy.losses(self.gauss_params)
            if self.config.use_scale_regularization and self.step % 10 == 0:
                losses["scale_reg"] = self.needle_loss()
            if self.training:
                self.camera_optimizer.get_loss_dict(losses)
        return losses

    def needle_loss(self) -> Tensor:
        """Return how far Gaussians are longer than `max_gauss_ratio` times their thickness, on average."""
        extent = torch.exp(self.scales)
        ratio = extent.amax(dim=-1) / extent.amin(dim=-1)
        return 0.1 * (ratio - self.config.max_gauss_ratio).clamp(min=0).mean()

    def step_post_backward(self, step: int) -> None:
        assert step == self.step and self.strategy is not None
        if step >= self.latent_steps:  # what is added or moved now, the decoder does not know
            return
        learning_rate = self.optimizers["means"].param_groups[0]["lr"]
        self.strategy.after_backward(
            self.gauss_params, self.optimizers, self.strategy_state, step, self.info, learning_rate
        )

    def _full_precision(self) -> torch.autocast:
        """Geometry, rasterization and SSIM are float32 under --mixed-precision too: they cancel in half precision."""
        return torch.autocast(self.device.type, enabled=False)

    # ---------------------------------------------------------------- rendering

    def render_field(self, camera: GridCamera, dilation: float) -> FieldRender:
        """Rasterize the field on the grids of cameras, over its background.

        Args:
            camera: B cameras.
            dilation: added to the diagonal of projected covariances, in square cells of the grid.
        """
        opacities = torch.sigmoid(self.opacities).squeeze(-1)
        if self.crop_box is not None and not self.training:
            opacities = opacities * self.crop_box.within(self.means).squeeze(-1)
        if self.training and self.config.opacity_dropout > 0:
            opacities = dropped_out(opacities, self.config.opacity_dropout * min(self.step / self.total_steps, 1.0))
        settings = RasterSettings(
            width=camera.columns,
            height=camera.rows,
            sh_degree=self.active_sh_degree,
            eps2d=dilation,
            render_depth=not self.training or self.config.output_depth_during_training,
            absgrad=self.training and self.strategy is not None and self.strategy.needs_absgrad(self.step),
            antialiased=self.config.rasterize_mode == "antialiased",
        )
        with self._full_precision():
            gaussians = Gaussians(
                self.means, self.quats, torch.exp(self.scales), opacities, self.features_dc, self.features_rest
            )
            with uninterrupted():
                features, depth, alpha, self.info = rasterize(gaussians, camera.viewmats, camera.Ks, settings)
            asked_for = renderers.BACKGROUND_COLOR_OVERRIDE  # by ns-render and the viewer, inside a crop box
            override = None if asked_for is None else plain_color(asked_for)
            background = self.background(override, views=len(camera.viewmats))
            return FieldRender(features + (1 - alpha) * background, alpha, depth)

    @torch.no_grad()
    def render(self, camera: GridCamera, decode: bool = True) -> Outputs:
        """Render and decode one camera, with the scene's own decoder where it is fitted.

        Args:
            camera: a single one; of the grid that the VAE decodes, unless `decode` is off.
            decode: whether `rgb` is decoded; otherwise it is `latent_rgb`.

        Returns:
            Pictures of the camera's size: `rgb` [H, W, 3] in [0, 1], `latent_rgb` [H, W, 3] (a linear map of the
            latent), `depth` [H, W, 1] in scene units, `accumulation` [H, W, 1] and, with a decoder of the scene,
            `vae_rgb` [H, W, 3], the VAE's picture, made when it is looked at; the `latent` [C, h, w]; and a stopwatch
            `times` with the marks `rasterized` and `decoded`.
        """
        times, decoder = Stopwatch(self.device), self.scene_decoder
        rgb: Tensor | None = None
        if decode and decoder is not None and self.decoder_is_fitted:
            camera = camera.subdivided(decoder.density)
            field, alpha, depth = self.render_field(camera, decoder.dense_dilation(self.config.dilation))
            times.mark("rasterized")
            rgb = decoder.decode(field[0], camera.height, camera.width)
            times.mark("decoded")
            latent = self.normalization.to_latent(decoder.field_latents(field[0]))
        else:
            decoder = None
            field, alpha, depth = self.render_field(camera, self.config.dilation)
            latent = self.normalization.to_latent(field[0])
            times.mark("rasterized")
            if decode:
                rgb = self.vae.decode(latent[None], camera.height, camera.width)[0]
            times.mark("decoded")
        latent_rgb = enlarged(self.linear_rgb(self.normalization.to_latent(field[0])).clamp(0, 1), camera)
        assert depth is not None
        outputs = Outputs(
            rgb=latent_rgb if rgb is None else rgb,
            latent_rgb=latent_rgb,
            depth=enlarged(torch.where(alpha > 0, depth, depth.max())[0], camera),
            accumulation=enlarged(alpha[0], camera),
            latent=latent,
            times=times,
        )
        if decoder is not None:

            def vae_rgb() -> Tensor:
                times.mark("vae_begun")
                picture = self.vae.decode(latent[None], camera.height, camera.width)[0]
                times.mark("vae_decoded")
                self.viewer_figures.show(self.num_points, "the VAE's", times, "vae_begun", "vae_decoded")
                return picture

            outputs.later("vae_rgb", vae_rgb)
        return outputs

    @exit_on_user_error()
    @torch.no_grad()
    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> Outputs:
        """Render a camera for nerfstudio's commands and viewer, inside a crop box if there is one.

        Returns:
            The pictures of :meth:`render`; previews while the viewer's camera moves.
        """
        self.set_crop(obb_box)
        cell: float = self.vae.spatial_factor
        shown = self.viewer_preview.value
        if shown == "auto":
            shown = "decoded" if self.decoder_is_fitted else "latent_rgb"
        preview = viewer_is_moving() and shown == "latent_rgb"
        if preview:
            cell = preview_cell(int(camera.height), int(camera.width), self.vae.spatial_factor)
        outputs = self.render(grid_camera(camera, cell, self.device), decode=not preview)
        self.vae.check_overflow()
        decoder = "the scene's own" if "vae_rgb" in outputs else "the VAE's"
        shown_by = "none, a linear map" if preview else decoder
        self.viewer_figures.show(self.num_points, shown_by, outputs["times"], "rasterized", "decoded")
        del outputs["latent"], outputs["times"]  # no pictures
        return outputs

    def set_background(self, background_color: Tensor) -> None:
        """Take the color that the viewer shows behind the Gaussians, RGB [3]; training does not see it."""
        self.background.viewer_color = plain_color(background_color)

    # ---------------------------------------------------------------- evaluation

    def get_image_metrics_and_images(
        self, outputs: Outputs, batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Compare a rendered held-out view with its photograph.

        Args:
            outputs: what :meth:`render` gives for the view's camera.
            batch: `image` [H, W, 3] in [0, 1], `latent` [C, h, w], and `mask` [H, W] if there is one.

        Returns:
            The metrics of :func:`compare_view` and `raster_seconds, decode_seconds`; its picture as `img`.
        """
        metrics, picture = compare_view(
            outputs["rgb"],
            outputs.get("vae_rgb"),
            outputs["latent"],
            batch["image"],
            batch["latent"],
            batch.get("mask"),
            vae=self.vae,
            normalization=self.normalization,
            metrics=self.image_metrics,
        )
        metrics["raster_seconds"] = outputs["times"].seconds("start", "rasterized")
        metrics["decode_seconds"] = outputs["times"].seconds("rasterized", "decoded")
        return metrics, {"img": picture}

    # ---------------------------------------------------------------- export

    # Colors for tools that know RGB only.

    @property
    def shs_0(self) -> Tensor:
        """[N, 3], degree 0 of the Gaussians' colors through the linear latent-to-RGB map, as ply viewers read them."""
        matrix, bias = self.linear_rgb.for_field(self.normalization)
        return RGB2SH(SH_C0 * self.features_dc @ matrix.T + bias)

    @property
    def shs_rest(self) -> Tensor:
        """[N, K - 1, 3], the higher degrees of the Gaussians' colors through the linear latent-to-RGB map."""
        matrix, _ = self.linear_rgb.for_field(self.normalization)
        return self.features_rest @ matrix.T

    @property
    def colors(self) -> Tensor:
        """[N, 3], the Gaussians' mean colors."""
        return SH2RGB(self.shs_0)


def _described(decoder: dict[str, int] | None) -> str:
    return "no decoder of the scene" if decoder is None else f"a decoder of the scene with {decoder}"
