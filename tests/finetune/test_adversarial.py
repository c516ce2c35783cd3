import pytest
import torch

from lrf_nerfstudio.finetune.adversarial import PatchDiscriminator, adaptive_weight, discriminator_hinge_loss


def test_hinge_loss_by_hand():
    # Photographs: relu(1 - 2) = 0 and relu(1 - 0) = 1, mean 0.5. Decoded: relu(1 - 3) = 0, relu(1 + 1) = 2, mean 1.
    assert discriminator_hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])).item() == 0.75


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
    logits = discriminator(images)
    assert logits.shape == (1, 1, 14, 14)  # 128 / 8 - 2
    blocks = [layer for layer in discriminator.layers if not isinstance(layer, torch.nn.GroupNorm)]
    (gradient,) = torch.autograd.grad(torch.nn.Sequential(*blocks)(images)[0, 0, 7, 7], images)
    rows = gradient[0].abs().sum(dim=(0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 70  # the receptive field of pix2pix's discriminator


def test_pictures_of_a_batch_are_judged_alone():
    discriminator = PatchDiscriminator(channels=8)
    images = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(discriminator(images)[1:2], discriminator(images[1:2]))


def test_it_learns_to_tell_photographs_from_grey():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    photographs, grey = torch.rand(2, 3, 64, 64), torch.full((2, 3, 64, 64), 0.5)
    for _ in range(20):
        loss = discriminator_hinge_loss(discriminator(photographs), discriminator(grey))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert discriminator(photographs).min() > 0 > discriminator(grey).max()
