"""`lrf stage3`, from a checkout."""

from lrf_nerfstudio.commands.finetune_stage3 import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
