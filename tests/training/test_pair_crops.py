import numpy as np
import pytest
import torch
from shifted_views import SHIFT, coordinate_picture, shifted_views

from lrf_nerfstudio.correspondence import PairMatches, SceneCorrespondences
from lrf_nerfstudio.training.data import pair_crops as crops_module
from lrf_nerfstudio.training.data.pair_crops import PairCrops, Region
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import sample_latents


@pytest.fixture
def coordinates(tmp_path) -> SceneCorrespondences:
    """Views whose colors say where in the scene they show."""
    return shifted_views(tmp_path, picture=coordinate_picture)


@pytest.fixture
def no_recoloring(monkeypatch):
    monkeypatch.setattr(crops_module, "random_recoloring", lambda rng: lambda pixels: pixels)


def scene_positions(item: dict) -> torch.Tensor:
    """[2, n, 2] in pixels of the scene, read from the crops' colors at the item's points."""
    images = item["images"].permute(0, 3, 1, 2)
    colors = sample_latents(images, item["points"][:, item["valid"]], factor=1)
    return colors[..., :2] * 255.0


@pytest.mark.parametrize("synthetic_share", [0.0, 1.0])
def test_points_of_both_crops_show_the_same(coordinates, no_recoloring, synthetic_share):
    dataset = PairCrops([coordinates], crop=48, margin=4, max_reduction=2.0, synthetic_share=synthetic_share)
    counts, mirrored, sides = [], 0, set()
    for index in range(40):
        item = dataset[index]
        first, second = scene_positions(item)
        counts.append(len(first))
        assert item["images"].shape == (2, 48, 48, 3)
        assert (item["points"][:, item["valid"]] >= 4).all() and (item["points"][:, item["valid"]] <= 44).all()
        # Bilinear sampling of a linear ramp is exact but for the 8 bits of either crop.
        torch.testing.assert_close(first, second, atol=1.0, rtol=0)
        mirrored += bool(item["images"][0, 0, 0, 0] > item["images"][0, 0, -1, 0])
        sides.add(round(float(item["images"][0, -1, 0, 1] - item["images"][0, 0, 0, 1]) * 255))
    assert min(counts) >= 1 and np.median(counts) > 10
    assert 5 < mirrored < 35
    assert min(sides) < 55 < 75 < max(sides)  # regions of 48 to 96 pixels


def test_crops_of_a_pair_come_from_both_views(coordinates, no_recoloring):
    # In the file, the same point of the scene lies SHIFT further left in the second view: only then do colors agree.
    wrong = SceneCorrespondences(
        coordinates.scene,
        tuple(PairMatches(p.i, p.j, p.points_i, p.points_j + np.float32((SHIFT / 2, 0))) for p in coordinates.pairs),
        coordinates.weights,
    )
    first, second = scene_positions(PairCrops([wrong], crop=48, margin=4)[0])
    assert (first - second).abs()[:, 0].mean() > 5


def test_recoloring_is_the_same_for_both_crops(coordinates):
    dataset = PairCrops([coordinates], crop=48, margin=4, max_reduction=1.0)
    blue = 0
    for index in range(20):
        item = dataset[index]
        images = item["images"].permute(0, 3, 1, 2)
        colors = sample_latents(images, item["points"][:, item["valid"]], factor=1)
        torch.testing.assert_close(colors[0], colors[1], atol=0.03, rtol=0)
        blue += bool((colors[..., 2] > 0.01).any())  # which the pictures lack
    assert 0 < blue < 20


def test_an_item_depends_on_its_number_and_the_seed_alone(coordinates):
    one, other = (PairCrops([coordinates], crop=48, margin=4, seed=3) for _ in range(2))
    for index in (0, 7, 2):
        other[index + 1]
        expected, again = one[index], other[index]
        for name in expected:
            torch.testing.assert_close(again[name], expected[name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(PairCrops([coordinates], crop=48, margin=4, seed=4)[0]["images"], one[0]["images"])


def test_every_pair_of_every_scene_comes_up_equally_often(tmp_path):
    few, many = shifted_views(tmp_path / "few", views=2), shifted_views(tmp_path / "many", views=4)
    weighted = SceneCorrespondences(many.scene, many.pairs, np.float32([0.1, 0.2, 0.3]))
    dataset = PairCrops([few, weighted], crop=48, margin=4)
    weights = [round(float(dataset[index]["weight"]), 1) for index in range(400)]
    assert {weight: pytest.approx(100, abs=35) for weight in (1.0, 0.1, 0.2, 0.3)} == {
        weight: weights.count(weight) for weight in set(weights)
    }


def test_at_most_so_many_photographs_stay_in_memory(coordinates, monkeypatch):
    reads = []
    read = crops_module.read_image
    monkeypatch.setattr(crops_module, "read_image", lambda path: reads.append(path) or read(path))
    roomy = PairCrops([coordinates], crop=48, margin=4, images_in_memory=3)
    for index in range(30):
        roomy[index]
    assert len(reads) == 3
    reads.clear()
    narrow = PairCrops([coordinates], crop=48, margin=4, images_in_memory=1)
    for index in range(30):
        narrow[index]
    assert len(reads) >= 30


def test_a_photograph_smaller_than_the_crop_is_named(coordinates):
    with pytest.raises(UserError, match=r"0\.png is 150 x 120 pixels, smaller than the crop of 128"):
        PairCrops([coordinates], crop=128, margin=8)


def test_corners_of_a_region_are_corners_of_the_crop():
    region = Region(left=10, top=20, side=96)
    corners = np.array([[10.0, 20.0], [106.0, 116.0]])
    np.testing.assert_allclose(region.to_crop(corners, 48), [[0, 0], [48, 48]])
    np.testing.assert_allclose(region.to_photograph(region.to_crop(corners, 48), 48), corners)


def test_noise_is_drawn_where_it_is_asked_for_and_belongs_to_the_item(coordinates):
    plain = PairCrops([coordinates], crop=48, margin=4)
    noisy, other = (PairCrops([coordinates], crop=48, margin=4, seed=seed, noise_shape=(4, 12, 12)) for seed in (0, 1))
    assert "noise" not in plain[3]
    assert torch.equal(noisy[3]["images"], plain[3]["images"])
    noise = noisy[3]["noise"]
    assert noise.shape == (2, 4, 12, 12) and not torch.equal(noise[0], noise[1])
    torch.rand(7)
    assert torch.equal(noisy[3]["noise"], noise)
    assert not torch.equal(noisy[4]["noise"], noise) and not torch.equal(other[3]["noise"], noise)
    many = torch.stack([noisy[index]["noise"] for index in range(50)])
    assert abs(many.mean()) < 0.02 and many.std() == pytest.approx(1.0, abs=0.02)
