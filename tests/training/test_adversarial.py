import pytest
import torch

from lrf_nerfstudio.training.adversarial import (
    PatchDiscriminator,
    ProjectedDiscriminator,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_loss,
)
from lrf_nerfstudio.training.imagenet import ImageNetFeatures

pytestmark = pytest.mark.usefixtures("weights_in_cache")


def tiny_patch() -> PatchDiscriminator:
    return PatchDiscriminator(channels=8)


def projected() -> ProjectedDiscriminator:
    return ProjectedDiscriminator(ImageNetFeatures("tf_efficientnet_lite0"), width=16)


def test_hinge_loss_by_hand():
    # Photographs: relu(1 - 2) = 0 and relu(1 - 0) = 1, mean 0.5. Decoded: relu(1 - 3) = 0, relu(1 + 1) = 2, mean 1.
    one = torch.tensor([2.0, 0.0, -3.0, 1.0])
    assert discriminator_hinge_loss([one]).item() == 0.75
    # A second output that is right everywhere, whatever its size: the mean of both.
    assert discriminator_hinge_loss([one, torch.tensor([[5.0] * 9, [-5.0] * 9])]).item() == 0.375
    assert generator_loss([one, torch.tensor([[4.0] * 9])]).item() == 2.0 * -1


def test_adversarial_gradient_gets_the_size_of_the_reconstruction_gradient():
    last_layer = torch.tensor([1.0, -2.0], requires_grad=True)
    reconstruction = (3.0 * last_layer).sum()  # gradient (3, 3)
    adversarial = (0.01 * last_layer.square()).sum()  # gradient (0.02, -0.04)
    weight = adaptive_weight(reconstruction, adversarial, last_layer)
    assert not weight.requires_grad
    assert weight.item() == pytest.approx(18**0.5 / (0.002**0.5 + 1e-4), rel=1e-5)
    assert adaptive_weight(reconstruction * 1e9, adversarial, last_layer).item() == 1e4


def test_logits_are_of_patches_of_70_pixels():
    discriminator = PatchDiscriminator(channels=8).requires_grad_(False)
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    (logits,) = discriminator(images)
    assert logits.shape == (1, 1, 14, 14)  # 128 / 8 - 2
    blocks = [layer for layer in discriminator.layers if not isinstance(layer, torch.nn.GroupNorm)]
    (gradient,) = torch.autograd.grad(torch.nn.Sequential(*blocks)(images)[0, 0, 7, 7], images)
    rows = gradient[0].abs().sum(dim=(0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 70  # the receptive field of pix2pix's discriminator


@pytest.mark.parametrize("make", [tiny_patch, projected])
def test_pictures_of_a_batch_are_judged_alone(make):
    discriminator = make().eval()
    images = torch.rand(3, 3, 64, 64)
    for together, alone in zip(discriminator(images), discriminator(images[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)


def test_the_pretrained_network_is_neither_trained_nor_saved():
    discriminator = projected()
    assert {name.split(".")[0] for name in discriminator.state_dict()} == {"heads"}
    features = discriminator._features[0]
    assert [logits.shape for logits in discriminator(torch.rand(2, 3, 64, 64))] == [
        (2, 1, side, side) for side in (16, 8, 4, 2)
    ]
    assert not any(parameter.requires_grad for parameter in features.parameters())


@pytest.mark.parametrize("make", [tiny_patch, projected])
def test_it_learns_to_tell_photographs_from_gray(make):
    torch.manual_seed(0)
    discriminator = make()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    photographs, gray = torch.rand(2, 3, 64, 64), torch.full((2, 3, 64, 64), 0.5)
    for _ in range(20):
        loss = discriminator_hinge_loss(discriminator(torch.cat([photographs, gray])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
    assert -generator_loss(discriminator(photographs)) > 0.5 > -0.5 > -generator_loss(discriminator(gray))
