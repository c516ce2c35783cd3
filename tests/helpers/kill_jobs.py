"""Kills jobs with signal 9 at random moments, starts them again, and compares how they end with an undisturbed run."""

import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Job = Literal["training", "scene-decoder", "stage1", "stage3", "pairs", "benchmark"]

TIMEOUT = 1800
"""Seconds after which a job has hung."""


@dataclass
class KillAndResume:
    """Kills jobs with signal 9 at random moments and starts them again until they end as an undisturbed run does.

    Every job is tiny (photographs of 100 pixels, an untrained autoencoder) and takes seconds.
    """

    jobs: tuple[Job, ...] = ("training", "scene-decoder", "stage1", "stage3", "pairs", "benchmark")
    """What is killed."""
    kills: int = 20
    """How often each is killed."""
    seed: int = 0
    """Of the moments."""
    report: Path | None = None
    """File for the figures, as JSON."""


@dataclass
class Figures:
    """What became of a job.

    Attributes:
        kills: how often it was killed.
        runs: that were taken to their end, each of which was compared with the undisturbed one.
        resumed: starts that found something of an earlier one to go on from.
        seconds: of the undisturbed run.
        left: names of what the kills have left behind, temporary files, with their counts.
    """

    kills: int
    runs: int
    resumed: int
    seconds: float
    left: dict[str, int]


class Killable(Protocol):
    """A job that is one command."""

    def command(self, output: Path) -> list[object]:
        """Return the command line that begins or goes on with a run."""

    def found(self, output: Path) -> bool:
        """Return whether there is something to go on from."""

    def complete(self, output: Path) -> bool:
        """Return whether a run was killed after it had written all, and refuses to be started again."""

    def compare(self, whole: Path, killed: Path) -> None:
        """Fail where the two runs have not ended alike."""


def assert_survives_kills(
    job: Killable, folder: Path, kills: int, seed: int, start: Callable[..., Any], say: Callable[[str], None] = print
) -> Figures:
    """Kill a job again and again; each run that comes to its end must have ended as one that is left alone.

    Args:
        job: to kill.
        folder: to write to.
        kills: how often.
        seed: of the moments, which are spread evenly over the time that an undisturbed run takes.
        start: starts a command line, and returns its process and the file of its output.
        say: told of every kill.
    """
    generator = random.Random(seed)

    def begin(output: Path) -> tuple[Any, Path]:
        command = job.command(output)
        environment = {"XDG_CACHE_HOME": str(output / "cache"), "MPLCONFIGDIR": str(folder / "matplotlib")}
        process, log = start(*command, env=environment)
        return process, log

    def wait(process: Any, log: Path) -> None:
        process.join(TIMEOUT)
        assert process.exitcode == 0, f"exit code {process.exitcode}\n{log.read_text()}"

    warm_up = folder / "warm_up"  # compiles kernels, fills the system's file cache
    wait(*begin(warm_up))
    shutil.rmtree(warm_up)
    whole = folder / "whole"
    begun = time.monotonic()
    wait(*begin(whole))
    seconds = lasts = time.monotonic() - begun
    say(f"undisturbed: {seconds:.1f} s")

    done = runs = resumed = 0
    left: Counter[str] = Counter()
    output = folder / "killed-0"
    while True:
        goes_on, complete = job.found(output), job.complete(output)
        resumed += goes_on
        begun = time.monotonic()
        if not complete:
            process, log = begin(output)
        if done < kills and not complete:
            delay = generator.uniform(0, lasts)
            process.join(delay)
            if process.exitcode is None:
                process.kill()
                process.join()
                done += 1
                say(f"kill {done} after {delay:.1f} s")
                continue
        if not complete:
            wait(process, log)
        if not goes_on:  # other programs slow a machine down, or no longer do
            lasts = time.monotonic() - begun
        job.compare(whole, output)
        runs += 1
        left.update(_kind(path) for path in output.rglob("*") if path.is_file() and path.name.startswith("."))
        say(f"run {runs} has ended as the undisturbed one")
        shutil.rmtree(output)
        if done == kills:
            return Figures(done, runs, resumed, round(seconds, 1), dict(left))
        output = folder / f"killed-{runs}"


