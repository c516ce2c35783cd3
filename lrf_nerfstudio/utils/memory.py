"""Peak memory of a stretch of work."""

from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def reset_peak_memory() -> None:
    """Lets :func:`peak_memory` count from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # not Linux, or not allowed
        (_PROCESS / "clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_memory() -> int | None:
    """Bytes that were occupied at most: by tensors on the GPU where there is one, else by the process.

    None where the system does not tell. Where it does not let the count start anew, it is of the whole process so far.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return 1024 * int(kilobytes[0]) if kilobytes else None
