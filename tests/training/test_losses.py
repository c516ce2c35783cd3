import pytest
import torch

from lrf_nerfstudio.training.losses import (
    channel_deviation,
    correspondence_loss,
    deviation_loss,
    gradient_loss,
    kl_divergence,
    masked_l1,
    range_loss,
    regularization_loss,
)


def corresponding(points_i, points_j, weights=(1.0,), valid=None, deviation=None):
    points_i, points_j = torch.tensor(points_i), torch.tensor(points_j)
    valid = torch.ones(points_i.shape[:2], dtype=torch.bool) if valid is None else torch.tensor(valid)
    deviation = torch.ones(points_i.shape[-1]) if deviation is None else torch.tensor(deviation)
    return correspondence_loss(points_i, points_j, valid, torch.tensor(weights), deviation).item()


def test_correspondence_loss_by_hand():
    # |differences|: (1, 4) / (1, 2) = (1, 2), mean 1.5; and (0, 2) / (1, 2) = (0, 1), mean 0.5; mean of the points 1.
    assert corresponding([[[0.0, 0.0], [1.0, 1.0]]], [[[1.0, 4.0], [1.0, 3.0]]], deviation=[1.0, 2.0]) == 1.0


def test_correspondence_loss_counts_points_that_exist():
    assert corresponding([[[0.0], [0.0]]], [[[2.0], [100.0]]], valid=[[True, False]]) == 2.0
    assert corresponding([[[0.0]]], [[[2.0]]], valid=[[False]]) == 0.0


def test_pairs_count_by_their_weight_and_equally_whatever_their_points():
    # Pair 1 differs by 1 at both points, pair 2 by 4 at its only point; lambda 3 : 1.
    points = [[[0.0], [0.0]], [[0.0], [0.0]]], [[[1.0], [1.0]], [[4.0], [9.0]]]
    valid = [[True, True], [True, False]]
    assert corresponding(*points, weights=(1.0, 1.0), valid=valid) == 2.5
    assert corresponding(*points, weights=(3.0, 1.0), valid=valid) == pytest.approx((3 * 1 + 4) / 4)
    # Normalised to mean 1 over the batch: only ratios matter. A pair without points has no part in it.
    assert corresponding(*points, weights=(0.3, 0.1), valid=valid) == pytest.approx((3 * 1 + 4) / 4)
    assert corresponding(*points, weights=(3.0, 1.0), valid=[[True, True], [False, False]]) == 1.0


def test_correspondence_loss_does_not_reward_shrinking():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 8, 8, generator=generator)
    scale = torch.ones((), requires_grad=True)
    scaled = latents * scale
    points = scaled.flatten(2).transpose(1, 2)
    valid, weights = torch.ones(1, 64, dtype=torch.bool), torch.ones(1)
    loss = correspondence_loss(points[:1], points[1:], valid, weights, channel_deviation(scaled))
    loss.backward()
    assert loss.item() > 0.5
    assert abs(scale.grad.item()) < 1e-6


def test_regularization_by_hand():
    original = torch.tensor([[0.0, 2.0], [0.0, 2.0]])[None, None]  # sample deviation sqrt(4 / 3)
    assert regularization_loss(original + 1.0, original).item() == pytest.approx((3 / 4) ** 0.5)
    assert regularization_loss(original, original).item() == 0.0


def test_deviation_loss_is_the_mean_log_ratio():
    loss = deviation_loss(torch.tensor([0.5, 4.0]), torch.tensor([1.0, 2.0]))
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item())


def test_kl_is_that_of_two_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, prior).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


def test_gradient_loss_by_hand():
    images = torch.zeros(1, 2, 2, 3)
    decoded = images.clone()
    decoded[0, 0, 0] = 1.0  # one pixel of four is wrong by 1
    # Of the two horizontal and the two vertical differences, one each is wrong by 1.
    assert gradient_loss(decoded, images).item() == pytest.approx(1 / 2)
    assert gradient_loss(images + 0.3, images).item() == 0.0


def test_range_loss_by_hand():
    assert range_loss(torch.tensor([0.0, 1.9, -3.0, 4.0])).item() == pytest.approx((0 + 0 + 1 + 4) / 4)


def test_masked_l1_by_hand():
    images, counts = torch.zeros(2, 2, 2, 3), torch.zeros(2, 2, 2, dtype=torch.bool)
    decoded = images.clone()
    decoded[0, 0, 0], decoded[1, 1, 1], decoded[1, 0, 0] = 0.3, -0.6, 9.0
    assert masked_l1(decoded, images, counts).item() == 0.0
    counts[0, 0, 0] = counts[1, 1, 1] = counts[1, 1, 0] = True
    assert masked_l1(decoded, images, counts).item() == pytest.approx((0.3 + 0.6 + 0.0) / 3)
