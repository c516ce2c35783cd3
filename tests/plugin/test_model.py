"""The field: what it renders, what it is fitted to, how it grows."""

import json
from pathlib import Path

import pytest
import torch
from in_process import make_pipeline, make_trainer
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.model_components.renderers import background_color_override_context
from tiny_scenes import Lens, write_scene
from tiny_vaes import make_vae

from lrf_nerfstudio.field.cameras import GridCamera, adjusted, world_to_camera
from lrf_nerfstudio.field.seeding import SH_C0, mean_latents_at_projections
from lrf_nerfstudio.plugin.cameras import grid_camera
from lrf_nerfstudio.plugin.model import LatentSplatfactoModel
from lrf_nerfstudio.splatting import Gaussians, RasterSettings, rasterize
from lrf_nerfstudio.splatting.strategies import DensificationConfig
from lrf_nerfstudio.utils.errors import UserError


@pytest.fixture(scope="module")
def pipeline(floor_scene, tiny_vae, device):
    """An untrained field of the floor. Tests must leave it as it is."""
    pipeline = make_pipeline(floor_scene, tiny_vae, device=device)
    pipeline.eval()
    return pipeline


@pytest.fixture(scope="module")
def alpha_scene(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("alpha") / "scene", transparent=True)


def view(pipeline, index: int = 0, height: int | None = None, width: int | None = None) -> Cameras:
    """A training camera, or one of another size with the same field of view."""
    camera = pipeline.datamanager.train_dataset.cameras[index : index + 1]
    if height is None or width is None:
        return camera
    return Cameras(
        camera_to_worlds=camera.camera_to_worlds,
        fx=camera.fx * width / camera.width,
        fy=camera.fy * height / camera.height,
        cx=camera.cx * width / camera.width,
        cy=camera.cy * height / camera.height,
        width=width,
        height=height,
        camera_type=CameraType.PERSPECTIVE,
    )


def on_grid(pipeline, index: int = 0, height: int | None = None, width: int | None = None) -> GridCamera:
    """The same on the grid that the VAE decodes."""
    return grid_camera(view(pipeline, index, height, width), 8, pipeline.device, index)


def field_of(model: LatentSplatfactoModel, camera: GridCamera) -> torch.Tensor:
    """[h, w, C], what the field renders."""
    return model.render_field(camera, model.config.dilation).field[0]


# ---------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(("height", "width"), [(67, 101), (64, 96), (129, 72), (9, 200), (3, 5), (1, 1)])
def test_outputs_have_exactly_the_cameras_size(pipeline, height, width):
    outputs = pipeline.model.get_outputs_for_camera(view(pipeline, 0, height, width))
    assert list(outputs) == ["rgb", "latent_rgb", "depth", "accumulation"]
    channels = {"rgb": 3, "latent_rgb": 3, "depth": 1, "accumulation": 1}
    for name, picture in outputs.items():
        assert picture.shape == (height, width, channels[name]), name
        assert picture.dtype == torch.float32
        assert torch.isfinite(picture).all(), name
    for name in ("rgb", "latent_rgb", "accumulation"):
        assert 0 <= outputs[name].min() <= outputs[name].max() <= 1 + 1e-6, name


def test_training_renders_the_latent_grid(floor_scene, tiny_vae, device):
    pipeline = make_pipeline(floor_scene, tiny_vae, device=device)
    pipeline.model.optimizers = {}
    outputs = pipeline.model(on_grid(pipeline))
    assert outputs["field"].shape == (1, 9, 13, 4)
    assert outputs["accumulation"].shape == (1, 9, 13, 1)


def test_the_picture_is_the_decoded_latent_cut_to_size(pipeline):
    model, camera = pipeline.model, on_grid(pipeline)
    rendered = model.render(camera)
    assert rendered["latent"].shape == (4, 9, 13)
    field = field_of(model, camera)
    assert torch.allclose(model.normalization.to_field(rendered["latent"]), field, atol=1e-5)
    assert torch.equal(rendered["rgb"], model.vae.decode(rendered["latent"][None], 67, 101)[0])
    assert rendered["times"].seconds("start", "rasterized") > 0
    assert rendered["times"].seconds("rasterized", "decoded") > 0


