"""Run training, decoder fits, stages I and III, pair building and benchmarks on disks that are too small.

Each must end in a message that says what to do, lose nothing, and end as an undisturbed run once there is room. It
mounts small file systems, which needs root, and it needs a checkout: the jobs are the tiny ones of tests/helpers.

Example: `python scripts/fill_disk.py --jobs training pairs --disks 5`.
"""

import sys
from importlib import import_module
from pathlib import Path

from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
    run(import_module("full_disks").main)
