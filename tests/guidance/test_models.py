"""Loading diffusion models, and refusing those that cannot guide or do not fit the VAE."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusion import SCHEDULER, STABLE_DIFFUSION_2, STABLE_DIFFUSION_UNET, make_diffusion, make_unet
from tiny_vaes import make_vae

from lrf_nerfstudio.guidance import DiffusionConfig, UNetDenoiser, check_latent_space
from lrf_nerfstudio.guidance.models import (
    COLOR_DISTANCE,
    STABLE_DIFFUSION,
    DiffusionModel,
    LatentSpace,
    color_distance,
)
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model in the layout of Stable Diffusion 1.5; tests must not change it."""
    return make_diffusion(tmp_path_factory.mktemp("diffusion") / "model")


@pytest.fixture
def copied(source, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(source, tmp_path / "model")


def setup(folder) -> DiffusionModel:
    return DiffusionConfig(source=str(folder)).setup()


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def noise(denoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, prompts = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 16, generator=generator)
    return denoiser.predict(x, torch.tensor([20, 700]), prompts)


def test_a_model_is_loaded_by_its_parts(source):
    model = setup(source)
    assert (model.channels, model.embedding_size, model.prediction_type) == (4, 16, "epsilon")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(model.alphas_cumprod, torch.cumprod(1 - betas, dim=0))
    denoiser = model.load_denoiser("cpu")
    assert denoiser.unet.dtype == torch.float32
    torch.testing.assert_close(noise(denoiser), noise(UNetDenoiser(make_unet(), model.alphas_cumprod)))


def test_weights_in_half_precision_are_found(source, copied):
    """As hub folders have them that were fetched with `variant="fp16"`."""
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = copied / part / f"{stem}.safetensors"
        weights = {name: weight.half() for name, weight in load_file(file).items()}
        save_file(weights, copied / part / f"{stem}.fp16.safetensors", {"format": "pt"})
        file.unlink()
    denoiser = setup(copied).load_denoiser("cpu")
    assert denoiser.unet.dtype == torch.float32
    torch.testing.assert_close(noise(denoiser), noise(setup(source).load_denoiser("cpu")), rtol=0.0, atol=0.05)
    setup(copied).load_text_encoder("cpu")


def test_v_prediction(source, copied):
    edit(copied / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", _class_name="DDIMScheduler")
    model, epsilon = setup(copied), setup(source)
    assert model.prediction_type == "v_prediction"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    a = model.alphas_cumprod[torch.tensor([20, 700])].view(-1, 1, 1, 1)
    expected = a.sqrt() * noise(epsilon.load_denoiser("cpu")) + (1 - a).sqrt() * x
    torch.testing.assert_close(noise(model.load_denoiser("cpu")), expected)


def test_trained_betas(copied):
    betas = torch.linspace(1e-4, 0.02, 50).tolist()
    edit(copied / "scheduler" / "scheduler_config.json", trained_betas=betas)
    torch.testing.assert_close(setup(copied).alphas_cumprod, torch.cumprod(1 - torch.tensor(betas), dim=0))


@pytest.mark.parametrize(
    ("options", "parameters", "key_shape"),
    [({}, 859_520_964, (320, 768)), (STABLE_DIFFUSION_2, 865_910_724, (320, 1024))],
    ids=["1.5", "2.1"],
)
def test_the_full_size(options, parameters, key_shape, tmp_path):
    """The layout of the published weights, without memory for them."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**STABLE_DIFFUSION_UNET, **options})
    weights = unet.state_dict()
    assert sum(weight.numel() for weight in weights.values()) == parameters
    assert len(weights) == 686
    assert weights["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape == key_shape
    assert weights["conv_in.weight"].shape == (320, 4, 3, 3)
    assert weights["time_embedding.linear_1.weight"].shape == (1280, 320)

    unet.save_config(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/vocab.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    model = setup(tmp_path)
    assert (model.channels, model.embedding_size) == (4, key_shape[1])

    denoiser = UNetDenoiser(unet, model.alphas_cumprod)
    on_meta = [torch.empty(shape, device="meta") for shape in ((8, 4, 64, 64), (8, 77, key_shape[1]))]
    predicted = denoiser.predict(on_meta[0], torch.empty(8, dtype=torch.int64, device="meta"), on_meta[1])
    assert predicted.shape == (8, 4, 64, 64)


# ------------------------------------------------------------------------------------------------ refusals


def unlink(name):
    return lambda folder: (folder / name).unlink()


def remove(name):
    return lambda folder: shutil.rmtree(folder / name)


def change(name, **changes):
    return lambda folder: edit(folder / name, **changes)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def pickle_instead(folder):
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save(weights, folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def without_a_weight(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("conv_in.bias")
    save_file(weights, file, {"format": "pt"})


UNET, TEXT = "unet/config.json", "text_encoder/config.json"
SPOILED = {
    "no U-Net": (remove("unet"), "has no unet/config.json"),
    "no text encoder": (remove("text_encoder"), "text_encoder .* holds no weights"),
    "no tokenizer": (remove("tokenizer"), "has no tokenizer/"),
    "no scheduler": (remove("scheduler"), "scheduler_config.json .* cannot be read"),
    "no weights": (unlink("unet/diffusion_pytorch_model.safetensors"), "holds no weights"),
    "pickled": (pickle_instead, r"pickled \(diffusion_pytorch_model.bin\)"),
    "no JSON": (lambda folder: (folder / UNET).write_text("{"), "unet/config.json .* cannot be read"),
    "SDXL": (change(UNET, addition_embed_type="text_time"), "more conditions than a prompt .addition_embed_type"),
    "upscaler": (change(UNET, num_class_embeds=1000), "more conditions than a prompt .num_class_embeds"),
    "inpainting": (change(UNET, in_channels=9), "takes 9 channels and returns 4"),
    "another class": (change(UNET, _class_name="UNet3DConditionModel"), "is a UNet3DConditionModel"),
    "flow matching": (
        lambda folder: (folder / "scheduler/scheduler_config.json").write_text(
            '{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}'
        ),
        "FlowMatchEulerDiscreteScheduler, has no schedule of betas",
    ),
    "a prediction of samples": (
        change("scheduler/scheduler_config.json", prediction_type="sample"),
        "predicts 'sample'; supported are 'epsilon' and 'v_prediction'",
    ),
    "an unknown schedule": (
        change("scheduler/scheduler_config.json", beta_schedule="new"),
        "describes no schedule of noise that is known",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_models_that_cannot_guide_are_refused_before_weights_are_loaded(copied, case):
    spoil, message = SPOILED[case]
    spoil(copied)
    with pytest.raises(UserError, match=message) as error:
        setup(copied)
    assert "--pipeline.diffusion.source" in str(error.value)
    assert str(copied) in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate("unet/diffusion_pytorch_model.safetensors"), "The U-Net in .* cannot be loaded"),
        (without_a_weight, "missing keys conv_in.bias"),
        (change(UNET, norm_num_groups=2, block_out_channels=[8, 8, 8, 8]), "U-Net in .* cannot be loaded|do not fit"),
    ],
    ids=["truncated", "incomplete", "of another shape"],
)
def test_damaged_weights_are_said(copied, spoil, message):
    spoil(copied)
    with pytest.raises(UserError, match=message) as error:
        setup(copied).load_denoiser("cpu")
    assert "--pipeline.diffusion.source" in str(error.value)


def test_a_damaged_text_encoder_is_said(copied):
    truncate("text_encoder/model.safetensors")(copied)
    with pytest.raises(UserError, match=r"text encoder in .* cannot be loaded.*"):
        setup(copied).load_text_encoder("cpu")


def test_a_text_encoder_of_another_model_is_said(copied):
    edit(copied / UNET, cross_attention_dim=32)
    with pytest.raises(UserError, match="embeddings of 16 numbers, but its U-Net takes 32"):
        setup(copied).load_text_encoder("cpu")


@pytest.mark.parametrize("source", ["", "nowhere", "a/b/c", "/nowhere/at/all"])
def test_what_is_neither_a_folder_nor_an_id_is_said(source):
    with pytest.raises(UserError, match=r"--pipeline.diffusion.source .* was not found"):
        DiffusionConfig(source=source).setup()


def test_a_hub_out_of_reach_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="neither on this machine nor could it be fetched"):
        DiffusionConfig(source="somebody/something").setup()


def test_a_hub_id_is_found_in_the_local_cache(source, tmp_path, monkeypatch):
    """The layout of the hub's cache: refs name a commit, snapshots hold its files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, repository / "snapshots" / ("0" * 40))
    assert DiffusionConfig(source="somebody/something").setup().channels == 4
    shutil.rmtree(repository / "snapshots" / ("0" * 40) / "text_encoder")
    with pytest.raises(UserError, match="lacks a part of a model"):
        DiffusionConfig(source="somebody/something").setup()


# --------------------------------------------------------------------------------------------- latent space


def vae_of(folder, **options) -> VAE:
    return VAEConfig(source=str(make_vae(folder, **options))).setup()


@pytest.fixture
def with_its_vae(copied):
    """A model whose own autoencoder lies in its folder."""
    make_vae(copied / "vae")
    return setup(copied)


def test_a_model_takes_its_own_vae_and_its_tuned_variants(with_its_vae, tmp_path):
    vae = VAEConfig(source=str(with_its_vae.folder)).setup()
    check_latent_space(with_its_vae, vae)
    with torch.no_grad():
        for weight in vae.autoencoder.encoder.parameters():
            weight.mul_(1 + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    check_latent_space(with_its_vae, vae)


def test_a_vae_of_another_space_is_refused(with_its_vae, tmp_path):
    """The same architecture, trained anew: nothing but its latents tells it apart."""
    with pytest.raises(UserError, match="different latent spaces") as error:
        check_latent_space(with_its_vae, vae_of(tmp_path / "vae", seed=1))
    assert "--pipeline.vae.source" in str(error.value)


def test_a_vae_of_another_scaling_factor_is_refused(with_its_vae):
    vae = VAEConfig(source=str(with_its_vae.folder)).setup()
    vae.scaling_factor *= 5.0
    with pytest.raises(UserError, match="scaling factor of 5"):
        check_latent_space(with_its_vae, vae)


def test_channels_and_factor_are_compared(source, tmp_path):
    model = setup(source)
    with pytest.raises(UserError, match=r"--pipeline.vae.source.*takes 4 channels, not 16"):
        check_latent_space(model, vae_of(tmp_path / "vae", channels=16))
    with pytest.raises(UserError, match="cells are 8 pixels wide, not 4"):
        check_latent_space(model, VAEConfig(source="lrf-f4c4").setup())


def test_without_its_vae_only_stable_diffusions_space_is_known(source, tmp_path):
    with pytest.raises(UserError, match="different latent spaces"):
        check_latent_space(setup(source), vae_of(tmp_path / "vae"))
    other = setup(make_diffusion(tmp_path / "other", in_channels=8, out_channels=8))
    with pytest.raises(UserError, match="nobody can tell what they mean"):
        check_latent_space(other, vae_of(tmp_path / "wide", channels=8))


@pytest.mark.realdata
def test_taesd_is_in_stable_diffusions_space(source, real_data):
    vae = VAEConfig(source=str(real_data / "weights" / "taesd")).setup()
    check_latent_space(setup(source), vae)
    space = LatentSpace.of_vae(vae)
    assert color_distance(space, STABLE_DIFFUSION) < 0.01
    assert color_distance(space._replace(colors=space.colors.flip(1)), STABLE_DIFFUSION) > 1.5 * COLOR_DISTANCE
