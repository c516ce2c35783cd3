"""A CUDA device without a GPU: what a GPU would refuse, or make the program wait for, is an error.

Inside `fake_cuda()` tensors on the CPU are as real as ever, and tensors on "cuda" are torch's fake ones: they have a
shape, a dtype, a device, and no numbers. Operations on tensors of two devices fail, and so does everything for which a
program waits until the GPU has finished: `.item()`, `bool(tensor)`, `.tolist()`, `.cpu()`, `torch.nonzero`, indexing
with a boolean mask. Inside `no_waiting()` this includes `torch.cuda.synchronize()` and copies from the CPU that are not
`non_blocking`, such as `torch.tensor(1.0, device="cuda")`.

    with fake_cuda() as gpu:
        model = gpu.place(Model())  # or Model().to("cuda")
        batch = gpu.place(batch)
        with gpu.no_waiting():
            loss = model(batch).sum()
            loss.backward()
        loss.item()  # raises Waits

Gradients work: `backward()`, `torch.autograd.grad`, `retain_grad()`, autograd functions of our own, checkpointing.
Hooks of tensors that are not leaves do not. `torch.cuda.is_available()` stays what it is.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)


class Waits(AssertionError):
    """The program would wait for the GPU here."""


class FakeGPU(TorchDispatchMode):
    """Hands operations on CUDA tensors to the `FakeTensorMode` around it, and lets all others compute real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._may_wait = True

    def place(self, what: Any) -> Any:
        """Return a tensor on the fake GPU, a leaf if it was one, or a module whose tensors are replaced."""
        if isinstance(what, torch.nn.Module):
            return what.to(DEVICE)
        fake = what.detach().to(DEVICE)
        if isinstance(what, torch.nn.Parameter):
            return torch.nn.Parameter(fake, requires_grad=what.requires_grad)
        return fake.requires_grad_(what.requires_grad and what.is_leaf)

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """A block, such as a training step, in which the program waits for nothing."""
        self._may_wait = False
        try:
            yield
        finally:
            self._may_wait = True

    def synchronize(self, device: Any = None) -> None:
        """Stands in for `torch.cuda.synchronize`."""
        if not self._may_wait:
            raise Waits("torch.cuda.synchronize()")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        on_cuda = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        to_cuda = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not on_cuda and not to_cuda:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if _selects_by_mask(func, args):
            raise Waits(f"{func} with a boolean mask")
        if not self._may_wait and _copies_from_the_cpu(func, args) and not kwargs.get("non_blocking", False):
            raise Waits(f"{func} from the CPU that is not `non_blocking`")
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Waits(f"{func} reads a CUDA tensor") from error
        if any(isinstance(leaf, Tensor) and leaf.device.type == "cpu" for leaf in tree_leaves(out)):
            raise Waits(f"{func} copies a CUDA tensor to the CPU")
        return out


