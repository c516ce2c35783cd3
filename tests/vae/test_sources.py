import pickle
import shutil
import sys
import time
import types

import numpy as np
import pytest
import torch
from latent_diffusion import ldm_layout
from safetensors.torch import load_file, save_file
from tiny_autoencoders import tiny_kl, tiny_taesd

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, VAEConfig
from lrf_nerfstudio.vae.sources import asset_names

pytestmark = pytest.mark.slow


@pytest.fixture(params=[{}, {"layers_per_block": 2, "use_quant_conv": False, "use_post_quant_conv": False}])
def kl(request):
    """An AutoencoderKL whose every option can be read off its weights: latent-diffusion norms are in groups of 32."""
    three_levels = {
        "block_out_channels": (32, 64, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 32,
        "latent_channels": 4,
        "shift_factor": None,
    }
    return tiny_kl(**three_levels, **request.param)


def assert_same_vae(source, autoencoder, images):
    loaded, expected = VAEConfig(str(source)).setup(), VAE(autoencoder)
    assert loaded.fingerprint == expected.fingerprint
    assert loaded.decoder_fingerprint == expected.decoder_fingerprint
    assert loaded.scaling_factor == expected.scaling_factor
    with torch.no_grad():
        latents = expected.encode(images)
        torch.testing.assert_close(loaded.encode(images), latents)
        size = images.shape[1:3]
        torch.testing.assert_close(loaded.decode(latents, *size), expected.decode(latents, *size))


def test_a_folder_and_a_pipeline_folder_give_the_same(tmp_path, autoencoder, images):
    autoencoder.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert_same_vae(tmp_path / "pipeline" / "vae", autoencoder, images)
    assert_same_vae(tmp_path / "pipeline", autoencoder, images)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_latent_diffusion_layout_gives_the_same(tmp_path, kl, images, prefix):
    weights = {f"{prefix}{name}": value for name, value in ldm_layout(kl).items()}
    save_file(weights, tmp_path / "vae.safetensors")
    assert_same_vae(tmp_path / "vae.safetensors", kl, images)

    beside = (
        {"loss.discriminator.main.0.weight": torch.zeros(2)}
        if not prefix
        else {"model.diffusion_model.x": torch.ones(1)}
    )
    training = {"state_dict": weights | beside, "epoch": 3, "callbacks": {"EMA": {"decay": 0.99}}}
    torch.save(training, tmp_path / "lightning.ckpt")
    assert_same_vae(tmp_path / "lightning.ckpt", kl, images)


def test_old_lightning_checkpoints_load_though_they_name_classes(tmp_path, kl, images, monkeypatch):
    """Lightning before 1.5 keys callbacks by class and keeps scores as numpy scalars; none of it is made or run."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    parents = ["pytorch_lightning", "pytorch_lightning.callbacks"]
    with monkeypatch.context() as patch:
        for name, fake in [*((parent, types.ModuleType(parent)) for parent in parents), (module.__name__, module)]:
            patch.setitem(sys.modules, name, fake)
        callbacks = {module.ModelCheckpoint: {"best_model_score": np.float64(0.5)}}
        torch.save({"state_dict": ldm_layout(kl), "callbacks": callbacks}, tmp_path / "old.ckpt")
    assert_same_vae(tmp_path / "old.ckpt", kl, images)


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("place", ["state_dict", "callbacks", "plain pickle"])
def test_a_checkpoint_that_could_run_code_is_refused_and_runs_nothing(tmp_path, kl, place):
    content = {"state_dict": ldm_layout(kl), "callbacks": {}}
    if place == "plain pickle":
        (tmp_path / "bad.ckpt").write_bytes(pickle.dumps({"state_dict": Malicious(tmp_path / "trace")}))
    else:
        content[place]["encoder.conv_in.weight"] = Malicious(tmp_path / "trace")
        torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=r"bad\.ckpt .*cannot be loaded safely"):
        VAEConfig(str(tmp_path / "bad.ckpt")).setup()
    assert not (tmp_path / "trace").exists()


def remove(name):
    return lambda weights: weights.pop(name)


def add(name):
    return lambda weights: weights.update({name: torch.zeros(1)})


def reshape(name):
    return lambda weights: weights.update({name: torch.zeros(7)})


@pytest.mark.parametrize(
    "damage",
    [
        remove("encoder.conv_in.weight"),
        remove("decoder.conv_in.weight"),
        remove("decoder.up.1.block.1.conv2.bias"),
        add("encoder.down.1.attn.0.q.weight"),
        add("something.else"),
        reshape("decoder.norm_out.bias"),
    ],
    ids=["no encoder", "no decoder", "missing", "attention", "foreign", "shape"],
)
def test_incomplete_or_foreign_weights_are_refused(tmp_path, kl, damage):
    weights = ldm_layout(kl)
    damage(weights)
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"vae\.safetensors .*--pipeline\.vae\.source"):
        VAEConfig(str(tmp_path / "vae.safetensors")).setup()


def test_damaged_files_are_refused(tmp_path, kl):
    save_file(ldm_layout(kl), tmp_path / "vae.safetensors")
    torch.save(ldm_layout(kl), tmp_path / "vae.ckpt")
    for name in ("vae.safetensors", "vae.ckpt"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=r"--pipeline\.vae\.source"):
            VAEConfig(str(tmp_path / name)).setup()
    torch.save([torch.zeros(1)], tmp_path / "list.ckpt")
    with pytest.raises(UserError, match="dictionary of weights"):
        VAEConfig(str(tmp_path / "list.ckpt")).setup()


@pytest.mark.parametrize(
    "damage", [remove("encoder.layers.0.weight"), add("extra.weight"), reshape("decoder.layers.0.bias")]
)
def test_a_folder_with_weights_that_do_not_fit_is_refused(tmp_path, damage):
    tiny_taesd().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file)
    with pytest.raises(UserError, match=r"--pipeline\.vae\.source"):
        VAEConfig(str(tmp_path)).setup()


def test_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        VAEConfig(str(tmp_path)).setup()
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="UNet2DModel"):
        VAEConfig(str(tmp_path)).setup()
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(UserError, match="cannot be loaded"):
        VAEConfig(str(tmp_path)).setup()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match="no file of weights"):
        VAEConfig(str(tmp_path / "notes.txt")).setup()
    tiny_kl().save_pretrained(tmp_path / "kl")
    with pytest.raises(UserError, match="give the folder"):
        VAEConfig(str(tmp_path / "kl" / "diffusion_pytorch_model.safetensors")).setup()


@pytest.mark.parametrize("source", ["", "no-such-name", "./missing", "/missing/folder", "missing.ckpt"])
def test_what_is_not_found_is_said_with_the_kinds_of_source(source):
    with pytest.raises(UserError, match=r"--pipeline\.vae\.source.*Hugging Face id"):
        VAEConfig(source).setup()


def test_what_is_written_does_not_say_where_it_was_loaded_from(tmp_path, autoencoder, images):
    autoencoder.save_pretrained(tmp_path / "private")
    VAEConfig(str(tmp_path / "private")).setup().save(tmp_path / "public", dtype=torch.float32)
    assert "private" not in (tmp_path / "public" / "config.json").read_text()
    assert_same_vae(tmp_path / "public", autoencoder, images)


def test_a_hub_id_is_found_in_the_local_cache(tmp_path, autoencoder, images, monkeypatch):
    """The layout of the hub's cache: refs name a commit, snapshots hold its files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--some-vae"
    autoencoder.save_pretrained(repository / "snapshots" / "0123abc" / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    assert_same_vae("someone/some-vae", autoencoder, images)

    shutil.rmtree(repository / "snapshots" / "0123abc" / "vae")
    with pytest.raises(UserError, match=r"some-vae.*--pipeline\.vae\.source"):
        VAEConfig("someone/some-vae").setup()


def test_a_hub_out_of_reach_is_said_quickly(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"someone/some-vae.*--pipeline\.vae\.source.*a folder in diffusers format"):
        VAEConfig("someone/some-vae").setup()
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("name", asset_names())
def test_the_autoencoders_in_the_package_load_and_reconstruct(name):
    vae = VAEConfig(name).setup()
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 131), torch.linspace(0, 1, 203), indexing="ij")
    image = torch.stack([rows, columns, 0.5 + 0.3 * torch.sin(12 * rows * columns)], dim=-1)
    decoded = vae.decode(vae.encode(image[None]), 131, 203)[0]
    assert -10 * torch.log10((decoded - image).square().mean()) > 25
    assert vae.scale(vae.encode(image[None])).abs().mean() < 3


