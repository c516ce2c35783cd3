"""Make the tables of published protocols.

Fits a field to each scene by each method, and measures held-out views.

A protocol (`lrf`, `lrf-llff-3`, `splatent`, `mip360`, `quick`) says which scenes, which photographs are held out, how
long fields are fitted and what is measured; see lrf_nerfstudio/evaluation/protocols. The rows are: each VAE with the
scene's own decoder and without it, which is the method of the paper; RGB at the VAE's latent resolution, enlarged
bicubically; and RGB at full resolution. What others have published stands beside, marked as theirs.

Run again after an interruption, it goes on where it was. To share the work, start several processes, on one machine or
many with one --output, with --num-shards and a --shard-index each; a last run without these writes the whole table.

Writes rows/<data set>/<scene>/<method>-seed<n>.json as soon as each is measured, then table.md, table.tex, results.json
(all rows) and figure.png (a held-out view of each scene). fits/ has the fields as ns-train leaves them; ns-eval gives
the same numbers for them.

Example: `lrf benchmark --protocol quick --data scenes --output results --vae lrf-f4c4`.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from rich.console import Console

from lrf_nerfstudio.correspondence.colmap import has_model
from lrf_nerfstudio.correspondence.scene import MODEL_FOLDERS
from lrf_nerfstudio.evaluation.names import named
from lrf_nerfstudio.evaluation.protocol import DataSet, Protocol, load_protocol
from lrf_nerfstudio.evaluation.tables import grid_of_pictures, protocol_latex, protocol_markdown
from lrf_nerfstudio.plugin.fitting import attempted
from lrf_nerfstudio.plugin.measuring import (
    MeasuringConfig,
    Method,
    SceneData,
    divided,
    measure,
    triangulate_training_views,
)
from lrf_nerfstudio.plugin.method import latent_splatfacto
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import replacing, write_atomically
from lrf_nerfstudio.utils.options import AtLeastOne, Count, Range
from lrf_nerfstudio.vae import VAE, VAEConfig
from lrf_nerfstudio.vae.sources import RGB

FIGURE_SCENES = 8
"""Scenes in the figure, at most: the first ones."""

Kind = Literal["scene-decoder", "vae", "rgb-at-latents", "rgb"]


@dataclass
class Benchmark:
    """Makes the tables of published protocols."""

    protocol: str = "quick"
    """Name of the protocol: lrf, lrf-llff-3, splatent, mip360 or quick."""
    data: Path = Path("data")
    """Folder that has the protocol's data sets; what is missing is named, with where to get it."""
    vae: tuple[str, ...] = ("untouched=lrf-f4c4-base", "stage I=lrf-f4c4-stage1", "stages I and III=lrf-f4c4")
    """VAEs: sources as for --pipeline.vae.source, each with a name for the table if wished (NAME=SOURCE)."""
    rows: tuple[Kind, ...] = ("scene-decoder", "vae", "rgb-at-latents", "rgb")
    """What is measured: each VAE with the scene's own decoder, and without it as in the paper; RGB at the resolution of
    the latents, enlarged; RGB at full resolution."""
    scenes: tuple[str, ...] = ()
    """Names of the scenes to measure; all that are there where none is named."""
    steps: int | None = None
    """Steps of a fit, where they are to be others than the protocol's; the table says so."""
    seeds: tuple[int, ...] = (latent_splatfacto.config.machine.seed,)
    """Seeds; with several, each method is fitted with each, and the table has their means."""
    opacity_dropout: Annotated[float, Range(least=0, below=1)] = 0.0
    """--pipeline.model.opacity-dropout of all fits, which the names of the rows tell where it is not 0."""
    output: Path = Path("benchmark")
    """Folder for the rows, the tables and the fits, which a second run takes up."""
    download_lpips: bool = False
    """Download the weights of LPIPS's network where they are missing; without them LPIPS is left out."""
    num_shards: AtLeastOne = 1
    """Processes that share the scenes."""
    shard_index: Count = 0
    """Which of them this is, from 0."""


@dataclass(frozen=True)
class Place:
    """Where a scene is, and what it is called."""

    data_set: DataSet
    name: str
    folder: Path


# ---------------------------------------------------------------------------------------------------- what there is


def find_scenes(protocol: Protocol, data: Path, only: Sequence[str]) -> tuple[list[Place], list[str]]:
    """Look for the scenes of a protocol.

    Args:
        protocol: names data sets and scenes.
        data: the folder of the data sets.
        only: names of scenes; empty stands for all.

    Returns:
        The scenes that are there, and what to tell the user of those that are not.
    """
    found, missing = [], []
    for data_set in protocol.data_sets:
        folder = data / data_set.folder
        names = data_set.scenes
        if not names and folder.is_dir():
            names = tuple(sorted(path.name for path in folder.iterdir() if _is_scene(path / data_set.inside)))
        names = tuple(name for name in names if not only or name in only)
        there = [name for name in names if _is_scene(folder / name / data_set.inside)]
        found += [Place(data_set, name, (folder / name / data_set.inside).resolve()) for name in there]
        absent = [name for name in names if name not in there]
        if absent or not (there or only):
            what = f"{', '.join(absent)} of {data_set.name}" if there or only else data_set.name
            missing.append(f"Not measured: {what}, which is looked for in {folder}. It is {data_set.where}.")
    return found, missing


