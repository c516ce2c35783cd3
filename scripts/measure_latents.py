"""`lrf measure`, from a checkout."""

from lrf_nerfstudio.commands.measure_latents import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
