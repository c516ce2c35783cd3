"""`lrf benchmark-rasterizer`, from a checkout."""

from lrf_nerfstudio.commands.benchmark_rasterizer import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
