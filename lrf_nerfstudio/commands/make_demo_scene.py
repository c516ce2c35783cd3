"""Make the demo scene: a ray-traced still life in a meadow.

The scene is in nerfstudio's format and has exact cameras and tracks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lrf_nerfstudio.synthetic.demo import demo_cameras, demo_scene
from lrf_nerfstudio.synthetic.writer import PictureConfig, is_there, settings_of, write_scene
from lrf_nerfstudio.utils.options import Count, Range
from lrf_nerfstudio.utils.progress import progress_bar


@dataclass
class DemoScene(PictureConfig):
    """Make a small procedural scene in nerfstudio's format."""

    output: Path = Path("demo/scene")
    """Folder to write. Nothing happens when the same scene is there already."""
    views: Annotated[int, Range(least=8)] = 48
    """Number of cameras, on one closed turn around the objects at changing heights."""
    seed: Count = 0
    """Seed of patterns, cameras and points."""


def main(config: DemoScene) -> None:
    """Make the scene.

    Raises:
        UserError: The folder holds something else or cannot be written.
    """
    settings = settings_of(config, "demo", config.seed)
    if is_there(config.output, settings):
        print(f"{config.output} holds this scene already.")
        return
    scene, cameras = demo_scene(config.seed), demo_cameras(config.views, config.seed, config.size)
    with progress_bar() as progress:
        task = progress.add_task("Ray tracing", total=config.views)
        points = write_scene(config.output, scene, cameras, settings, lambda: progress.advance(task))
    height, width = config.size
    print(f"{config.views} views of {height} x {width} and {points} surface points in {config.output}")
