"""The command `lrf`: its help, its names, and the scripts of a checkout, which are the same functions."""

import inspect
import os
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from lrf_nerfstudio.__main__ import COMMANDS, function_of, main, summary
from lrf_nerfstudio.utils import cli

ROOT = Path(__file__).resolve().parents[2]
FOR_DEVELOPERS = {"fill_disk", "fuzz_readers", "kill_and_resume", "soak"}
"""Scripts that need a checkout: what they work on is written by tests/helpers."""
HEAVY = {"accelerate", "diffusers", "matplotlib", "nerfstudio", "numba", "pycolmap", "torch", "torchvision"}

HELP = """
import runpy, sys
sys.argv = ["lrf", *sys.argv[1:]]
try:
    runpy.run_module("lrf_nerfstudio", run_name="__main__")
finally:
    print("MODULES", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """The exit code and all that `lrf` prints, words apart by one space."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    captured = capsys.readouterr()
    return stopped.value.code, " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_every_command_at_once_and_imports_nothing_heavy(arguments: list[str]) -> None:
    seconds = []
    for _ in range(2):  # the second time, Python's own caches are warm
        start = os.times()
        finished = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True)
        end = os.times()
        seconds.append(end.children_user + end.children_system - start.children_user - start.children_system)
    assert finished.returncode == 0, finished.stderr
    shown = " ".join(finished.stdout.replace("│", " ").split())
    for command in COMMANDS:
        assert f" {command} {summary(command).split()[0]}" in shown
    assert not HEAVY & set(finished.stderr.rpartition("MODULES")[2].split())
    assert min(seconds) < 1


def test_every_command_has_its_module_its_script_and_a_summary_of_one_line() -> None:
    folder = ROOT / "lrf_nerfstudio" / "commands"
    assert sorted(COMMANDS.values()) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert scripts - FOR_DEVELOPERS == set(COMMANDS.values()) and scripts >= FOR_DEVELOPERS
    for command, module in COMMANDS.items():
        docstring = inspect.getdoc(import_module(f"lrf_nerfstudio.commands.{module}")) or ""
        assert docstring.startswith(summary(command)) and docstring[len(summary(command)) :][:2] in ("", "\n\n")
        assert summary(command).endswith(".")


@pytest.mark.parametrize("command", COMMANDS)
def test_scripts_and_lrf_call_the_same_function(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = []
    monkeypatch.setattr(cli, "run", lambda function, *arguments, **names: called.append(function))
    monkeypatch.setattr("lrf_nerfstudio.__main__.run", cli.run)
    runpy.run_path(str(ROOT / "scripts" / f"{COMMANDS[command]}.py"), run_name="__main__")
    main([command])
    main([command.replace("-", "_")])
    assert called == [function_of(command)] * 3


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_what_to_type(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = printed(capsys, command, "--help")
    assert code == 0
    assert f"usage: lrf {command} " in text and summary(command).split(".")[0] in text


def test_wrong_commands_and_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = printed(capsys, "stage2")
    assert code == 2 and "stage2" in text and "stage1" in text
    code, text = printed(capsys, "demo-scene", "--veiws", "9")
    assert code == 2 and "--veiws" in text and "--views" in text


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete_commands_and_their_options(shell: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--tyro-write-completion", shell, str(tmp_path / "lrf")])
    assert not stopped.value.code
    script = (tmp_path / "lrf").read_text()
    for word in (*COMMANDS, "correspondence-weight", "shard-index", "load-config"):
        assert word in script
    if shell == "bash":
        subprocess.run(["bash", "-n", tmp_path / "lrf"], check=True)
