"""How alike objects are by silhouette and color."""

import pytest
import torch

from lrf_nerfstudio.evaluation.likeness import likeness
from lrf_nerfstudio.guidance import OrbitConfig, evaluation_orbit
from lrf_nerfstudio.guidance.toy_objects import OBJECTS, render_object


def square(color: tuple[float, float, float], left: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture [1, 4, 8, 3] of a square of 4 x 4 pixels before white, and its silhouette."""
    picture, silhouette = torch.ones(1, 4, 8, 3), torch.zeros(1, 4, 8, dtype=torch.bool)
    picture[:, :, left : left + 4] = torch.tensor(color)
    silhouette[:, :, left : left + 4] = True
    return picture, silhouette


def test_overlap_times_color():
    red = square((1.0, 0.0, 0.0))
    assert likeness(*red, *red) == 1
    assert likeness(*red, *square((0.7, 0.0, 0.4))) == pytest.approx(0.5)  # 0.3, 0.4, 0.5
    assert likeness(*red, *square((1.0, 0.0, 0.0), left=2)) == pytest.approx(2 / 6)
    assert likeness(*red, *square((0.7, 0.0, 0.4), left=2)) == pytest.approx(1 / 6)
    assert likeness(*red, *square((1.0, 0.0, 0.0), left=4)) == 0
    assert likeness(*red, *square((0.0, 1.0, 1.0))) == 0
    two_views = [torch.cat([part, part]) for part in red]
    other = [torch.cat(parts) for parts in zip(red, square((1.0, 0.0, 0.0), left=4), strict=True)]
    assert likeness(*two_views, *other) == pytest.approx(0.5)


def test_nothing_is_like_nothing():
    picture, silhouette = square((1.0, 0.0, 0.0))
    nothing = torch.ones_like(picture), torch.zeros_like(silhouette)
    assert likeness(*nothing, picture, silhouette) == likeness(picture, silhouette, *nothing) == 0
    assert likeness(*nothing, *nothing) == 0


def test_each_of_the_ten_objects_is_most_like_itself():
    orbit = evaluation_orbit(OrbitConfig(cells=8, eval_views=3), cell=4)
    shown = [render_object(thing, orbit) for thing in OBJECTS]
    for number, one in enumerate(shown):
        scores = [likeness(*one, *other) for other in shown]
        assert scores[number] == pytest.approx(1, abs=1e-5)
        assert max(score for index, score in enumerate(scores) if index != number) < 0.8
