"""The package as it is installed: entry point, dependencies, pins, scripts."""

import ast
import compileall
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHELL_SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]


def direct_dependencies(extra: str | None = None) -> list[Requirement]:
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def pins() -> list[Requirement]:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins_here() -> dict[str, str]:
    """Canonical name to version, as the markers choose on this machine."""
    chosen = [pin for pin in pins() if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in chosen}


DISCOVER = """
import json, sys, time
from importlib.metadata import EntryPoint

load = EntryPoint.load
cost = {}

def timed(self):
    before, start = set(sys.modules), time.process_time()
    result = load(self)
    if self.name == "latent-splatfacto":
        cost.update(seconds=time.process_time() - start, modules=sorted(set(sys.modules) - before))
    return result

EntryPoint.load = timed
from nerfstudio.configs.method_configs import all_descriptions, all_methods

method = all_methods["latent-splatfacto"]
print(json.dumps(cost | {"name": method.method_name, "description": all_descriptions["latent-splatfacto"]}))
"""


@pytest.fixture(scope="module")
def discovered() -> dict[str, Any]:
    """What every command of nerfstudio does first, and what this package adds to it."""
    import lrf_nerfstudio

    compileall.compile_dir(str(Path(lrf_nerfstudio.__file__).parent), quiet=1)
    result = subprocess.run([sys.executable, "-c", DISCOVER], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_nerfstudio_finds_the_method(discovered: dict[str, Any]) -> None:
    assert discovered["name"] == "latent-splatfacto"
    assert discovered["description"]


def test_the_plugin_costs_nerfstudios_commands_little(discovered: dict[str, Any]) -> None:
    added = {module.split(".")[0] for module in discovered["modules"]}
    assert not added & {"diffusers", "numba", "llvmlite", "pycolmap", "safetensors", "selenium", "transformers"}, added
    assert discovered["seconds"] < 0.3


def test_one_opencv_and_it_is_headless() -> None:
    assert set(importlib.metadata.packages_distributions()["cv2"]) == {"opencv-python-headless"}


def test_pins_are_exact_versions_and_name_no_place() -> None:
    for pin in pins():
        assert pin.url is None
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), pin
    for path in (ROOT / "scripts" / "constraints.txt", ROOT / "pyproject.toml", *SHELL_SCRIPTS):
        assert not re.search(r"https?:|file://|--\S*index\b|--find-links", path.read_text()), path


def test_pins_cover_and_meet_the_direct_dependencies() -> None:
    pinned = pins_here()
    for requirement in direct_dependencies() + direct_dependencies("dev"):
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_the_environment_is_the_pinned_one() -> None:
    """Only where the project's scripts made it: other environments may hold any version within the ranges."""
    if not (Path(sys.prefix) / "stamp").is_file():
        pytest.skip("this environment was not made by scripts/env.sh")
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
    pinned = pins_here()
    others = {name: version for name, version in installed.items() if pinned.get(name) != version}
    assert set(others) <= {"lrf-nerfstudio", "pip"}, others


def imported_modules(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file, those inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(str(node.module).split(".")[0])
    return modules


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("lrf_nerfstudio", [None, "text", "nerfbaselines"]),
        ("scripts", [None]),
        ("tests", [None, "dev", "nerfbaselines"]),
    ],
)
def test_what_is_imported_is_a_direct_dependency(folder: str, extras: list[str | None]) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    own = {"lrf_nerfstudio"} | {path.stem for path in [*files, *(ROOT / "scripts").glob("*.py")]}
    imported = set().union(*map(imported_modules, files)) - sys.stdlib_module_names - own
    declared = {canonicalize_name(r.name) for extra in extras for r in direct_dependencies(extra)}
    owners = importlib.metadata.packages_distributions()
    missing = {
        module for module in imported if not declared & {canonicalize_name(d) for d in owners.get(module, [module])}
    }
    assert not missing


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


PYTHON = """#!/bin/sh
# Stands for an interpreter: makes the folders of an environment and notes down what it is asked to install.
case "$*" in
    *"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *install*) echo "$*" >> "$LOG" ;;
esac
"""


class Checkout:
    """A checkout with the files that an environment depends on, and with interpreters that only pretend to install."""

    def __init__(self, folder: Path, python: str = PYTHON) -> None:
        self.root, self.bin, self.log = folder / "a checkout", folder / "bin", folder / "log"
        for name in ("pyproject.toml", "scripts/constraints.txt", "scripts/env.sh"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text((ROOT / name).read_text())
        self.bin.mkdir()
        for name in ("python3.10", "python3.11", "python3.12", "python3", "python"):
            (self.bin / name).write_text(python)
            (self.bin / name).chmod(0o755)

    def source(self) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """Source env.sh; also what has been installed since the last time."""
        self.log.write_text("")
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", 'source "$0" && command -v python', self.root / "scripts" / "env.sh"],
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "LOG": str(self.log)},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        return result, self.log.read_text().splitlines()


def test_an_environment_is_made_once_and_again_when_its_inputs_change(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    result, installed = checkout.source()
    assert result.returncode == 0, result.stderr
    assert len(installed) == 2
    assert "[dev]" in installed[1]
    assert result.stdout.splitlines()[-1] == str(checkout.root / ".venv" / "bin" / "python")

    assert checkout.source()[1] == []
    (checkout.root / "scripts" / "constraints.txt").write_text("nerfstudio==1.1.5\n")
    assert len(checkout.source()[1]) == 2
    assert checkout.source()[1] == []


def test_an_interrupted_installation_is_made_anew(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, PYTHON.replace('*install*) echo "$*" >> "$LOG" ;;', "*install*) exit 1 ;;"))
    assert checkout.source()[0].returncode == 1
    (checkout.bin / "python3.11").write_text(PYTHON)
    result, installed = checkout.source()
    assert result.returncode == 0, result.stderr
    assert len(installed) == 2


def test_pip_installs_where_uv_cannot(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, PYTHON.replace("*install*)", '*"-m uv"*) exit 1 ;;\n    *install*)'))
    result, installed = checkout.source()
    assert result.returncode == 0, result.stderr
    assert all(line.startswith("-m pip install") for line in installed)
    assert "[dev]" in installed[1]


def test_a_machine_without_a_suitable_python_is_told_so(tmp_path: Path) -> None:
    result, installed = Checkout(tmp_path, "#!/bin/sh\nexit 127\n").source()
    assert result.returncode == 1
    assert "no Python 3.10, 3.11 or 3.12" in result.stderr
    assert installed == []