def test_other_cameras_are_refused(pipeline):
    camera = view(pipeline)
    camera.camera_type = torch.full_like(camera.camera_type, CameraType.EQUIRECTANGULAR.value)
    with pytest.raises(UserError, match="perspective"):
        grid_camera(camera, 8, "cpu")


def test_principal_point_moves_the_picture(pipeline):
    """Rendering a window of a picture is cutting it out: intrinsics are divided by f exactly."""
    whole = view(pipeline, 0, 128, 192)
    window = view(pipeline, 0, 128, 192)
    window.cx, window.cy = window.cx - 64, window.cy - 16
    window.width, window.height = torch.full_like(window.width, 96), torch.full_like(window.height, 64)
    field, part = (field_of(pipeline.model, grid_camera(camera, 8, "cpu")) for camera in (whole, window))
    assert torch.allclose(part, field[2:10, 8:20], atol=2e-3)


# ---------------------------------------------------------------------------------------------------- crop, background


def box(center=(0.0, 0.0, 0.0), size=(1.0, 1.0, 1.0)) -> OrientedBox:
    return OrientedBox.from_params(center, (0.0, 0.0, 0.0), size)


def test_a_crop_box_shows_what_is_inside(pipeline):
    model, camera = pipeline.model, view(pipeline)
    crop = box((0.2, 0.0, 0.0), (0.8, 10.0, 10.0))
    cropped = model.get_outputs_for_camera(camera, obb_box=crop)
    everything = model.get_outputs_for_camera(camera)
    assert 0 < cropped["accumulation"].mean() < 0.9 * everything["accumulation"].mean()
    inside = crop.within(model.means).squeeze(-1)
    assert 0 < inside.sum() < len(inside)
    opacities = model.opacities.detach().clone()
    model.gauss_params["opacities"].data[~inside] = -1e4
    alone = model.get_outputs_for_camera(camera)
    model.gauss_params["opacities"].data.copy_(opacities)
    assert torch.allclose(cropped["accumulation"], alone["accumulation"], atol=1e-6)
    assert torch.allclose(cropped["rgb"], alone["rgb"], atol=1e-5)
    # Without a box, all is there again.
    assert torch.equal(model.get_outputs_for_camera(camera)["rgb"], everything["rgb"])


def test_an_empty_crop_box_shows_the_background(pipeline):
    nothing = box((50.0, 0.0, 0.0), (0.1, 0.1, 0.1))
    with background_color_override_context(torch.tensor([1.0, 0.0, 0.0])):
        outputs = pipeline.model.get_outputs_for_camera(view(pipeline), obb_box=nothing)
    assert outputs["accumulation"].max() == 0
    for name in ("rgb", "latent_rgb", "depth"):
        assert torch.isfinite(outputs[name]).all()
    pipeline.model.set_crop(None)


def encoded_color(model: LatentSplatfactoModel, rgb: list[float]) -> torch.Tensor:
    """[C], the field latent of a plain picture."""
    picture = torch.tensor(rgb, device=model.device).expand(1, 256, 256, 3)
    return model.normalization.to_field(model.vae.encode(picture))[0, 16, 16]


def test_the_viewers_background_is_encoded(pipeline):
    model, nothing = pipeline.model, box((50.0, 0.0, 0.0), (0.1, 0.1, 0.1))
    model.set_crop(nothing)
    neutral = field_of(model, on_grid(pipeline))
    assert torch.allclose(neutral, torch.full_like(neutral, 0.5))
    model.set_background(torch.tensor([0.9, 0.2, 0.1]))
    field = field_of(model, on_grid(pipeline))
    expected = encoded_color(model, [0.9, 0.2, 0.1])
    with background_color_override_context(torch.tensor([0.0, 0.3, 1.0])):
        overridden = field_of(model, on_grid(pipeline))
    model.background.viewer_color = None
    model.set_crop(None)
    assert torch.allclose(field, expected.expand_as(field), atol=1e-4)
    assert torch.allclose(overridden, encoded_color(model, [0.0, 0.3, 1.0]).expand_as(field), atol=1e-4)


