"""Options that say in their type which values they may have, and the one function that checks them.

Example:
    >>> @dataclass
    ... class Fit:
    ...     steps: AtLeastOne = 3000
    ...     ratio: Annotated[float, Range(above=0, most=1)] = 0.8
    >>> check_options(Fit(steps=0))
    UserError: --steps must be 1 or more; it is 0.

Options that must fit each other are named by a method `conflicts` of their dataclass; see `HasConflicts`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Protocol, get_args, get_origin, get_type_hints, runtime_checkable

from lrf_nerfstudio.utils.errors import UserError


@dataclass(frozen=True)
class Range:
    """The values that a number may have: finite ones within bounds, of which each may be missing.

    Attributes:
        least: the smallest value.
        above: or the largest number that is too small.
        most: the largest value.
        below: or the smallest number that is too large.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"{self.least} to {self.most}"
        bounds = {"{} or more": self.least, "above {}": self.above, "at most {}": self.most, "below {}": self.below}
        return " and ".join(text.format(bound) for text, bound in bounds.items() if bound is not None)


AtLeastOne = Annotated[int, Range(least=1)]
"""A count of something that there must be."""
Count = Annotated[int, Range(least=0)]
"""A count of something that may be left out."""
Positive = Annotated[float, Range(above=0)]
"""Such as a size or a learning rate."""
NotNegative = Annotated[float, Range(least=0)]
"""Such as the weight of a loss, which 0 leaves out."""
Fraction = Annotated[float, Range(least=0, most=1)]
"""A part of a whole."""


@runtime_checkable
class HasConflicts(Protocol):
    """Options of which some must fit others, or that hold options of another package."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield the names of the fields whose value does not fit, each with what it must be, "must be above start"."""


def check_options(options: Any, prefix: str = "--") -> None:
    """Check that all options are in their ranges and fit each other, those of the dataclasses among them too.

    Args:
        options: a dataclass.
        prefix: of the names of its fields on the command line, such as `--pipeline.model.`.

    Raises:
        UserError: if one is not; the message names it.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        name, value = prefix + field.name, getattr(options, field.name)
        for limits in broken_ranges(hints[field.name], value):
            raise _out_of_range(name, f"must be {limits}", value)
        for inner, held in _dataclasses_in(value, name):
            check_options(held, f"{inner}.")
    if isinstance(options, HasConflicts):
        for path, demand in options.conflicts():
            value = options
            for part in path.split("."):
                value = getattr(value, part)
            raise _out_of_range(prefix + path, demand, value)


def broken_ranges(annotation: Any, value: Any) -> Iterator[Range]:
    """Yield the ranges in the type of an option that its value, or an item of a tuple, does not lie in."""
    if value is None:
        return
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        yield from (limits for limits in arguments[1:] if isinstance(limits, Range) and value not in limits)
        yield from broken_ranges(arguments[0], value)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from broken_ranges(arguments[0 if arguments[-1] is Ellipsis else number], item)
    else:  # a union with None, or no type with arguments
        for argument in arguments if isinstance(value, int | float) else ():
            if not isinstance(argument, str):
                yield from broken_ranges(argument, value)


def _dataclasses_in(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _dataclasses_in(item, f"{name}.{key}")
    elif is_dataclass(value) and not isinstance(value, type):
        yield name, value


def _out_of_range(name: str, demand: str, value: Any) -> UserError:
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return UserError(f"{name.replace('_', '-')} {demand}; it is {shown}.")
