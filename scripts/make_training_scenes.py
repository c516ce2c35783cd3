"""`lrf training-scenes`, from a checkout."""

from lrf_nerfstudio.commands.make_training_scenes import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