def _kind(path: Path) -> str:
    """The name of a temporary file without what is random in it."""
    return path.name.rpartition("-")[0]


# ---------------------------------------------------------------------------------------------------- jobs


@dataclass
class Training:
    """ns-train with Gaussians that are added and removed, with or without the scene's own decoder."""

    scene: Path
    vae: Path
    share: float
    steps: int

    def command(self, output: Path) -> list[object]:
        more = ["--load-dir", self._models(output)] if self.found(output) else []
        densification = {"start": 0.1, "stop": 1.0, "gradient-threshold": 1e-7, "max-gaussians": 500}
        return [
            *("ns-train", "latent-splatfacto", "--data", self.scene, "--output-dir", output, "--timestamp", "run"),
            *("--vis", "tensorboard", "--max-num-iterations", self.steps, "--pipeline.vae.source", self.vae),
            *("--steps-per-save", 10, "--pipeline.model.scene-decoder.share", self.share),
            *(item for name, x in densification.items() for item in (f"--pipeline.model.densification.{name}", x)),
            *more,
        ]

    def found(self, output: Path) -> bool:
        return any(self._models(output).glob("step-*.ckpt"))

    def compare(self, whole: Path, killed: Path) -> None:
        import torch
        from equality import assert_equal

        expected, actual = (torch.load(self._last(output), weights_only=True) for output in (whole, killed))
        assert expected["step"] == self.steps - 1
        assert_equal(actual, expected)

    def complete(self, output: Path) -> bool:
        return self._last(output).exists()

    def _last(self, output: Path) -> Path:
        return self._models(output) / f"step-{self.steps - 1:09d}.ckpt"

    def _models(self, output: Path) -> Path:
        return output / self.scene.name / "latent-splatfacto" / "run" / "nerfstudio_models"


@dataclass
class Tuning:
    """lrf stage1 or stage3, with a checkpoint after every second step."""

    name: str
    options: list[object]
    steps: int

    def command(self, output: Path) -> list[object]:
        run = output / "run"
        if not self.found(output):
            shutil.rmtree(run, ignore_errors=True)  # killed before the first checkpoint was complete
        return [
            *("lrf", self.name, *self.options, "--output", run, "--steps", self.steps, "--save-every", 2),
            *("--device", "cpu", *(["--resume"] if self.found(output) else [])),
        ]

    def found(self, output: Path) -> bool:
        return (output / "run" / "checkpoint.pt").exists()

    def complete(self, output: Path) -> bool:
        return False  # what is complete is left as it is

    def compare(self, whole: Path, killed: Path) -> None:
        from tiny_runs import assert_same_end

        assert_same_end(killed / "run", whole / "run")


@dataclass
class Pairs:
    """lrf pairs of two scenes, with three snapshots of each."""

    scenes: list[Path]
    vae: Path

    def command(self, output: Path) -> list[object]:
        return [
            *("lrf", "pairs", "--scenes", *self.scenes, "--vae", self.vae, "--output", output / "pairs"),
            *("--steps", 60, "--snapshots", 20, 40),
        ]

    def found(self, output: Path) -> bool:
        return any(output.glob("pairs/*/*.json"))

    def complete(self, output: Path) -> bool:
        return False  # what is complete is left as it is

    def compare(self, whole: Path, killed: Path) -> None:
        from lrf_nerfstudio.training.data.scene_pairs import ScenePairs

        for scene in self.scenes:
            expected, actual = (ScenePairs.load(output / "pairs" / scene.name) for output in (whole, killed))
            for pairs in (expected, actual):
                assert not pairs.missing_files()
                pairs.cost, pairs.folder = {}, Path()  # seconds and memory
            assert actual == expected
            files = sorted((whole / "pairs" / scene.name).glob("*.safetensors"))
            assert files
            for file in files:
                assert (killed / "pairs" / scene.name / file.name).read_bytes() == file.read_bytes(), file.name


