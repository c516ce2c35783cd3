"""Tables of measured and of published numbers, as Markdown and as LaTeX, and figures of pictures in a grid."""

from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lrf_nerfstudio.evaluation.protocol import Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


class Column(NamedTuple):
    """A column of a table: where a row has its number, and how it is written."""

    part: str
    metric: str
    decimals: int
    factor: float = 1.0

    def is_in(self, row: Row) -> bool:
        """Return whether a row has the number."""
        return self.metric in row.get(self.part, {})

    def cell(self, row: Row) -> str:
        """Write the number of a row, with its standard deviation where the row has that; `-` where it has none."""
        if not self.is_in(row):
            return "-"
        text = f"{row[self.part][self.metric] * self.factor:.{self.decimals}f}"
        deviation = row.get("deviations", {}).get(self.metric)
        return text if deviation is None else f"{text} ± {deviation * self.factor:.{self.decimals}f}"


class Table(NamedTuple):
    """A table of text.

    Attributes:
        titles: of the columns.
        rows: cells.
        left: how many columns, from the first, are names; the others are numbers.
    """

    titles: list[str]
    rows: list[list[str]]
    left: int


def make_table(rows: Sequence[Row], heads: Mapping[str, str], columns: Mapping[str, Column]) -> Table:
    """Write rows of numbers as text; columns that have no number in any row are left out.

    Args:
        rows: with names, with numbers in parts, `row[part][metric]`, and with their standard deviations,
            `row["deviations"][metric]`, where there are any.
        heads: title -> key of a name.
        columns: title -> column.
    """
    used = {title: column for title, column in columns.items() if any(column.is_in(row) for row in rows)}
    cells = [[str(row[key]) for key in heads.values()] + [c.cell(row) for c in used.values()] for row in rows]
    return Table([*heads, *used], cells, len(heads))


def as_markdown(table: Table) -> str:
    """Write a table as Markdown."""
    rule = ["---" if number < table.left else "---:" for number in range(len(table.titles))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (table.titles, rule, *table.rows))


def as_latex(table: Table) -> str:
    """Write a table as a `tabular` of LaTeX, with rules of booktabs."""
    alignment = "l" * table.left + "r" * (len(table.titles) - table.left)
    lines = [" & ".join(_latex(cell) for cell in line) + r" \\" for line in (table.titles, *table.rows)]
    begin, end = rf"\begin{{tabular}}{{{alignment}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end, ""])


def _latex(text: str) -> str:
    escapes = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(escapes.get(char) or (f"\\{char}" if char in "&%$#_{}" else char) for char in text)


# ---------------------------------------------------------------------------------------------------- protocols