def test_the_viewers_background_does_not_reach_training(floor_scene, tiny_vae, device):
    pipeline = make_pipeline(floor_scene, tiny_vae, background_color="black", device=device)
    model, camera = pipeline.model, on_grid(pipeline)
    with torch.no_grad():
        before = field_of(model.train(), camera)
        model.set_background(torch.tensor([1.0, 1.0, 1.0]))
        assert torch.equal(field_of(model, camera), before)


def test_random_backgrounds_change_in_training_alone(pipeline):
    model, camera = pipeline.model, on_grid(pipeline)
    with torch.no_grad():
        first, second = (field_of(model.train(), camera) for _ in range(2))
        assert not torch.equal(first, second)
        first, second = (field_of(model.eval(), camera) for _ in range(2))
        assert torch.equal(first, second)


def test_transparent_photographs_decide_the_background(alpha_scene, tiny_vae, device):
    model = make_pipeline(alpha_scene, tiny_vae, device=device).model
    assert model.background.scene_color.tolist() == [1, 1, 1]
    expected = encoded_color(model, [1.0, 1.0, 1.0])
    model.set_background(torch.tensor([0.1, 0.2, 0.3]))  # what the viewer does at every frame
    for training in (False, True):
        model.train(training)
        assert torch.allclose(model.background(), expected, atol=1e-4)
    model.eval()
    asked_for = (0.0, 0.0, 1.0)
    assert torch.allclose(model.background(asked_for), encoded_color(model, list(asked_for)), atol=1e-4)


# ---------------------------------------------------------------------------------------------------- loss


