"""`lrf compare`, from a checkout."""

from lrf_nerfstudio.commands.compare_vaes import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
