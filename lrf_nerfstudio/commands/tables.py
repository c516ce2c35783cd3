"""Make the tables of the pages from files of results.

Between the comments `<!-- results: quick, summary -->` and `<!-- end of results -->` of README.md and docs/*.md stands
what `docs/results/quick.json` says; nobody types a number there. lrf_nerfstudio/evaluation/pages.py has the layouts.

Example: `lrf tables --add benchmark` takes the rows of an output folder of `lrf benchmark` into the results of their
protocol, and makes the tables anew.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lrf_nerfstudio.evaluation.pages import Results, filled, read_results, results_text, with_measured
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import write_atomically


@dataclass
class Tables:
    """Makes the tables of the pages."""

    add: tuple[Path, ...] = ()
    """Output folders of `lrf benchmark` whose rows are taken into docs/results."""
    root: Path = Path()
    """The checkout, which has README.md and docs."""


def add_rows(folder: Path, results: Path) -> Path:
    """Take the rows of an output folder of `lrf benchmark` into the file of their protocol.

    Args:
        folder: has settings.json and rows.
        results: the folder of the files.

    Returns:
        The file.

    Raises:
        UserError: if there are no rows, they were measured with other steps than those of the file, or a file cannot be
            read or written.
    """
    rows = sorted(folder.glob("rows/*/*/*.json"))
    if not rows:
        raise UserError(f"There are no rows in {folder} (--add), which takes the --output of `lrf benchmark`.")
    settings = json.loads((folder / "settings.json").read_text())
    file = results / f"{settings['protocol']}.json"
    steps = (settings["steps"], settings["rgb_steps"])
    there = read_results(file) if file.exists() else Results(settings["protocol"], steps)
    if there.steps != steps:
        raise UserError(f"The rows of {folder} are of fits of {steps} steps, those of {file} of {there.steps}.")
    added = with_measured(there, [json.loads(row.read_text()) for row in rows])
    write_atomically(file, results_text(added).encode(), "--root")
    return file


def pages_of(root: Path) -> list[Path]:
    """Return the pages that may have tables."""
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.exists()]


def page_with_tables(page: Path, root: Path) -> str:
    """Return the text of a page as its results make it."""
    text = page.read_text(encoding="utf-8")
    try:
        return filled(text, lambda name: read_results(root / "docs" / "results" / f"{name}.json"))
    except UserError as error:
        raise UserError(f"{page}: {error}") from error


def main(options: Tables) -> None:
    """Add what is to be added, and write the pages whose tables are others now.

    Raises:
        UserError: if something cannot be read, made or written.
    """
    for folder in options.add:
        file = add_rows(folder.expanduser(), options.root / "docs" / "results")
        Console().print(f"Wrote {file}", markup=False, soft_wrap=True)
    pages = pages_of(options.root)
    if not pages:
        raise UserError(f"{options.root.resolve()} has no README.md and no docs (--root takes a checkout).")
    for page in pages:
        text = page_with_tables(page, options.root)
        if text != page.read_text(encoding="utf-8"):
            write_atomically(page, text.encode(), "--root")
            Console().print(f"Wrote {page}", markup=False, soft_wrap=True)
