"""Imports point downwards, and nothing but the plugin and the scripts needs nerfstudio."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "lrf_nerfstudio"
ROOT = Path(__file__).parents[1] / PACKAGE

LEVELS = (
    {"commands"},
    {"plugin"},
    {"training", "guidance", "evaluation"},
    {"field", "correspondence", "synthetic"},
    {"splatting", "vae"},
    {"utils"},
)
"""From top to bottom; a package imports from those below its own level."""

WITHIN_A_LEVEL = {"evaluation": f"{PACKAGE}.training.data"}
"""Evaluation measures the pairs of rendered and true latents that stage III trains on, which are stored there."""


def imports(source: str, package: str) -> Iterator[str]:
    """The absolute names of all modules that a source imports, at its top, in functions or for types alone.

    Args:
        source: Python code of a module.
        package: that the module lies in, for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def level(package: str) -> int:
    """The number of a package's level, from 0 at the top."""
    return next(number for number, packages in enumerate(LEVELS) if package in packages)


def objection(importer: str, imported: str) -> str | None:
    """Why a package of ours must not import a module; None if it may.

    Args:
        importer: name of the package, such as `vae`.
        imported: absolute name of the module or of something in it.
    """
    parts = imported.split(".")
    if parts[0] == "nerfstudio":
        return None if importer == "plugin" else "only plugin and scripts know nerfstudio"
    if parts[0] != PACKAGE or len(parts) == 1 or parts[1] == importer or parts[1] == "assets":
        return None
    if level(parts[1]) > level(importer):
        return None
    allowed = WITHIN_A_LEVEL.get(importer)
    if allowed is not None and f"{imported}.".startswith(f"{allowed}."):
        return None
    return f"{importer} is not above {parts[1]}"


def test_every_package_has_a_level():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"assets"}
    assert found == set().union(*LEVELS)
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_imports_point_downwards():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if len(parts) > 2:
            for imported in imports(path.read_text(), ".".join(parts[:-1])):
                if reason := objection(parts[1], imported):
                    wrong.append(f"{path.relative_to(ROOT.parent)} imports {imported}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "source", "wrong"),
    [
        ("vae", "from lrf_nerfstudio.utils.files import replacing", False),
        ("vae", "from lrf_nerfstudio.splatting import rasterize", True),
        ("vae", "from lrf_nerfstudio import splatting", True),
        ("vae", "from .grid import latent_size", False),
        ("vae", "from ..splatting import rasterize", True),
        ("vae", "from .. import splatting", True),
        ("field", "def late():\n    import lrf_nerfstudio.plugin.model", True),
        ("field", "if TYPE_CHECKING:\n    from lrf_nerfstudio.training import loop", True),
        ("field", "from lrf_nerfstudio.vae import VAE", False),
        ("training", "from lrf_nerfstudio.evaluation.metrics import psnr", True),
        ("evaluation", "from lrf_nerfstudio.training.data.scene_pairs import ScenePairs", False),
        ("evaluation", "from lrf_nerfstudio.training.data import scene_pairs", False),
        ("evaluation", "from lrf_nerfstudio.training.loop import FineTuner", True),
        ("evaluation", "from lrf_nerfstudio.training.database import Table", True),
        ("evaluation", "import nerfstudio.cameras.cameras", True),
        ("plugin", "from nerfstudio.cameras.cameras import Cameras", False),
        ("plugin", "from lrf_nerfstudio.guidance import orbits", False),
        ("utils", "from lrf_nerfstudio.vae import VAE", True),
        ("utils", "import nerfstudio_extras, torch", False),
    ],
)
def test_what_may_import_what(importer, source, wrong):
    found = [objection(importer, imported) for imported in imports(source, f"{PACKAGE}.{importer}")]
    # `from package import name` may name a module or something in one: it is wrong where either would be.
    assert any(found) == wrong