class _Event:
    """Stands in for `torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        raise Waits("an event")


def _copies_from_the_cpu(func: Any, args: Sequence[Any]) -> bool:
    source = {torch.ops.aten._to_copy: 0, torch.ops.aten.copy_: 1}.get(func.overloadpacket)
    return source is not None and args[source].device.type == "cpu"


def _selects_by_mask(func: Any, args: Sequence[Any]) -> bool:
    """Whether a value that is not a number is written to where a mask is true: torch looks up these places first."""
    if func.overloadpacket not in (torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return False
    _, indices, value, *_ = args
    is_number = value.device.type == "cpu" and value.numel() == 1
    return not is_number and any(index is not None and index.dtype == torch.bool for index in indices)


_torch_swap_tensors = torch.utils.swap_tensors


def _swap_tensors(tensor: Tensor, other: Tensor) -> None:
    """Lets `module.to` be called where the module is on its device already; fake tensors cannot be swapped."""
    if (tensor.device, tensor.dtype, tensor.stride()) != (other.device, other.dtype, other.stride()):
        _torch_swap_tensors(tensor, other)


_torch_load = torch.load


def _load(*args: Any, **kwargs: Any) -> Any:
    """Reads what is in a file; `torch.load` would make fake tensors of it."""
    with unset_fake_temporarily():
        return _torch_load(*args, **kwargs)


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeGPU]:
    """A block in which "cuda" is a device of fake tensors; see the module."""
    gpu = FakeGPU()
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(gpu)
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", gpu.synchronize))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", _Event))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", _swap_tensors))
        stack.enter_context(mock.patch.object(torch, "load", _load))
        # Else `torch.autocast("cuda")` and `GradScaler` turn themselves off.
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True))
        stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        if not torch.cuda.is_available():
            # torch's own engine asks the driver for its streams.
            stack.enter_context(_python_engine())
        yield gpu


@contextlib.contextmanager
def _python_engine() -> Iterator[None]:
    """Replaces the engine that walks the graph of autograd."""
    retained: dict[tuple[Any, int], list[Tensor]] = defaultdict(list)

    torch_retain_grad = Tensor.retain_grad

    def retain_grad(tensor: Tensor) -> None:
        torch_retain_grad(tensor)  # else torch warns when `grad` is read
        if tensor.grad_fn is not None:
            retained[_edge(tensor)].append(tensor)

    def set_materialize_grads(context: Any, value: bool) -> None:
        context.materialize_grads = context.fills_in_zeros = value  # the former cannot be read

    def run_backward(
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        _keep_graph: bool,
        create_graph: bool,
        inputs: Sequence[Tensor],
        allow_unreachable: bool = False,
        accumulate_grad: bool = False,
    ) -> tuple[Tensor | None, ...]:
        with torch.set_grad_enabled(create_graph):
            arrived = _walk_back(outputs, gradients, retained, accumulate_grad and not inputs)
        found = [arrived.get(_edge(tensor)) for tensor in inputs]
        assert allow_unreachable or all(gradient is not None for gradient in found), "an input is not in the graph"
        if accumulate_grad:
            for tensor, gradient in zip(inputs, found, strict=True):
                if gradient is not None:
                    tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
        return tuple(found)

    functions = torch.autograd.function.FunctionCtx
    with (
        mock.patch.object(torch.autograd, "_engine_run_backward", run_backward),
        mock.patch.object(Tensor, "retain_grad", retain_grad),
        mock.patch.object(functions, "set_materialize_grads", set_materialize_grads),
    ):
        yield


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """The place in the graph at which the gradient of a tensor arrives."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _walk_back(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    retained: dict[tuple[Any, int], list[Tensor]],
    accumulate: bool,
) -> dict[tuple[Any, int], Tensor | None]:
    """Calls the functions of the graph from the outputs to the leaves.

    Returns:
        The gradient that arrived at each place; leaves hold theirs if `accumulate`.
    """
    roots = [_edge(tensor) for tensor in outputs]
    waiting: dict[Any, int] = {}  # edges into each node that have not been walked
    found = [node for node, _ in roots]
    while found:
        node = found.pop()
        if node not in waiting:
            waiting[node] = 0
            found += [following for following, _ in node.next_functions if following is not None]
    for node in waiting:
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] += 1

    arrived: dict[tuple[Any, int], Tensor | None] = {}

    def arrive(node: Any, slot: int, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        expected = node._input_metadata[slot]
        if gradient.shape != expected.shape:
            gradient = gradient.sum_to_size(expected.shape)
        gradient = gradient.to(expected.dtype)
        assert gradient.device == expected.device, f"{node} gets a gradient on {gradient.device}: {expected.device}"
        before = arrived.get((node, slot))
        arrived[node, slot] = gradient if before is None else before + gradient

    for (node, slot), gradient in zip(roots, gradients, strict=True):
        arrive(node, slot, gradient)
    ready = [node for node, count in waiting.items() if count == 0]
    while ready:
        node = ready.pop()
        incoming = [arrived.get((node, slot)) for slot in range(len(node._input_metadata))]
        for slot, gradient in enumerate(incoming):
            for tensor in retained.get((node, slot), ()):
                tensor.grad = gradient
        leaf = not node.next_functions
        outgoing = _call(node, incoming) if any(g is not None for g in incoming) and (accumulate or not leaf) else ()
        for index, (following, slot) in enumerate(node.next_functions):
            if following is not None:
                if outgoing:
                    arrive(following, slot, outgoing[index])
                waiting[following] -= 1
                if waiting[following] == 0:
                    ready.append(following)
    return arrived


def _call(node: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients for `node.next_functions` from those of the node's outputs."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        if getattr(node, "fills_in_zeros", True):
            zeros = [
                # The description of an output that is None is that of a number on the CPU.
                torch.zeros(it.shape, dtype=it.dtype, device=it.device) if it.shape or it.device.type != "cpu" else None
                for it in node._input_metadata
            ]
            gradients = [zero if given is None else given for zero, given in zip(zeros, gradients, strict=True)]
        result = node.apply(*gradients)
        result = result if isinstance(result, tuple) else (result,)
        # One for each argument, while the graph has edges for tensors alone.
        needed = (gradient for gradient, used in zip(result, node.needs_input_grad, strict=True) if used)
        return tuple(None if following is None else next(needed) for following, _ in node.next_functions)
    result = node(*gradients)
    return result if isinstance(result, tuple) else (result,)
