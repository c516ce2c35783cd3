"""`lrf pairs`, from a checkout."""

from lrf_nerfstudio.commands.build_stage3_pairs import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
