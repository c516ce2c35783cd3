"""What is kept on disk: files that are complete or as before at any moment, and the user's cache folder."""

import errno
import hashlib
import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lrf_nerfstudio.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_directory(name: str) -> Path:
    """Return `lrf_nerfstudio/<name>` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrf_nerfstudio" / name


def file_sha256(file: Path) -> str:
    """Return the hash of a file's content, 64 hexadecimal digits; raises OSError."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unwritable(path: Path, error: OSError, option: str = "", hint: str = "") -> UserError:
    """Return what the user reads when a file or folder could not be written.

    Args:
        path: the file or folder.
        error: why not.
        option: with which the user chooses another place, such as `--output`.
        hint: one more sentence, such as what is still there and how to go on.
    """
    advice = "Free some space or choose" if error.errno in _NO_SPACE else "Choose"
    place = f"another place ({option})" if option else "another place"
    return UserError(f"{path} could not be written: {error.strerror or error}. {advice} {place}. {hint}".rstrip())


def make_folder(folder: Path, option: str = "") -> None:
    """Make a folder and those above it where they are missing.

    Args:
        folder: may be there already.
        option: with which the user chooses another one, for the message.

    Raises:
        UserError: a file is in its place, or it may not be made there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error, option) from error


@contextmanager
def reporting_full_disk(folder: Path, option: str = "", hint: str = "") -> Iterator[None]:
    """Say that the disk is full where a library that writes into a folder finds it so.

    Args:
        folder: that is written to.
        option: see :func:`unwritable`.
        hint: see :func:`unwritable`.

    Raises:
        UserError: an OSError of the block says that there is no space. Others are left as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise unwritable(folder, error, option, hint) from error


class _File(io.FileIO):
    """A file that remembers why a write failed: torch.save replaces the system's reason by a RuntimeError."""

    failure: OSError | None = None

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def replacing(file: Path, option: str = "", hint: str = "") -> Iterator[IO[bytes]]:
    """Open a stream whose content takes the place of a file when the block ends; if it fails, the file stays as it was.

    The file is complete or as before, whenever the program ends. A missing folder is made.

    Args:
        file: to write.
        option: with which the user chooses another place, for the message (see :func:`unwritable`).
        hint: one more sentence for the message.

    Raises:
        UserError: the disk is full, the folder cannot be made, or it may not be written to. Every OSError of the block
            is taken for one of these.
    """
    temporary = file.with_name(f".{file.stem}-{uuid.uuid4().hex}")
    raw = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        raw = _File(temporary, "xb")
        with io.BufferedWriter(raw) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except Exception as error:
        failure = error if isinstance(error, OSError) else getattr(raw, "failure", None)
        if failure is None:
            raise
        raise unwritable(file, failure, option, hint) from error
    finally:
        with suppress(OSError):
            temporary.unlink()  # where something failed; a file in place of the folder is an OSError too


def write_atomically(file: Path, content: bytes, option: str = "", hint: str = "") -> None:
    """Write a file so that it is complete or as before, whenever the program ends.

    Args:
        file: to write; a missing folder is made.
        content: of the file.
        option: see :func:`replacing`.
        hint: see :func:`replacing`.

    Raises:
        UserError: see :func:`replacing`.
    """
    with replacing(file, option, hint) as stream:
        stream.write(content)


def write_tensors(file: Path, tensors: "dict[str, Tensor]", option: str = "", hint: str = "") -> None:
    """Write CPU tensors as safetensors with a checksum, atomically.

    Args:
        file: to write; a missing folder is made.
        tensors: contiguous, by name, sharing no memory.
        option: see :func:`replacing`.
        hint: see :func:`replacing`.

    Raises:
        UserError: see :func:`replacing`.
    """
    from safetensors.torch import save

    write_atomically(file, save(tensors, {"sha256": _tensors_sha256(tensors)}), option, hint)


def read_tensors(file: Path) -> "dict[str, Tensor]":
    """Read what :func:`write_tensors` wrote; a damaged file raises ValueError, OSError or what safetensors raises."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (it is no dict)
        metadata = content.metadata() or {}
    if metadata.get("sha256") != _tensors_sha256(tensors):
        raise ValueError("its checksum is wrong")
    return tensors


def _tensors_sha256(tensors: "dict[str, Tensor]") -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
