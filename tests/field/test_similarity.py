"""SSIM: the known measure, everywhere or at the positions that are taken, in every precision and on every device."""

import pytest
import torch
from fake_cuda import DEVICE, fake_cuda
from pytorch_msssim import ssim

from lrf_nerfstudio.field import similarity as module
from lrf_nerfstudio.field.similarity import _picture_similarity_map, picture_similarity, structural_similarity

MEASURES = [structural_similarity, lambda x, y: picture_similarity(x, y, stride=1)]


def pictures(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    photograph = torch.rand(height, width, 3, generator=generator)
    return (photograph + 0.2 * torch.randn(height, width, 3, generator=generator)).requires_grad_(), photograph


@pytest.mark.parametrize("measure", MEASURES, ids=["latents", "pictures"])
def test_without_a_stride_it_is_the_known_measure(measure):
    picture, photograph = pictures(31, 40)
    known = ssim(*(image.permute(2, 0, 1)[None] for image in (picture, photograph)), data_range=1.0)
    similarity = measure(picture, photograph)
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


@pytest.mark.parametrize("size", [(5, 40), (10, 10), (3, 7)])
def test_on_small_grids_the_window_shrinks(size):
    rendered, target = pictures(*size)
    window = min(11, *(length - 1 + length % 2 for length in size))
    images = (image.detach().double().permute(2, 0, 1)[None] for image in (rendered, target))
    known = ssim(*images, data_range=1.0, win_size=window)
    assert structural_similarity(rendered, target).item() == pytest.approx(known.item(), abs=1e-5)


@pytest.mark.parametrize("measure", MEASURES, ids=["latents", "pictures"])
def test_autocast_changes_nothing(measure):
    """Bright and smooth: E[x^2] - E[x]^2 is 1e-4 of either, which half precision cannot tell from 0."""
    generator = torch.Generator().manual_seed(0)
    target = 0.9 + 0.01 * torch.randn(31, 40, 3, generator=generator)
    rendered = (target + 0.01 * torch.randn(31, 40, 3, generator=generator)).requires_grad_()
    exact = measure(rendered.double().detach(), target.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = measure(rendered, target)
    (gradient,) = torch.autograd.grad(value, rendered)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), abs=1e-4)
    torch.testing.assert_close(gradient, torch.autograd.grad(measure(rendered, target), rendered)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # what it would be: the products of matrices in half precision
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16


@pytest.mark.parametrize("measure", [*MEASURES, picture_similarity], ids=["latents", "pictures", "every second"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_on_cuda_nothing_is_copied_or_read_back(measure, dtype):
    with fake_cuda() as gpu:
        picture, photograph = (gpu.place(image) for image in pictures(31, 40))
        with gpu.no_waiting(), torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            value = measure(picture, photograph)
            value.backward()
        assert value.device == picture.grad.device == DEVICE
        assert value.dtype == picture.grad.dtype == torch.float32


def test_what_is_kept_for_a_device_is_real_made_once_and_fit_for_training(monkeypatch):
    picture, photograph = pictures(23, 29)
    made, make = [], module._make_gaussian_band
    monkeypatch.setattr(module, "_make_gaussian_band", lambda *key: made.append(key) or make(*key))
    monkeypatch.setattr(module, "_gaussian_band_of", module.lru_cache(lambda *key: module._make_gaussian_band(*key)))
    with torch.inference_mode():
        expected = structural_similarity(picture, photograph)
    assert len(made) == 2
    for _ in range(2):
        with fake_cuda() as gpu:
            structural_similarity(gpu.place(picture), gpu.place(photograph))
            assert structural_similarity(picture, photograph) == expected  # on the CPU all is as it was
        structural_similarity(picture, photograph).backward()
    assert [device.type for _, _, device in made] == ["cpu", "cpu", "cuda", "cuda", "cuda", "cuda"]
