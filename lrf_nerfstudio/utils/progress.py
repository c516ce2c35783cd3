"""Progress on the terminal, with the same columns everywhere.

Example:
    >>> from lrf_nerfstudio.utils.progress import progress_bar, track
    >>> for path in track(["a.png", "b.png"], "Reading photographs"):
    ...     pass
    >>> with progress_bar(transient=True) as progress:
    ...     task = progress.add_task("Fitting", total=100)
    ...     progress.update(task, completed=50, status="loss 0.0123")
"""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_T = TypeVar("_T")


class _Status(ProgressColumn):
    """What changes from update to update, such as a loss; last, so that it does not move the other columns."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("status", ""))


def progress_bar(transient: bool = False, disable: bool = False) -> Progress:
    """Return a progress display: description, bar, count, time elapsed and remaining, status.

    Descriptions are plain text, so names of files may have brackets. `progress.update(task, status="loss 0.01")` sets
    the last column, which is empty otherwise.

    Args:
        transient: clear the display when it is done.
        disable: show nothing, as in all processes but the main one.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        _Status(),
        transient=transient,
        disable=disable,
    )


def track(items: Iterable[_T], description: str, total: int | None = None, transient: bool = True) -> Iterator[_T]:
    """Yield items and show how many of them are done.

    Args:
        items: whatever the caller loops over.
        description: plain text in front of the bar.
        total: number of items; if None and they have a length, that.
        transient: clear the display when it is done.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(transient) as progress:
        yield from progress.track(items, total=total, description=description)
