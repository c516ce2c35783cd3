"""Measures what a second of training is worth: held-out PSNR against the time of the fit, beside splatting in RGB.

Each length of run is a fit of its own, from the first step, because learning rates and densification follow the length.
The time of a fit has everything in it that a user waits for: reading, encoding, both parts of the run. Run again after
an interruption, it goes on where it was; fits that were interrupted themselves have no time and are left out.

Writes points.json and figure.png. Example: `lrf psnr-over-time --scene fox --output fox-over-time`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from lrf_nerfstudio.plugin.measuring import MeasuringConfig, Method, SceneData, measure
from lrf_nerfstudio.splatting import prepare_backend
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import make_folder, replacing, write_atomically
from lrf_nerfstudio.utils.options import AtLeastOne
from lrf_nerfstudio.vae import VAEConfig
from lrf_nerfstudio.vae.sources import RGB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = dict[str, Any]
"""`method`, `steps`, `seconds` of the fit, `psnr` and `ssim` of the held-out views, and `gaussians`."""


@dataclass
class PSNROverTime:
    """Measures held-out PSNR against the time of the fit."""

    scene: Path
    """Folder of the scene, in nerfstudio's format; every 8th photograph is held out, starting with the first."""
    output: Path = Path("psnr-over-time")
    """Folder for points.json, figure.png and the fits."""
    vae: str = "lrf-f4c4"
    """The VAE, as --pipeline.vae.source of ns-train."""
    downscale_factor: AtLeastOne = 2
    """N takes the photographs from images_N."""
    steps: tuple[AtLeastOne, ...] = (500, 1000, 2000, 4000)
    """Lengths of the runs with the VAE and the scene's own decoder."""
    rgb_steps: tuple[AtLeastOne, ...] = (300, 1000, 3000)
    """Lengths of the runs in RGB at full resolution."""


def points_over_time(options: PSNROverTime) -> Iterator[Point]:
    """Fit and measure all lengths, or take what was measured before; yield each as soon as it is there.

    Raises:
        UserError: the scene or the VAE cannot be used, a length is not positive, or a file cannot be written.
    """
    if min((*options.steps, *options.rgb_steps), default=0) < 1:
        raise UserError("--steps and --rgb-steps must be positive, and at least one of them be given.")
    make_folder(options.output, "--output")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare_backend(device)  # not a part of the first fit
    scene = SceneData(options.scene.expanduser().resolve(), options.downscale_factor)
    methods = [Method(f"{options.vae}, the scene's decoder", options.vae, scene_decoder=True), Method("RGB", RGB)]
    for method, lengths in zip(methods, (options.steps, options.rgb_steps), strict=True):
        vae = VAEConfig(method.source).setup(device)
        for steps in lengths:
            folder = options.output / "fits" / f"{method.source.replace('/', '_')}-{steps}"
            file = folder / "point.json"
            if not file.exists():
                with TemporaryDirectory() as cache:  # every fit encodes the photographs
                    row, _ = measure(scene, method, vae, folder, MeasuringConfig(steps, latent_cache_dir=Path(cache)))
                novel, cost = row["novel"], row["cost"]
                if "seconds" not in cost:
                    Console().print(
                        f"The fit in {folder} was interrupted: remove it to measure its time.", markup=False
                    )
                    continue
                point = {
                    "method": method.name,
                    "steps": steps,
                    "seconds": cost["seconds"],
                    "psnr": novel["psnr"],
                    "ssim": novel["ssim"],
                    "gaussians": cost["gaussians"],
                }
                write_atomically(file, json.dumps(point).encode(), "--output")
            yield json.loads(file.read_text())


def figure(points: Sequence[Point], scene: str) -> "Figure":
    """Draw PSNR against seconds, a line for each method with the number of steps at each of its points."""
    from matplotlib.figure import Figure

    result = Figure(figsize=(6, 4), layout="constrained")
    axes = result.subplots()
    for method in dict.fromkeys(point["method"] for point in points):
        of_method = [point for point in points if point["method"] == method]
        axes.plot([p["seconds"] for p in of_method], [p["psnr"] for p in of_method], marker="o", label=method)
        for point in of_method:
            axes.annotate(
                f"{point['steps']:,}", (point["seconds"], point["psnr"]), (4, -11), textcoords="offset points"
            )
    axes.set(xlabel="seconds of the whole fit", ylabel="held-out PSNR in dB", title=scene)
    axes.grid(alpha=0.3)
    axes.legend()
    return result


def main(options: PSNROverTime) -> None:
    """Measure, write the files, and print the points."""
    table, points = Table(), list[Point]()
    for heading in ("method", "steps", "seconds", "PSNR", "SSIM", "Gaussians"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for point in points_over_time(options):
        points.append(point)
        values = (f"{point['seconds']:.0f}", f"{point['psnr']:.2f}", f"{point['ssim']:.4f}", f"{point['gaussians']:,}")
        table.add_row(point["method"], f"{point['steps']:,}", *values)
        write_atomically(options.output / "points.json", (json.dumps(points, indent=2) + "\n").encode(), "--output")
        with replacing(options.output / "figure.png", "--output") as stream:
            figure(points, options.scene.resolve().name).savefig(stream, dpi=150, format="png")
    Console().print(table)