def test_the_default_is_in_the_package_with_what_it_was_before_stages_1_and_3():
    default, base, stage1 = (VAEConfig(VAEConfig().source + suffix).setup() for suffix in ("", "-base", "-stage1"))
    assert default.fingerprint == stage1.fingerprint != base.fingerprint
    assert len({vae.decoder_fingerprint for vae in (default, base, stage1)}) == 3
    assert {(vae.latent_channels, vae.spatial_factor) for vae in (default, base, stage1)} == {(4, 4)}


def test_rgb_is_no_autoencoder_at_all(images):
    vae = VAEConfig("rgb").setup()
    assert (vae.latent_channels, vae.spatial_factor, vae.device.type) == (3, 1, "cpu")
    latents = vae.encode(images)
    torch.testing.assert_close(latents, images.permute(0, 3, 1, 2) * 2 - 1)
    torch.testing.assert_close(vae.decode(latents, *images.shape[1:3]), images)


@pytest.mark.realdata
def test_taesd_reconstructs_photographs_as_well_as_known(real_data):
    """30.5 dB at 512 x 512 on fox."""
    import cv2

    vae = VAEConfig(str(real_data / "weights" / "taesd")).setup()
    psnrs = []
    for path in sorted((real_data / "scenes" / "fox" / "images").iterdir())[::25]:
        photograph = cv2.resize(cv2.imread(str(path))[:530, :530, ::-1], (512, 512), interpolation=cv2.INTER_AREA)
        image = torch.from_numpy(photograph.copy()).float() / 255
        decoded = vae.decode(vae.encode(image[None]), 512, 512)[0]
        psnrs.append(-10 * torch.log10((decoded - image).square().mean()).item())
    assert sum(psnrs) / len(psnrs) == pytest.approx(30.5, abs=1.5)


