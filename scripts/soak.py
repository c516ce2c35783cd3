"""Train a tiny scene for 30,000 steps and print the memory that each tenth of the run took.

It needs a checkout: the scene is written by tests/helpers.

Example: `python scripts/soak.py --steps 30000`.
"""

import sys
from importlib import import_module
from pathlib import Path

from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
    run(import_module("soaking").main)
