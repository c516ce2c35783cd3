"""The last part of a run: the scene's own decoder is fitted, with the field, to the photographs."""

import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from fake_cuda import DEVICE, fake_cuda
from in_process import make_pipeline, make_trainer
from test_cuda import place_trainer
from test_trainer import run_folder
from tiny_scenes import Lens, write_scene

from lrf_nerfstudio.field import LatentField
from lrf_nerfstudio.field.decoder import SceneDecoder
from lrf_nerfstudio.field.generic_decoder import for_field, load_generic, save_generic, shipped_generic
from lrf_nerfstudio.field.similarity import fitting_loss
from lrf_nerfstudio.plugin.cameras import grid_camera
from lrf_nerfstudio.plugin.export import exported_field
from lrf_nerfstudio.plugin.optimizers import RunScheduleConfig
from lrf_nerfstudio.plugin.photographs import Part, Photographs
from lrf_nerfstudio.plugin.trainer import load_checkpoint
from lrf_nerfstudio.splatting.strategies import DensificationConfig
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAEConfig

pytestmark = pytest.mark.slow

KEPT = DensificationConfig(gradient_threshold=1e9, opacity_threshold=1e-6)
"""No Gaussian is added or removed."""


def psnr(trainer, name: str = "psnr") -> float:
    return trainer.pipeline.get_average_eval_image_metrics()[name]


def test_a_run_fits_latents_then_the_decoder_then_both(floor_scene, tiny_vae, tmp_path, device):
    options = {"scene_decoder__share": 0.5, "densification": KEPT, "device": device}
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, steps=40, **options)
    model = trainer.pipeline.model
    assert (model.latent_steps, model.joint_steps) == (20, 21)
    moved: dict[str, list[bool]] = {"means": [], "decoder": []}
    take = trainer.train_iteration

    def watched(step):
        before = [model.means.detach().clone(), model.scene_decoder.tail.weight.detach().clone()]
        result = take(step)
        for name, old, new in zip(moved, before, (model.means, model.scene_decoder.tail.weight), strict=True):
            moved[name].append(not torch.equal(old, new))
        assert ("psnr" in result[2], "latent_psnr" in result[2]) == (step >= 20, step < 20)
        return result

    trainer.train_iteration = watched
    trainer.train()
    assert moved["means"] == [True] * 20 + [False] + [True] * 19
    assert moved["decoder"] == [False] * 21 + [True] * 19  # the learning rate rises from 0


def test_the_decoder_is_better_than_the_linear_map_that_it_starts_from(floor_scene, tmp_path, device):
    alone = {"scene_decoder__share": 0.6, "scene_decoder__warmup": 1.0}  # the field stays as it is
    trainer = make_trainer(floor_scene, "lrf-f4c4", tmp_path, steps=400, device=device, **alone)
    model = trainer.pipeline.model
    start = {name: tensor.clone() for name, tensor in model.scene_decoder.state_dict().items()}
    trainer.train()
    metrics = trainer.pipeline.get_average_eval_image_metrics()
    assert metrics["psnr"] > 18
    assert {"vae_psnr", "vae_ssim", "ceiling_psnr"} <= set(metrics)
    model.scene_decoder.load_state_dict(start)
    assert metrics["psnr"] > psnr(trainer)


def test_it_can_be_left_out(floor_scene, tiny_vae, tmp_path, device):
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, steps=4, scene_decoder__share=0.0, device=device)
    trainer.train()
    model = trainer.pipeline.model
    assert model.scene_decoder is None and model.latent_steps == 4
    assert not any("decoder" in name for name in model.state_dict())
    camera = trainer.pipeline.datamanager.eval_dataset.cameras[0:1]
    assert list(model.eval().get_outputs_for_camera(camera)) == ["rgb", "latent_rgb", "depth", "accumulation"]


def test_the_vaes_picture_is_another_output_made_when_it_is_looked_at(floor_scene, tiny_vae, tmp_path, device):
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, steps=4, device=device)
    trainer.train()
    model = trainer.pipeline.eval().model
    decode, calls = model.vae.decode, []
    model.vae.decode = lambda *arguments: calls.append(1) or decode(*arguments)
    outputs = model.get_outputs_for_camera(trainer.pipeline.datamanager.eval_dataset.cameras[0:1])
    assert list(outputs) == ["rgb", "latent_rgb", "depth", "accumulation", "vae_rgb"]
    assert not calls
    assert outputs["vae_rgb"].shape == outputs["rgb"].shape == (67, 101, 3)
    assert outputs["vae_rgb"] is outputs["vae_rgb"]
    assert len(calls) == 1
    assert not torch.equal(outputs["vae_rgb"], outputs["rgb"])


