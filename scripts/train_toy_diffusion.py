"""`lrf toy-diffusion`, from a checkout."""

from lrf_nerfstudio.commands.train_toy_diffusion import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
