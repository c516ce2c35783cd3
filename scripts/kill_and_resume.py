"""Kill training runs, decoder fits, stages I and III, pair building and benchmarks at random moments, and compare.

Each job is killed with signal 9, started again, and must end as an undisturbed run does. It needs a checkout: what it
kills are the tiny jobs of tests/helpers.

Example: `python scripts/kill_and_resume.py --jobs training pairs --kills 20`.
"""

import sys
from importlib import import_module
from pathlib import Path

from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
    run(import_module("kill_jobs").main)