@pytest.mark.parametrize("kind", ["opaque", "masked", "transparent", "sizes"])
def test_all_kinds_of_photographs(tmp_path, tiny_vae, kind, device):
    lenses = [Lens(96, 72), Lens(64, 101, 70.0)] if kind == "sizes" else Lens(101, 67)
    kinds = {} if kind in ("opaque", "sizes") else {kind: True}
    scene = write_scene(tmp_path / "scene", views=9, lenses=lenses, **kinds)
    trainer = make_trainer(scene, tiny_vae, tmp_path, steps=12, datamanager__photograph_side=40, device=device)
    trainer.train()
    assert psnr(trainer) > 5


def test_pixels_outside_the_mask_do_not_matter(tmp_path, tiny_vae, device):
    pipeline = make_pipeline(write_scene(tmp_path / "scene", views=9, masked=True), tiny_vae, device=device)
    pipeline.prepare_training(10)
    model = pipeline.model
    model.step = 9
    camera, batch = pipeline.datamanager.next_train(9)
    assert 0 < batch["mask"].sum() < batch["mask"].numel()
    outputs = model(camera)
    loss = model.get_loss_dict(outputs, batch)["main_loss"]
    spoiled = torch.where(batch["mask"][..., None], batch["photograph"], 255 - batch["photograph"])
    assert torch.equal(model.get_loss_dict(outputs, {**batch, "photograph": spoiled})["main_loss"], loss)
    other = {**batch, "photograph": 255 - batch["photograph"]}
    assert not torch.equal(model.get_loss_dict(outputs, other)["main_loss"], loss)


# ---------------------------------------------------------------------------------------------------- latents


