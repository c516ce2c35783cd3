"""Nothing in the terminal that is not for the user: no warnings of libraries about their own code."""

import subprocess
import sys

import pytest
from commands import TrainedScene, run

ALL_HELP = """
import os, sys
import torch  # once for all
from lrf_nerfstudio.__main__ import COMMANDS, main

for command in COMMANDS:
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        main([command, "--help"])  # raises SystemExit
    assert os.waitpid(child, 0)[1] == 0, command
"""

NERFSTUDIO_ALONE = """
import nerfstudio.plugins.registry

nerfstudio.plugins.registry.discover_methods = lambda: ({}, {})
import nerfstudio.scripts.train
"""


def stderr_of(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr


def warnings_in(output: str) -> set[str]:
    return {line for line in output.splitlines() if "Warning" in line}


@pytest.fixture(scope="module")
def of_nerfstudio() -> set[str]:
    """What nerfstudio says of its own imports before it loads any plugin, where no plugin can keep it from doing so."""
    return warnings_in(stderr_of(NERFSTUDIO_ALONE))


@pytest.mark.slow
def test_no_command_warns_when_it_is_asked_for_help() -> None:
    assert stderr_of(ALL_HELP) == ""


@pytest.mark.slow
def test_the_plugin_adds_no_warning_to_nerfstudios(of_nerfstudio: set[str]) -> None:
    help_text = run("ns-train", "latent-splatfacto", "--help").check().output
    assert warnings_in(help_text) <= of_nerfstudio


def test_training_adds_no_warning_to_nerfstudios(trained: TrainedScene, of_nerfstudio: set[str]) -> None:
    assert warnings_in(trained.output) <= of_nerfstudio
