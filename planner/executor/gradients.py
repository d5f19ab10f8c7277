"""Gradients summed over the data-parallel processes that hold the same stages."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.executor.transport import telling_lost_peers

BUCKET_BYTES = 25 * 2**20
_MAX_ON_THE_WAY = 2  # buckets being reduced at once: one travels while the one before is copied back


def take_gradients(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Take what is in `.grad` away, for `add_gradients` to put back: it has been reduced already."""
    taken = []
    for parameter in parameters:
        if parameter.grad is not None:
            taken.append((parameter, parameter.grad))
            parameter.grad = None
    return taken


def add_gradients(taken: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Add gradients taken before to those there are now."""
    for parameter, gradient in taken:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def reduce_gradients(
    parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, *, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Replace every gradient by its sum over `group`, in buckets of one dtype and at most `bucket_bytes`.

    A parameter that got a gradient on some processes only (an expert nobody asked) counts as zero on the
    others; one that got none anywhere keeps none. One more number per parameter and bucket says which is
    which.
    """
    on_the_way: deque[tuple[list[nn.Parameter], Tensor, dist.Work]] = deque()
    with telling_lost_peers("the data-parallel reduction"):
        for bucket in _buckets(parameters, bucket_bytes):
            flat = _flatten(bucket)
            work = dist.all_reduce(flat, group=group, async_op=True)
            assert work is not None
            on_the_way.append((bucket, flat, work))
            if len(on_the_way) == _MAX_ON_THE_WAY:
                _take_back(*on_the_way.popleft())
        while on_the_way:
            _take_back(*on_the_way.popleft())


def _flatten(bucket: Sequence[nn.Parameter]) -> Tensor:
    """All gradients one after the other, then one flag per parameter that tells whether it has one."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    flags = parts[0].new_tensor([float(p.grad is not None) for p in bucket])
    return torch.cat([*(part.reshape(-1) for part in parts), flags])


def _take_back(bucket: Sequence[nn.Parameter], flat: Tensor, work: dist.Work) -> None:
    work.wait()
    counts = flat[-len(bucket) :].tolist()
    offset = 0
    for parameter, count in zip(bucket, counts, strict=True):
        size = parameter.numel()
        if count > 0:
            summed = flat[offset : offset + size].view(parameter.shape)
            parameter.grad = summed.clone() if parameter.grad is None else parameter.grad.copy_(summed)
        offset += size


def _buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
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