def _is_scene(folder: Path) -> bool:
    return (folder / "transforms.json").exists() or any(has_model(folder / model) for model in MODEL_FOLDERS)


def methods_of(vaes: Mapping[str, VAE], rows: Sequence[Kind], opacity_dropout: float) -> list[Method]:
    """Return the rows of a scene: those of the VAEs by name, then those of RGB."""
    methods = []
    dropout = f", dropout {opacity_dropout:g}" if opacity_dropout else ""
    for name, vae in vaes.items():
        if "scene-decoder" in rows:
            methods.append(Method(f"{name}, the scene's decoder{dropout}", vae.source, True, opacity_dropout))
        if "vae" in rows:
            methods.append(Method(f"{name}{dropout}", vae.source, False, opacity_dropout))
    if "rgb-at-latents" in rows:
        for factor in sorted({vae.spatial_factor for vae in vaes.values() if vae.spatial_factor > 1}):
            name = f"RGB at 1/{factor}, enlarged{dropout}"
            methods.append(Method(name, f"{RGB}-f{factor}", False, opacity_dropout))
    if "rgb" in rows:
        methods.append(Method(f"RGB{dropout}", RGB, False, opacity_dropout))
    return methods


# ---------------------------------------------------------------------------------------------------- measuring


def benchmark(options: Benchmark) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure what is missing and write the files.

    Returns:
        All rows that are in the output folder, and the scenes of this process that failed.

    Raises:
        UserError: if options do not fit together, nothing is there to measure, a VAE cannot be used, or the files
            cannot be written.
    """
    protocol = load_protocol(options.protocol)
    if options.steps is not None:
        title = f"{protocol.title}; here all fields are fitted for {options.steps:,} steps"
        protocol = replace(protocol, steps=options.steps, rgb_steps=None, title=title)
    if not 0 <= options.shard_index < options.num_shards:
        raise UserError(f"--shard-index is from 0 to --num-shards - 1, which is {options.num_shards - 1}.")
    places, missing = find_scenes(protocol, options.data.expanduser(), options.scenes)
    for message in missing:
        Console().print(message, markup=False, style="yellow")
    if not places:
        raise UserError(f"None of the scenes of the protocol {protocol.name} is in {options.data} (--data).")
    vaes = {name: VAEConfig(source).setup() for name, source in named(options.vae, "--vae").items()}
    methods = methods_of(vaes, options.rows, options.opacity_dropout)
    if not methods:
        raise UserError("There is nothing to measure: give --rows or --vae.")
    _claim(options, protocol)

    by_source = {vae.source: vae for vae in vaes.values()}
    by_source |= {m.source: VAEConfig(m.source).setup() for m in methods if m.source not in by_source}
    failed = []
    for number, place in enumerate(places[options.shard_index :: options.num_shards], start=1):
        Console().print(f"Scene {number}: {place.name} of {place.data_set.name}", markup=False, soft_wrap=True)
        scene = attempted(partial(_prepared, place, protocol, options.output))
        if scene is None:
            failed.append(place.name)
            continue
        for method, seed in itertools.product(methods, options.seeds):
            steps = protocol.rgb_steps if method.in_rgb and protocol.rgb_steps is not None else protocol.steps
            config = MeasuringConfig(steps, seed, protocol.lpips, options.download_lpips)
            vae = by_source[method.source]
            if attempted(partial(_measured, place, scene, method, vae, options.output, config)) is None:
                failed.append(place.name)
    rows = read_rows(options.output, places, methods, options.seeds)
    if rows:
        write_tables(rows, protocol, options.output)
        _write_figure(places, methods, options.seeds[0], options.output)
    return rows, list(dict.fromkeys(failed))


def _claim(options: Benchmark, protocol: Protocol) -> None:
    """Note in the output folder what rows in it mean; refuse a folder of other rows."""
    file = options.output / "settings.json"
    settings = {
        "protocol": protocol.name,
        "steps": protocol.steps,
        "rgb_steps": protocol.rgb_steps,
    }
    if not file.exists():
        write_atomically(file, (json.dumps(settings, indent=2) + "\n").encode(), "--output")
    there = json.loads(file.read_text())
    for name, value in settings.items():
        if there.get(name) != value:
            raise UserError(
                f"{options.output} holds rows of another kind: their {name} is {there.get(name)}, not {value}. Use the "
                "options of the first time, or another --output."
            )


def _prepared(place: Place, protocol: Protocol, output: Path) -> SceneData:
    """Divide a scene, and find its first points where the protocol asks for it."""
    scene = replace(divided(place.folder, place.data_set.images, place.data_set.split), crop=protocol.crop)
    if protocol.points == "sfm":
        return scene
    file = output / "points" / slug(place.data_set.name) / f"{place.name}.ply"
    return replace(scene, points=triangulate_training_views(scene, file))


def _measured(
    place: Place, scene: SceneData, method: Method, vae: VAE, output: Path, config: MeasuringConfig
) -> dict[str, Any]:
    """Return a row: from disk, or measured and written there."""
    file = _row_file(output, place, method, config.seed)
    if file.exists():
        row = json.loads(file.read_text())
        identity = (vae.fingerprint, vae.decoder_fingerprint)
        if (row["vae"]["fingerprint"], row["vae"]["decoder_fingerprint"]) != identity:
            raise UserError(
                f"{file} was measured with another VAE of the name {method.name!r}. Give the VAE another name (--vae "
                "NAME=SOURCE), or use another --output."
            )
        return row
    measured, pictures = measure(scene, method, vae, output / "fits" / slug(place.data_set.name) / place.name, config)
    for name, picture in pictures.items():
        title = "photograph.png" if name == "photograph" else f"{file.stem}.png"
        with replacing(_picture_folder(output, place) / title, "--output") as stream:
            Image.fromarray(picture).save(stream, format="PNG")
    row = {"data_set": place.data_set.name, "scene": place.name, "method": method.name, "seed": config.seed, **measured}
    row["photographs"] = {"train": list(scene.train), "held_out": list(scene.held_out)}
    row["options"] = {
        "steps": config.steps,
        "scene_decoder": method.scene_decoder,
        "opacity_dropout": method.opacity_dropout,
        "lpips": config.lpips,
    }
    write_atomically(file, (json.dumps(row, indent=1) + "\n").encode(), "--output")
    return row


def slug(name: str) -> str:
    """Return a name without what file systems do not like."""
    return re.sub(r"[^\w.-]+", "-", name)


def _row_file(output: Path, place: Place, method: Method, seed: int) -> Path:
    return output / "rows" / slug(place.data_set.name) / place.name / f"{slug(method.name)}-seed{seed}.json"


def _picture_folder(output: Path, place: Place) -> Path:
    return output / "pictures" / slug(place.data_set.name) / place.name


# ---------------------------------------------------------------------------------------------------- tables


def read_rows(
    output: Path, places: Sequence[Place], methods: Sequence[Method], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Read what has been measured, by whatever process, in the order of the table."""
    files = (_row_file(output, *row) for row in itertools.product(places, methods, seeds))
    return [json.loads(file.read_text()) for file in files if file.exists()]


