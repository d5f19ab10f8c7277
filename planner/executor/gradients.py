"""Gradients summed over the data-parallel processes that hold the same stages, while the pipeline still runs.

As soon as the last backward of a stage has run on this process, its gradients are put into buckets and the buckets
leave, beside what the rank still has to run; the end of the step waits for them. All processes of a data-parallel group
run one program, so they start the same buckets in the same order, and nobody waits in a circle: a reduction is one more
action, at the same place of the same order on each of them.

A bucket becomes the storage of its gradients, so what is on its way takes no memory beside them. A tensor is held here
from before its reduction starts until `wait` has put the stream that uses it behind it.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.executor.trace import Tracer
from planner.executor.transport import telling_lost_peers

BUCKET_BYTES = 25 * 2**20
_WHAT = "the data-parallel reduction"


class GradientSync(Protocol):
    """What becomes of gradients after the backward. Called by the thread that runs the step, on every process alike.

    Sharded data parallelism belongs behind this.
    """

    def begin(self) -> None:
        """A step starts: gradients there are from earlier steps are to be kept, and added to."""

    def stage_finished(self, stage: int) -> None:
        """The last backward of `stage` in this step has run here; nobody touches its gradients until `finish`."""

    def look(self) -> None:
        """Called after every action."""

    def finish(self) -> None:
        """The pipeline is through: return when gradients are what the step promises."""


class NoSync:
    """For a process that holds its stages alone."""

    def begin(self) -> None:
        """Nothing to do."""

    def stage_finished(self, stage: int) -> None:
        """Nothing to do."""

    def look(self) -> None:
        """Nothing to do."""

    def finish(self) -> None:
        """Nothing to do."""


@dataclass
class _Reduction:
    """One stage's gradients on their way."""

    stage: int | None
    parameters: list[nn.Parameter]
    seen: Tensor  # per parameter: on how many processes it got a gradient
    works: list[dist.Work]
    tensors: list[Tensor]  # what the works write to
    start: object  # a mark of the tracer

    def wait(self) -> None:
        for work in self.works:
            work.wait()

    @property
    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self.works)


class DataParallelSum:
    """A `GradientSync` that replaces every gradient by its sum over `group`, in buckets of at most `bucket_bytes`.

    A parameter that got a gradient on some processes only (an expert nobody asked) counts as zero on the others; one
    that got none anywhere keeps none. `parameters_of` says which parameters each stage has; one that several stages
    share waits for the last of them. With `overlaps` false all leave at the end of the pipeline; the sums are the same,
    to the bit.
    """

    def __init__(
        self,
        parameters_of: Mapping[int, Iterable[nn.Parameter]],
        group: dist.ProcessGroup,
        tracer: Tracer | None = None,
        *,
        overlaps: bool = True,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._parameters = {stage: list(parameters) for stage, parameters in parameters_of.items()}
        self._stages_of: dict[nn.Parameter, set[int]] = {}
        for stage, parameters in self._parameters.items():
            for parameter in parameters:
                self._stages_of.setdefault(parameter, set()).add(stage)
        self._group = group
        self._tracer = tracer
        self._overlaps = overlaps
        self._bucket_bytes = bucket_bytes
        self._carried: list[tuple[nn.Parameter, Tensor]] = []
        self._finished: list[int] = []
        self._on_the_way: deque[_Reduction] = deque()  # not known to have arrived
        self._arrived: list[_Reduction] = []

    def begin(self) -> None:
        """Take away what has been summed in earlier steps."""
        self._finished.clear()
        self._carried = take_gradients(self._stages_of)

    def stage_finished(self, stage: int) -> None:
        """Start the sums of all parameters that no unfinished stage shares."""
        self._finished.append(stage)
        if self._overlaps:
            self._start(stage, len(self._finished))

    def look(self) -> None:
        """Note, for the trace, what has arrived."""
        while self._on_the_way and self._on_the_way[0].is_completed:
            self._arrive()

    def finish(self) -> None:
        """Wait for the sums, and add them to what was there before the step."""
        if not self._overlaps:
            for count, stage in enumerate(self._finished, 1):
                self._start(stage, count)
        while self._on_the_way:
            self._arrive()
        for reduction in self._arrived:
            for parameter, seen in zip(reduction.parameters, reduction.seen.tolist(), strict=True):
                if not seen:
                    parameter.grad = None
        self._arrived.clear()
        carried, self._carried = self._carried, []
        for parameter, gradient in carried:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _start(self, stage: int, num_finished: int) -> None:
        finished = set(self._finished[:num_finished])
        complete = [p for p in self._parameters[stage] if p.requires_grad and self._stages_of[p] <= finished]
        if complete:
            start = None if self._tracer is None else self._tracer.mark()
            with telling_lost_peers(_WHAT):
                self._on_the_way.append(_started(complete, self._group, self._bucket_bytes, stage, start))

    def _arrive(self) -> None:
        reduction = self._on_the_way.popleft()
        with telling_lost_peers(_WHAT):
            reduction.wait()
        self._arrived.append(reduction)
        if self._tracer is not None:
            self._tracer.record("reduce", reduction.stage, None, reduction.start, reduction.start)


def reduce_gradients(
    parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, *, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Replace every gradient by its sum over `group`, as `DataParallelSum` does, in one go."""
    once = DataParallelSum({0: parameters}, group, overlaps=False, bucket_bytes=bucket_bytes)
    once.stage_finished(0)
    once.finish()


def _started(
    parameters: list[nn.Parameter], group: dist.ProcessGroup, bucket_bytes: int, stage: int, start: object
) -> _Reduction:
    first = parameters[0]
    flags = [float(p.grad is not None) for p in parameters]
    seen = torch.tensor(flags, dtype=torch.float32).to(first.device, non_blocking=True)
    tensors = [seen, *(_joined(bucket) for bucket in buckets(parameters, bucket_bytes))]
    works = []
    for tensor in tensors:
        work = dist.all_reduce(tensor, group=group, async_op=True)
        assert work is not None
        works.append(work)
    return _Reduction(stage, parameters, seen, works, tensors, start)


def _joined(bucket: Sequence[nn.Parameter]) -> Tensor:
    """One tensor with all gradients of the bucket, which from now on are parts of it; zeros where there was none."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    if len(bucket) == 1:
        bucket[0].grad = gradients[0].contiguous()
        return bucket[0].grad
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    offset = 0
    for parameter in bucket:
        parameter.grad = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    return flat


def take_gradients(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Take what is in `.grad` away, to be added again when the step's own has been summed."""
    taken = []
    for parameter in parameters:
        if parameter.grad is not None:
            taken.append((parameter, parameter.grad))
            parameter.grad = None
    return taken


def buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, cut into lists of one dtype and at most `bucket_bytes`, or one parameter."""
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for same in by_dtype.values():
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in same:
            if bucket and size + parameter.nbytes > bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.nbytes
        if bucket:
            yield bucket
