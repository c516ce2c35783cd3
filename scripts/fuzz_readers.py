"""Mutate the files that readers read: each mutation ends in a correct result or in one clear error.

COLMAP models, transforms.json, fields, generic decoders, autoencoders in three layouts, points, checkpoints and pairs
are written, mutated and read in processes of their own: no other exception, crash, hang or file outside of the folder
is allowed. It needs a checkout: what is mutated is written by tests/helpers.

Example: `python scripts/fuzz_readers.py --mutations 10000 --seed 0`.
"""

import sys
from importlib import import_module
from pathlib import Path

from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
    run(import_module("reader_fuzzing").main)
