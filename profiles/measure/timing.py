"""Time spans of work on a device, many times over, and what is reported of them: median and quartile spread.

On a CPU a span is wall time. On CUDA it lies between two events on the current stream, read when everything is
over: queued work is timed as it runs in training, with no synchronisation around every span.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event


@dataclass(frozen=True)
class Timing:
    """What is kept of many runs."""

    median_us: float
    spread: float  # (third quartile − first quartile) / median; 0 for a single run or a zero median

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> "Timing":
        """The summary of at least one sample."""
        median_us = statistics.median(samples_us)
        if len(samples_us) < 2 or median_us == 0:
            return cls(median_us, 0.0)
        first, _, third = statistics.quantiles(samples_us, n=4, method="inclusive")
        return cls(median_us, (third - first) / median_us)


class Stopwatch:
    """Collects named spans; `samples_us` hands them out."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._wall_us: dict[Hashable, list[float]] = defaultdict(list)
        self._events: dict[Hashable, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)

    @contextmanager
    def span(self, name: Hashable) -> Iterator[None]:
        """Time the work inside the block, under `name`; nothing is recorded if the block raises."""
        if self._is_cuda:
            begin, end = _new_event(enable_timing=True), _new_event(enable_timing=True)
            stream = torch.cuda.current_stream(self._device)
            begin.record(stream)
            yield
            end.record(stream)
            self._events[name].append((begin, end))
        else:
            start_s = time.perf_counter()
            yield
            self._wall_us[name].append((time.perf_counter() - start_s) * 1e6)

    def samples_us(self, name: Hashable) -> list[float]:
        """Every span recorded under `name`, in order, in µs; waits for the device. Empty if there is none."""
        if not self._is_cuda:
            return list(self._wall_us[name])
        torch.cuda.synchronize(self._device)
        return [begin.elapsed_time(end) * 1e3 for begin, end in self._events[name]]

    def clear(self) -> None:
        """Forget every span, as after a warm-up."""
        self._wall_us.clear()
        self._events.clear()
