"""Measure how consistent the latents of VAEs are between views, and how good their reconstructions.

Example, before and after fine-tuning: `lrf measure --scenes fox flower --vae before=taesd
after=outputs/tuned --output measures --downscale-factor 2`.

Writes `measures.json`, a row for each VAE and scene (LatentMeasures in lrf_nerfstudio/evaluation/latents.py says what
each number is), and `spectrum.png`, the radially averaged power spectra of the latents.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lrf_nerfstudio.correspondence import CorrespondenceConfig, find_correspondences, load_scene
from lrf_nerfstudio.evaluation.latents import measure_scene
from lrf_nerfstudio.evaluation.names import named, scene_names
from lrf_nerfstudio.evaluation.spectra import spectrum_figure
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import make_folder, replacing, write_atomically
from lrf_nerfstudio.utils.options import AtLeastOne
from lrf_nerfstudio.utils.progress import progress_bar
from lrf_nerfstudio.vae import VAEConfig


@dataclass
class MeasureLatents:
    """Measures VAEs on scenes."""

    scenes: tuple[Path, ...]
    """Scenes to measure on, each in one of nerfstudio's formats."""
    vae: tuple[str, ...]
    """VAEs to measure, the first one as the reference: sources as for --pipeline.vae.source, each with a name for table
    and figure if wished (NAME=SOURCE)."""
    output: Path
    """Folder for measures.json and spectrum.png, which are replaced."""
    downscale_factor: AtLeastOne = 1
    """N takes the photographs from images_N."""
    reference: str | None = None
    """Another reference, which original_decoder_psnr, latent_drift and latent_std_ratio are relative to: the name of a
    VAE in --vae, or one more VAE, which is then measured too."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device to encode and decode on."""
    correspondence: CorrespondenceConfig = field(default_factory=CorrespondenceConfig)
    """Where correspondences come from."""


def measure(config: MeasureLatents) -> list[dict[str, Any]]:
    """Measures, writes the files; the rows of measures.json."""
    if not config.vae or not config.scenes:
        raise UserError("There is nothing to measure: give --scenes and --vae one or more each.")
    sources = named(config.vae, "--vae")
    reference = config.reference or next(iter(sources))
    if reference not in sources:
        sources = named([reference, *config.vae], "--reference and --vae")
        reference = next(iter(sources))
    names = scene_names(config.scenes)
    vaes = {name: VAEConfig(source).setup(config.device) for name, source in sources.items()}
    scenes = [
        find_correspondences(load_scene(folder, config.downscale_factor), config.correspondence)
        for folder in config.scenes
    ]
    make_folder(config.output, "--output")  # now rather than after an hour
    rows = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(vaes) * sum(len(scene.scene.views) for scene in scenes))
        for scene, correspondences in zip(names, scenes, strict=True):
            progress.update(task, description=scene)
            measures = measure_scene(correspondences, vaes, reference, lambda: progress.advance(task))
            rows += [{"vae": name, "scene": scene, **asdict(of_vae)} for name, of_vae in measures.items()]
    spectra = {scene: {row["vae"]: row["spectrum"] for row in rows if row["scene"] == scene} for scene in names}
    write_atomically(config.output / "measures.json", (json.dumps(rows, indent=2) + "\n").encode(), "--output")
    with replacing(config.output / "spectrum.png", "--output") as stream:
        spectrum_figure(spectra).savefig(stream, dpi=150, format="png")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people to read."""

    def cell(value: float | None, decimals: int) -> str:
        return "-" if value is None else f"{value:.{decimals}f}"

    result = Table()
    for heading in (
        "scene",
        "VAE",
        "incon-\nsistency",
        "PSNR",
        "SSIM",
        "detail",
        "original\ndecoder",
        "drift",
        "std ratio",
    ):
        result.add_column(heading, justify="left" if heading in ("scene", "VAE") else "right")
    for row in rows:
        ratios = [ratio for ratio in row["latent_std_ratio"] or () if ratio is not None]
        result.add_row(
            escape(row["scene"]),
            escape(row["vae"]),
            cell(row["inconsistency"], 4),
            cell(row["reconstruction_psnr"], 2),
            cell(row["reconstruction_ssim"], 4),
            cell(row["detail"], 3),
            cell(row["original_decoder_psnr"], 2),
            cell(row["latent_drift"], 3),
            f"{min(ratios):.2f} - {max(ratios):.2f}" if ratios else "-",
        )
    return result


def main(options: MeasureLatents) -> None:
    """Measure, and print the table."""
    Console().print(table(measure(options)))