@pytest.mark.parametrize(("factor", "cell"), [(8, 4), (4, 4), (4, 2), (4, 1), (8, 16), (1, 2)])
@pytest.mark.parametrize("side", [40, 200])
def test_the_cells_of_the_vae_in_a_part(factor, cell, side):
    """All whole cells are found, and pixels are where both grids say they are."""
    height, width = 67, 101
    decoder = SceneDecoder(channels=2, factor=factor, cell=cell)
    generator, found = random.Random(0), 0
    for _ in range(1000):
        part = Part.random(height, width, side, factor, decoder.cell * decoder.margin, generator)
        cells = part.latent_cells(decoder)
        if cells is None:
            assert decoder.density < factor  # dense cells no larger than a pixel always make up the VAE's
            continue
        found += 1
        spans = ((part.top, part.height, height), (part.left, part.width, width))
        for axis, (start, length, whole) in zip(cells, spans, strict=True):
            dense_cell = factor / decoder.density
            assert start + axis.dense.start * dense_cell == axis.cells.start * factor
            assert start + axis.dense.stop * dense_cell == axis.cells.stop * factor
            covered = -(-length // factor) * factor
            assert 0 <= axis.cells.start * factor - start < factor
            assert 0 <= start + covered - axis.cells.stop * factor < factor
            assert axis.cells.stop <= -(-whole // factor)
    assert found > 5  # one of 64 where a dense cell is one of the VAE's


def latent_step(scene, vae, **options):
    """A pipeline, the cameras and the batch of a step whose grid contains the VAE's but does not begin with it."""
    pipeline = make_pipeline(scene, vae, **{"scene_decoder__latent_weight": 0.5, **options})
    pipeline.prepare_training(2000)
    for step in range(pipeline.model.joint_steps, 2000):
        camera, batch = pipeline.datamanager.next_train(step)
        if "target" in batch and batch["dense"][0].start > 0:
            pipeline.model.step = step
            return pipeline, camera, batch
    raise AssertionError("the grid never contained the VAE's")


def test_the_latent_loss_compares_what_the_vaes_grid_shows(floor_scene, tiny_vae):
    pipeline, camera, batch = latent_step(floor_scene, tiny_vae, background_color="black")  # the same in both renders
    model, decoder, (index,) = pipeline.model, pipeline.model.scene_decoder, batch["image_idx"]
    whole = pipeline.datamanager.train_views[index]
    dilation = decoder.dense_dilation(model.config.dilation)
    with torch.no_grad():
        dense = model.render_field(whole.camera.subdivided(decoder.density), dilation).field[0]
        outputs = model(camera)
    rows, columns = batch["target"].shape[1:3]
    found = decoder.field_latents(outputs["dense"][batch["dense"]])
    expected = decoder.field_latents(dense)
    assert (rows, columns) < expected.shape[:2]  # the part begins within the first cell
    torch.testing.assert_close(found, expected[-rows:, -columns:], atol=1e-3, rtol=1e-3)
    assert torch.equal(batch["target"], whole.target[:, -rows:, -columns:])
    with torch.no_grad():
        losses = model.get_loss_dict(outputs, batch)
        same = model.get_loss_dict(outputs, {**batch, "target": found[None]})
    assert losses["latent_loss"] == 0.5 * fitting_loss(found[None], batch["target"], None, 0.2)
    assert same["latent_loss"] == pytest.approx(0, abs=1e-6)
    assert torch.equal(losses["main_loss"], same["main_loss"])


def test_latents_outside_the_mask_do_not_matter(tmp_path, tiny_vae):
    scene = write_scene(tmp_path / "scene", views=9, masked=True)
    pipeline, camera, batch = latent_step(scene, tiny_vae)
    model, mask = pipeline.model, batch["target_mask"]
    assert mask.shape == batch["target"].shape[:3] and 0 < mask.sum() < mask.numel()
    outputs = model(camera)
    loss = model.get_loss_dict(outputs, batch)["latent_loss"]
    spoiled = torch.where(mask[..., None], batch["target"], batch["target"] + 1)
    assert torch.equal(model.get_loss_dict(outputs, {**batch, "target": spoiled})["latent_loss"], loss)


def test_without_its_weight_there_are_no_latents(floor_scene, tiny_vae):
    pipeline = make_pipeline(floor_scene, tiny_vae, scene_decoder__latent_weight=0.0)
    pipeline.prepare_training(100)
    assert not any(
        "target" in pipeline.datamanager.next_train(step)[1] for step in range(pipeline.model.latent_steps, 100)
    )


def test_the_latent_term_keeps_latents(floor_scene, tmp_path, device):
    values = {}
    for weight in (0.0, 5.0):
        options = {"scene_decoder__latent_weight": weight, "scene_decoder__share": 0.75, "densification": KEPT}
        torch.manual_seed(0)
        trainer = make_trainer(floor_scene, "lrf-f4c4", tmp_path / str(weight), steps=240, device=device, **options)
        trainer.train()
        values[weight] = psnr(trainer, "latent_psnr")
    assert values[5.0] > values[0.0]


def test_how_good_the_latents_are_is_said_before_and_after_the_photographs(floor_scene, tiny_vae, tmp_path, capsys):
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, steps=10)
    trainer.train()
    said = dict(
        re.findall(r"held-out views after (\d+) steps: (-?[\d.]+) dB", " ".join(capsys.readouterr().out.split()))
    )
    assert list(said) == [str(trainer.pipeline.model.latent_steps), "10"]
    assert float(said["10"]) == pytest.approx(psnr(trainer, "latent_psnr"), abs=0.01)


# ---------------------------------------------------------------------------------------------------- photographs


@pytest.mark.parametrize(("height", "width"), [(67, 101), (30, 101), (30, 30), (3, 200)])
@pytest.mark.parametrize("margin", [0, 5, 24])
def test_parts_lie_inside_and_reach_every_pixel(height, width, margin):
    rows, columns = set[int](), set[int]()
    generator = random.Random(0)
    rows_and_columns = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
    for _ in range(300):
        part = Part.random(height, width, 32, 8, margin, generator)
        inner = part.of(rows_and_columns)
        outer = rows_and_columns[part.top : part.top + part.height, part.left : part.left + part.width]
        assert torch.equal(outer[part.inside], inner)
        assert max(inner.shape[:2]) <= 32
        assert min(inner.shape[:2]) > 0
        for axis, length in enumerate((height, width)):
            first, last = int(inner[0, 0, axis]), int(inner[-1, -1, axis])
            if length > 32:  # as much around it as there is
                assert int(outer[0, 0, axis]) == max(first - margin, 0)
                assert int(outer[-1, -1, axis]) == min(last + margin, length - 1)
            else:
                assert first == int(outer[0, 0, axis]) < 8 and last == length - 1
        rows |= set(inner[:, 0, 0].tolist())
        columns |= set(inner[0, :, 1].tolist())
    assert (rows, columns) == (set(range(height)), set(range(width)))


def test_a_part_is_decoded_as_in_the_whole_picture(floor_scene, tiny_vae):
    """Up to where the grid lies: parts that begin at its cells are compared."""
    pipeline = make_pipeline(floor_scene, tiny_vae)
    pipeline.prepare_training(10)
    model, decoder = pipeline.model, pipeline.model.scene_decoder
    torch.nn.init.normal_(decoder.tail.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    whole = grid_camera(pipeline.datamanager.train_dataset.cameras[0:1], 8, "cpu")
    dilation = decoder.dense_dilation(0.1)
    with torch.no_grad():
        model.eval()
        picture = decoder(model.render_field(whole.subdivided(decoder.density), dilation).field[0])
        part = Part(16, 32, 51, 69, (slice(24, 51), slice(24, 69)))
        camera = part.camera(whole).subdivided(decoder.density)
        decoded = decoder(model.render_field(camera, dilation).field[0])[part.inside]
    torch.testing.assert_close(decoded, picture[40:67, 56:101], atol=1e-3, rtol=1e-3)


def test_photographs_are_the_same_whether_they_are_kept_or_read(floor_scene, tiny_vae):
    dataset = make_pipeline(floor_scene, tiny_vae).datamanager.train_dataset
    kept, read = Photographs(dataset, 1e9, False), Photographs(dataset, 0, False)
    order = [0, 3, 1, 3, 0, 2]
    for index, following in zip(order, [*order[1:], 5], strict=True):
        a, b = kept.take(index, following), read.take(index, following)
        assert torch.equal(a.image, b.image) and a.image.dtype == torch.uint8
        assert torch.equal(a.image.float() / 255, dataset.photograph(index)[0])
    assert len(kept._kept) == 4 and not read._kept


def test_a_photograph_that_vanishes_is_named_and_nothing_is_lost(tmp_path, tiny_vae, capsys):
    scene = write_scene(tmp_path / "scene", views=9)
    trainer = make_trainer(scene, tiny_vae, tmp_path, steps=40, datamanager__photograph_memory=0.0)
    trainer.config.steps_per_save = 10
    take = trainer.train_iteration

    def sabotaged(step):
        if step == 25:
            shutil.rmtree(scene / "images")
        return take(step)

    trainer.train_iteration = sabotaged
    with pytest.raises(SystemExit):
        trainer.train()
    assert f"{scene / 'images'}" in capsys.readouterr().err.replace("\n", "")
    (checkpoint,) = (run_folder(scene, tmp_path) / "nerfstudio_models").iterdir()
    assert checkpoint.name == "step-000000020.ckpt"


# ---------------------------------------------------------------------------------------------------- the start


def generic_file(folder: Path, source: Path, **shape: int) -> Path:
    """Write a generic decoder with random weights for a VAE."""
    vae = VAEConfig(str(source)).setup()
    torch.manual_seed(1)
    generic = SceneDecoder(vae.latent_channels, vae.spatial_factor, **shape)
    torch.nn.init.normal_(generic.tail.weight, std=0.1)
    save_generic(generic, vae, folder / "generic.safetensors")
    return folder / "generic.safetensors"


def test_a_scene_starts_from_a_generic_decoder(floor_scene, tiny_vae, tmp_path, device):
    file = generic_file(tmp_path, tiny_vae)
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, 4, scene_decoder__start=str(file), device=device)
    model = trainer.pipeline.model
    expected = for_field(load_generic(file, model.vae), model.normalization.cpu()).state_dict()
    for name, tensor in model.scene_decoder.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), expected[name], msg=name)
        assert tensor.device == model.means.device
    trainer.train()
    file.unlink()
    models = run_folder(floor_scene, tmp_path) / "nerfstudio_models"
    pipeline = make_pipeline(floor_scene, tiny_vae, "test", scene_decoder__start=str(file), device=device)
    state = load_checkpoint(next(models.iterdir()))
    pipeline.load_pipeline(state["pipeline"], state["step"])  # a trained scene does not need the file


