"""What a rank did and when: every action with its start, its end, and how long it waited before for a tensor.

On CPU the clock is the host's; on CUDA events are recorded on the stream and read after the step, so that
tracing does not synchronise. Times are µs on the host's wall clock, less the first start of the job once
traces are put together: ranks of one machine share that clock, ranks of several machines only as well as
their clocks agree.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, Self

import torch
from pydantic import Field

from planner.executor.groups import Coordinates
from profiles.facts import Facts, NonNegative

EventKind = Literal["F", "B", "W", "BW", "R", "drain", "reduce", "optimizer", "validate", "discarded"]


class TraceEvent(Facts):
    """One thing a rank did, in the order of the ends. `drain` waits for the last sends.

    `reduce` with a stage is the data-parallel reduction of that stage's gradients, beside other events: from when it
    started until it was found to be over, after an action or at the end. `reduce` without one is what shows of them:
    from the end of the pipeline until the gradients are there.

    `validate` settles an optimizer step made before its gradient norm was known; `discarded` is all that ran on
    parameters which that put right.
    """

    kind: EventKind
    stage: int | None = None  # for F, B, W, BW, R, and reduce beside other events
    microbatch: int | None = None
    waited_us: NonNegative = 0.0  # just before the start, for a tensor from another rank
    start_us: float
    end_us: float


class StepTrace(Facts):
    """One optimizer step of one rank."""

    step: int
    events: tuple[TraceEvent, ...]


class RankTrace(Facts):
    """The traced steps of one process."""

    global_rank: int
    pipeline_rank: int
    data_rank: int
    tensor_rank: int
    device: str
    steps: tuple[StepTrace, ...]


class Trace(Facts):
    """All processes of a job. Times start at 0."""

    schema_version: Literal["pipewright.trace/1"] = Field(default="pipewright.trace/1", alias="schema")
    ranks: tuple[RankTrace, ...]

    @classmethod
    def gathered(cls, ranks: Iterable[RankTrace]) -> Self:
        """Put the ranks on one clock that starts with the first event of any."""
        ordered = sorted(ranks, key=lambda rank: rank.global_rank)
        every = [event for rank in ordered for step in rank.steps for event in step.events]
        origin = min((event.start_us - event.waited_us for event in every), default=0.0)
        return cls(ranks=tuple(_shifted(rank, origin) for rank in ordered))


def _shifted(rank: RankTrace, origin_us: float) -> RankTrace:
    steps = []
    for step in rank.steps:
        events = [
            event.model_copy(update={"start_us": event.start_us - origin_us, "end_us": event.end_us - origin_us})
            for event in step.events
        ]
        steps.append(step.model_copy(update={"events": tuple(events)}))
    return rank.model_copy(update={"steps": tuple(steps)})


class _Row(NamedTuple):
    kind: EventKind
    stage: int | None
    microbatch: int | None
    waiting: object  # marks of the clock
    start: object
    end: object


class _Clock(Protocol):
    """Marks moments, and says later when they were."""

    def mark(self) -> object: ...

    def begin(self) -> None: ...

    def resolve(self, marks: Sequence[object]) -> list[float]: ...


class _HostClock:
    """For devices that have done the work when a call returns."""

    def __init__(self) -> None:
        # One number per process, so that marks cost one call of the monotonic clock.
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    def begin(self) -> None:
        pass

    def mark(self) -> object:
        return time.perf_counter_ns()

    def resolve(self, marks: Sequence[object]) -> list[float]:
        return [(mark + self._epoch_ns) / 1e3 for mark in marks if isinstance(mark, int)]


_new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event  # torch leaves its constructor untyped


class _CudaClock:
    """Events on the current stream; one synchronisation per step ties them to the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base: torch.cuda.Event | None = None
        self._base_us = 0.0

    def begin(self) -> None:
        torch.cuda.synchronize(self._device)
        self._base_us = time.time_ns() / 1e3
        self._base = self._event()

    def mark(self) -> object:
        return self._event()

    def resolve(self, marks: Sequence[object]) -> list[float]:
        torch.cuda.synchronize(self._device)
        base = self._base
        assert base is not None
        events = [mark for mark in marks if isinstance(mark, torch.cuda.Event)]
        return [self._base_us + base.elapsed_time(event) * 1e3 for event in events]

    def _event(self) -> torch.cuda.Event:
        event = _new_event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Tracer:
    """Records the last `keep` steps of one process; 0 records nothing."""

    def __init__(self, device: torch.device, *, keep: int) -> None:
        self._clock: _Clock = _CudaClock(device) if device.type == "cuda" else _HostClock()
        self._device = device
        self._on = keep > 0
        self._kept: deque[StepTrace] = deque(maxlen=max(keep, 1))
        self._rows: list[_Row] = []
        self._step = -1

    def begin_step(self) -> None:
        """Start a step; what was recorded since the last one started is put away."""
        self._put_away()
        self._step += 1
        if self._on:
            self._clock.begin()

    def mark(self) -> object:
        """This moment, to be given to `record`."""
        return self._clock.mark() if self._on else None

    def record(
        self, kind: EventKind, stage: int | None, microbatch: int | None, waiting: object, start: object
    ) -> None:
        """Something that waited from mark `waiting`, ran from mark `start`, and ends now."""
        if self._on:
            self._rows.append(_Row(kind, stage, microbatch, waiting, start, self._clock.mark()))

    def discard_step(self, start: object) -> None:
        """What this step recorded since mark `start` becomes one event that ends now."""
        self._rows.clear()
        self.record("discarded", None, None, start, start)

    def rank_trace(self, coordinates: Coordinates) -> RankTrace:
        """The kept steps, the present one included."""
        self._put_away()
        return RankTrace(
            global_rank=coordinates.global_rank,
            pipeline_rank=coordinates.pipeline_rank,
            data_rank=coordinates.data_rank,
            tensor_rank=coordinates.tensor_rank,
            device=str(self._device),
            steps=tuple(self._kept),
        )

    def _put_away(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        times = self._clock.resolve([mark for row in rows for mark in row[3:]])
        events = []
        for n, row in enumerate(rows):
            waiting, start, end = times[3 * n : 3 * n + 3]
            events.append(
                TraceEvent(
                    kind=row.kind,
                    stage=row.stage,
                    microbatch=row.microbatch,
                    waited_us=max(0.0, start - waiting),
                    start_us=start,
                    end_us=end,
                )
            )
        self._kept.append(StepTrace(step=self._step, events=tuple(events)))
