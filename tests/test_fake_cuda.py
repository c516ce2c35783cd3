"""The fake GPU of the tests notices what a real one would make slow or impossible."""

import pytest
import torch
from fake_cuda import Waits, fake_cuda
from torch import nn


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.PixelShuffle(2))


def test_a_training_step_runs():
    with fake_cuda() as gpu:
        model = gpu.place(network())
        images = gpu.place(torch.rand(2, 3, 8, 8))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        with gpu.no_waiting():
            for _ in range(2):
                loss = (model(images) - 0.5).abs().mean() + model(images).square().mean()
                loss.backward()
                optimizer.step()
        for parameter in model.parameters():
            assert parameter.grad.device == parameter.device == torch.device("cuda", 0)
            assert parameter.grad.shape == parameter.shape


def test_tensors_on_the_cpu_are_real():
    with fake_cuda() as gpu, gpu.no_waiting():
        steps = torch.arange(4.0)
        assert steps.sum().item() == 6
        assert (torch.ones(3, device="cuda") * steps[2]).device.type == "cuda"
        moved = steps.to("cuda", non_blocking=True)
    assert moved.shape == (4,) and moved.device.type == "cuda"


def test_autocast_computes_in_half_precision():
    with fake_cuda(), torch.autocast("cuda", dtype=torch.float16):
        assert (torch.rand(2, 3, device="cuda") @ torch.rand(3, 4, device="cuda")).dtype == torch.float16


class Scaled(torch.autograd.Function):
    """x * factor, or None where the factor is 0; with arguments that are no tensors."""

    @staticmethod
    def forward(ctx, factor, x, label, y):
        ctx.factor = factor
        return x * factor, y * factor if factor else None

    @staticmethod
    def backward(ctx, v_x, v_y):
        assert ctx.needs_input_grad == (False, True, False, True)
        assert v_x is not None and (v_y is not None) == bool(ctx.factor)
        return None, v_x * ctx.factor, None, None if v_y is None else v_y.sum() * v_y


@pytest.mark.parametrize("factor", [0, 2])
def test_autograd_functions_of_our_own(factor):
    with fake_cuda() as gpu:
        x, y = gpu.place(torch.rand(3, requires_grad=True)), gpu.place(torch.rand(5, requires_grad=True))
        out, _ = Scaled.apply(factor, x, "label", y)
        out.sum().backward()
        assert x.grad.shape == (3,) and (y.grad is None) == (factor == 0)


def test_gradients_of_gradients_and_checkpoints():
    with fake_cuda() as gpu:
        x, model = gpu.place(torch.rand(4, requires_grad=True)), gpu.place(nn.Linear(4, 4))
        (slope,) = torch.autograd.grad(x.pow(3).sum(), [x], create_graph=True)
        slope.square().sum().backward()
        assert x.grad.shape == (4,)
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
        assert model.weight.grad.shape == (4, 4)


def test_gradients_of_chosen_tensors():
    with fake_cuda() as gpu:
        x, y = (gpu.place(torch.rand(3, requires_grad=True)) for _ in range(2))
        hidden = x * y
        hidden.retain_grad()
        (gradient,) = torch.autograd.grad((hidden * hidden).sum(), [x], retain_graph=True)
        assert gradient.shape == (3,)
        assert x.grad is None
        hidden.sum().backward()
        assert hidden.grad.shape == x.grad.shape == y.grad.shape == (3,)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x[:1]),
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.arange(3.0).to(x.device),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x.new_tensor([1.0, 2.0, 3.0]),
        lambda x: torch.tensor(1.0, device=x.device),
        lambda x: torch.cuda.synchronize(),
    ],
    ids=[
        "item",
        "bool",
        "tolist",
        "mask",
        "mask_put",
        "nonzero",
        "cpu",
        "to",
        "mixed",
        "tensor",
        "new_tensor",
        "number",
        "synchronize",
    ],
)
def test_waiting_is_noticed(wait):
    with fake_cuda() as gpu:
        x = gpu.place(torch.rand(3))
        with gpu.no_waiting(), pytest.raises((Waits, RuntimeError)):
            wait(x)


def test_what_stays_on_the_gpu_is_fine():
    with fake_cuda() as gpu:
        x = gpu.place(torch.rand(3))
        with gpu.no_waiting():
            y = torch.where(x > 0, x, x.new_zeros(())) * 2.0 + torch.rand(3, device=x.device)
            y[0] = 1.0
            assert y.device == x.device
