import io
import re

import pytest
import rich.progress
from rich.console import Console

from lrf_nerfstudio.utils.progress import progress_bar, track


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """What a terminal of 120 columns is sent."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(rich.progress, "get_console", lambda: console)
    return stream


def lines(stream: io.StringIO) -> list[str]:
    """What was shown, without control sequences."""
    return [line for line in re.sub(r"\x1b\[[0-9?;]*[A-Za-z]|\r", "\n", stream.getvalue()).splitlines() if line.strip()]


def test_items_pass_in_their_order_and_are_counted(terminal):
    assert list(track("abc", "Reading", transient=False)) == ["a", "b", "c"]
    assert re.search(r"Reading ━+ 3/3 0:00:0\d 0:00:00", lines(terminal)[-1])


def test_items_without_a_length_take_the_total_that_is_given(terminal):
    assert list(track(iter("ab"), "Reading", total=2, transient=False)) == ["a", "b"]
    assert "2/2" in lines(terminal)[-1]


def test_descriptions_are_plain_text(terminal):
    assert list(track("a", "Reading [bold]x[/bold] [/]", transient=False)) == ["a"]
    assert "Reading [bold]x[/bold] [/]" in lines(terminal)[-1]


def test_a_status_comes_last_and_may_be_missing(terminal):
    with progress_bar() as progress:
        task = progress.add_task("Fitting", total=2)
        progress.update(task, completed=1, status="loss [0.5]")
    assert re.search(r"Fitting ━+.* 1/2 .* loss \[0\.5\]", lines(terminal)[-1])


def test_disabled_shows_nothing(terminal):
    with progress_bar(disable=True) as progress:
        progress.update(progress.add_task("Fitting", total=2), completed=2)
    assert not lines(terminal)
