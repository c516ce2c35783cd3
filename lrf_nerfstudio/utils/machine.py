"""What a measurement ran on."""

import platform
from pathlib import Path


def machine() -> dict[str, str | int]:
    """Return the names of the processor and of the GPU, if there is one, PyTorch's threads, and its version."""
    import torch

    found: dict[str, str | int] = {"processor": _processor(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"torch": torch.__version__}


def _processor() -> str:
    """Return the processor's name as Linux tells it, or what Python knows of it elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
