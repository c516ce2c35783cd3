"""What is kept on disk: files that are complete or as before at any moment, and the user's cache folder."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cache_directory(name: str) -> Path:
    """`lrf_nerfstudio/<name>` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrf_nerfstudio" / name


def file_sha256(file: Path) -> str:
    """The hash of a file's content; raises OSError."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A stream whose content takes the place of a file when the block ends; if it fails, the file stays as it was.

    The file is complete or as before, whenever the program ends. A missing folder is made. Raises OSError.
    """
    temporary = file.with_name(f".{file.stem}-{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        with suppress(OSError):
            temporary.unlink()  # where something failed; a file in place of the folder is an OSError too


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that it is complete or as before, whenever the program ends; raises OSError."""
    with replacing(file) as stream:
        stream.write(content)


def write_tensors(file: Path, tensors: "dict[str, Tensor]") -> None:
    """Write CPU tensors as safetensors with a check sum, atomically; raises OSError."""
    from safetensors.torch import save

    write_atomically(file, save(tensors, {"sha256": _tensors_sha256(tensors)}))


def read_tensors(file: Path) -> "dict[str, Tensor]":
    """Read what :func:`write_tensors` wrote; a damaged file raises ValueError, OSError or what safetensors raises."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (it is no dict)
        metadata = content.metadata() or {}
    if metadata.get("sha256") != _tensors_sha256(tensors):
        raise ValueError("its check sum is wrong")
    return tensors


def _tensors_sha256(tensors: "dict[str, Tensor]") -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
