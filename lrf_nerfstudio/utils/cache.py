"""What is costly to compute, kept on disk under a hash of all that it is computed from."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import file_sha256, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = 2  # part of every key: raise it when what is stored changes its meaning


class TensorCache:
    """Groups of CPU tensors, one safetensors file each: `<directory>/<key>.safetensors`.

    The key is a hash of the inputs' contents and of the options, so an entry never goes stale, whatever is renamed,
    moved or edited. Files are complete or absent, also when several processes fill one cache at once; a file that is
    damaged all the same, or holds something else, is replaced with a warning.

    Attributes:
        directory: of the files.
        hits: entries read from disk so far.
        misses: entries computed so far.

    Example:
        >>> import tempfile, torch
        >>> cache = TensorCache(Path(tempfile.mkdtemp()), option="--cache-dir")
        >>> for _ in range(2):
        ...     entry = cache.load_or_compute({"power": 2}, lambda: {"values": torch.arange(4) ** 2})
        >>> entry["values"].tolist(), cache.hits, cache.misses
        ([0, 1, 4, 9], 1, 1)
    """

    def __init__(self, directory: Path, option: str) -> None:
        """Use a folder, which is made with its first file.

        Args:
            directory: of the files; `~` stands for the user's home.
            option: with which the user chooses another one, for the message when it cannot be written to.
        """
        self.directory = Path(directory).expanduser()
        self.option = option
        self.hits = 0
        self.misses = 0

    def load_or_compute(
        self,
        inputs: Mapping[str, Any],
        compute: Callable[[], "dict[str, Tensor]"],
        check: "Callable[[dict[str, Tensor]], object]" = lambda tensors: None,
    ) -> "dict[str, Tensor]":
        """Return an entry, from disk if it is there, else computed and stored.

        Args:
            inputs: all that the tensors depend on, as JSON types; of files, :func:`content_hash`.
            compute: makes the tensors, on the CPU and contiguous; called only when they are not there.
            check: raises any exception if tensors that were read cannot be what `compute` made.

        Returns:
            Tensors by name; the same bits from disk as computed.

        Raises:
            UserError: the entry cannot be written (disk full, no permission).
        """
        description = json.dumps({"format": _FORMAT, **inputs}, sort_keys=True)
        file = self.directory / f"{hashlib.sha256(description.encode()).hexdigest()[:32]}.safetensors"
        if file.exists():
            try:
                tensors = read_tensors(file)
                check(tensors)
            except Exception as error:  # a damaged file fails in as many ways as there are kinds of damage
                warnings.warn(f"{file} is damaged ({error}); it is computed again.", stacklevel=3)
            else:
                self.hits += 1
                return tensors
        tensors = compute()
        self.misses += 1
        write_tensors(file, tensors, self.option)
        return tensors


def content_hash(file: Path) -> str:
    """Return a hash of the content of a file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return file_sha256(file)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}. Restore it or remove it from the data set."
        ) from error
