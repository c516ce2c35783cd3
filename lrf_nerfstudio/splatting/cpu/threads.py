"""Compiling kernels, and running them on several threads.

Kernels release the GIL and work on a range of items that nobody else writes to; a pool of Python threads shares out the
ranges. Compared with numba's own `parallel=True` this compiles in a fraction of the time, can be called from any number
of Python threads at once (numba's default threading layer aborts the process when a viewer renders while a trainer
trains), and its idle threads sleep instead of spinning against torch's OpenMP workers.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def kernel(function: Callable) -> Callable:
    """Compile a kernel on its first call; machine code is cached on disk where there is a writable folder for it."""
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written to
        return numba.njit(**options)(function)


inline = numba.njit(forceinline=True, nogil=True, error_model="numpy", boundscheck=False)
"""Decorator for the parts of kernels: LLVM always inlines them."""


def _forget_pool() -> None:
    """Start anew in a forked child, which has none of its parent's threads."""
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _executor(workers: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    pool = _pool
    if pool is None or _pool_size < workers:
        pool = _pool = ThreadPoolExecutor(workers, thread_name_prefix="rasterizer")
        _pool_size = workers
    return pool


def even_ranges(count: int, size: int) -> list[tuple[int, int]]:
    """Cut [0, count) into consecutive ranges of `size` items; the last may be shorter."""
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]


def thread_count() -> int:
    """Return how many threads share the work: one per processor, unless NUMBA_NUM_THREADS says otherwise.

    torch's number is no guide: training on small tensors is fastest with one torch thread.
    """
    return numba.config.NUMBA_NUM_THREADS


def run(
    function: Callable[..., Any],
    ranges: Sequence[tuple[int, int]],
    *args: Any,
    of_range: Sequence[Any] | None = None,
) -> list[Any]:
    """Call the kernel `function(begin, end, *args)` for every range, on `thread_count()` threads.

    Which thread takes which range is left to chance; the result is not, since ranges write to different places.

    Args:
        function: The kernel.
        ranges: Begin and end of each call.
        *args: The same for all calls. Numba takes groups of arguments as tuples; named tuples would work as well, but
            they cost 2 microseconds each at every call, ten times as much.
        of_range: One argument for each call that comes before `args`.

    Returns:
        What the calls returned, in the order of the ranges.
    """
    results: list[Any] = [None] * len(ranges)
    remaining = iter(range(len(ranges)))

    def work() -> None:
        for index in remaining:
            own = () if of_range is None else (of_range[index],)
            results[index] = function(*ranges[index], *own, *args)

    helpers = min(thread_count(), len(ranges)) - 1
    futures = [_executor(helpers).submit(work) for _ in range(helpers)] if helpers > 0 else []
    work()
    for future in futures:
        future.result()
    return results
