"""The small diffusion model of our own: its pictures, its formats, and that a run can be resumed."""

import shutil
from dataclasses import replace

import pytest
import torch
from tiny_vaes import make_vae

from lrf_nerfstudio.guidance import (
    DiffusionConfig,
    GuidanceConfig,
    OrbitConfig,
    PromptConfig,
    ScoreGuidance,
    TextEmbedder,
    ViewPrompts,
    check_latent_space,
)
from lrf_nerfstudio.guidance.toy_diffusion import (
    CHECKPOINT,
    ToyDiffusionConfig,
    ToyTrainer,
    draw_samples,
    schedule,
    write_tokenizer,
)
from lrf_nerfstudio.guidance.toy_objects import OBJECTS, render_views
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAEConfig

pytestmark = pytest.mark.slow

CALM = OrbitConfig(cells=8, position_jitter=0.0, target_jitter=0.0, roll_jitter=0.0)


def config(tmp_path, **options) -> ToyDiffusionConfig:
    options = {"steps": 4, "save_every": 2, "views": 1, "batch_size": 4, "channels": (16, 16), **options}
    return ToyDiffusionConfig(output=tmp_path / "toy", vae="lrf-f4c4", orbits=CALM, device="cpu", **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model after four steps; tests must not change its folder."""
    run = config(tmp_path_factory.mktemp("run"))
    ToyTrainer(run).run()
    return run


def test_ten_objects_differ_in_color_or_shape():
    assert len({thing.name for thing in OBJECTS}) == 10
    assert len({(thing.color, thing.shape) for thing in OBJECTS}) == 10


def test_pictures_have_their_object_and_their_caption():
    views = list(render_views(replace(CALM, cells=16), views=2, cell=4))
    assert [view.name for view in views] == [thing.name for thing in OBJECTS] * 2
    for view in views:
        assert view.image.shape == (64, 64, 3)
        assert view.caption.startswith(f"{view.name}, ") and view.caption.endswith(" view")
        corners = view.image[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners - corners[0]).abs().max() < 0.01  # a plain background
        assert (view.image[32, 32] - corners[0]).abs().max() > 0.05 or "ring" in view.name
    red = next(view.image[32, 32] for view in views if view.name == "a red cube" and "front" not in view.caption)
    assert red[0] > 2 * red[1]


def test_only_the_front_has_an_eye():
    config = replace(CALM, cells=16, elevation=(0.0, 5.0), even_azimuths=False)
    views = [view for view in render_views(config, views=12, cell=4) if view.name == "a yellow ball"]
    dark = {
        view.caption: int((view.image.amax(dim=-1) < 0.35).sum()) for view in views if view.image[0, 0].min() > 0.45
    }
    assert any(count > 3 for caption, count in dark.items() if "front" in caption)
    assert all(count == 0 for caption, count in dark.items() if "back" in caption)


def test_the_model_is_a_folder_that_guides(trained, tmp_path):
    model = DiffusionConfig(source=str(trained.output)).setup()
    vae = VAEConfig(source=trained.vae).setup()
    check_latent_space(model, vae)
    with pytest.raises(UserError, match="cells are 4 pixels wide, not 8"):
        check_latent_space(model, VAEConfig(source=str(make_vae(tmp_path / "vae"))).setup())
    prompts = ViewPrompts(PromptConfig(prompt="a red cube"), TextEmbedder(model, cache_folder=tmp_path))
    guidance = ScoreGuidance(GuidanceConfig(), model.load_denoiser("cpu"), prompts)
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    result = guidance(latents, [0.0, 180.0], [10.0, 10.0], 0.0)
    result.loss.backward()
    assert latents.grad.abs().sum() > 0
    assert result.metrics["not_finite"] == 0
    pictures = draw_samples(model, vae, ["a red cube", "a blue ball"], cells=8, steps=3)
    assert pictures.shape == (2, 32, 32, 3)
    assert 0 <= pictures.min() and pictures.max() <= 1


def test_v_prediction_is_written_down(tmp_path):
    ToyTrainer(config(tmp_path, steps=1, prediction_type="v_prediction")).run()
    assert DiffusionConfig(source=str(tmp_path / "toy")).setup().prediction_type == "v_prediction"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_it_learns(tmp_path, prediction_type):
    losses = []
    options = {"steps": 60, "save_every": 60, "batch_size": 16, "learning_rate": 1e-2}
    ToyTrainer(config(tmp_path, prediction_type=prediction_type, **options)).run(
        lambda step, loss: losses.append(float(loss))
    )
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_as_if_nothing_had_happened(trained, tmp_path):
    def kill(step, loss):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        ToyTrainer(config(tmp_path)).run(kill)
    ToyTrainer(config(tmp_path, resume=True)).run()
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", CHECKPOINT):
        assert (tmp_path / "toy" / file).read_bytes() == (trained.output / file).read_bytes(), file


def test_pictures_are_made_once(trained, tmp_path, monkeypatch):
    shutil.copytree(trained.output, tmp_path / "toy")
    monkeypatch.setattr("lrf_nerfstudio.guidance.toy_objects.render_views", None)
    assert ToyTrainer(config(tmp_path, resume=True)).step == 4


def test_a_folder_in_use_is_left_alone(trained, tmp_path):
    with pytest.raises(UserError, match="--resume"):
        ToyTrainer(replace(trained, resume=False))
    with pytest.raises(UserError, match="no run to --resume"):
        ToyTrainer(config(tmp_path, resume=True))
    with pytest.raises(UserError, match="other options"):
        ToyTrainer(replace(trained, resume=True, batch_size=5))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(UserError, match="not empty"):
        ToyTrainer(replace(trained, output=tmp_path / "other"))


def test_a_damaged_checkpoint_is_said(trained, tmp_path):
    shutil.copytree(trained.output, tmp_path / "toy")
    checkpoint = tmp_path / "toy" / CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"checkpoint.safetensors cannot be read"):
        ToyTrainer(config(tmp_path, resume=True))


def test_the_tokenizer_knows_its_words_and_can_read_any_text(tmp_path):
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path, ["a red cube, front view", "a green cube, back view"])
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    known = tokenizer("A green  cube, front view").input_ids
    assert known[0] == tokenizer.bos_token_id and known[-1] == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(known)[1:-1] == [
        *("a</w>", "green</w>", "cube</w>", ",</w>", "front</w>", "view</w>")
    ]
    assert tokenizer.decode(tokenizer("naïve 3D ☃").input_ids, skip_special_tokens=True).replace(" ", "") == "naïve3d☃"
    assert tokenizer("", padding="max_length").input_ids == [known[0]] + [known[-1]] * 23


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(rates[99], rel=0.02)
    assert rates[-1] < 1e-4