def test_the_decoders_learning_rate_rises_so_that_a_good_start_is_not_spoiled():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {"steps": 1000, "latent_steps": 600, "on_photographs": 1.0, "decay_on_photographs": 0.05}
    schedule = RunScheduleConfig(rise_on_photographs=0.05, **options).setup().get_scheduler(optimizer, 1.0)
    rates = []
    for _ in range(1000):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[600] == 0
    assert rates[600:621] == sorted(rates[600:621])
    assert rates[620:] == sorted(rates[620:], reverse=True)
    assert rates[620] == pytest.approx(0.05**0.05)
    assert rates[-1] == pytest.approx(0.05, rel=0.01)


def test_the_decoder_that_comes_with_the_default_vae_knows_colors_of_a_new_scene(floor_scene, tmp_path, device):
    options = {"scene_decoder__share": 1 / 200, "densification": KEPT, "device": device}
    trainer = make_trainer(floor_scene, "lrf-f4c4", tmp_path, steps=200, **options)
    model = trainer.pipeline.model
    shipped = for_field(load_generic(shipped_generic(model.vae), model.vae), model.normalization.cpu())
    trainer.train()  # one step on photographs, at the learning rate 0
    for name, tensor in model.scene_decoder.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), shipped.state_dict()[name], msg=name)
    assert psnr(trainer) > 20


