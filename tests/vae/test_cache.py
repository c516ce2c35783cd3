import copy
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, LatentCache, default_cache_directory


def image_of(seed):
    return torch.rand(21, 30, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def photographs(tmp_path):
    """Files with different contents; what a file shows is made up from its name."""
    paths = []
    for i in range(3):
        paths.append(tmp_path / "photographs" / f"{i}.jpg")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(bytes([i]) * 100)
    return paths


def fill(directory, paths, vae, **preprocessing):
    cache = LatentCache(directory, vae)
    latents = [
        cache.load_or_encode(path, preprocessing, lambda i=i: image_of(i), size=(21, 30))
        for i, path in enumerate(paths)
    ]
    return cache, latents


def files_in(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_the_second_start_encodes_nothing_and_gives_the_same_bits(tmp_path, photographs, vae):
    first, encoded = fill(tmp_path / "cache", photographs, vae)
    assert (first.hits, first.misses) == (0, 3)

    def never():
        raise AssertionError("the image was loaded again")

    second = LatentCache(tmp_path / "cache", vae)
    for path, latent in zip(photographs, encoded, strict=True):
        read = second.load_or_encode(path, {}, never)
        assert torch.equal(read, latent) and read.dtype == torch.float32
        assert not read.requires_grad
    assert (second.hits, second.misses) == (3, 0)
    with torch.no_grad():
        assert torch.equal(encoded[0], vae.encode(image_of(0)[None])[0])


def test_what_a_latent_depends_on_is_in_its_key_and_nothing_else(tmp_path, photographs, vae, autoencoder):
    def misses(paths, model=vae, **preprocessing):
        cache = LatentCache(tmp_path / "cache", model)
        cache.load_or_encode(paths, preprocessing, lambda: image_of(0))
        return cache.misses

    photograph, mask, _ = photographs
    assert misses(photograph) == 1
    assert misses(photograph.rename(photograph.with_name("renamed.jpg"))) == 0
    photograph = photograph.with_name("renamed.jpg")
    assert misses(photograph, undistort=[0.1, 0.2]) == 1
    assert misses([photograph, mask]) == 1
    assert misses(photograph, VAE(copy.deepcopy(autoencoder), dtype=torch.bfloat16)) == 1
    assert misses(photograph, VAE(autoencoder, tiling=True, tile_size=16)) == 1
    with torch.no_grad():
        next(autoencoder.decoder.parameters()).mul_(2)
    assert misses(photograph, VAE(autoencoder)) == 0
    with torch.no_grad():
        next(autoencoder.encoder.parameters()).mul_(2)
    assert misses(photograph, VAE(autoencoder)) == 1
    photograph.write_bytes(b"edited")
    assert misses(photograph) == 1


def change_shape(file):
    with safe_open(file, framework="pt") as content:
        latent, metadata = content.get_tensor("latent"), content.metadata()
    save_file({"latent": latent.flip(-1)[..., 1:].contiguous()}, file, metadata)


def reshape_in_place(file):
    """The same bytes and checksum as another grid."""
    with safe_open(file, framework="pt") as content:
        latent, metadata = content.get_tensor("latent"), content.metadata()
    save_file({"latent": latent.view(latent.shape[0], latent.shape[2], latent.shape[1])}, file, metadata)


def rename_tensor(file):
    with safe_open(file, framework="pt") as content:
        save_file({"other": content.get_tensor("latent")}, file)


@pytest.mark.parametrize("damage", [change_shape, reshape_in_place, rename_tensor])
def test_what_is_no_latent_of_the_image_is_encoded_again_with_one_warning_and_replaced(
    tmp_path, photographs, vae, damage
):
    _, encoded = fill(tmp_path / "cache", photographs, vae)
    damaged = files_in(tmp_path / "cache")[1]
    damage(damaged)
    with pytest.warns(UserWarning, match="damaged") as caught:
        cache, latents = fill(tmp_path / "cache", photographs, vae)
    assert len([w for w in caught if str(damaged) in str(w.message)]) == 1 == len(caught)
    assert (cache.hits, cache.misses) == (2, 1)
    assert all(torch.equal(latent, before) for latent, before in zip(latents, encoded, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fill(tmp_path / "cache", photographs, vae)[0].hits == 3


def test_a_cache_that_cannot_be_made_and_a_photograph_that_cannot_be_read_are_named(tmp_path, photographs, vae):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--pipeline\.datamanager\.latent-cache-dir"):
        fill(tmp_path / "file", photographs, vae)
    with pytest.raises(UserError, match=r"missing\.jpg"):
        fill(tmp_path / "cache", [tmp_path / "missing.jpg"], vae)


def test_the_default_directory_is_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_directory() == Path("/somewhere/lrf_nerfstudio/latents")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_directory() == Path.home() / ".cache" / "lrf_nerfstudio" / "latents"
