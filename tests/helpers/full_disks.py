"""Runs jobs on disks that are too small, then gives them room: nothing old is lost, and they end as ever."""

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kill_jobs import TIMEOUT, Job, Killable, make_job


@dataclass
class FillDisk:
    """Lets jobs run into full disks, of random sizes, and then go on with room. Mounts file systems: needs root."""

    jobs: tuple[Job, ...] = ("training", "scene-decoder", "stage1", "stage3", "pairs", "benchmark")
    """What is run."""
    disks: int = 5
    """How many sizes each is tried with."""
    seed: int = 0
    """Of the sizes."""
    report: Path | None = None
    """File for the figures, as JSON."""


@dataclass
class Figures:
    """What became of a job.

    Attributes:
        disks: that were too small.
        kilobytes: of these disks.
        whole: kilobytes that an undisturbed run takes.
        failures: what was not as it should be.
    """

    disks: int
    kilobytes: list[int]
    whole: int
    failures: list[str]


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a file system of a size at a folder; what is yielded changes the size."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)

    def resize(kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", folder], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def assert_survives_full_disks(
    job: Killable, folder: Path, disks: int, seed: int, start: Callable[..., Any], say: Callable[[str], None] = print
) -> Figures:
    """Run a job on disks of random sizes below what it needs.

    Args:
        job: to run.
        folder: to write to.
        disks: how many.
        seed: of the sizes.
        start: starts a command line, and returns its process and the file of its output.
        say: told what becomes of every disk.
    """
    generator, failures, sizes = random.Random(seed), list[str](), list[int]()

    def run(output: Path) -> tuple[int | None, str]:
        environment = {"XDG_CACHE_HOME": str(output / "cache"), "MPLCONFIGDIR": str(folder / "matplotlib")}
        process, log = start(*job.command(output), env=environment)
        process.join(TIMEOUT)
        return process.exitcode, log.read_text()

    whole = folder / "whole"
    code, said = run(whole)
    assert code == 0, said
    needed = int(subprocess.run(["du", "-sk", whole], check=True, capture_output=True, text=True).stdout.split()[0])
    for number in range(disks):
        output = folder / f"small-{number}"
        size = generator.randint(8, max(9, needed * 9 // 10))
        with small_disk(output, size) as resize:
            code, said = run(output)
            if code == 0:
                say(f"{size} kB of {needed} suffice")
            else:
                sizes.append(size)
                what = f"{size} kB of {needed}: "
                if code != 1 or "Traceback" in said:
                    failures.append(f"{what}exit code {code}\n{said[-3000:]}")
                elif "could not be written" not in " ".join(said.split()):
                    failures.append(f"{what}an unclear message\n{said[-1000:]}")
            resize(4 * needed + 100_000)
            if not job.complete(output):
                code, said = run(output)
                if code != 0:
                    failures.append(f"with room after {size} kB: exit code {code}\n{said[-3000:]}")
                    continue
            job.compare(whole, output)
            say(f"{size} kB of {needed}, then room: has ended as ever")
    return Figures(len(sizes), sizes, needed, failures)


def main(options: FillDisk) -> None:
    """Fill disks, and print and write the figures."""
    from commands import ForkedCommands

    from lrf_nerfstudio.utils.errors import UserError

    if os.geteuid() != 0:
        raise UserError("Only root can mount the small file systems that this needs.")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    figures: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="disks-") as temporary:
        folder = Path(temporary)
        forked = ForkedCommands(folder)
        for job in options.jobs:

            def say(said: str, job: Job = job) -> None:
                print(f"{job}: {said}", flush=True)

            killable = make_job(job, folder / job / "data")
            figures[job] = found = assert_survives_full_disks(
                killable, folder / job, options.disks, options.seed, forked.start, say
            )
            print(
                f"{job}: {found.disks} full disks, {len(found.failures)} failures",
                *found.failures,
                sep="\n",
                flush=True,
            )
            if options.report is not None:
                options.report.write_text(json.dumps({name: vars(item) for name, item in figures.items()}, indent=1))
    if any(found.failures for found in figures.values()):
        raise UserError("Not every full disk ended in a clear message.")