def test_the_loss_ignores_cells_outside_the_mask(tmp_path, tiny_vae, device):
    pipeline = make_pipeline(write_scene(tmp_path / "scene", masked=True), tiny_vae, device=device)
    model = pipeline.model
    _, batch = pipeline.datamanager.next_train(0)
    mask = batch["mask"]
    assert 0 < mask.sum() < mask.numel()
    outputs = {"field": torch.rand(*mask.shape, 4, requires_grad=True)}
    loss = model.get_loss_dict(outputs, batch)["main_loss"]
    loss.backward()
    assert (outputs["field"].grad[~mask] == 0).all()
    assert (outputs["field"].grad[mask] != 0).any(dim=-1).all()
    garbage = batch["target"] + 1000 * ~mask[..., None]
    assert model.get_loss_dict(outputs, {**batch, "target": garbage})["main_loss"] == loss
    # And it is zero where the field is the target.
    assert model.get_loss_dict({"field": batch["target"]}, batch)["main_loss"].item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_papers(pipeline):
    from pytorch_msssim import ssim

    _, batch = pipeline.datamanager.next_train(0)
    target = batch["target"]
    rendered = torch.rand_like(target)
    pair = (picture.permute(0, 3, 1, 2) for picture in (rendered, target))
    expected = 0.8 * (rendered - target).abs().mean() + 0.2 * (1 - ssim(*pair, data_range=1.0, win_size=9))
    loss = pipeline.model.get_loss_dict({"field": rendered}, batch)["main_loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------- colors


def test_colors_for_ply_viewers_are_the_linear_map_of_the_field(floor_scene, tiny_vae, device):
    """Mapping what the field renders is rendering the mapped coefficients."""
    pipeline = make_pipeline(floor_scene, tiny_vae, device=device)
    pipeline.eval()
    model, camera = pipeline.model, on_grid(pipeline)
    generator = torch.Generator().manual_seed(0)
    model.features_rest.data.copy_(0.3 * torch.randn(model.features_rest.shape, generator=generator))
    model.update_to_step(10_000)  # all degrees are active
    with torch.no_grad():
        field, alpha, _ = model.render_field(camera, model.config.dilation)
        mapped = model.linear_rgb(model.normalization.to_latent(field[0]))
        background = model.linear_rgb(model.normalization.to_latent(model.background().expand(1, 1, -1)))
        in_rgb = Gaussians(
            model.means,
            model.quats,
            torch.exp(model.scales),
            torch.sigmoid(model.opacities).squeeze(-1),
            model.shs_0,
            model.shs_rest,
        )
        settings = RasterSettings(13, 9, sh_degree=3, eps2d=model.config.dilation)
        rendered = rasterize(in_rgb, camera.viewmats, camera.Ks, settings).features
    # A ply viewer adds 0.5 to every Gaussian's color.
    shown = (rendered + 0.5 * alpha + (1 - alpha) * background)[0]
    assert torch.allclose(mapped, shown, atol=1e-4)
    assert torch.allclose(model.colors, SH_C0 * model.shs_0 + 0.5)


# ---------------------------------------------------------------------------------------------------- growth


@pytest.mark.parametrize("strategy", ["default", "mcmc"])
def test_the_field_grows_to_its_bound_and_not_beyond(floor_scene, tiny_vae, tmp_path, strategy, monkeypatch, device):
    counts = []
    step_post_backward = LatentSplatfactoModel.step_post_backward

    def counting(self: LatentSplatfactoModel, step: int) -> None:
        step_post_backward(self, step)
        counts.append(self.num_points)

    monkeypatch.setattr(LatentSplatfactoModel, "step_post_backward", counting)
    trainer = make_trainer(
        *(floor_scene, tiny_vae, tmp_path),
        steps=60,
        densification=DensificationConfig(strategy=strategy, max_gaussians=470, gradient_threshold=1e-7),
        scene_decoder__share=0.0,
        device=device,
    )
    trainer.train()
    assert counts[0] == 400
    assert max(counts) == 470
    assert len(counts) == 60
    for name, parameter in trainer.pipeline.model.gauss_params.items():
        assert torch.isfinite(parameter).all(), name


def test_more_seeds_than_the_bound(floor_scene, tiny_vae, pipeline, device):
    """An evenly random selection of them, with their own features; the same one every time."""
    option = {"densification": DensificationConfig(max_gaussians=100), "device": device}
    model = make_pipeline(floor_scene, tiny_vae, **option).model
    assert model.num_points == 100
    seeds = pipeline.model
    same = (model.means[:, None] == seeds.means).all(dim=-1)  # [100, 400]
    assert (same.sum(dim=1) == 1).all()
    kept = same.int().argmax(dim=1)
    assert torch.equal(model.features_dc, seeds.features_dc[kept])
    assert kept.unique().shape == (100,)
    assert (torch.histc(kept.float(), bins=4, min=0, max=400) > 15).all()
    assert torch.equal(make_pipeline(floor_scene, tiny_vae, **option).model.means, model.means)


def test_losses_of_mcmc_and_of_the_ratio_of_scales_are_added(floor_scene, tiny_vae, tmp_path, device):
    trainer = make_trainer(
        *(floor_scene, tiny_vae, tmp_path),
        steps=1,
        densification=DensificationConfig(strategy="mcmc"),
        use_scale_regularization=True,
        device=device,
    )
    camera, batch = trainer.pipeline.datamanager.next_train(0)
    model = trainer.pipeline.model
    losses = model.get_loss_dict(model(camera), batch)
    assert set(losses) == {"main_loss", "scale_reg", "mcmc_opacity", "mcmc_scale"}
    assert losses["mcmc_opacity"].item() == pytest.approx(0.01 * torch.sigmoid(model.opacities).mean().item())


def test_a_scene_without_points_starts_at_random(tmp_path, tiny_vae, device):
    scene = write_scene(tmp_path / "scene", points=False)
    model = make_pipeline(scene, tiny_vae, num_random=321, device=device).model
    assert model.num_points == 321
    assert model.features_dc.shape == (321, 4)


def test_harmonics_join_one_degree_at_a_time(pipeline):
    model = pipeline.model
    interval = model.config.sh_degree_interval
    degrees = []
    for step in (0, interval - 1, interval, 2 * interval, 10 * interval):
        model.update_to_step(step)
        degrees.append(model.active_sh_degree)
    model.update_to_step(0)
    assert degrees == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("sh_degree", [0, 1])
def test_lower_degrees_train(floor_scene, tiny_vae, tmp_path, sh_degree, device):
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, steps=3, sh_degree=sh_degree, device=device)
    trainer.train()
    assert trainer.pipeline.model.features_rest.shape == (400, (sh_degree + 1) ** 2 - 1, 4)


# ---------------------------------------------------------------------------------------------------- camera optimizer


@pytest.fixture(scope="module")
def movable(floor_scene, tiny_vae, device):
    options = {"camera_optimizer": CameraOptimizerConfig(mode="SO3xR3"), "background_color": "black"}
    return make_pipeline(floor_scene, tiny_vae, device=device, **options)


