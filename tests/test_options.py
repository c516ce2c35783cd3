"""Every option has its range, and is checked before anything is read: of all commands and of the methods."""

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from lrf_nerfstudio.__main__ import COMMANDS, function_of
from lrf_nerfstudio.plugin.method import latent_dreamsplat, latent_splatfacto
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import AtLeastOne, Range, check_options

SOMETHING = {Path: Path("somewhere"), str: "something", tuple: (Path("somewhere"),)}
"""Values for options without a default."""


def options_of(command: str) -> Any:
    """The options of a command: defaults, and something where there is none."""
    (parameter,) = signature(function_of(command)).parameters
    kind = get_type_hints(function_of(command))[parameter]
    missing = {
        field.name: SOMETHING[get_origin(hint) or hint]
        for field in fields(kind)
        if (hint := get_type_hints(kind)[field.name]) in SOMETHING or get_origin(hint) is tuple
        if field.default.__class__.__name__ == field.default_factory.__class__.__name__ == "_MISSING_TYPE"
    }
    return kind(**missing)


def ranges_in(annotation: Any) -> Iterator[Range]:
    if get_origin(annotation) is Annotated:
        yield from (item for item in get_args(annotation)[1:] if isinstance(item, Range))
    for argument in get_args(annotation):
        yield from ranges_in(argument)


def own_options(options: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Path, annotation and value of the options that dataclasses of this package declare."""
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value, owner = getattr(options, field.name), owner_of(type(options), field.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from own_options(value, (*path, field.name))
        elif owner.__module__.startswith("lrf_nerfstudio"):
            yield (*path, field.name), hints[field.name], value


def owner_of(kind: type, name: str) -> type:
    return next(base for base in kind.__mro__ if name in inspect.get_annotations(base))


def changed(options: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy with another value."""
    result = holder = copy.deepcopy(options)
    for name in path[:-1]:
        holder = getattr(holder, name)
    setattr(holder, path[-1], value)
    return result


def beyond(limits: Range) -> Iterator[float]:
    """Values that lie just outside of a range."""
    yield from (bound - 1 for bound in (limits.least, limits.above) if bound is not None)
    yield from (bound + 1 for bound in (limits.most, limits.below) if bound is not None)
    yield from (bound for bound in (limits.above, limits.below) if bound is not None)
    yield math.nan


def like(value: Any, annotation: Any, number: float) -> Any:
    """A number, or as many of it as the option has, or one."""
    if get_origin(annotation) is not tuple:
        return number
    if value and isinstance(value[0], tuple):
        return tuple(tuple(number for _ in inner) for inner in value)
    return tuple(number for _ in value) or (number,)


ALL = [pytest.param(lambda name=name: options_of(name), id=name) for name in COMMANDS]
METHODS = (latent_splatfacto, latent_dreamsplat)
ALL += [pytest.param(lambda method=method: method.config, id=method.config.method_name) for method in METHODS]


@pytest.mark.parametrize("make", ALL)
def test_every_option_below_at_and_above_its_range(make) -> None:
    options = make()
    check_options(options)
    for path, annotation, value in own_options(options):
        option = "--" + ".".join(path).replace("_", "-")
        for limits in ranges_in(annotation):
            for number in beyond(limits):
                with pytest.raises(UserError, match=f"^{option} must be {limits}; it is "):
                    check_options(changed(options, path, like(value, annotation, number)))
            for bound in (limits.least, limits.most):
                if bound is not None:
                    try:
                        check_options(changed(options, path, like(value, annotation, bound)))
                    except UserError as error:  # it need not fit the other options
                        assert f"must be {limits};" not in str(error)


@pytest.mark.parametrize("make", ALL)
def test_every_number_has_a_range(make) -> None:
    bare = [
        ".".join(path)
        for path, annotation, value in own_options(make())
        if "Suppress" not in repr(annotation)  # tyro's mark of an option that cannot be given
        if isinstance(value, int | float) and not isinstance(value, bool) and not list(ranges_in(annotation))
    ]
    assert not bare


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("pipeline.datamanager.dataparser.eval_interval", 0),
        ("pipeline.datamanager.dataparser.downscale_factor", -1),
        ("pipeline.model.densification.stop", 0.05),
        ("pipeline.model.densification.opacity_resets", 12),
    ],
)
def test_options_that_do_not_fit(path: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^--{path.replace('_', '-')} must be .*; it is {value}\\.$"):
        check_options(changed(latent_splatfacto.config, tuple(path.split(".")), value))


def test_optimizers_are_reached() -> None:
    config = copy.deepcopy(latent_splatfacto.config)
    config.optimizers["means"]["optimizer"].lr = -1.0
    with pytest.raises(UserError, match=r"^--optimizers\.means\.optimizer\.lr must be above 0; it is -1\.0\.$"):
        check_options(config)


def test_shards_and_snapshots() -> None:
    for name, value in (("shard_index", 1), ("snapshots", (10, 3000))):
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} must be "):
            check_options(changed(options_of("pairs"), (name,), value))


def test_items_of_tuples_and_what_may_be_none() -> None:
    @dataclass
    class Some:
        sizes: tuple[AtLeastOne, AtLeastOne] = (1, 1)
        many: tuple[tuple[AtLeastOne, ...], ...] = ()
        maybe: AtLeastOne | None = None
        free: Annotated[float, Range(above=0, most=1)] | None = None

    check_options(Some(many=((1, 2), (3,)), free=1))
    for wrong in ({"sizes": (1, 0)}, {"many": ((1,), (2, 0))}, {"maybe": 0}, {"free": 0.0}, {"free": math.inf}):
        with pytest.raises(UserError, match=f"^--{next(iter(wrong))} must be "):
            check_options(Some(**wrong))
