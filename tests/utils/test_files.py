import os
from pathlib import Path

import pytest
import torch

from lrf_nerfstudio.utils.files import read_tensors, replacing, write_atomically, write_tensors


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


def test_a_file_stays_when_writing_fails(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, b"old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as stream:
        stream.write(b"half of the n")
        raise KeyboardInterrupt
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(OSError):
        write_atomically(file / "below a file", b"")


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
    with pytest.raises(ValueError, match="check sum"):
        read_tensors(tmp_path / "tensors")
