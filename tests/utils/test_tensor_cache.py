"""The cache of tensors: what is damaged, who else writes, and a disk that is full."""

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

from lrf_nerfstudio.utils.cache import TensorCache, content_hash
from lrf_nerfstudio.utils.errors import UserError

pytestmark = pytest.mark.slow


def entry(number):
    return {"values": torch.arange(20.0).reshape(4, 5) + number, "flags": torch.tensor([True, bool(number)])}


def check(tensors):
    if tensors["values"].shape != (4, 5):
        raise ValueError(f"values are {tuple(tensors['values'].shape)}")


def fill(directory):
    cache = TensorCache(directory, "--cache-dir")
    entries = [cache.load_or_compute({"number": i}, lambda i=i: entry(i), check) for i in range(3)]
    return cache, entries


def assert_right(entries):
    for number, found in enumerate(entries):
        assert found.keys() == entry(number).keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in entry(number).items())


def files_in(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_the_second_start_computes_nothing_and_gives_the_same_bits(tmp_path):
    first, entries = fill(tmp_path / "cache")
    assert (first.hits, first.misses) == (0, 3)
    assert_right(entries)
    second = TensorCache(tmp_path / "cache", "--cache-dir")
    assert_right([second.load_or_compute({"number": i}, pytest.fail, check) for i in range(3)])
    assert (second.hits, second.misses) == (3, 0)


def test_the_key_is_the_content_of_the_inputs(tmp_path):
    cache = TensorCache(tmp_path / "cache", "--cache-dir")
    inputs = [{"a": 1, "b": [2.0, None]}, {"a": 1, "b": [2.5, None]}, {"a": 1}, {"a": "1"}]
    for number, each in enumerate(inputs):
        assert cache.load_or_compute(each, lambda number=number: {"x": torch.tensor(number)})["x"] == number
    for number, each in enumerate(inputs):
        again = dict(reversed(each.items()))
        assert cache.load_or_compute(again, pytest.fail)["x"] == number


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def empty(file):
    file.write_bytes(b"")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def claim_a_huge_header(file):
    file.write_bytes(b"\xff" * 7 + b"\x7f" + file.read_bytes()[8:])


def reshape(file):
    """Another shape with the checksum of the old one, and then with its own."""
    with safe_open(file, framework="pt") as content:
        tensors, metadata = {name: content.get_tensor(name) for name in content.keys()}, content.metadata()  # noqa: SIM118
    save_file(tensors | {"values": tensors["values"].reshape(5, 4)}, file, metadata)


def rename_a_tensor(file):
    with safe_open(file, framework="pt") as content:
        save_file({"other": content.get_tensor("values")}, file)


def take_anothers_place(file):
    TensorCache(file.parent / "other", "").load_or_compute({}, lambda: {"values": torch.zeros(3)})
    (other,) = (file.parent / "other").iterdir()
    other.replace(file)
    (file.parent / "other").rmdir()


DAMAGES = [truncate, empty, flip_a_bit, claim_a_huge_header, reshape, rename_a_tensor, take_anothers_place]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_replaced_with_one_warning(tmp_path, damage):
    fill(tmp_path / "cache")
    damaged = files_in(tmp_path / "cache")[1]
    whole = damaged.read_bytes()
    damage(damaged)
    with pytest.warns(UserWarning, match="damaged") as caught:
        cache, entries = fill(tmp_path / "cache")
    assert [str(damaged) in str(warning.message) for warning in caught] == [True]
    assert (cache.hits, cache.misses) == (2, 1)
    assert_right(entries)
    assert damaged.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fill(tmp_path / "cache")[0].hits == 3


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_names_the_option_and_leaves_nothing_behind(tmp_path, monkeypatch, failing):
    cache, _ = fill(tmp_path / "cache")
    before = {path: path.read_bytes() for path in files_in(tmp_path / "cache")}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"No space left on device.*\(--cache-dir\)"):
        patch.setattr(os, failing, full)
        cache.load_or_compute({"number": 4}, lambda: entry(4))
    assert {path: path.read_bytes() for path in files_in(tmp_path / "cache")} == before
    assert torch.equal(cache.load_or_compute({"number": 4}, lambda: entry(4))["values"], entry(4)["values"])


def fill_with_a_limit(directory, messages):
    """Fills the cache in a process whose files may not exceed 100 bytes, which fails as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        fill(directory)
    except UserError as error:
        messages.put(str(error))


def test_a_write_that_fails_halfway_leaves_nothing_behind(tmp_path):
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    process = context.Process(target=fill_with_a_limit, args=(tmp_path / "cache", messages))
    process.start()
    assert "--cache-dir" in messages.get(timeout=120)
    process.join(timeout=60)
    assert files_in(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_made_and_a_file_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache-dir"):
        fill(tmp_path / "file")
    with pytest.raises(UserError, match=r"missing\.jpg cannot be read: No such file"):
        content_hash(tmp_path / "missing.jpg")


def fill_over_and_over(directory, start, results):
    """What each of the processes does: fills the cache, checks it, empties it, again and again."""
    start.wait()
    for _ in range(20):
        _, entries = fill(directory)
        results.put([found["values"].double().sum().item() for found in entries])
        for file in directory.rglob("*.safetensors"):
            file.unlink(missing_ok=True)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_fill_one_cache_at_once(tmp_path, count):
    """No one fails, no one reads half a file (that would warn, and warnings are errors there), nothing stays behind."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(count), context.Queue()
    arguments = (tmp_path / "cache", start, results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", "error:.*damaged:UserWarning")
        processes = [context.Process(target=fill_over_and_over, args=arguments) for _ in range(count)]
        for process in processes:
            process.start()
    sums = [results.get(timeout=300) for _ in range(20 * count)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    expected = [entry(number)["values"].double().sum().item() for number in range(3)]
    assert all(found == expected for found in sums)
    assert not [path for path in files_in(tmp_path / "cache") if path.suffix != ".safetensors"]


def test_a_path_in_the_users_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(Path("~/cache"))
    assert len(files_in(tmp_path / "cache")) == 3