def mean_of(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means of what all have; empty if there are none."""
    names = [name for name in values[0] if all(name in other for other in values)] if values else []
    return {name: sum(value[name] for value in values) / len(values) for name in names}


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Join rows of one method, scene and data set, which differ in their seeds, to their mean; the order stays.

    Those of several seeds get `deviations`: the standard deviation of `psnr` and `vae_psnr` from seed to seed.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["data_set"], row["scene"], row["method"]), []).append(row)
    return [
        {
            "data_set": data_set,
            "scene": scene,
            "method": method,
            "seeds": len(group),
            "deviations": _deviations([row["novel"] for row in group]),
            **{part: mean_of([row[part] for row in group]) for part in ("novel", "cost")},
        }
        for (data_set, scene, method), group in groups.items()
    ]


def _deviations(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = [name for name in ("psnr", "vae_psnr") if all(name in value for value in values)]
    return {name: stdev([value[name] for value in values]) for name in names} if len(values) > 1 else {}


def over_scenes(rows: Sequence[Row], protocol: Protocol) -> list[Row]:
    """Return the protocol's means over scenes, of rows that :func:`over_seeds` gave.

    A method that was not measured on all the scenes that others were gets no mean, for it could not be compared with
    theirs; nor is there a mean of one scene. How many scenes there are is part of the name.
    """
    means: list[Row] = []
    for mean in protocol.means:
        of_mean = [row for row in rows if row["data_set"] in mean.data_sets and row["scene"] not in mean.without]
        scenes = {(row["data_set"], row["scene"]) for row in of_mean}
        for method in dict.fromkeys(row["method"] for row in of_mean) if len(scenes) > 1 else ():
            of_method = [row for row in of_mean if row["method"] == method]
            if len(of_method) == len(scenes):
                parts = {part: mean_of([row[part] for row in of_method]) for part in ("novel", "cost")}
                name = f"{mean.name}: mean of {len(scenes)}"
                means.append({"data_set": mean.name, "scene": name, "method": method, **parts})
    return means


def reported_rows(protocol: Protocol) -> tuple[list[Row], list[str]]:
    """Return what others have published as rows of a table, marked as theirs, and the sources that the marks name."""
    sources = list(dict.fromkeys(reported.source for reported in protocol.reported))
    rows: list[Row] = []
    for reported in protocol.reported:
        numbers = {name: getattr(reported, name) for name in ("psnr", "ssim", "lpips")}
        rows.append(
            {
                "data_set": reported.data,
                "scene": reported.data,
                "method": f"theirs: {reported.method} [{sources.index(reported.source) + 1}]",
                "novel": {name: value for name, value in numbers.items() if value is not None},
            }
        )
    return rows, sources


def protocol_table(rows: Sequence[Row], protocol: Protocol) -> Table:
    """Make the table of a protocol: a row for each scene and method, means, and what others have published.

    Args:
        rows: `{data_set, scene, method, seed, novel, cost}`, in the order of the table.
        protocol: that they were measured by.
    """
    of_scenes = over_seeds(rows)
    lines = [*of_scenes, *over_scenes(of_scenes, protocol), *reported_rows(protocol)[0]]
    return make_table(lines, {"scene": "scene", "method": "method"}, protocol_columns(protocol))


def protocol_columns(protocol: Protocol) -> dict[str, Column]:
    """Return the columns of a protocol's table: title -> column."""
    network = protocol.lpips.upper() if protocol.lpips == "vgg" else "AlexNet"
    return {
        "PSNR": Column("novel", "psnr", 2),
        "SSIM": Column("novel", "ssim", 3),
        f"LPIPS ({network})": Column("novel", "lpips", 3),
        "the VAE's PSNR": Column("novel", "vae_psnr", 2),
        "the VAE's SSIM": Column("novel", "vae_ssim", 3),
        "the VAE's LPIPS": Column("novel", "vae_lpips", 3),
        "latent PSNR": Column("novel", "latent_psnr", 2),
        "ceiling PSNR": Column("novel", "ceiling_psnr", 2),
        "ceiling SSIM": Column("novel", "ceiling_ssim", 3),
        "ceiling LPIPS": Column("novel", "ceiling_lpips", 3),
        "raster, ms": Column("novel", "raster_seconds", 1, 1000.0),
        "decode, ms": Column("novel", "decode_seconds", 1, 1000.0),
        "fit, s": Column("cost", "seconds", 0),
        "memory, GB": Column("cost", "gigabytes", 2),
        "Gaussians": Column("cost", "gaussians", 0),
    }


def protocol_markdown(rows: Sequence[Row], protocol: Protocol) -> str:
    """Write the table of a protocol with what must be known to read it, as Markdown."""
    _, sources = reported_rows(protocol)
    notes = [f"{protocol.title}. {seeds_of(rows)}"]
    if sources:
        notes.append("\nPublished numbers, not measured here (theirs):\n")
        notes += [f"- [{number}] {source}" for number, source in enumerate(sources, start=1)]
    if protocol.open:
        notes.append("\nWhat the protocol leaves open, and what was chosen:\n")
        notes += [f"- {text}" for text in protocol.open]
    return as_markdown(protocol_table(rows, protocol)) + "\n" + "\n".join(notes) + "\n"


def seeds_of(rows: Sequence[Row]) -> str:
    """Say of how many fits the numbers of a table are."""
    counts = sorted({row["seeds"] for row in over_seeds(rows)})
    if counts == [1]:
        return "Held-out views, one fit each."
    return (
        f"Held-out views, means over {' or '.join(map(str, counts))} fits of different seeds; ± is the standard "
        "deviation from seed to seed."
    )


def protocol_latex(rows: Sequence[Row], protocol: Protocol) -> str:
    """Write the table of a protocol as LaTeX, its sources as comments below."""
    _, sources = reported_rows(protocol)
    comments = "".join(f"% [{number}] {source}\n" for number, source in enumerate(sources, start=1))
    return f"% {protocol.title}\n" + as_latex(protocol_table(rows, protocol)) + comments


def grid_of_pictures(pictures: Mapping[str, Mapping[str, np.ndarray]], titles: Sequence[str]) -> "Figure":
    """Draw pictures in a grid.

    Args:
        pictures: name of a row -> title of a column -> [H, W, 3]; each row has the first column's.
        titles: of the columns; where a row lacks a picture, its panel is empty.
    """
    from matplotlib.figure import Figure

    ratios = [row[titles[0]].shape[0] / row[titles[0]].shape[1] for row in pictures.values()]
    figure = Figure(figsize=(3 * len(titles), 3 * sum(ratios) + 0.3 * len(ratios)), layout="constrained")
    panels = figure.subplots(len(ratios), len(titles), squeeze=False, gridspec_kw={"height_ratios": ratios})
    for (name, row), of_row in zip(pictures.items(), panels, strict=True):
        of_row[0].set_ylabel(name)
        for title, panel in zip(titles, of_row, strict=True):
            panel.set(xticks=[], yticks=[])
            if title in row:
                panel.imshow(row[title], interpolation="none")
            else:
                panel.set_frame_on(False)
    for title, panel in zip(titles, panels[0], strict=True):
        panel.set_title(title)
    return figure
