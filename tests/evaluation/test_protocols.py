"""Protocols: each split against the names that the rules of the papers give, and what the files say."""

import math

import numpy as np
import pytest

from lrf_nerfstudio.evaluation.protocol import load_protocol, protocol_names, read_protocol
from lrf_nerfstudio.evaluation.splits import Split, SplitRule, evenly_spaced, farthest_points, split
from lrf_nerfstudio.utils.errors import UserError

ALL = ["lrf", "lrf-llff-3", "mip360", "quick", "splatent"]


def names_of(count: int) -> list[str]:
    """Names in an order that is not theirs."""
    names = [f"image{number:03d}.png" for number in range(count)]
    return names[1::2] + names[::2]


def named_split(rule: SplitRule, count: int, positions: np.ndarray | None = None) -> tuple[list[int], list[int]]:
    """The numbers in the names of the photographs that a rule takes for either part."""
    names = names_of(count)
    parts = split(rule, names, np.zeros((count, 3)) if positions is None else positions)
    train, test = ([int(names[index][5:8]) for index in part] for part in parts)
    assert train == sorted(train) and test == sorted(test) and not set(train) & set(test)
    return train, test


def rule_of(protocol: str, data_set: str) -> SplitRule:
    (found,) = [each for each in load_protocol(protocol).data_sets if each.name == data_set]
    return found.split


@pytest.mark.parametrize(
    ("protocol", "data_set"),
    [
        ("quick", "scenes"),
        ("lrf", "LLFF"),
        ("lrf", "DL3DV"),
        ("lrf", "MVImgNet"),
        ("lrf", "Mip-NeRF 360"),
        ("mip360", "outdoors"),
        ("mip360", "indoors"),
    ],
)
def test_every_8th_photograph_is_held_out(protocol, data_set):
    train, test = named_split(rule_of(protocol, data_set), 20)  # as many as fern has
    assert test == [0, 8, 16]
    assert train == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19]


@pytest.mark.parametrize(
    ("count", "train", "test"),
    [
        (20, [1, 10, 19], [0, 8, 16]),  # fern: 17 others, their numbers 0, 8 and 16
        (34, [1, 17, 33], [0, 8, 16, 24, 32]),  # flower: 29 others, 0, 14 and 28
        (25, [1, 12, 23], [0, 8, 16, 24]),  # orchids: 21 others, 0, 10 and 20
        (19, [1, 10, 18], [0, 8, 16]),  # 16 others: 7.5 is rounded to 8
        (17, [1, 7, 15], [0, 8, 16]),  # 14 others: 6.5 is rounded to 6
    ],
)
def test_three_views_of_llff(count, train, test):
    assert named_split(rule_of("lrf-llff-3", "LLFF"), count) == (train, test)


def test_splatent_takes_every_8th_of_llff_as_input():
    assert named_split(rule_of("splatent", "LLFF"), 20) == ([0, 8, 16], [n for n in range(20) if n % 8])


def test_splatent_takes_views_far_apart():
    rule = rule_of("splatent", "DL3DV, 5 views")
    assert rule.views == 5 and rule_of("splatent", "DL3DV").views == rule_of("splatent", "Mip-NeRF 360").views == 30
    # Cameras on a line, at the numbers of their photographs: the first, the last, the middle, those of the halves.
    names = names_of(33)
    positions = np.array([[float(name[5:8]), 0, 0] for name in names])
    train, test = named_split(rule, 33, positions)
    assert train == [0, 8, 16, 24, 32]
    assert test == [number for number in range(33) if number % 8]
    assert farthest_points(np.array([[0.0, 0, 0], [1, 0, 0], [-1, 0, 0]]), 2) == [0, 1]  # of equals the first


def test_photographs_that_do_not_suffice():
    for rule, count in (
        (SplitRule("farthest", views=5), 5),
        (SplitRule("few", views=3), 3),
        (SplitRule("every-nth-is-test"), 1),
        (SplitRule("every-nth-is-input"), 1),
    ):
        with pytest.raises(ValueError, match="photographs"):
            split(rule, names_of(count), np.zeros((count, 3)))
    assert evenly_spaced([4, 5, 6], 3) == [4, 5, 6]
    assert split(SplitRule("few", views=3), names_of(4), np.zeros((4, 3))).test == [names_of(4).index("image000.png")]
    assert Split([1], [0]) == split(SplitRule("every-nth-is-test"), ["a", "b"], np.zeros((2, 3)))


def test_the_protocols_files():
    assert protocol_names() == ALL
    steps = {name: load_protocol(name).steps for name in ALL}
    assert steps == {"lrf": 30000, "lrf-llff-3": 10000, "mip360": 30000, "quick": 4000, "splatent": 30000}
    for name in ALL:
        protocol = load_protocol(name)
        assert protocol.name == name and protocol.lpips in ("alex", "vgg") and protocol.data_sets
        known = {data_set.name for data_set in protocol.data_sets}
        scenes = {scene for data_set in protocol.data_sets for scene in data_set.scenes}
        for mean in protocol.means:
            assert set(mean.data_sets) <= known and set(mean.without) <= scenes
        for reported in protocol.reported:
            assert reported.source and reported.data in known | {mean.name for mean in protocol.means}
            assert 10 < (reported.psnr or math.nan) < 40
    assert {d.images for d in load_protocol("lrf").data_sets} == {8} and load_protocol("lrf").crop == 8
    assert [d.images for d in load_protocol("mip360").data_sets] == [4, 2]
    means = {mean.name: mean for mean in load_protocol("mip360").means}
    assert sum(len(d.scenes) for d in load_protocol("mip360").data_sets) == 9
    assert len(means["7 scenes"].without) == 2
    assert [row.psnr for row in load_protocol("lrf").reported] == [26.47, 28.07, 29.12]
    assert {row.psnr for row in load_protocol("splatent").reported if row.method == "LRF"} == {20.19, 17.98, 19.08}
    assert load_protocol("lrf-llff-3").points == "triangulated"


def test_mistakes_in_a_protocol():
    with pytest.raises(UserError, match="there are lrf, lrf-llff-3"):
        load_protocol("../quick")
    with pytest.raises(ValueError, match="no stepz"):
        read_protocol("x", "{title: x, stepz: 3, lpips: alex, data_sets: []}")
