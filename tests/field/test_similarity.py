"""SSIM of pictures at a stride: the known measure at the positions that are taken."""

import pytest
import torch
from pytorch_msssim import ssim

from lrf_nerfstudio.field.similarity import _picture_similarity_map, picture_similarity


def pictures(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    photograph = torch.rand(height, width, 3, generator=generator)
    return (photograph + 0.2 * torch.randn(height, width, 3, generator=generator)).requires_grad_(), photograph


def test_without_a_stride_it_is_the_known_measure():
    picture, photograph = pictures(31, 40)
    known = ssim(*(image.permute(2, 0, 1)[None] for image in (picture, photograph)), data_range=1.0)
    similarity = picture_similarity(picture, photograph, stride=1)
    torch.testing.assert_close(similarity, known, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(value, picture)[0] for value in (similarity, known)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("stride", [2, 3])
def test_a_stride_takes_every_so_many_positions(stride):
    picture, photograph = pictures(31, 40)
    every = _picture_similarity_map(picture, photograph, 1)
    some = _picture_similarity_map(picture, photograph, stride)
    torch.testing.assert_close(some, every[:, ::stride, ::stride], atol=1e-5, rtol=1e-5)
    assert picture_similarity(photograph, photograph, stride).item() == pytest.approx(1)