def test_rgb_at_a_lower_resolution_is_mean_colors_enlarged(images):
    vae, halved = VAEConfig("rgb-f4").setup(), VAEConfig("rgb-f2").setup()
    assert (vae.latent_channels, vae.spatial_factor, halved.spatial_factor) == (3, 4, 2)
    assert len({vae.fingerprint, halved.fingerprint, VAEConfig("rgb").setup().fingerprint}) == 3
    image = torch.rand(1, 32, 48, 3)
    latents = vae.encode(image)
    means = image.reshape(1, 8, 4, 12, 4, 3).mean(dim=(2, 4))
    torch.testing.assert_close(latents.permute(0, 2, 3, 1) / 2 + 0.5, means)
    # A ramp stays where it is, but for the edges: cells and pixels agree on their centers.
    ramp = torch.linspace(0.2, 0.8, 48).expand(32, 48)[None, ..., None].repeat(1, 1, 1, 3)
    back = vae.decode(vae.encode(ramp), 32, 48)
    torch.testing.assert_close(back[:, :, 8:40], ramp[:, :, 8:40], atol=5e-3, rtol=0)
    assert vae.decode(vae.encode(images), *images.shape[1:3]).shape == images.shape
    with pytest.raises(UserError, match="rgb-f<factor>"):
        VAEConfig("rgb-f3").setup()
