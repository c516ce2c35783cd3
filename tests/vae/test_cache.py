import copy
import errno
import multiprocessing
import os
import resource
import signal
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, LatentCache, default_cache_directory


class CellMeans:
    """An encoder that two fresh processes need not import diffusers for."""

    fingerprint, encode_settings, latent_channels, spatial_factor = "means", {}, 3, 4

    def encode(self, images):
        return torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2), 4, ceil_mode=True)


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


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def empty(file):
    file.write_bytes(b"")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def change_shape(file):
    with safe_open(file, framework="pt") as content:
        latent, metadata = content.get_tensor("latent"), content.metadata()
    save_file({"latent": latent.flip(-1)[..., 1:].contiguous()}, file, metadata)


def reshape_in_place(file):
    """The same bytes and check sum as another grid."""
    with safe_open(file, framework="pt") as content:
        latent, metadata = content.get_tensor("latent"), content.metadata()
    save_file({"latent": latent.view(latent.shape[0], latent.shape[2], latent.shape[1])}, file, metadata)


def rename_tensor(file):
    with safe_open(file, framework="pt") as content:
        save_file({"other": content.get_tensor("latent")}, file)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, change_shape, reshape_in_place, rename_tensor])
def test_a_damaged_file_is_encoded_again_with_one_warning_and_replaced(tmp_path, photographs, vae, damage):
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


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_names_the_option_and_leaves_nothing_behind(tmp_path, photographs, vae, monkeypatch, failing):
    fill(tmp_path / "cache", photographs[:2], vae)
    before = {path: path.read_bytes() for path in files_in(tmp_path / "cache")}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"--pipeline\.datamanager\.latent-cache-dir"):
        patch.setattr(os, failing, full)
        fill(tmp_path / "cache", photographs, vae)
    assert {path: path.read_bytes() for path in files_in(tmp_path / "cache")} == before
    assert fill(tmp_path / "cache", photographs, vae)[0].misses == 1


def fill_with_a_limit(directory, paths, messages):
    """Fills the cache in a process whose files may not exceed 100 bytes, which fails as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        fill(directory, paths, CellMeans())
    except UserError as error:
        messages.put(str(error))


def test_a_write_that_fails_halfway_leaves_nothing_behind(tmp_path, photographs):
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    process = context.Process(target=fill_with_a_limit, args=(tmp_path / "cache", photographs, messages))
    process.start()
    assert "--pipeline.datamanager.latent-cache-dir" in messages.get(timeout=120)
    process.join(timeout=60)
    assert files_in(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_made_and_a_photograph_that_cannot_be_read_are_named(tmp_path, photographs, vae):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--pipeline\.datamanager\.latent-cache-dir"):
        fill(tmp_path / "file", photographs, vae)
    with pytest.raises(UserError, match=r"missing\.jpg"):
        fill(tmp_path / "cache", [tmp_path / "missing.jpg"], vae)


def fill_over_and_over(directory, paths, start, results):
    """What each of the two processes does: fills the cache, checks it, empties it, again and again."""
    start.wait()
    for _ in range(20):
        _, latents = fill(directory, paths, CellMeans())
        results.put([latent.double().sum().item() for latent in latents])
        for file in directory.rglob("*.safetensors"):
            file.unlink(missing_ok=True)


def test_two_processes_fill_one_cache_at_once(tmp_path, photographs):
    """No one fails, no one reads half a file (that would warn, and warnings are errors there), nothing stays behind."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    arguments = (tmp_path / "cache", photographs, start, results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", "error:.*damaged:UserWarning")
        processes = [context.Process(target=fill_over_and_over, args=arguments) for _ in range(2)]
        for process in processes:
            process.start()
    sums = [results.get(timeout=300) for _ in range(40)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert all(s == sums[0] for s in sums)
    assert not [path for path in files_in(tmp_path / "cache") if path.suffix != ".safetensors"]


def test_the_default_directory_is_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_directory() == Path("/somewhere/lrf_nerfstudio/latents")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_directory() == Path.home() / ".cache" / "lrf_nerfstudio" / "latents"
