"""`lrf generic-decoder`, from a checkout."""

from lrf_nerfstudio.commands.train_generic_decoder import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
