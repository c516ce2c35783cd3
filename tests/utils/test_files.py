import contextlib
import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import (
    make_folder,
    read_tensors,
    replacing,
    reporting_full_disk,
    write_atomically,
    write_tensors,
)

NOBODY = 65534


@contextlib.contextmanager
def full_disk(room: int = 100):
    """No file may grow beyond some bytes: a write fails with EFBIG, which stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def read_only_folder():
    """A folder that this process may read and not write to, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        (folder / "file").write_bytes(b"old")
        folder.chmod(0o555)
        try:
            if user == 0:
                os.seteuid(NOBODY)
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    file = tmp_path / "new" / "file"
    with replacing(file) as stream:
        stream.write(b"first")
        assert not file.exists()
    assert file.read_bytes() == b"first"
    with replacing(file) as stream:
        stream.write(b"second")
        assert file.read_bytes() == b"first"
    assert file.read_bytes() == b"second"
    assert os.listdir(file.parent) == ["file"]


def test_a_file_stays_when_the_block_fails(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, b"old")
    for error in (KeyboardInterrupt(), RuntimeError("of the block"), UserError("of the block")):
        with pytest.raises(type(error)) as raised, replacing(file) as stream:
            stream.write(b"half of the n")
            raise error
        assert raised.value is error
        assert file.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("size", [101, 10_000_000])
def test_a_full_disk(tmp_path, size):
    file = tmp_path / "file"
    write_atomically(file, b"old")
    with full_disk(), pytest.raises(UserError) as raised:
        write_atomically(file, b"x" * size, "--output", "The old one is still there.")
    assert str(raised.value) == (
        f"{file} could not be written: File too large. Free some space or choose another place (--output). "
        "The old one is still there."
    )
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("numbers", [10, 1_000_000])
def test_a_full_disk_is_what_the_user_reads_whatever_a_library_makes_of_it(tmp_path, numbers):
    with full_disk(), pytest.raises(UserError, match="File too large"), replacing(tmp_path / "file") as stream:
        torch.save({"tensor": torch.zeros(numbers)}, stream)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_that_a_library_writes_to(tmp_path):
    said = pytest.raises(UserError, match=r"could not be written: File too large.*\(--output\)")
    with full_disk(), said, reporting_full_disk(tmp_path, "--output"):
        (tmp_path / "events").write_bytes(b"x" * 1000)
    with pytest.raises(FileNotFoundError), reporting_full_disk(tmp_path, "--output"):
        (tmp_path / "missing").read_bytes()


def test_a_library_that_hides_the_systems_reason(tmp_path):
    def write(stream):
        try:
            stream.write(b"x" * 100_000)
        except OSError:
            raise RuntimeError("a write failed") from None

    with full_disk(), pytest.raises(UserError, match="File too large"), replacing(tmp_path / "file") as stream:
        write(stream)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    for below in ("a", "b/c"):
        file = tmp_path / "file" / below
        with pytest.raises(UserError) as raised:
            write_atomically(file, b"", "--output")
        assert str(raised.value).startswith(f"{file} could not be written: ")
        assert str(raised.value).endswith(". Choose another place (--output).")
        with pytest.raises(UserError, match=r"could not be written: .*\(--output\)"):
            make_folder(file, "--output")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_read_only_folder():
    with read_only_folder() as folder:
        for file in (folder / "file", folder / "below" / "file"):
            with pytest.raises(UserError, match=r"file could not be written: Permission denied\. Choose"):
                write_atomically(file, b"new")
        with pytest.raises(UserError, match=r"below could not be written: Permission denied"):
            make_folder(folder / "below")
        assert (folder / "file").read_bytes() == b"old"
        assert os.listdir(folder) == ["file"]


def test_a_folder_that_is_there_already_is_kept(tmp_path):
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "file").write_bytes(b"old")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"old"


def test_files_are_readable_by_others_as_the_user_wants(tmp_path):
    mask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(mask)
    assert Path(tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_tensors_survive_and_damage_shows(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}
    write_tensors(tmp_path / "tensors", tensors)
    read = read_tensors(tmp_path / "tensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)
    content = bytearray((tmp_path / "tensors").read_bytes())
    content[-1] ^= 1  # the last bit of the last value
    (tmp_path / "tensors").write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        read_tensors(tmp_path / "tensors")