def test_the_camera_optimizer_gets_the_gradient(movable):
    """It equals the finite difference of what is rendered."""
    model = movable.model
    model.optimizers = {}
    # A few Gaussians apart from each other: where two overlap, a change of their order is a jump.
    model.gauss_params["opacities"].data.fill_(-20.0)
    model.gauss_params["opacities"].data[::40] = 0.0
    camera, batch = movable.datamanager.next_train(0)
    (index,) = batch["image_idx"]
    adjustment = model.camera_optimizer.pose_adjustment
    weights = torch.randn(1, 9, 13, 4, generator=torch.Generator().manual_seed(0)).to(model.device)

    def rendered() -> torch.Tensor:
        return (model(camera)["field"] * weights).sum()

    rendered().backward()
    gradient = adjustment.grad[index].clone()
    assert (gradient != 0).all()
    assert (adjustment.grad[torch.arange(len(adjustment)) != index] == 0).all()
    for axis in range(6):
        difference = 0.0
        for sign in (1, -1):
            adjustment.data[index, axis] = sign * 3e-4
            difference += sign * rendered().item() / 6e-4
        adjustment.data[index, axis] = 0
        assert difference == pytest.approx(gradient[axis].item(), rel=0.02, abs=0.01 * gradient.norm().item())


def test_the_camera_optimizer_moves_cameras(floor_scene, tiny_vae, tmp_path, device):
    trainer = make_trainer(
        floor_scene, tiny_vae, tmp_path, steps=40, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"), device=device
    )
    trainer.train()
    model = trainer.pipeline.model
    assert (model.camera_optimizer.pose_adjustment != 0).any(dim=-1).all()
    # Training sees the moved camera, evaluation the data set's.
    camera, _ = trainer.pipeline.datamanager.next_train(0)
    with torch.no_grad():
        moved, data = (model.render_field(seen, 0.1).alpha for seen in (model.optimized(camera), camera))
        assert not torch.equal(moved, data)
    assert "camera_opt" in trainer.optimizers.optimizers


# ---------------------------------------------------------------------------------------------------- seeds


def test_seed_features_are_the_latents_at_their_projections():
    """A latent that is linear over the picture is sampled exactly; the mean of two views is the mean of two samples."""
    generator = torch.Generator().manual_seed(0)
    height, width = 9, 13
    x, y = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
    points = torch.rand(50, 3, generator=generator) - 0.5
    K = torch.tensor([[11.0, 0, 7.1], [0, 12.0, 4.2], [0, 0, 1]])
    views, expected, seen = [], torch.zeros(50, 2), torch.zeros(50)
    for index in range(3):
        viewmat = torch.eye(4)
        viewmat[:3, 3] = torch.tensor([0.1 * index, -0.05 * index, 2.0 if index < 2 else -2.0])  # the last looks away
        slopes = torch.randn(2, 3, generator=generator)
        latent = slopes[:, 0, None, None] + slopes[:, 1, None, None] * x + slopes[:, 2, None, None] * y
        views.append((latent, viewmat, K))
        local = points + viewmat[:3, 3]
        pixels = (local @ K.T)[:, :2] / local[:, 2:]
        margin = 0.5  # between the outermost cells' centres, where interpolation is linear
        inside = (pixels > margin).all(-1) & (pixels < torch.tensor([width, height]) - margin).all(-1)
        inside &= local[:, 2] > 0
        expected[inside] += (slopes[:, 0] + pixels @ slopes[:, 1:].T)[inside]
        seen += inside
    features, count = mean_latents_at_projections(points, iter(views))
    sure = seen == 2
    assert sure.sum() > 25
    assert (count[sure] == 2).all()
    assert torch.allclose(features[sure], expected[sure] / 2, atol=1e-4)
    assert (count <= 2).all()
    assert (features[count == 0] == 0).all()


