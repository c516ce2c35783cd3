"""Whether two checkpoints are the same."""

from typing import Any

import torch


def assert_equal(a: Any, b: Any, name: str = "checkpoint") -> None:
    """Equal value by value, tensors bit by bit."""
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert list(a) == list(b), name
        for key in a:
            assert_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{name}.{index}")
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)
    else:
        assert a == b, name
