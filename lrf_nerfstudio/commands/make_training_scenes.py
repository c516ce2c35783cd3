"""Make ray-traced scenes to train autoencoders on, with exact cameras and correspondences.

Each seed has its own layout, shapes, materials, light and camera path; the scene of a seed is the same at every run.
Every folder is a scene in nerfstudio's format with a COLMAP model, whose tracks are exact: stage I finds its
correspondences there. Run again after an interruption, the command goes on where it was. To share the work, start
several processes with --num-shards and a --shard-index each; NUMBA_NUM_THREADS limits the threads of each.

Example: `lrf training-scenes --output scenes --count 100`, then
`lrf stage1 --scenes scenes/* --vae madebyollin/taesd --output taesd-stage1`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lrf_nerfstudio.synthetic.random_scenes import random_scene
from lrf_nerfstudio.synthetic.writer import PictureConfig, is_there, settings_of, write_scene
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import AtLeastOne, Count
from lrf_nerfstudio.utils.progress import progress_bar


@dataclass
class TrainingScenes(PictureConfig):
    """Make training scenes by seed."""

    output: Path = Path("scenes")
    """Folder of the scenes; the scene of seed 7 is in `scene_00007`."""
    count: AtLeastOne = 100
    """Number of scenes."""
    first_seed: Count = 0
    """Seed of the first scene; the others follow it."""
    num_shards: AtLeastOne = 1
    """Processes that share the scenes."""
    shard_index: Count = 0
    """Which of them this is, from 0."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what does not fit the other options; see `check_options`."""
        if self.shard_index >= self.num_shards:
            yield "shard_index", f"must be 0 to {self.num_shards - 1}, as many as num-shards"


def main(config: TrainingScenes) -> None:
    """Make the scenes of this process that are not there yet; one that fails is reported and left out.

    Raises:
        UserError: Scenes failed.
    """
    last = config.first_seed + config.count
    seeds, failed = range(config.first_seed, last)[config.shard_index :: config.num_shards], list[int]()
    with progress_bar() as bar:
        task = bar.add_task("Views", total=len(seeds) * config.views)
        for number, seed in enumerate(seeds, start=1):
            folder, settings = config.output / f"scene_{seed:05d}", settings_of(config, "random", seed)
            try:
                if not is_there(folder, settings):
                    scene, cameras = random_scene(seed, config.views, config.size)
                    write_scene(folder, scene, cameras, settings, lambda: bar.advance(task))
            except UserError as error:
                failed.append(seed)
                bar.console.print(f"Scene {seed} is left out: {error}", markup=False, style="red")
            except Exception:  # whatever it is, the other scenes can be had
                failed.append(seed)
                bar.console.print_exception()
            bar.update(task, completed=number * config.views)
    print(f"{config.output} has {len(seeds) - len(failed)} scenes of this process.")
    if failed:
        names = ", ".join(map(str, failed))
        raise UserError(f"{len(failed)} of {len(seeds)} scenes failed, for the reasons above: seeds {names}.")
