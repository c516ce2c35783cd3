from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lrf_nerfstudio.training.config import TrainingConfig
from lrf_nerfstudio.training.perceptual import PerceptualLosses, feature_distance
from lrf_nerfstudio.utils.images import read_image


def losses_of(**options) -> PerceptualLosses:
    return PerceptualLosses(TrainingConfig(output=Path(), **options))


@pytest.fixture(scope="module")
def photograph(demo_scene) -> torch.Tensor:
    """[1, 128, 128, 3] in [0, 1]."""
    image = read_image(sorted((demo_scene / "images").iterdir())[0])
    return torch.from_numpy(cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA)).float()[None] / 255


def test_distance_by_hand():
    # Unit vectors (1, 0) and (0, 1): 2 (squared), equal directions: 0, mean 1. The second stage has opposites: 4.
    first = [torch.tensor([[3.0, 0.0], [2.0, 1.0]]).T[None, :, :, None], torch.ones(1, 1, 1, 1)]
    second = [torch.tensor([[0.0, 5.0], [4.0, 2.0]]).T[None, :, :, None], -torch.ones(1, 1, 1, 1)]
    assert feature_distance(first, second).item() == pytest.approx((1 + 4) / 2)
    assert feature_distance(first, first).item() == 0


def test_terms_of_weight_0_are_left_out(photograph, weights_in_cache):
    losses = losses_of()
    assert losses.weights == {} and losses(photograph, photograph) == {} and losses.notices == ()
    losses = losses_of(feature_weight=0.1)
    assert losses.weights == {"features": 0.1}
    decoded = (photograph * 0.5).requires_grad_()
    terms = losses(decoded, photograph)
    terms["features"].backward()
    assert decoded.grad.abs().sum() > 0
    assert losses(photograph, photograph)["features"] == 0


def test_both_losses_see_a_blurred_photograph(photograph, weights_in_cache):
    losses = losses_of(feature_weight=0.1, lpips_weight=1.0)
    assert losses.weights == {"features": 0.1, "lpips": 1.0} and losses.notices == ()
    x = photograph.permute(0, 3, 1, 2)
    blurred = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4.0, mode="bicubic").permute(0, 2, 3, 1)
    terms = losses(blurred, photograph)
    assert np.all([0 < float(term) < 4 for term in terms.values()])
    slightly = losses(photograph + 0.1 * (blurred - photograph), photograph)
    assert all(slightly[name] < terms[name] for name in terms)


def test_losses_whose_weights_are_missing_are_left_out(photograph, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    without = losses_of(feature_weight=1.0, lpips_weight=1.0)
    assert without.weights == {} and without(photograph, photograph) == {}
    features, lpips = without.notices
    assert features.startswith("The feature loss is left out: ") and "tf_efficientnet_lite0" in features
    assert lpips.startswith("LPIPS is left out: ") and "vgg16" in lpips
    assert all("--download-weights" in notice for notice in without.notices)
