import re
import urllib.error
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from lrf_nerfstudio.training.imagenet import ImageNetFeatures
from lrf_nerfstudio.utils.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """PyTorch's cache for files of weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def write_weights(network: torch.nn.Module, cache: Path, url: str) -> None:
    """Random weights, and statistics of normalization layers that are not those of a fresh network."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    torch.save(network.state_dict(), cache / Path(url).name)


def write_timm(name: str, cache: Path) -> torch.nn.Module:
    network = timm.create_model(name)
    write_weights(network, cache, network.default_cfg["url"])
    return network.eval()


def test_timms_weights_are_in_the_layers_that_they_belong_to(cache):
    whole = write_timm("tf_efficientnet_lite0", cache)
    features = ImageNetFeatures("tf_efficientnet_lite0")
    images = torch.rand(2, 3, 64, 96)
    found = {}
    for stage in (0, 1, 2, 4):  # those that are followed by a reduction, or the last at 1/16
        whole.blocks[stage].register_forward_hook(lambda _, __, output, stage=stage: found.update({stage: output}))
    whole(images * 2.0 - 1.0)  # mean and deviation 0.5
    for expected, feature in zip(found.values(), features(images), strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)
    assert features.channels == [feature.shape[1] for feature in features(images)]


def test_features_are_frozen_and_normalized_as_in_training(weights_in_cache):
    features = ImageNetFeatures("tf_efficientnet_lite0")
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


def test_networks_of_torchvision(cache):
    torch.manual_seed(0)
    network = torchvision.models.shufflenet_v2_x0_5().eval()  # a name that timm lacks
    url = torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.url
    write_weights(network, cache, url)
    features = ImageNetFeatures("shufflenet_v2_x0_5")
    images = torch.rand(2, 3, 64, 96)
    maps = features(images)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, 64 // stride, 96 // stride)
        for channels, stride in zip(features.channels, (2, 4, 8, 16), strict=True)
    ]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = network.maxpool(network.conv1((images - mean[:, None, None]) / std[:, None, None]))
    expected = network.stage3(network.stage2(x))
    torch.testing.assert_close(maps[3], expected, rtol=1e-4, atol=1e-5)


def test_weights_that_are_missing(cache):
    with pytest.raises(OSError, match=re.escape(str(cache / "tf_efficientnet_lite0-0aa007d2.pth"))):
        ImageNetFeatures("tf_efficientnet_lite0")
    with pytest.raises(OSError, match="shufflenetv2"):
        ImageNetFeatures("shufflenet_v2_x0_5")


def test_weights_are_downloaded_where_it_is_allowed(cache, monkeypatch):
    published = cache.parent / "published"
    published.mkdir()
    write_timm("mobilenetv3_small_050", published)
    fetched = []

    def download(url, destination, hash_prefix):
        fetched.append((url, hash_prefix))
        Path(destination).write_bytes((published / Path(url).name).read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    ImageNetFeatures("mobilenetv3_small_050", download=True)
    ((url, hash_prefix),) = fetched
    assert url.startswith("https://") and f"-{hash_prefix}." in url
    ImageNetFeatures("mobilenetv3_small_050", download=True)
    assert len(fetched) == 1


def test_a_download_that_fails_leaves_no_file(cache):
    """No network is reached in tests."""
    with pytest.raises((OSError, urllib.error.URLError)):
        ImageNetFeatures("tf_efficientnet_lite0", download=True)
    assert not list(cache.iterdir())


def test_networks_that_cannot_be_used_are_named(cache):
    with pytest.raises(UserError, match=r"no-such-network.*neither timm nor torchvision"):
        ImageNetFeatures("no-such-network")
    write_timm("vit_tiny_patch16_224", cache)
    with pytest.raises(UserError, match="--feature-network vit_tiny_patch16_224 cannot be used"):
        ImageNetFeatures("vit_tiny_patch16_224")
    (cache / "tf_efficientnet_lite0-0aa007d2.pth").write_bytes(b"damaged")
    with pytest.raises(UserError, match="--feature-network tf_efficientnet_lite0 cannot be used"):
        ImageNetFeatures("tf_efficientnet_lite0")


def test_a_malicious_file_is_not_run(cache, tmp_path):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"conv_stem.weight": Malicious()}, cache / "tf_efficientnet_lite0-0aa007d2.pth")
    with pytest.raises(UserError, match="cannot be used"):
        ImageNetFeatures("tf_efficientnet_lite0")
    assert not (tmp_path / "executed").exists()
