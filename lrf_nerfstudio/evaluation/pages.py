"""Results that are kept as rows in a file, and the pages of Markdown whose tables are made from them.

Two comments on a page, each at the start of a line, say where a table stands, and which. What is between them is made
from `docs/results/NAME.json`:

    <!-- results: quick, summary -->
    <!-- end of results -->

`summary` has a line for each scene, `rows` a line for each scene and method, with all numbers.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrf_nerfstudio.evaluation.protocol import load_protocol
from lrf_nerfstudio.evaluation.tables import (
    Column,
    Row,
    Table,
    as_markdown,
    over_scenes,
    over_seeds,
    protocol_markdown,
    seeds_of,
)
from lrf_nerfstudio.utils.errors import UserError

END = "<!-- end of results -->"
_BLOCK = re.compile(
    rf"^<!-- results: (?P<name>[\w.-]+), (?P<layout>\w+) -->\n.*?^{re.escape(END)}", re.DOTALL | re.MULTILINE
)
_START = re.compile(r"(?m)^<!-- results:")
SCENE_DECODER = ", the scene's decoder"
"""How the names of rows end whose pictures the scene's own decoder makes."""


@dataclass(frozen=True)
class Results:
    """Rows that were measured by one protocol.

    Attributes:
        protocol: its name.
        steps: that fields were fitted for, and those in RGB where that is another number.
        rows: `{data_set, scene, method, seed, machine, options, vae, photographs, novel, cost}`; `photographs` are
            numbers of them.
    """

    protocol: str
    steps: tuple[int, int | None]
    rows: tuple[Mapping[str, Any], ...] = ()


def read_results(file: Path) -> Results:
    """Read a file of results.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        steps, rgb_steps = content["steps"]
        return Results(content["protocol"], (steps, rgb_steps), tuple(content["rows"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The results {file} cannot be read: {error}. Make them with `lrf tables --add OUTPUT`, where OUTPUT is "
            "the --output of `lrf benchmark`."
        ) from error


def results_text(results: Results) -> str:
    """Write results as JSON, a row on each line."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in results.rows)
    head = f'"protocol": {json.dumps(results.protocol)},\n "steps": {json.dumps(results.steps)},'
    return f'{{{head}\n "rows": [\n{rows}\n ]}}\n'


def with_measured(results: Results, rows: Sequence[Row]) -> Results:
    """Add rows as `lrf benchmark` writes them; one of the same scene, method and seed takes the place of an old one.

    Folders on the machine that measured them, names of photographs and digits beyond the sixth are left out.
    """
    by_key = {_key(row): row for row in (*results.rows, *map(_shortened, rows))}
    return Results(results.protocol, results.steps, tuple(by_key[key] for key in sorted(by_key)))


def _key(row: Row) -> tuple[Any, ...]:
    """Return what identifies a row, in the order of tables: RGB last, at full resolution behind all."""
    method = row["method"]
    in_rgb = method.startswith("RGB")
    return row["data_set"], row["scene"], in_rgb, in_rgb and "enlarged" not in method, method, row["seed"]


def _shortened(row: Row) -> dict[str, Any]:
    short = {name: row[name] for name in ("data_set", "scene", "method", "seed", "machine", "options")}
    short["vae"] = {name: row["vae"][name] for name in ("fingerprint", "decoder_fingerprint")}
    short["photographs"] = {name: len(names) for name, names in row["photographs"].items()}
    for part in ("novel", "cost"):
        short[part] = {name: round(value, 6) for name, value in row[part].items()}
    return short


# ---------------------------------------------------------------------------------------------------- pages


def filled(page: str, results_of: Callable[[str], Results]) -> str:
    """Return a page with the tables that its comments ask for.

    Args:
        page: Markdown.
        results_of: gives the results of a name.

    Raises:
        UserError: if a comment asks for what there is not, or lacks its end.
    """
    if len(_START.findall(page)) != len(_BLOCK.findall(page)):
        raise UserError(f"A page has `<!-- results: NAME, LAYOUT -->` without `{END}` behind it, or without a layout.")

    def block(match: re.Match[str]) -> str:
        if match["layout"] not in LAYOUTS:
            raise UserError(f"Results have no layout {match['layout']!r}; there are {', '.join(LAYOUTS)}.")
        start = match.group(0).partition("\n")[0]
        return f"{start}\n{LAYOUTS[match['layout']](results_of(match['name']))}{END}"

    return _BLOCK.sub(block, page)


def rows_layout(results: Results) -> str:
    """Write a line for each scene and method, with all numbers, and what must be known to read them."""
    return f"{protocol_markdown(results.rows, load_protocol(results.protocol))}\n{_machines(results.rows)}\n"


def summary_layout(results: Results) -> str:
    """Write a line for each scene: PSNR and SSIM by each method, and the ceilings of the VAEs."""
    protocol = load_protocol(results.protocol)
    of_scenes = over_seeds(results.rows)
    lines = [*of_scenes, *over_scenes(of_scenes, protocol)]
    columns = [(method, kind) for method in dict.fromkeys(row["method"] for row in lines) for kind in _kinds(method)]
    cells = {(row["scene"], row["method"], kind): _cell(row, kind) for row in lines for kind in PARTS}
    table = Table(
        ["scene", *(_title(method, kind) for method, kind in columns)],
        [
            [scene, *(cells.get((scene, method, kind), "-") for method, kind in columns)]
            for scene in dict.fromkeys(row["scene"] for row in lines)
        ],
        left=1,
    )
    notes = f"PSNR in dB and SSIM. {protocol.title}. {seeds_of(results.rows)} {_machines(results.rows)}"
    return f"{as_markdown(table)}\n{notes}\n"


PARTS = {"picture": "", "vae": "vae_", "ceiling": "ceiling_"}
"""Kinds of numbers of a row: the picture, the VAE's picture of the same field, the VAE's own reconstruction."""


def _kinds(method: str) -> Sequence[str]:
    return tuple(PARTS) if SCENE_DECODER in method else ("picture",)


def _title(method: str, kind: str) -> str:
    name = method.replace(SCENE_DECODER, "")
    return {"picture": method, "vae": f"{name}: the VAE's picture", "ceiling": f"{name}: ceiling"}[kind]


def _cell(row: Row, kind: str) -> str:
    psnr, ssim = Column("novel", f"{PARTS[kind]}psnr", 2), Column("novel", f"{PARTS[kind]}ssim", 3)
    return f"{psnr.cell(row)}, {ssim.cell(row)}" if psnr.is_in(row) else "-"


def _machines(rows: Sequence[Row]) -> str:
    """Say what the rows were measured on."""
    found = dict.fromkeys(_machine(row["machine"]) for row in rows)
    return f"Measured on {'; '.join(found)}." if found else "Nothing has been measured yet."


def _machine(machine: Mapping[str, Any]) -> str:
    threads = machine["threads"]
    processor = machine.get("gpu") or f"{machine['processor']} ({threads} thread{'' if threads == 1 else 's'})"
    return f"{processor} with PyTorch {machine['torch']}"


LAYOUTS: dict[str, Callable[[Results], str]] = {"summary": summary_layout, "rows": rows_layout}
"""How the results of a protocol can be shown."""
