"""What the allocator hands out while work runs: bytes at the start, at the peak and at the end of each phase.

On CUDA the caching allocator counts by itself. On a CPU the allocation events of torch.profiler are added up.
Memory that a library takes past torch's allocator is in neither.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class Phase:
    """Allocated bytes, counted from an arbitrary zero that all phases of one recording share."""

    start_bytes: int
    peak_bytes: int
    end_bytes: int


class MemoryRecorder(Protocol):
    """Phases are entered one after another, and can be read when the recording is over."""

    phases: dict[str, Phase]

    def phase(self, name: str) -> Any:
        """Context manager around the work of one phase."""


@contextmanager
def recording_memory(device: torch.device) -> Iterator[MemoryRecorder]:
    """Record allocations on `device`; only memory allocated inside this block is seen to be freed."""
    if device.type == "cuda":
        yield _CudaRecorder(device)
        return
    recorder = _CpuRecorder()
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with _kineto_silenced():
        profiler.start()
    try:
        yield recorder
    finally:
        with _kineto_silenced():
            profiler.stop()
    recorder.read(profiler)


class _CudaRecorder:
    def __init__(self, device: torch.device) -> None:
        self.phases: dict[str, Phase] = {}
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        start_bytes = torch.cuda.memory_allocated(self._device)
        yield
        torch.cuda.synchronize(self._device)
        self.phases[name] = Phase(
            start_bytes,
            torch.cuda.max_memory_allocated(self._device),
            torch.cuda.memory_allocated(self._device),
        )


_MARK = "pipewright.phase:"


class _CpuRecorder:
    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with record_function(_MARK + name):
            yield

    def read(self, profiler: profile) -> None:
        """Cut the profiler's allocation events into phases."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
        for event in events:
            if not event["name"].startswith(_MARK):
                continue
            begin, end = event["ts"], event["ts"] + event["dur"]
            level = start_bytes = sum(change for when, change in changes if when < begin)
            peak_bytes = level
            for _, change in (pair for pair in changes if begin <= pair[0] <= end):
                level += change
                peak_bytes = max(peak_bytes, level)
            self.phases[event["name"].removeprefix(_MARK)] = Phase(start_bytes, peak_bytes, level)


@contextmanager
def _kineto_silenced() -> Iterator[None]:
    """Keep off stderr what torch's tracing library announces there at every start and stop, in C++.

    Its log level can only be set in the environment, before torch is loaded.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
