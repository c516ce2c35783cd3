import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vgg16

from lrf_nerfstudio.training.perceptual import WEIGHTS, PerceptualLosses, PretrainedFeatures, feature_distance
from lrf_nerfstudio.utils.images import read_image


@pytest.fixture(scope="module")
def features() -> PretrainedFeatures:
    return PretrainedFeatures()


@pytest.fixture(scope="module")
def photograph(demo_scene) -> torch.Tensor:
    """[1, 128, 128, 3] in [0, 1]."""
    image = read_image(sorted((demo_scene / "images").iterdir())[0])
    return torch.from_numpy(cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA)).float()[None] / 255


def test_weights_are_in_the_layers_that_they_belong_to(features):
    saved, own = torch.load(WEIGHTS, weights_only=True), features.network.state_dict()
    for name, in_file in {
        "conv_stem.weight": "_conv_stem.weight",
        "bn1.running_var": "_bn0.running_var",
        "blocks.0.0.conv_dw.weight": "_blocks.0._depthwise_conv.weight",
        "blocks.1.0.conv_pw.weight": "_blocks.1._expand_conv.weight",
        "blocks.1.1.bn3.running_mean": "_blocks.2._bn2.running_mean",
        "blocks.4.2.conv_pwl.weight": "_blocks.10._project_conv.weight",
    }.items():
        assert torch.equal(own[name], saved[in_file]), name


@pytest.mark.realdata
def test_the_whole_network_knows_a_banana(real_data):
    import timm

    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(
        dict(zip(network.state_dict(), torch.load(WEIGHTS, weights_only=True).values(), strict=True))
    )
    image = read_image(sorted((real_data / "scenes" / "banana" / "images_2").iterdir())[5])
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = cv2.resize(image[top : top + side, left : left + side], (224, 224), interpolation=cv2.INTER_AREA)
    with torch.no_grad():
        logits = network(torch.from_numpy(square).permute(2, 0, 1)[None] / 127.5 - 1.0)
    assert logits.argmax() == 954  # ImageNet's banana


def test_features_are_frozen_and_normalised_as_in_training(features):
    features.train()
    assert not any(module.training for module in features.modules() if module is not features)
    assert not any(parameter.requires_grad for parameter in features.parameters())
    images = torch.rand(2, 3, 64, 96, requires_grad=True)
    maps = features(images)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, 64 // stride, 96 // stride)
        for channels, stride in zip(features.channels, (2, 4, 8, 16), strict=True)
    ]
    torch.testing.assert_close(features(images[:1])[3], maps[3][:1], rtol=1e-4, atol=1e-4)
    maps[3].mean().backward()
    assert images.grad.abs().sum() > 0


def test_distance_by_hand():
    # Unit vectors (1, 0) and (0, 1): 2 (squared), equal directions: 0, mean 1. The second stage has opposites: 4.
    first = [torch.tensor([[3.0, 0.0], [2.0, 1.0]]).T[None, :, :, None], torch.ones(1, 1, 1, 1)]
    second = [torch.tensor([[0.0, 5.0], [4.0, 2.0]]).T[None, :, :, None], -torch.ones(1, 1, 1, 1)]
    assert feature_distance(first, second).item() == pytest.approx((1 + 4) / 2)
    assert feature_distance(first, first).item() == 0


def test_blur_is_further_than_a_change_of_brightness_of_the_same_l1(features, photograph):
    x = photograph.permute(0, 3, 1, 2)
    blurred = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4.0, mode="bicubic")
    brighter = x + (blurred - x).abs().mean()
    expected = features(x)
    assert feature_distance(features(blurred), expected) > 5 * feature_distance(features(brighter), expected)


def test_terms_of_weight_0_are_left_out(photograph):
    losses = PerceptualLosses(feature_weight=0.0, lpips_weight=0.0, download_lpips=False)
    assert losses.weights == {} and losses(photograph, photograph) == {} and losses.notices == ()
    losses = PerceptualLosses(feature_weight=0.1, lpips_weight=0.0, download_lpips=False)
    assert losses.weights == {"features": 0.1}
    decoded = (photograph * 0.5).requires_grad_()
    terms = losses(decoded, photograph)
    terms["features"].backward()
    assert decoded.grad.abs().sum() > 0
    assert losses(photograph, photograph)["features"] == 0


def test_lpips_where_its_weights_are(photograph, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    without = PerceptualLosses(feature_weight=0.0, lpips_weight=1.0, download_lpips=False)
    assert without.weights == {} and "--download-lpips" in without.notices[0]
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(vgg16(weights=None).state_dict(), folder / "vgg16-397923af.pth")
    losses = PerceptualLosses(feature_weight=0.1, lpips_weight=1.0, download_lpips=False)
    assert losses.weights == {"features": 0.1, "lpips": 1.0} and losses.notices == ()
    terms = losses(photograph.flip(1), photograph)
    assert np.all([0 < float(term) < 4 for term in terms.values()])