def test_without_a_generic_decoder_auto_is_linear(floor_scene, tiny_vae):
    states = []
    for start in ("linear", "auto"):
        pipeline = make_pipeline(floor_scene, tiny_vae, scene_decoder__start=start)
        pipeline.prepare_training(10)
        states.append(pipeline.model.scene_decoder.state_dict())
    linear, auto = states
    assert all(torch.equal(linear[name], auto[name]) for name in ("matrix", "bias", "tail.weight"))


@pytest.mark.parametrize(
    ("start", "shape", "message"),
    [
        ("generic", None, "There is no generic decoder for the latents of"),
        ("nowhere.safetensors", None, "nowhere.safetensors cannot be read"),
        ("file", {"width": 16, "blocks": 3}, "has width 16, blocks 3, the scene's width 32, blocks 2"),
    ],
)
def test_a_start_that_cannot_be_had_is_named(floor_scene, tiny_vae, tmp_path, start, shape, message):
    if shape is not None:
        start = str(generic_file(tmp_path, tiny_vae, **shape))
    pipeline = make_pipeline(floor_scene, tiny_vae, scene_decoder__start=start)
    with pytest.raises(UserError, match=message):
        pipeline.prepare_training(10)


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("option", [{"scene_decoder__width": 16}, {"scene_decoder__share": 0.0}])
def test_a_checkpoint_with_another_decoder_is_refused(floor_scene, tiny_vae, tmp_path, capsys, option):
    make_trainer(floor_scene, tiny_vae, tmp_path / "first", 4).train()
    models = run_folder(floor_scene, tmp_path / "first") / "nerfstudio_models"
    with pytest.raises(SystemExit):
        make_trainer(floor_scene, tiny_vae, tmp_path / "second", 8, load_from=(models, None), **option)
    assert "--pipeline.model.scene-decoder" in capsys.readouterr().err


@pytest.mark.parametrize("option", [{"cell": 3}])
def test_cells_that_do_not_fit_the_vae_are_named(floor_scene, tiny_vae, option, capsys):
    ((name, value),) = option.items()
    with pytest.raises(SystemExit):
        make_pipeline(floor_scene, tiny_vae, **{f"scene_decoder__{name}": value})
    assert f"--pipeline.model.scene-decoder.{name}" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_the_exported_field_makes_the_models_pictures_without_a_vae(floor_scene, tiny_vae, tmp_path, device, mode):
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, steps=8, device=device, rasterize_mode=mode)
    trainer.train()
    model, dataset = trainer.pipeline.eval().model, trainer.pipeline.datamanager.eval_dataset
    exported_field(model, torch.eye(4)[:3], 1.0).save(tmp_path / "field.safetensors")
    field = LatentField.load(tmp_path / "field.safetensors", device)
    pixels = grid_camera(dataset.cameras[1:2], 1, device)
    picture = field.picture(pixels.viewmats[0], pixels.Ks[0], width=101, height=67)
    latent = field.render(pixels.viewmats[0], pixels.Ks[0], width=101, height=67)
    outputs = model.render(grid_camera(dataset.cameras[1:2], 8, device))
    torch.testing.assert_close(picture, outputs["rgb"], atol=1e-4, rtol=1e-4)
    assert latent.shape == outputs["latent"].shape == (4, 9, 13)


# ---------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.parametrize("side", [40, 1024])
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_a_step_on_photographs_never_waits(floor_scene, tiny_vae, tmp_path, fake_gsplat, side, mixed_precision):
    options = {"datamanager__photograph_side": side, "scene_decoder__share": 0.5}
    options |= {"scene_decoder__cell": 1, "scene_decoder__latent_weight": 0.1}
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, steps=20, **options)
    trainer.mixed_precision = mixed_precision
    with fake_cuda() as gpu:
        place_trainer(gpu, trainer)
        trainer.take_step(9)
        trainer.take_step(10)
        with gpu.no_waiting():
            for step in range(11, 14):
                loss, losses, metrics = trainer.take_step(step)
        assert loss.device == losses["latent_loss"].device == metrics["psnr"].device == DEVICE
        model = trainer.pipeline.eval().model
        camera = grid_camera(trainer.pipeline.datamanager.eval_dataset.cameras[0:1], 8, DEVICE)
        with gpu.no_waiting():
            rendered = model.render(camera)
            assert rendered["rgb"].device == rendered["vae_rgb"].device == DEVICE
        assert isinstance(model.scene_decoder, SceneDecoder)
