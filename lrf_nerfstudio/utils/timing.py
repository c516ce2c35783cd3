"""Times of work on a device, taken without waiting for it."""

import time

import torch


class Stopwatch:
    """Takes marks while work is queued; waits for the device only when a time is asked for.

    Example:
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> watch.mark("rasterized")
        >>> watch.seconds("start", "rasterized") >= 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        """Start, with the mark `start`."""
        self._on_cuda = device.type == "cuda"
        self._marks: dict[str, float | torch.cuda.Event] = {}
        self.mark("start")

    def mark(self, name: str) -> None:
        """Mark the moment at which the device has done what was queued so far."""
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def seconds(self, first: str, last: str) -> float:
        """Return the seconds between two marks."""
        begin, end = self._marks[first], self._marks[last]
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return begin.elapsed_time(end) / 1000.0
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
