"""The sdist and the wheel: what is in them, and that the wheel works where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def clean_environment() -> dict[str, str]:
    """The variables of this process but those that would put the checkout before what is installed."""
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


def uv(*arguments: object) -> None:
    command = [sys.executable, "-m", "uv", *map(str, arguments), "--offline", "--no-config", "--quiet"]
    subprocess.run(command, check=True, env=clean_environment(), cwd="/")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it. Without isolation: the builder is installed already."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def tracked(*folders: str) -> set[str]:
    """The files of the checkout that belong to the project."""
    names = {path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {str(name) for name in names if "__pycache__" not in name.parts and name.suffix != ".pyc"}


def test_the_wheel_has_the_package_with_its_data_and_nothing_else(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
        (metadata,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        assert wheel.read(f"{metadata}/entry_points.txt").decode().count("lrf_nerfstudio.plugin.method:") == 3
        assert "Requires-Dist: nerfstudio" in wheel.read(f"{metadata}/METADATA").decode()
    assert {name for name in names if not name.startswith(f"{metadata}/")} == tracked("lrf_nerfstudio")
    for name in ("assets/lrf-f4c4/diffusion_pytorch_model.safetensors", "evaluation/protocols/quick.yaml", "py.typed"):
        assert f"lrf_nerfstudio/{name}" in names
    assert f"{metadata}/licenses/LICENSE" in names


def test_the_sdist_has_what_the_tests_need(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert tracked("lrf_nerfstudio", "scripts", "tests", "docs") <= names
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith((".git/", ".venv", "shared", "demo"))]


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, which finds all other packages where this one does."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    uv("pip", "install", "--python", python, "--no-deps", archives[1])
    paths = {"base": str(folder), "platbase": str(folder)}
    site_packages = Path(sysconfig.get_path("purelib", vars=paths))
    # A line of a .pth file puts a folder behind site-packages, and does not read that folder's own .pth files, through
    # which an editable installation is found.
    (site_packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for script in Path(sys.executable).parent.glob("ns-*"):  # as pip writes them for nerfstudio, but for this python
        text = script.read_text()
        (python.parent / script.name).write_text(f"#!{python}\n{text.partition(chr(10))[2]}")
        (python.parent / script.name).chmod(0o755)
    return python.parent


def test_a_scene_is_trained_measured_and_exported_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(command: str, *arguments: object) -> str:
        finished = subprocess.run(
            [installed / command, *map(str, arguments)],
            cwd=folder,
            env=clean_environment() | {"HOME": str(tmp_path), "PATH": f"{installed}:/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert finished.returncode == 0, finished.stdout
        return finished.stdout

    where = run("python", "-c", "import lrf_nerfstudio, nerfstudio; print(lrf_nerfstudio.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent)

    run("lrf", "demo-scene", "--output", "scene", "--views", 9, "--size", 64, 80, "--samples", 1, "--points", 300)
    run(
        *("ns-train", "latent-splatfacto", "--data", "scene", "--timestamp", "run", "--vis", "tensorboard"),
        *("--max-num-iterations", 20),
    )
    config = Path("outputs", "scene", "latent-splatfacto", "run", "config.yml")
    run("ns-eval", "--load-config", config, "--output-path", "metrics.json")
    results = json.loads((folder / "metrics.json").read_text())["results"]
    assert 5 < results["psnr"] < results["ceiling_psnr"]
    run("lrf", "export", "--load-config", config, "--output-path", "field.safetensors")
    assert (folder / "field.safetensors").stat().st_size > 10_000
    shutil.rmtree(folder / "scene")
    run(
        "python",
        "-c",
        "from pathlib import Path; from lrf_nerfstudio.field import LatentField; "
        "LatentField.load(Path('field.safetensors'))",
    )
