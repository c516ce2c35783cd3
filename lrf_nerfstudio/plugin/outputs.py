"""What a rendered view consists of."""

from collections import UserDict
from collections.abc import Callable
from typing import Any


class Outputs(UserDict[str, Any]):
    """Outputs by name; those that take their time are made when they are looked at.

    Example:
        >>> outputs = Outputs(rgb=1)
        >>> outputs.later("vae_rgb", lambda: print("decoding") or 2)
        >>> list(outputs)
        ['rgb', 'vae_rgb']
        >>> outputs["vae_rgb"]
        decoding
        2
        >>> outputs["vae_rgb"]
        2
    """

    def later(self, name: str, make: Callable[[], Any]) -> None:
        """Add an output that `make` returns."""
        self.data[name] = _Later(make)

    def __getitem__(self, name: str) -> Any:
        value = self.data[name]
        if isinstance(value, _Later):
            value = self.data[name] = value.make()
        return value


class _Later:
    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
