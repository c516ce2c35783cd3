"""A script from its command line to its exit code, as a file that is run and as a function that a test calls."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from lrf_nerfstudio.utils.cli import run

SCRIPT = '''"""Repeats words.

Example: `python repeat.py --words a b`.
"""

import functools
from dataclasses import dataclass

from lrf_nerfstudio.utils.cli import run
from lrf_nerfstudio.utils.errors import UserError


@dataclass
class Repeat:
    """Options."""

    words: tuple[str, ...] = ()
    """What is repeated."""
    times: int = 2
    """How often."""


def decorated(function):
    return functools.wraps(function)(lambda options: function(options))


@decorated
def main(options: Repeat) -> None:
    """Repeat."""
    if options.times < 0:
        raise UserError(f"--times is {options.times}. Give 0 or more.")
    print(*options.words * options.times)


if __name__ == "__main__":
    run(main)
'''


def run_file(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    (folder / "repeat.py").write_text(SCRIPT)
    return subprocess.run([sys.executable, folder / "repeat.py", *arguments], capture_output=True, text=True)


def test_options_reach_main(tmp_path):
    finished = run_file(tmp_path, "--words", "a", "b", "--times", "3")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "a b a b a b\n", "")


def test_a_users_mistake_is_one_message_and_status_1(tmp_path):
    finished = run_file(tmp_path, "--times", "-1")
    assert finished.returncode == 1 and finished.stdout == ""
    assert finished.stderr == "\nError: --times is -1. Give 0 or more.\n"


def test_help_begins_with_the_modules_docstring_and_has_every_option(tmp_path):
    finished = run_file(tmp_path, "--help")
    assert finished.returncode == 0
    assert "Repeats words.\n" in finished.stdout and "Example: `python repeat.py --words a b`." in finished.stdout
    for text in ("--words", "What is repeated.", "--times", "How often."):
        assert text in finished.stdout
    assert run_file(tmp_path, "--wrods", "a").returncode == 2


def test_arguments_take_the_place_of_the_processes_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "repeat_here.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    repeat_here = importlib.import_module("repeat_here")

    run(repeat_here.main, ["--words", "a"])
    assert capsys.readouterr().out == "a a\n"
    with pytest.raises(SystemExit) as raised:
        run(repeat_here.main, ["--times", "-1"])
    assert raised.value.code == 1
