"""`lrf psnr-over-time`, from a checkout."""

from lrf_nerfstudio.commands.psnr_over_time import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
