"""`lrf triangulate`, from a checkout."""

from lrf_nerfstudio.commands.triangulate import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
