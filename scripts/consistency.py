"""`lrf consistency`, from a checkout."""

from lrf_nerfstudio.commands.consistency import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
