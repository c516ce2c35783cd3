"""The documentation is true: its commands can be typed, its links lead somewhere, its error messages are the code's."""

import ast
import inspect
import re
import runpy
import shlex
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import tyro
from nerfstudio.configs import external_methods
from nerfstudio.scripts import eval as evaluation
from nerfstudio.scripts import render
from nerfstudio.scripts.viewer.run_viewer import RunViewer

from lrf_nerfstudio.__main__ import COMMANDS, function_of
from lrf_nerfstudio.plugin import method
from lrf_nerfstudio.utils.options import check_options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("lrf_nerfstudio/**/*.md")),
]
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
HOLE = "…"
OF_OTHERS = (
    "No space left on device",
    "FutureWarning",
    "ns-…",
    "libusb-1.0.so.0: cannot open shared object file",
    "Bus error",
)
"""What other programs say."""


def text_of(node: ast.expr) -> str:
    """The constant text of an expression; what is filled in is `…`."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.Call):  # "...".rstrip(), advice.format("...")
        called = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        return "".join(map(text_of, [*called, *node.args])) or HOLE
    return HOLE


def all_texts() -> list[str]:
    """All strings in the package."""
    nodes = [
        node
        for path in sorted((ROOT / "lrf_nerfstudio").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant | ast.JoinedStr)
    ]
    return list(map(text_of, nodes))


def error_messages() -> list[str]:
    """The texts of all `UserError(...)` in the package that are written where they are raised."""
    messages = []
    for path in sorted((ROOT / "lrf_nerfstudio").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                text = "".join(map(text_of, node.args))
                if text.strip(f"{HOLE}: "):
                    messages.append(text)
    return messages


def documented() -> list[re.Pattern[str]]:
    """The first cells of the tables: every quoted part of a message, with anything for `…`."""
    rows = re.findall(r"^\| (?!message |---)(.*?) \|", TROUBLESHOOTING, re.MULTILINE)
    quoted = [part for row in rows for part in re.findall(r"`([^`]+)`", row)]
    return [re.compile(".*".join(map(re.escape, part.split(HOLE))), re.DOTALL) for part in quoted]


def test_every_error_message_is_explained() -> None:
    patterns = documented()
    missing = [text for text in error_messages() if not any(pattern.search(text) for pattern in patterns)]
    assert not missing, "\n".join(missing)


def test_every_explained_message_exists() -> None:
    texts = [*all_texts(), *error_messages(), *OF_OTHERS]
    gone = [pattern.pattern for pattern in documented() if not any(pattern.search(text) for text in texts)]
    assert not gone


# ---------------------------------------------------------------- commands


def commands_in(page: str) -> Iterator[str]:
    """The lines of a page's shell blocks, joined where they end in a backslash, and its code spans with options."""
    for block in re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^ *```.*?^ *```", "", page, flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`((?:lrf|ns-[a-z]+) [^`]* --[^`]+)`", prose):
        if "..." not in span:
            yield " ".join(span.split())


def arguments_of(line: str) -> list[str]:
    """The words of a command line, with names in place of `<...>`."""
    words = shlex.split(
        re.sub(r"<([^>]*)>", lambda match: match[1].replace(" ", "-").replace("'", ""), line), comments=True
    )
    if words[:2] == ["accelerate", "launch"]:
        words = ["lrf", *words[words.index("lrf_nerfstudio") + 1 :]]
    return words


DOCUMENTED = sorted(
    {
        (line.strip(), str(path.relative_to(ROOT)))
        for path in PAGES
        for line in commands_in(path.read_text())
        # Of help and the shell's completion, see test_lrf.py.
        if re.match(r"\s*(lrf|ns-[a-z]+|accelerate launch) (?!--)", line) and not line.rstrip().endswith("--help")
    }
)
METHODS = {
    specification.config.method_name: specification.config
    for specification in (method.latent_splatfacto, method.latent_splatfacto_sd, method.latent_dreamsplat)
}


def options_of_nerfstudio(command: str) -> Any:
    """What the arguments of one of nerfstudio's commands are parsed to; of ns-train, this package's methods alone."""
    if command == "ns-train":
        return tyro.conf.SuppressFixed[tyro.extras.subcommand_type_from_defaults(METHODS)]
    if command == "ns-export":
        from nerfstudio.scripts import exporter  # imports open3d, which needs libusb

        return exporter.Commands
    return {"ns-eval": evaluation.ComputePSNR, "ns-render": render.Commands, "ns-viewer": RunViewer}[command]


def parse(line: str) -> Any:
    """The options of a command line; exits where one does not exist or has a value of the wrong type."""
    command, *arguments = arguments_of(line)
    if command != "lrf":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tyro about nerfstudio's types
            return tyro.cli(tyro.conf.FlagConversionOff[options_of_nerfstudio(command)], args=arguments)
    name, *rest = arguments
    (parameter,) = inspect.signature(function_of(name)).parameters
    return tyro.cli(get_type_hints(function_of(name))[parameter], args=rest)


@pytest.mark.slow
@pytest.mark.parametrize(("line", "page"), DOCUMENTED, ids=[f"{page}: {line[:60]}" for line, page in DOCUMENTED])
def test_commands_can_be_typed(line: str, page: str) -> None:
    words = arguments_of(line)
    if words[0] == "ns-export":
        pytest.importorskip("open3d", exc_type=OSError)
    check_options(parse(line))


def test_a_wrong_command_is_noticed() -> None:
    """The check above can fail."""
    for line in ("lrf export --load-confg a.yml", "ns-train latent-splatfacto --data a --max-num-iterations many"):
        with pytest.raises(SystemExit):
            parse(line)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_named_exist_and_links_lead_somewhere(path: Path) -> None:
    page = path.read_text()
    named = set(re.findall(r"`lrf ([a-z][a-z0-9-]*)", page))
    assert named <= set(COMMANDS)
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", re.sub(r"```.*?```", "", page, flags=re.DOTALL)):
        assert (path.parent / link).exists(), link


# ---------------------------------------------------------------- nerfstudio's documentation


def test_the_entry_for_nerfstudio_has_the_names_and_descriptions_that_are_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries: list[external_methods.ExternalMethod] = []
    monkeypatch.setattr(external_methods, "external_methods", entries)
    runpy.run_path(str(ROOT / "docs" / "nerfstudio" / "external_method.py"))
    (entry,) = entries
    assert isinstance(entry, external_methods.ExternalMethod)
    registered = {
        point.name: point.load().description
        for point in entry_points(group="nerfstudio.method_configs")
        if point.value.startswith("lrf_nerfstudio.")
    }
    assert dict(entry.configurations) == registered
    assert f"pip install {entry.pip_package}" in entry.instructions
    page = (ROOT / "docs" / "nerfstudio" / "latent_splatfacto.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == set(registered)
    assert f"pip install {entry.pip_package}" in page
