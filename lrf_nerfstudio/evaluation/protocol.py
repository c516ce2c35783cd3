"""Protocols of published tables: data sets, scenes, splits, and the numbers that others have reported.

Each is a file of `lrf_nerfstudio/evaluation/protocols/`, which says where a paper leaves something open.
"""

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from lrf_nerfstudio.evaluation.splits import SplitRule
from lrf_nerfstudio.utils.errors import UserError

_T = TypeVar("_T")


@dataclass(frozen=True)
class DataSet:
    """Scenes of one kind.

    Attributes:
        name: in tables.
        folder: below --data, with a folder for each scene; `.` is --data itself.
        scenes: names of their folders; empty stands for all that are there.
        images: N, for the photographs in the folders `images_N`; 1 for `images`.
        split: which photographs are held out.
        inside: folder of a scene that has its photographs and cameras; `.` is the scene's own.
        where: where the data comes from, and how the folder must look.
    """

    name: str
    folder: str
    images: int
    split: SplitRule
    where: str
    scenes: tuple[str, ...] = ()
    inside: str = "."


@dataclass(frozen=True)
class Mean:
    """A mean over scenes that a table shows.

    Attributes:
        name: in tables.
        data_sets: whose scenes are in it.
        without: scenes that are not.
    """

    name: str
    data_sets: tuple[str, ...]
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reported:
    """A number that others have published.

    Attributes:
        method: as they call it.
        data: what it was measured on, as they call it.
        source: where it is published.
        psnr: in dB.
        ssim: structural similarity.
        lpips: with the network that `source` names.
    """

    method: str
    data: str
    source: str
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None


@dataclass(frozen=True)
class Protocol:
    """How a table is made.

    Attributes:
        name: of the file.
        title: what it is.
        steps: that a field is fitted for.
        rgb_steps: that a field in RGB is fitted for, where it is another number.
        lpips: the network of LPIPS.
        data_sets: what is measured on.
        means: over scenes; one for each data set where none is given.
        crop: photographs are cut in the middle to a multiple of so many pixels along each axis.
        points: where the first Gaussians are: at the data set's points (`sfm`), or at points that are triangulated from
            the photographs that are trained on, with their known cameras.
        open: what the paper leaves open, and what was chosen.
        reported: what others have published.
    """

    name: str
    title: str
    steps: int
    lpips: Literal["alex", "vgg"]
    data_sets: tuple[DataSet, ...]
    means: tuple[Mean, ...] = ()
    crop: int = 1
    points: Literal["sfm", "triangulated"] = "sfm"
    rgb_steps: int | None = None
    open: tuple[str, ...] = field(default=())
    reported: tuple[Reported, ...] = ()


def protocol_names() -> list[str]:
    """Return the names of the protocols in the package."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


def load_protocol(name: str) -> Protocol:
    """Read a protocol of the package.

    Raises:
        UserError: if there is none of this name.
    """
    if name not in protocol_names():
        raise UserError(f"There is no protocol {name!r} (--protocol); there are {', '.join(protocol_names())}.")
    return read_protocol(name, (_folder() / f"{name}.yaml").read_text(encoding="utf-8"))


def read_protocol(name: str, text: str) -> Protocol:
    """Read the text of a protocol's file; whatever a file says that nobody reads is a ValueError."""
    import yaml

    content = yaml.safe_load(text)
    data_sets = tuple(
        _made(DataSet, entry | {"split": _made(SplitRule, entry["split"])}) for entry in content.pop("data_sets")
    )
    means = tuple(_made(Mean, entry) for entry in content.pop("means", ())) or tuple(
        Mean(data_set.name, (data_set.name,)) for data_set in data_sets
    )
    reported = tuple(_made(Reported, entry) for entry in content.pop("reported", ()))
    return _made(Protocol, content | {"name": name, "data_sets": data_sets, "means": means, "reported": reported})


def _made(kind: type[_T], entry: Mapping[str, Any]) -> _T:
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]  # all kinds here are dataclasses
    if unknown := set(entry) - known:
        raise ValueError(f"a {kind.__name__} has no {', '.join(sorted(unknown))}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})


def _folder() -> Any:
    return importlib.resources.files("lrf_nerfstudio") / "evaluation" / "protocols"