def test_seeds_take_the_latents_of_the_training_views(pipeline):
    """The floor's seeds, seen in one view, look like that view's latent."""
    model = pipeline.model
    field = model.features_dc.detach() * SH_C0
    points = model.means.detach()
    views = (
        (model.normalization.to_latent(view.target)[0], view.camera.viewmats[0], view.camera.Ks[0])
        for view in pipeline.datamanager.train_views
    )
    latents, seen = mean_latents_at_projections(points, views)
    expected = model.normalization.to_field(latents.T[:, :, None])[:, 0]
    assert torch.allclose(field[seen > 0], expected[seen > 0], atol=1e-5)
    assert (field[seen == 0] == 0.5).all()
    assert torch.equal(points, pipeline.datamanager.train_dataparser_outputs.metadata["points3D_xyz"])
    # Seeds are samples of the views' latents, so they lie within their range.
    views = pipeline.datamanager.train_views
    targets = torch.cat([view.target.flatten(0, 2) for view in views])
    assert (field >= targets.amin(0) - 1e-5).all()
    assert (field <= targets.amax(0) + 1e-5).all()


def test_world_to_camera_inverts_the_pose(pipeline):
    poses = pipeline.datamanager.train_dataset.cameras.camera_to_worlds
    viewmats = world_to_camera(poses)
    in_camera = torch.tensor([0.0, 0.0, 1.0, 1.0])  # one unit before the camera, OpenCV axes
    in_world = poses[:, :, 3] - poses[:, :, 2]
    projected = viewmats @ torch.cat([in_world, torch.ones(len(poses), 1)], dim=-1)[..., None]
    assert torch.allclose(projected[..., 0], in_camera.expand(len(poses), 4), atol=1e-5)


def test_adjusted_cameras_are_those_of_nerfstudios_optimizer(movable):
    optimizer, cameras = movable.model.camera_optimizer, movable.datamanager.train_dataset.cameras
    index = torch.tensor([3], device=movable.device)
    camera = cameras[3:4].to(movable.device)
    camera.metadata = {"cam_idx": 3}
    with torch.no_grad():
        optimizer.pose_adjustment[3] = torch.tensor([0.1, -0.2, 0.05, 0.3, 0.1, -0.2])
        expected = world_to_camera(optimizer.apply_to_camera(camera))
        actual = adjusted(world_to_camera(camera.camera_to_worlds), optimizer(index))
        optimizer.pose_adjustment[3] = 0
    assert torch.allclose(actual, expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- state


def test_a_loaded_field_renders_what_the_saved_one_did(floor_scene, tiny_vae, tmp_path, device):
    trainer = make_trainer(
        floor_scene,
        tiny_vae,
        tmp_path,
        steps=25,
        densification=DensificationConfig(gradient_threshold=1e-7),
        device=device,
    )
    trainer.train()
    trained = trainer.pipeline.eval()
    assert trained.model.num_points != 400
    loaded = make_pipeline(floor_scene, tiny_vae, "test", device=device).eval()
    checkpoint = torch.load(trainer.checkpoint_dir / "step-000000024.ckpt", weights_only=True)
    loaded.load_pipeline(checkpoint["pipeline"], checkpoint["step"])
    camera = view(loaded, 2)
    for name, picture in trained.model.get_outputs_for_camera(camera).items():
        assert torch.equal(loaded.model.get_outputs_for_camera(camera)[name], picture), name


def test_a_checkpoint_holds_no_weights_of_the_vae(floor_scene, tiny_vae, device):
    state = make_pipeline(floor_scene, tiny_vae, device=device).state_dict()
    assert not any("vae" in name or "autoencoder" in name for name in state)
    assert json.dumps(state["_model._extra_state"]["vae"])  # plain values


def test_channels_follow_the_vae(floor_scene, tmp_path_factory, device):
    vae: Path = make_vae(tmp_path_factory.mktemp("vae16"), channels=16)
    pipeline = make_pipeline(floor_scene, vae, device=device)
    assert pipeline.model.features_dc.shape == (400, 16)
    assert pipeline.eval().model.render(on_grid(pipeline))["rgb"].shape == (67, 101, 3)


def test_small_pictures_train(tmp_path, tiny_vae, device):
    """A grid of 2 x 3 cells is smaller than SSIM's usual window."""
    scene = write_scene(tmp_path / "scene", lenses=Lens(24, 16, 22.0))
    make_trainer(scene, tiny_vae, tmp_path / "out", steps=3, device=device).train()
