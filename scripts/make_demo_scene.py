"""`lrf demo-scene`, from a checkout."""

from lrf_nerfstudio.commands.make_demo_scene import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
