"""CUDA tensors without a GPU: shapes, dtypes and devices as they would be, and no values.

PyTorch's `FakeTensorMode` has tensors on "cuda" that know everything but their values. What mixes devices fails, and so
does what asks for a value (`.item()`, `bool(tensor)`, `.tolist()`, indexing by a boolean mask), which on a GPU would
make the host wait. Use it like this:

    with fake_cuda() as gpu:
        model = gpu.place(model)  # parameters and buffers of a module made on the CPU, or a tensor
        ...  # what may wait, such as setting up
        with gpu.no_waiting():
            loss = model(gpu.place(batch)).sum()
            loss.backward()

PyTorch's autograd engine asks the driver for the GPU before it runs, so backward passes are taken here node by node, in
the order that the engine takes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)


class Waits(AssertionError):
    """The host would wait for the GPU, or copy to or from it."""


class FakeGPU:
    """What a test does with the fake GPU while it is there."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode

    def place(self, what: Any) -> Any:
        """Return a tensor, or a module whose parameters and buffers are replaced, on the fake GPU."""
        if isinstance(what, Tensor):
            detached = what.detach()
            fake = (detached if isinstance(what, FakeTensor) else self.mode.from_tensor(detached)).to(DEVICE)
            if isinstance(what, nn.Parameter):
                return nn.Parameter(fake, requires_grad=what.requires_grad)
            return fake.requires_grad_(what.requires_grad) if what.is_leaf else fake
        for module in what.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = self.place(tensor)
        return what

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Fail where the host would wait for the GPU or copy between it and itself."""
        with _NoTransfers(), pytest.MonkeyPatch.context() as patch:

            def waits(*_: Any, **__: Any) -> None:
                raise Waits("torch.cuda.synchronize() waits for the GPU")

            patch.setattr(torch.cuda, "synchronize", waits)
            yield


@contextmanager
def fake_cuda() -> Iterator[FakeGPU]:
    """Have a GPU that computes shapes, dtypes and devices."""
    mode = FakeTensorMode()
    with mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", _backward)
        patch.setattr(torch.autograd, "backward", lambda tensors, *args, **kwargs: _backward(_only(tensors)))
        patch.setattr(torch.autograd, "grad", _grad)
        patch.setattr(torch.Tensor, "retain_grad", _retain_grad)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        yield FakeGPU(mode)


class _Event:
    """Stands in for `torch.cuda.Event`; asking it for a time would wait."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        raise Waits("an event was waited for")


class _NoTransfers(TorchDispatchMode):
    """Fails where a tensor crosses between host and GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise Waits("a value is read from the GPU")
        result = func(*args, **(kwargs or {}))
        sources = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim}
        results = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        if len(sources | results) > 1:
            raise Waits(f"{func} copies between host and GPU")
        return result


# ---------------------------------------------------------------------------------------------------- autograd

_retained: list[tuple[Any, int, Tensor]] = []
_torch_retain_grad = torch.Tensor.retain_grad


def _retain_grad(tensor: Tensor) -> None:
    if tensor.grad_fn is not None:
        _retained.append((tensor.grad_fn, tensor.output_nr, tensor))
        _torch_retain_grad(tensor)  # lets `.grad` be read without a warning


def _only(tensors: Any) -> Tensor:
    (tensor,) = [tensors] if isinstance(tensors, Tensor) else tensors
    return tensor


def _backward(tensor: Tensor, gradient: Tensor | None = None, retain_graph: bool | None = None, **_: Any) -> None:
    _propagate([tensor], [gradient], [])
    _retained.clear()


def _grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    **_: Any,
) -> tuple[Tensor | None, ...]:
    assert not create_graph, "gradients of gradients are not taken here"
    outputs, inputs = ([value] if isinstance(value, Tensor) else list(value) for value in (outputs, inputs))
    return tuple(_propagate(outputs, grad_outputs or [None] * len(outputs), inputs))


@torch.no_grad()
def _propagate(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], wanted: Sequence[Tensor]
) -> list[Tensor | None]:
    """Take the backward pass: fill `.grad` of leaves or, where tensors are wanted, return their gradients."""
    roots = [get_gradient_edge(output) for output in outputs]
    edges = [get_gradient_edge(tensor) for tensor in wanted]
    found: dict[tuple[Any, int], Tensor | None] = {}
    waiting_for = Counter[Any]()
    seen, stack = {root.node for root in roots}, [root.node for root in roots]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting_for[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    arrived: dict[Any, list[Tensor | None]] = {}

    def add(node: Any, position: int, gradient: Tensor | None) -> None:
        slots = arrived.setdefault(node, [None] * max(1, len(node._input_metadata)))
        if gradient is not None:
            expected = node._input_metadata[position]
            assert gradient.device == expected.device, f"{node.name()}: {gradient.device} for {expected.device}"
            gradient = gradient.sum_to_size(expected.shape)  # as the engine does where an operand was broadcast
            present = slots[position]
            slots[position] = gradient if present is None else present + gradient

    for root, output, gradient in zip(roots, outputs, gradients, strict=True):
        add(root.node, root.output_nr, torch.ones_like(output) if gradient is None else gradient)
    ready = [node for node in arrived if not waiting_for[node]]
    while ready:
        node = ready.pop()
        received = arrived.pop(node, [None] * max(1, len(node._input_metadata)))
        for edge in edges:
            if edge.node is node:
                found[node, edge.output_nr] = received[edge.output_nr]
        for owner, position, tensor in _retained:
            if owner is node:
                tensor.grad = received[position]
        passed = _apply(node, received, bool(wanted))
        for (following, position), gradient in zip(node.next_functions, passed, strict=True):
            if following is not None:
                add(following, position, gradient)
                waiting_for[following] -= 1
                if not waiting_for[following]:
                    ready.append(following)
    return [found.get((edge.node, edge.output_nr)) for edge in edges]


def _apply(node: Any, received: list[Tensor | None], keep_leaves: bool) -> tuple[Tensor | None, ...]:
    """Run one node of the graph."""
    if hasattr(node, "variable"):  # a leaf
        if not keep_leaves and received[0] is not None:
            leaf = node.variable
            leaf.grad = received[0] if leaf.grad is None else leaf.grad + received[0]
        return ()
    if all(gradient is None for gradient in received):
        return (None,) * len(node.next_functions)
    in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    passed = node.apply(*received) if in_python else node(*received)
    passed = passed if isinstance(passed, tuple) else (passed,)
    return passed[: len(node.next_functions)]
