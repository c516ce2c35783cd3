"""Compare VAEs by what can be seen of radiance fields in their latent spaces.

Fits a field for each VAE and scene, and compares its decoded renders of training and held-out views with the
photographs.

VAEs with the same encoder share a field, decoded by each: those before and after stage III, for example. The source
`rgb` is no VAE: the scene is splatted in RGB at full resolution by the same code. Where it is among them, its renders
are also encoded and decoded by each VAE ("recoded"): what a latent field as good as it would give. Run again after an
interruption, it goes on where it was.

The source `rgb-f4` (f2 to f32) is RGB at 1/4 of the resolution, enlarged: what a VAE of this factor must beat. With
--scene-decoder, each VAE has a second row, of fields whose pictures are made by the scene's own decoder.

Writes table.md, table.json (lrf_nerfstudio/evaluation/decoding.py says what each number is) and figure.png, a
held-out view of each scene: photograph, the first VAE's own reconstruction, and the decoded renders.

Example: `lrf compare --scenes fox flower --vae original=taesd stage1=taesd-stage1
stage3=taesd-stage3 --downscale-factor 2 --output comparison`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lrf_nerfstudio.evaluation.decoding import (
    decoding_figure,
    decoding_table,
    measure_decoding,
    measure_recoding,
    with_means,
)
from lrf_nerfstudio.evaluation.metrics import ImageMetrics
from lrf_nerfstudio.evaluation.names import named
from lrf_nerfstudio.plugin.fitting import FittingConfig, attempted
from lrf_nerfstudio.plugin.measuring import MeasuringConfig, Method, SceneData, measure
from lrf_nerfstudio.plugin.pair_building import PairConfig, build_scenes, check_names
from lrf_nerfstudio.training.data.scene_pairs import ScenePairs
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import replacing, write_atomically
from lrf_nerfstudio.utils.progress import progress_bar
from lrf_nerfstudio.vae import VAE, VAEConfig
from lrf_nerfstudio.vae.sources import RGB


@dataclass
class CompareVAEs(FittingConfig):
    """Compares VAEs by the radiance fields in their latent spaces."""

    scenes: tuple[Path, ...] = ()
    """Folders of the scenes, in nerfstudio's format; every 8th photograph is held out, starting with the first."""
    vae: tuple[str, ...] = ()
    """VAEs: sources as for --pipeline.vae.source, each with a name for table and figure if wished (NAME=SOURCE)."""
    output: Path = Path("comparison")
    """Folder for table.md, table.json and figure.png, and for fields and measures, which a second run takes up."""
    scene_decoder: bool = False
    """Fit each scene with the scene's own decoder too, and add a row of it for each VAE."""
    download_lpips: bool = False
    """Download the weights of LPIPS's AlexNet where they are missing (230 MB); without them LPIPS is left out."""