@dataclass
class Table:
    """lrf benchmark of one scene by two methods."""

    data: Path
    vae: Path

    def command(self, output: Path) -> list[object]:
        return [
            *("lrf", "benchmark", "--data", self.data, "--vae", f"tiny={self.vae}", "--steps", 30),
            *("--rows", "scene-decoder", "vae", "--output", output / "table"),
        ]

    def found(self, output: Path) -> bool:
        return any(output.glob("table/rows/**/*.json"))

    def complete(self, output: Path) -> bool:
        return False  # what is complete is left as it is

    def compare(self, whole: Path, killed: Path) -> None:
        expected, actual = (self._numbers(output / "table") for output in (whole, killed))
        assert len(expected) == 2
        assert actual == expected

    def _numbers(self, table: Path) -> list[dict[str, Any]]:
        """The rows without seconds and memory."""
        rows: list[dict[str, Any]] = json.loads((table / "results.json").read_text())["rows"]
        for row in rows:
            row["novel"] = {name: value for name, value in row["novel"].items() if not name.endswith("seconds")}
            row["cost"] = row["cost"]["gaussians"]
        return rows


def make_job(name: Job, folder: Path) -> Killable:
    """Write what a job reads.

    Args:
        name: of the job.
        folder: to write to.
    """
    from tiny_pairs import write_pairs
    from tiny_runs import write_tiny
    from tiny_scenes import Lens, write_scene
    from tiny_vaes import make_vae

    folder.mkdir(parents=True)
    if name in ("training", "scene-decoder"):
        scene = write_scene(folder / "floor", views=17, lenses=Lens(101, 67))
        share, steps = (0.0, 120) if name == "training" else (0.6, 80)
        return Training(scene, make_vae(folder / "vae"), share, steps)
    if name == "stage1":
        from lrf_nerfstudio.commands import make_demo_scene

        scene = folder / "scene"
        make_demo_scene.main(make_demo_scene.DemoScene(output=scene, views=12, size=(100, 132), samples=1, points=500))
        vae = write_tiny(folder / "vae")
        options = ["--scenes", scene, "--vae", vae, "--crop", 64, "--max-reduction", 1.2, "--batch-size", 1]
        return Tuning(name, [*options, "--workers", 0], steps=40)
    if name == "stage3":
        vae = write_tiny(folder / "vae")
        write_pairs(folder / "pairs" / "scene", vae)
        options = ["--pairs", folder / "pairs", "--vae", vae, "--crop", 32, "--batch-size", 2, "--workers", 0]
        return Tuning(name, options, steps=60)
    if name == "pairs":
        scenes = [write_scene(folder / name, views=9, lenses=Lens(101, 67)) for name in "ab"]
        return Pairs(scenes, make_vae(folder / "vae"))
    from PIL import Image

    scene = write_scene(folder / "data" / "a", views=9, lenses=Lens(100, 68))
    (scene / "images_2").mkdir()
    for path in (scene / "images").iterdir():
        with Image.open(path) as image:
            image.resize((50, 34)).save(scene / "images_2" / path.name)
    return Table(folder / "data", make_vae(folder / "vae"))


def main(options: KillAndResume) -> None:
    """Kill all jobs, and print and write the figures."""
    from commands import ForkedCommands

    # Sums depend on the number of threads, and there is no network to wait for.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    figures: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        folder = Path(temporary)
        forked = ForkedCommands(folder)
        for job in options.jobs:
            killable = make_job(job, folder / job / "data")
            figures[job] = assert_survives_kills(
                killable,
                folder / job,
                options.kills,
                options.seed,
                forked.start,
                lambda said, job=job: print(f"{job}: {said}", flush=True),  # type: ignore[misc]
            )
            print(f"{job}: {figures[job]}", flush=True)
            if options.report is not None:
                options.report.write_text(json.dumps({name: vars(item) for name, item in figures.items()}, indent=1))
