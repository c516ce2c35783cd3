"""Which photographs of a scene are trained on and which are held out, by the rules of published protocols."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np


class Split(NamedTuple):
    """Numbers of photographs, ascending; a photograph is in one of the two or in neither."""

    train: list[int]
    test: list[int]


@dataclass(frozen=True)
class SplitRule:
    """How photographs are divided. They are numbered in the order of their names, from 0.

    Attributes:
        rule: `every-nth-is-test`: numbers divisible by `n` are held out, the others are trained on. `few`: of these
            others only `views` are trained on, evenly spaced from the first to the last. `every-nth-is-input`: numbers
            divisible by `n` are trained on, the others are held out. `farthest`: `views` photographs are trained on,
            each taken as far as can be from those before; all others are held out.
        n: see `rule`.
        views: see `rule`.
    """

    rule: Literal["every-nth-is-test", "few", "every-nth-is-input", "farthest"]
    n: int = 8
    views: int = 3


def split(rule: SplitRule, names: Sequence[str], positions: np.ndarray) -> Split:
    """Divide the photographs of a scene.

    Args:
        rule: how.
        names: of the photographs, in any order.
        positions: [N, 3], of their cameras.

    Returns:
        Indices into `names`, in the order of the names.

    Raises:
        ValueError: if nothing would be left to train on or to hold out, or fewer than the rule asks for.
    """
    order = sorted(range(len(names)), key=lambda index: names[index])
    if rule.rule == "farthest":
        chosen = set(farthest_points(np.asarray(positions)[order], rule.views))
        train = [number for number in range(len(order)) if number in chosen]
        test = [number for number in range(len(order)) if number not in chosen]
    else:
        nth = [number for number in range(len(order)) if number % rule.n == 0]
        rest = [number for number in range(len(order)) if number % rule.n]
        train, test = (nth, rest) if rule.rule == "every-nth-is-input" else (rest, nth)
        if rule.rule == "few":
            train = evenly_spaced(rest, rule.views)
    if not train or not test:
        raise ValueError(f"{len(names)} photographs are too few for the rule {rule.rule}")
    return Split([order[number] for number in train], [order[number] for number in test])


def evenly_spaced(items: Sequence[int], count: int) -> list[int]:
    """Return `count` items from the first to the last, those at `round(linspace(0, len - 1, count))`.

    Halves are rounded to even, as NumPy does in RegNeRF's code, which later papers follow.

    Raises:
        ValueError: if there are not so many.
    """
    if len(items) < count:
        raise ValueError(f"{len(items)} photographs are left where {count} are asked for")
    return [items[number] for number in np.round(np.linspace(0, len(items) - 1, count)).astype(int)]


def farthest_points(positions: np.ndarray, count: int) -> list[int]:
    """Return indices of positions [N, 3] by farthest-point sampling, which begins with the first of them.

    The next is the one whose distance to the nearest of those taken is largest; of equals the first.

    Raises:
        ValueError: if there are not more than `count`: none would be held out.
    """
    if len(positions) <= count:
        raise ValueError(f"{len(positions)} photographs are too few to take {count} of them as input")
    taken = [0]
    distances = np.linalg.norm(positions - positions[0], axis=1)
    while len(taken) < count:
        taken.append(int(distances.argmax()))
        distances = np.minimum(distances, np.linalg.norm(positions - positions[taken[-1]], axis=1))
    return taken
