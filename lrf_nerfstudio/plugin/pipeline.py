"""Owns the VAE: loads it once, for the datamanager (which encodes) and the model (which decodes)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.pipelines.base_pipeline import Pipeline, VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils import profiler
from torch import Tensor
from torchvision.utils import save_image

from lrf_nerfstudio.evaluation.views import latent_psnr
from lrf_nerfstudio.field.seeding import mean_latents_at_projections
from lrf_nerfstudio.plugin.datamanager import LatentDatamanager, LatentDatamanagerConfig
from lrf_nerfstudio.plugin.ffmpeg import provide_ffmpeg
from lrf_nerfstudio.plugin.model import LatentSplatfactoModel, LatentSplatfactoModelConfig
from lrf_nerfstudio.plugin.viewer import StartCamera
from lrf_nerfstudio.splatting import prepare_backend
from lrf_nerfstudio.utils.errors import UserError, exit_on_user_error
from lrf_nerfstudio.utils.progress import track
from lrf_nerfstudio.vae import VAE, FieldNormalization, LinearRGB, VAEConfig, downsample_mask

MAX_VIEWS_FOR_LINEAR_RGB = 16
"""Photographs that the linear latent-to-RGB map is fitted to: 3 (C + 1) numbers need no more."""


@dataclass
class LatentPipelineConfig(VanillaPipelineConfig):
    """Configuration of the data, the VAE and the model."""

    _target: type = field(default_factory=lambda: LatentPipeline)
    datamanager: LatentDatamanagerConfig = field(default_factory=LatentDatamanagerConfig)
    """The photographs and their latents."""
    vae: VAEConfig = field(default_factory=VAEConfig)
    """The autoencoder whose latent space the scene is trained in."""
    model: LatentSplatfactoModelConfig = field(default_factory=LatentSplatfactoModelConfig)
    """The radiance field."""
    device: Literal["auto", "cpu"] = "auto"
    """Where ns-viewer, ns-render, ns-eval and ns-export put the trained scene: `auto` is the GPU where there is one. A
    scene that was trained with `--machine.device-type cpu` stays on the CPU."""


class LatentPipeline(VanillaPipeline):
    """VAE, datamanager and model of a latent radiance field.

    Only training (`test_mode="val"`) encodes images: everything else takes the normalisation of the latents, the map to
    RGB and the Gaussians from the checkpoint, and does not need the training photographs.
    """

    config: LatentPipelineConfig
    datamanager: LatentDatamanager

    @exit_on_user_error()
    def __init__(
        self,
        config: LatentPipelineConfig,
        device: str | torch.device,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: Any = None,
    ):
        Pipeline.__init__(self)
        provide_ffmpeg()  # ns-render looks for it once it has its pipeline
        if world_size > 1:
            raise UserError("This method trains on one device: leave out --machine.num-devices.")
        self.config = config
        self.test_mode = test_mode
        self.world_size = world_size
        if config.device == "cpu":
            device = "cpu"
        prepare_backend(device)
        vae = config.vae.setup(device)
        self.datamanager = self.setup_datamanager(
            vae, device, test_mode=test_mode, world_size=world_size, local_rank=local_rank
        )
        self.datamanager.to(device)
        dataset = self.datamanager.train_dataset
        # Of the targets of training; in a list, which hides it from nn.Module.
        self._target_maps: list[FieldNormalization] = []
        initial_state = self.initial_state(vae) if test_mode == "val" else {}
        self._model = config.model.setup(
            scene_box=dataset.scene_box,
            num_train_data=len(dataset),
            metadata=dataset.metadata,
            device=device,
            grad_scaler=grad_scaler,
            vae=vae,
            **initial_state,
        )
        self.model.to(device)
        self.viewer_start = StartCamera(dataset.cameras, lambda: self.model.means)

    @property
    def model(self) -> LatentSplatfactoModel:
        return self._model

    def setup_datamanager(self, vae: VAE, device: str | torch.device, **options: Any) -> LatentDatamanager:
        """Make the datamanager; `options` are those that nerfstudio's datamanagers take."""
        datamanager: LatentDatamanager = self.config.datamanager.setup(device=device, vae=vae, **options)
        return datamanager

    def prepare_training(self, steps: int) -> None:
        """Make what only training needs, for a run of so many steps, before a checkpoint is loaded."""
        self.model.prepare_training(steps)
        latents_too = self.model.config.scene_decoder.latent_weight > 0
        self.datamanager.prepare_training(self.model.latent_steps, self.model.scene_decoder, latents_too)

    def is_light(self, step: int) -> bool:
        """Return whether a training step is many small operations, which more threads only slow down on a CPU."""
        return step < self.model.latent_steps

    def initial_state(self, vae: VAE) -> dict[str, Any]:
        """What a new field starts from: maps between latents, field latents and RGB, and seed points with features."""
        datamanager, dataset = self.datamanager, self.datamanager.train_dataset
        datamanager.encode_train_views()
        latents = [view.target[0] for view in datamanager.train_views]
        normalization = FieldNormalization.from_latents(latents)
        stride = -(-len(latents) // MAX_VIEWS_FOR_LINEAR_RGB)
        linear_rgb = LinearRGB.fit(
            ((latents[index], dataset.photograph(index)[0]) for index in range(0, len(latents), stride)),
            datamanager.spatial_factor,
        )
        state = {
            "normalization": normalization,
            "linear_rgb": linear_rgb,
            "background_rgb": dataset.background_rgb,
            "seed_points": self._seed_points(normalization),
        }
        self._target_maps = [copy.deepcopy(normalization)]
        datamanager.map_targets(copy.deepcopy(normalization).to(datamanager.device).to_field)
        return state

    def _seed_points(self, normalization: FieldNormalization) -> tuple[Tensor, Tensor] | None:
        """Positions [N, 3] and field latents [N, C] of the data set's points; None if it has none."""
        points = self.datamanager.train_dataparser_outputs.metadata.get("points3D_xyz")
        if points is None or len(points) < 4:  # the first scales come from the three nearest neighbors
            return None
        points = points.float().cpu()
        views = (
            (view.target[0].cpu(), view.camera.viewmats[0].cpu(), view.camera.Ks[0].cpu())
            for view in self.datamanager.train_views
        )
        latents, seen = mean_latents_at_projections(points, views)
        field = normalization.to_field(latents.T[:, :, None])[:, 0]  # [C, N, 1] to [N, 1, C] to [N, C]
        field[seen == 0] = 0.5  # the middle of the field's range, where no training view looks
        return points, field

    # ---------------------------------------------------------------- checkpoints

    @exit_on_user_error()
    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        super().load_pipeline(loaded_state, step)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool | None = None) -> Any:
        """Load a checkpoint; every name must match."""
        prefix = "_model."
        unexpected = [name for name in state_dict if not name.startswith(prefix)]
        if unexpected or f"{prefix}_extra_state" not in state_dict:
            raise UserError(
                "The checkpoint was written by another method than the one that is to load it. Give --load-dir or "
                "--load-checkpoint one of a run of the same method."
            )
        state = {name.removeprefix(prefix): value for name, value in state_dict.items()}
        keys = self.model.load_state_dict(state, strict=True)
        if self._target_maps:
            self._map_targets_again({name: state[f"normalization.{name}"].cpu() for name in ("shift", "scale")})
        return keys

    def _map_targets_again(self, buffers: dict[str, Tensor]) -> None:
        """Map the targets of training with the normalization of a checkpoint, if it is one of other photographs."""
        (before,) = self._target_maps
        if all(torch.equal(value, before.state_dict()[name]) for name, value in buffers.items()):
            return
        after = copy.deepcopy(before)
        after.load_state_dict(buffers)
        self._target_maps = [after]
        old, new = (copy.deepcopy(maps).to(self.datamanager.device) for maps in (before, after))
        self.datamanager.map_targets(lambda target: new.to_field(old.to_latent(target)))

    # ---------------------------------------------------------------- evaluation

    @profiler.time_function
    def get_eval_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Losses and metrics of the next held-out view, on the latent grid as in training."""
        self.eval()
        camera, batch = self.datamanager.next_eval(step)
        batch["target"] = self.model.normalization.to_field(batch.pop("latent")[None])
        if "mask" in batch:
            batch["mask"] = downsample_mask(batch["mask"], self.model.vae.spatial_factor)[None]
        with torch.no_grad():
            render = self.model.render_field(camera, self.model.config.dilation)
        outputs = {"field": render.field, "accumulation": render.alpha}
        metrics = self.model.get_metrics_dict(outputs, batch)
        losses = self.model.get_loss_dict(outputs, batch, metrics)
        self.train()
        return outputs, losses, metrics

    @profiler.time_function
    def get_eval_image_metrics_and_images(self, step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Metrics and pictures of the next held-out view."""
        self.eval()
        camera, batch = self.datamanager.next_eval_image(step)
        metrics, images = self.model.get_image_metrics_and_images(self.model.render(camera), batch)
        metrics["num_rays"] = camera.height * camera.width
        self.train()
        return metrics, images

    @torch.no_grad()
    @exit_on_user_error()
    def held_out_latent_psnr(self) -> float:
        """Return the mean `latent_psnr` of the held-out views, as :meth:`get_average_eval_image_metrics` has it."""
        self.eval()
        model, values = self.model, []
        for camera, batch in self.datamanager.fixed_indices_eval_dataloader:
            latent = model.render(camera, decode=model.decoder_is_fitted)["latent"]
            values.append(latent_psnr(latent, batch["latent"], model.normalization))
        self.train()
        return sum(values) / len(values)

    @profiler.time_function
    @exit_on_user_error()
    def get_average_eval_image_metrics(
        self, step: int | None = None, output_path: Path | None = None, get_std: bool = False
    ) -> dict[str, float]:
        """Mean over the held-out views of every metric of the model, and its standard deviation as `<name>_std`.

        Args:
            step: ignored, part of nerfstudio's interface.
            output_path: a folder for one picture a view: the photograph, the VAE's reconstruction, the decoded render.
            get_std: whether to add the standard deviations.
        """
        self.eval()
        views = self.datamanager.fixed_indices_eval_dataloader
        self.model.render(views[0][0])  # compile and warm up, so that the times are those of any later view
        collected: dict[str, list[float]] = {}
        for index in track(range(len(views)), "Evaluating the held-out views"):
            camera, batch = views[index]
            metrics, images = self.model.get_image_metrics_and_images(self.model.render(camera), batch)
            for name, value in metrics.items():
                collected.setdefault(name, []).append(value)
            if output_path is not None:
                output_path.mkdir(parents=True, exist_ok=True)
                save_image(images["img"].permute(2, 0, 1).cpu(), output_path / f"eval_{index:04d}.png")
        self.train()
        averages = {}
        for name, values in collected.items():
            averages[name] = float(torch.tensor(values).mean())
            if get_std:
                averages[f"{name}_std"] = float(torch.tensor(values).std(unbiased=len(values) > 1))
        return averages
