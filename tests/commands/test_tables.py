"""The tables of the pages are what the files of results give, and these are what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from lrf_nerfstudio.commands import tables
from lrf_nerfstudio.evaluation.pages import END, filled, read_results
from lrf_nerfstudio.utils import cli
from lrf_nerfstudio.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

PAGE = f"""# A page
before

<!-- results: quick, summary -->
what somebody typed: 99.99
{END}

between

<!-- results: quick, rows -->
{END}
after
"""


def row(scene: str, method: str, seed: int, psnr: float, **novel: float) -> dict[str, Any]:
    """A row as `lrf benchmark` writes it."""
    return {
        "data_set": "scenes",
        "scene": scene,
        "method": method,
        "seed": seed,
        "novel": {"psnr": psnr, "ssim": 0.5, "decode_seconds": 0.0123456789, **novel},
        "cost": {"seconds": 61.2, "gaussians": 1000},
        "vae": {"source": "/home/somebody/vae", "fingerprint": "a", "decoder_fingerprint": "b"},
        "machine": {"processor": "Z80", "threads": 1, "torch": "2.6"},
        "photographs": {"train": ["1.png", "2.png"], "held_out": ["0.png"]},
        "options": {"steps": 4000},
    }


DECODER = "ours, the scene's decoder"
MEASURED = [
    row("b", "RGB", 42, 29.0),
    row("b", DECODER, 42, 26.0, vae_psnr=24.0, vae_ssim=0.4, ceiling_psnr=28.0, ceiling_ssim=0.6),
    row("a", DECODER, 42, 30.0, vae_psnr=28.0, vae_ssim=0.4, ceiling_psnr=32.0, ceiling_ssim=0.6),
    row("a", DECODER, 43, 31.0, vae_psnr=28.5, vae_ssim=0.4, ceiling_psnr=32.0, ceiling_ssim=0.6),
    row("a", "RGB at 1/4, enlarged", 42, 25.0),
    row("a", "RGB", 42, 33.0),
]


def write_output(folder: Path, rows: list[dict[str, Any]], steps: int = 4000) -> Path:
    """An output folder of `lrf benchmark`."""
    for number, each in enumerate(rows):
        file = folder / "rows" / "scenes" / each["scene"] / f"{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(each))
    (folder / "settings.json").write_text(json.dumps({"protocol": "quick", "steps": steps, "rgb_steps": 3000}))
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a page in docs and a README without tables, and rows in its results."""
    (tmp_path / "checkout" / "docs").mkdir(parents=True)
    (tmp_path / "checkout" / "docs" / "page.md").write_text(PAGE)
    (tmp_path / "checkout" / "README.md").write_text("No table.\n")
    run(tmp_path / "checkout", write_output(tmp_path / "output", MEASURED))
    return tmp_path / "checkout"


def run(checkout: Path, *add: Path) -> None:
    cli.run(tables.main, ["--root", str(checkout), *(["--add", *map(str, add)] if add else [])])


@pytest.mark.parametrize("page", tables.pages_of(ROOT), ids=lambda page: page.name)
def test_no_number_in_the_tables_of_our_pages_was_typed(page: Path) -> None:
    assert tables.page_with_tables(page, ROOT) == page.read_text(), "run `lrf tables`"


def test_a_page_gets_the_tables_that_it_asks_for(checkout: Path) -> None:
    text = (checkout / "docs" / "page.md").read_text()
    assert "99.99" not in text and text.startswith("# A page\nbefore\n\n<!-- results: quick, summary -->\n| scene |")
    assert text.endswith(f"{END}\nafter\n") and "\n\nbetween\n\n<!-- results: quick, rows -->\n" in text
    summary, rows = (part.partition(END)[0].splitlines() for part in text.split("-->\n|")[1:])
    titles = [title.strip() for title in summary[0].split("|") if title.strip()]
    assert titles == [
        *("scene", DECODER, "ours: the VAE's picture", "ours: ceiling"),
        *("RGB at 1/4, enlarged", "RGB"),
    ]
    assert (
        summary[2] == "| a | 30.50 ± 0.71, 0.500 | 28.25 ± 0.35, 0.400 | 32.00, 0.600 | 25.00, 0.500 | 33.00, 0.500 |"
    )
    assert summary[3] == "| b | 26.00, 0.500 | 24.00, 0.400 | 28.00, 0.600 | - | 29.00, 0.500 |"
    assert summary[4] == "| scenes: mean of 2 | 28.25, 0.500 | 26.12, 0.400 | 30.00, 0.600 | - | 31.00, 0.500 |"
    assert "4,000 steps" in summary[6] and "means over 1 or 2 fits" in summary[6] and "Z80 (1 thread)" in summary[6]
    names = [line.split("|")[1:3] for line in rows[2:7]]
    assert [(scene.strip(), method.strip()) for scene, method in names] == [
        *(("a", DECODER), ("a", "RGB at 1/4, enlarged"), ("a", "RGB")),
        *(("b", DECODER), ("b", "RGB")),
    ]
    assert "| 12.3 |" in rows[2]  # milliseconds of a decode


def test_what_is_kept_of_a_row(checkout: Path, tmp_path: Path) -> None:
    file = checkout / "docs" / "results" / "quick.json"
    assert "somebody" not in file.read_text()
    results = read_results(file)
    assert len(results.rows) == 6 and results.steps == (4000, 3000)
    assert results.rows[0]["novel"]["decode_seconds"] == 0.012346
    assert results.rows[0]["photographs"] == {"train": 2, "held_out": 1}
    before = file.read_text()
    run(checkout, tmp_path / "output")
    assert file.read_text() == before
    # What is measured again replaces what was, and nothing else.
    run(checkout, write_output(tmp_path / "again", [row("b", "RGB", 42, 29.5)]))
    psnr = [each["novel"]["psnr"] for each in read_results(file).rows]
    assert psnr == [30.0, 31.0, 25.0, 33.0, 26.0, 29.5]
    assert "29.50" in (checkout / "docs" / "page.md").read_text()


def test_mistakes_are_told(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*add: Path) -> str:
        with pytest.raises(SystemExit):
            run(checkout, *add)
        return " ".join(capsys.readouterr().err.split())

    assert "no rows in" in message(tmp_path / "nothing")
    assert "of fits of (3000, 3000) steps" in message(write_output(tmp_path / "other", MEASURED[:1], steps=3000))
    page = checkout / "docs" / "page.md"
    page.write_text(PAGE.replace("quick, rows", "slow, rows"))
    assert "slow.json cannot be read" in message()
    page.write_text(PAGE.replace("quick, rows", "quick, columns"))
    assert "no layout 'columns'; there are summary, rows" in message()
    page.write_text(PAGE.replace("results: quick, rows", "results: quick"))
    assert "without a layout" in message()
    with pytest.raises(UserError, match="without"):
        filled("<!-- results: quick, rows -->\n", lambda name: pytest.fail())
