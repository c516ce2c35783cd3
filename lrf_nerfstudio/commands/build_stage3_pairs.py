"""Build the pairs of rendered latents and photographs that stage III trains on.

Fits a radiance field to each scene, renders its training and its held-out cameras, and stores what it renders beside
the photographs.

Run again after an interruption, it goes on where it was; scenes that are finished are skipped. To share the work, start
several processes, on one machine or many, with --num-shards and a --shard-index each; CUDA_VISIBLE_DEVICES gives each
its GPU. A scene's contact_sheet.png shows photographs beside decoded renders. Its `field` folder holds the field as
ns-train leaves it, for ns-viewer and the like; a finished scene's pairs do not need it.

Example: `lrf pairs --scenes plush kitchen --vae taesd-stage1 --output pairs`, then
`lrf stage3 --pairs pairs --vae taesd-stage1 --output taesd-stage3`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from lrf_nerfstudio.plugin.pair_building import PairConfig, build_scenes, check_names
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import AtLeastOne, Count
from lrf_nerfstudio.vae import VAEConfig


@dataclass
class BuildPairs(PairConfig):
    """Builds pairs of rendered latents and photographs."""

    scenes: tuple[Path, ...] = ()
    """Folders of the scenes, in nerfstudio's format; every 8th photograph is held out, starting with the first."""
    vae: str = "lrf-f4c4"
    """The autoencoder, as --pipeline.vae.source of ns-train."""
    output: Path = Path("pairs")
    """Folder of the pairs."""
    num_shards: AtLeastOne = 1
    """Processes that share the scenes."""
    shard_index: Count = 0
    """Which of them this is, from 0."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what does not fit the other options; see `check_options`."""
        yield from super().conflicts()
        if self.shard_index >= self.num_shards:
            yield "shard_index", f"must be 0 to {self.num_shards - 1}, as many as num-shards"


def select(options: BuildPairs) -> list[Path]:
    """The scenes of this process.

    Raises:
        UserError: no scene is given, or two have one name.
    """
    if not options.scenes:
        raise UserError("Name the folders of the scenes to build pairs of: --scenes A B ...")
    check_names(options.scenes)
    return list(options.scenes[options.shard_index :: options.num_shards])


def main(options: BuildPairs) -> None:
    """Build the pairs and say how many there are."""
    scenes = select(options)
    config = PairConfig(options.steps, options.downscale_factor, options.snapshots, options.density)
    vae = VAEConfig(options.vae).setup("cuda" if torch.cuda.is_available() else "cpu")
    results = build_scenes(scenes, vae, options.output, config)
    pairs = [scene for scene in results if scene is not None]
    count = sum(len(scene.views) * len(scene.latents) for scene in pairs)
    Console().print(f"{options.output} has {count} pairs of {len(pairs)} scenes.", markup=False)
    if failed := [str(scene) for scene, result in zip(scenes, results, strict=True) if result is None]:
        raise UserError(
            f"{len(failed)} of {len(scenes)} scenes failed, for the reasons above: {', '.join(failed)}. "
            "Run again to try these once more."
        )
