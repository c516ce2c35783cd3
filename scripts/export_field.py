"""`lrf export`, from a checkout."""

from lrf_nerfstudio.commands.export_field import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
