"""Warnings of PyTorch about what other packages call, which no user can mend."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_jit_warning() -> Iterator[None]:
    """Silence, while a package is imported, that it calls `torch.jit.script`.

    PyTorch attributes this warning to itself, so a filter by module would silence other people's calls too.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
        yield
