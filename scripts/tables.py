"""`lrf tables`, from a checkout."""

from lrf_nerfstudio.commands.tables import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