def compare(options: CompareVAEs) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Fits, measures, writes the files.

    Returns:
        The rows of table.json, and the scenes that failed with some VAE.

    Raises:
        UserError: options do not fit together, a VAE cannot be used, or the files cannot be written.
    """
    if not options.vae or not options.scenes:
        raise UserError("There is nothing to compare: give --scenes and --vae one or more each.")
    check_names(options.scenes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vaes = {name: VAEConfig(source).setup(device) for name, source in named(options.vae, "--vae").items()}

    fields: dict[str, list[ScenePairs | None]] = {}  # by the fingerprint of the encoder
    for vae in vaes.values():
        if vae.fingerprint not in fields:
            folder = options.output / "fields" / vae.fingerprint[:12]
            config = PairConfig(options.steps, options.downscale_factor)
            fields[vae.fingerprint] = build_scenes(options.scenes, vae, folder, config)

    names = [scene.resolve().name for scene in options.scenes]
    scenes = {
        scene: {name: pairs for name, vae in vaes.items() if (pairs := fields[vae.fingerprint][number]) is not None}
        for number, scene in enumerate(names)
    }
    failed = [scene for scene, by_vae in scenes.items() if len(by_vae) < len(vaes)]
    scenes = {scene: by_vae for scene, by_vae in scenes.items() if by_vae}
    metrics, rows = ImageMetrics(options.download_lpips, "--download-lpips"), list[Mapping[str, Any]]()
    for scene, by_vae in scenes.items():
        rgb = next(((pairs, vaes[name]) for name, pairs in by_vae.items() if vaes[name].source == RGB), None)
        for name, pairs in by_vae.items():
            measured = measures(options.output, scene, pairs, vaes[name], rgb, metrics)
            rows.append({"scene": scene, "vae": name, **measured, "cost": pairs.cost})
        for name, pairs in by_vae.items() if options.scene_decoder else ():
            if vaes[name].source != RGB:
                rows += with_scene_decoder(options, pairs, name, vaes[name])
    rows = with_means(rows)
    if scenes:
        write_atomically(options.output / "table.json", (json.dumps(rows, indent=2) + "\n").encode(), "--output")
        write_atomically(options.output / "table.md", decoding_table(rows).encode(), "--output")
        with replacing(options.output / "figure.png", "--output") as stream:
            decoding_figure(scenes, vaes).savefig(stream, dpi=150, format="png")
    return rows, failed


def measures(
    output: Path, scene: str, pairs: ScenePairs, vae: VAE, rgb: tuple[ScenePairs, VAE] | None, metrics: ImageMetrics
) -> dict[str, dict[str, float]]:
    """What :func:`measure_decoding` and, where there is a field in RGB, :func:`measure_recoding` give."""
    folder = output / "measures" / f"{vae.fingerprint[:12]}-{vae.decoder_fingerprint[:12]}"
    decoding = once(
        folder / f"{scene}.json",
        f"Decoding {scene} with {vae.source}",
        len(pairs.views),
        lambda advance: measure_decoding(pairs, vae, metrics, advance),
    )
    if rgb is None:
        return decoding
    recoding = once(
        folder / f"{scene}-recoded.json",
        f"Recoding {scene} with {vae.source}",
        len(pairs.of_kind("novel")),
        lambda advance: measure_recoding(*rgb, vae, metrics, advance),
    )
    return {**decoding, "novel": decoding["novel"] | recoding}


def with_scene_decoder(options: CompareVAEs, pairs: ScenePairs, name: str, vae: VAE) -> list[Mapping[str, Any]]:
    """The row of a VAE with the scene's own decoder, as `lrf benchmark` measures it; none if that failed."""
    scene = Path(pairs.scene)
    file = options.output / "measures" / f"{vae.fingerprint[:12]}-{vae.decoder_fingerprint[:12]}-decoder"
    method, data = Method(name, vae.source, scene_decoder=True), SceneData(scene, options.downscale_factor)
    config = MeasuringConfig(options.steps, download_lpips=options.download_lpips)
    fits = options.output / "decoder-fits" / scene.name
    row = attempted(
        lambda: once(
            file / f"{scene.name}.json",
            f"Fitting {scene.name} with {vae.source} and a decoder of its own",
            1,
            lambda _: measure(data, method, vae, fits, config)[0],
        )
    )
    if row is None:
        return []
    return [{"scene": scene.name, "vae": f"{name}, the scene's decoder", "train": {}, **row}]


def once(file: Path, description: str, total: int, measure: Callable[[Callable[[], None]], Any]) -> Any:
    """What `measure` gives, called with a function to call `total` times; from disk where it has been measured already.

    Raises:
        UserError: the file cannot be written.
    """
    if file.exists():
        return json.loads(file.read_text())
    with progress_bar(transient=True) as progress:
        task = progress.add_task(description, total=total)
        result = measure(lambda: progress.advance(task))
    write_atomically(file, json.dumps(result).encode(), "--output")
    return result


def main(options: CompareVAEs) -> None:
    """Compare, and print the table."""
    rows, failed = compare(options)
    if rows:
        Console().print(decoding_table(rows), markup=False, soft_wrap=True)
    if failed:
        raise UserError(
            f"No field could be fitted, for the reasons above, to: {', '.join(failed)}. The table lacks these. Run "
            "again to try them once more."
        )
