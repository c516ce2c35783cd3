"""Runs nerfstudio's commands as a user would, in processes of their own."""

import importlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    *(f"nerfstudio.scripts.{name}" for name in ("train", "eval", "render", "viewer.run_viewer")),
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_tiny",
    "lrf_nerfstudio.splatting.cpu.autograd",
    "sklearn.neighbors",
    "torch.utils.tensorboard",
]
"""What the commands import, now or later, and what takes its time."""


@dataclass
class Finished:
    """A command that has ended."""

    code: int
    output: str  # of both streams

    def check(self) -> "Finished":
        assert self.code == 0, self.output
        return self

    @property
    def message(self) -> str:
        """What a user who made a mistake reads: asserts that the command failed with one message and no traceback."""
        assert self.code == 1, f"exit code {self.code}\n{self.output}"
        assert "Traceback" not in self.output, self.output
        assert self.output.count("Error: ") == 1, self.output
        return self.output.split("Error: ")[1]


def run(command: str, *arguments: object, env: dict[str, str] | None = None, timeout: float = 500) -> Finished:
    """Run a command of the environment's bin folder: what a user types, with nerfstudio's seconds of imports."""
    process = start(command, *arguments, env=env)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Finished(process.returncode, output)


def start(command: str, *arguments: object, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """Start a command of the environment's bin folder."""
    executable = Path(sys.executable).with_name(command)
    return subprocess.Popen(
        [executable, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | (env or {}),
    )


class ForkedCommands:
    """Runs the commands' entry points in children of a server process that has imported nerfstudio already.

    Each child is a process with its own memory, exit code and limits, as from the shell, but starts in no time. The
    server has never computed anything, so its children start with fresh thread pools.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def start(
        self, command: str, *arguments: object, env: dict[str, str] | None = None, max_file_size: int | None = None
    ) -> tuple[BaseProcess, Path]:
        """Start a command; also the file that its output goes to."""
        self.count += 1
        log = self.folder / f"{self.count:03d}.log"
        argv = [command, *map(str, arguments)]
        process = self.context.Process(target=_child, args=(argv, log, env or {}, max_file_size))
        process.start()
        return process, log

    def __call__(
        self,
        command: str,
        *arguments: object,
        env: dict[str, str] | None = None,
        max_file_size: int | None = None,
        timeout: float = 300,
    ) -> Finished:
        """Run a command to its end.

        Args:
            command: such as ns-train.
            arguments: of the command line.
            env: variables to set.
            max_file_size: no file that the command writes can grow beyond this many bytes, as on a full disk.
            timeout: in seconds.
        """
        process, log = self.start(command, *arguments, env=env, max_file_size=max_file_size)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{command} takes more than {timeout} s\n{log.read_text()}")
        return Finished(process.exitcode, log.read_text())

    def call(self, function: Callable[..., Any], *arguments: object, timeout: float = 300) -> Any:
        """What an importable function gives in a fresh process."""
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_call, args=(sender, function, arguments))
        process.start()
        sender.close()
        try:
            assert receiver.poll(timeout), f"{function.__name__} takes more than {timeout} s"
            return receiver.recv()  # EOFError if the process died
        finally:
            process.kill()


def _call(sender: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    sender.send(function(*arguments))


def _child(argv: list[str], log: Path, env: dict[str, str], max_file_size: int | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= env
    if max_file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    sys.argv = argv
    (script,) = entry_points(group="console_scripts", name=argv[0])
    module, _, function = script.value.partition(":")
    getattr(importlib.import_module(module), function)()


def wait_until(condition: Callable[[], object], timeout: float = 60, what: str = "") -> None:
    """Wait until a condition holds; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what or condition} did not happen within {timeout} s"
        time.sleep(0.02)


@dataclass
class TrainedScene:
    """A scene that ns-train has trained with default options."""

    scene: Path
    run: Path  # where its config.yml is
    output: str  # what ns-train said

    @property
    def config(self) -> Path:
        return self.run / "config.yml"
