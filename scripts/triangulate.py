"""Triangulates points of a scene from known cameras: see lrf_nerfstudio/commands/triangulate.py."""

from lrf_nerfstudio.commands.triangulate import main
from lrf_nerfstudio.utils.cli import run

if __name__ == "__main__":
    run(main)