def write_tables(rows: Sequence[Mapping[str, Any]], protocol: Protocol, output: Path) -> None:
    """Write results.json, from which the tables can be made again, table.md and table.tex.

    Raises:
        UserError: if they cannot be written.
    """
    results = {"protocol": protocol.name, "title": protocol.title, "rows": list(rows)}
    write_atomically(output / "results.json", (json.dumps(results, indent=1) + "\n").encode(), "--output")
    write_atomically(output / "table.md", protocol_markdown(rows, protocol).encode(), "--output")
    write_atomically(output / "table.tex", protocol_latex(rows, protocol).encode(), "--output")


def _write_figure(places: Sequence[Place], methods: Sequence[Method], seed: int, output: Path) -> None:
    """Draw a held-out view of each of the first scenes: the photograph, and the pictures of all methods."""
    titles = ["photograph", *(method.name for method in methods)]
    pictures: dict[str, dict[str, np.ndarray]] = {}
    for place in places:
        folder = _picture_folder(output, place)
        files = [folder / "photograph.png"]
        files += [folder / f"{_row_file(output, place, method, seed).stem}.png" for method in methods]
        row = {t: np.asarray(Image.open(file)) for t, file in zip(titles, files, strict=True) if file.exists()}
        if "photograph" in row and len(pictures) < FIGURE_SCENES:
            pictures[f"{place.name} of {place.data_set.name}" if place.name in pictures else place.name] = row
    if pictures:
        with replacing(output / "figure.png", "--output") as stream:
            grid_of_pictures(pictures, titles).savefig(stream, dpi=150, format="png")


def main(options: Benchmark) -> None:
    """Measure, and print the table."""
    rows, failed = benchmark(options)
    if rows:
        Console().print((options.output / "table.md").read_text(), markup=False, soft_wrap=True)
    if failed:
        raise UserError(
            f"Not everything could be measured, for the reasons above, of: {', '.join(failed)}. Run again to try once "
            "more."
        )
