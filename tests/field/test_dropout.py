"""Dropout of Gaussians: what is left makes up for what is not."""

import torch
from fake_cuda import DEVICE, fake_cuda

from lrf_nerfstudio.field.dropout import dropped_out


def test_opacities_are_as_before_on_average():
    torch.manual_seed(0)
    opacities = torch.linspace(0, 0.7, 8).repeat(20000)
    dropped = dropped_out(opacities, 0.2)
    assert ((dropped == 0) | torch.isclose(dropped, opacities / 0.8)).all()
    assert abs((dropped == 0)[opacities > 0].float().mean() - 0.2) < 0.01
    torch.testing.assert_close(dropped.reshape(-1, 8).mean(0), opacities.reshape(-1, 8).mean(0), atol=0.01, rtol=0)
    assert torch.equal(dropped_out(opacities, 0.0), opacities)
    assert dropped_out(torch.ones(100), 0.5).max() == 1.0


def test_what_is_left_out_gets_no_gradient_and_nothing_waits():
    opacities = torch.full((100,), 0.4, requires_grad=True)
    dropped = dropped_out(opacities, 0.5)
    dropped.sum().backward()
    assert torch.equal(opacities.grad, torch.where(dropped > 0, 2.0, 0.0))
    with fake_cuda() as gpu:
        on_gpu = gpu.place(torch.rand(100))
        with gpu.no_waiting():
            assert dropped_out(on_gpu, 0.2).device == DEVICE
