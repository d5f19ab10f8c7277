"""The norm of all gradients of a pipeline, the same bits on every rank whichever way it is put together.

Every rank squares and sums its own gradients; the sums are added in rank order, in float64, either all at once
(`complete`) or as a running sum that passes from rank to rank (`begin`), in which case the last rank tells the
others what came out (`end`). Both ways make the same additions in the same order.
"""

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from enum import Enum
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.executor.groups import Groups
from planner.executor.transport import telling_lost_peers
from planner.plans import Layout

# As torch.nn.utils.clip_grad_norm_ adds it to the norm it divides by.
_EPSILON = 1e-6


class Decision(Enum):
    """What a gradient norm asks of the optimizer."""

    UPDATE = "update"
    CLIP = "clip the gradients, then update"
    SKIP = "leave the parameters as they are"


class Rule(NamedTuple):
    """How a sum of squares is judged."""

    max_norm: float | None
    skip_nonfinite: bool

    def decide(self, square_sum: float) -> Decision:
        """The decision for gradients whose squares sum to `square_sum`, inf and NaN included."""
        if self.skip_nonfinite and not math.isfinite(square_sum):
            return Decision.SKIP
        # Negated, so that a NaN clips: the gradients become NaN, as torch makes them.
        if self.max_norm is not None and not self.max_norm / (math.sqrt(square_sum) + _EPSILON) >= 1.0:
            return Decision.CLIP
        return Decision.UPDATE


def square_sum(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """The sum of the squares of all elements of the gradients, float64, shape (), in the order given.

    Not finite when one gradient holds an inf or a NaN, or is too large for its dtype's norm (float32 for 16-bit).
    """
    norms = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.numel() > 0:
            wide = torch.float32 if gradient.dtype.itemsize < 4 else gradient.dtype
            norms.append(torch.linalg.vector_norm(gradient, dtype=wide).to(torch.float64))
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(norms).square().sum()


class Prefix(NamedTuple):
    """Sums of squares that a rank knows at once."""

    mine: float  # of ranks 0 up to this one
    first: float  # of rank 0


class GradientNorm:
    """Sums over the ranks of one pipeline. All calls are made by all of its ranks, in the same order."""

    def __init__(self, groups: Groups, layout: Layout, *, in_passing: bool, timeout: timedelta) -> None:
        """`in_passing` makes a group of its own for `begin` and `end`; every process of the job must be here."""
        self._groups = groups
        self._rank = groups.coordinates.pipeline_rank
        self._num_ranks = layout.pp
        self._is_replicated = layout.dp > 1
        self._group = _own_group(groups, layout, timeout) if in_passing and layout.pp > 1 else None
        self._on_the_way: list[tuple[dist.Work, Tensor]] = []

    @property
    def is_alone(self) -> bool:
        """Whether the pipeline has one rank only, which knows everything at once."""
        return self._num_ranks == 1

    @property
    def is_last(self) -> bool:
        """Whether this rank knows the whole sum first."""
        return self._rank == self._num_ranks - 1

    def local(self, parameters: Iterable[nn.Parameter]) -> float:
        """This rank's sum. Data rank 0's counts for all: devices of two kinds may sum in two orders.

        Shards of one parameter (tensor parallel, FSDP) would be summed over their group here.
        """
        found = square_sum(parameters, self._groups.device)
        if self._is_replicated:
            with telling_lost_peers("the gradient norm"):
                dist.broadcast(found, group=self._groups.data, group_src=0)
        return found.item()

    def complete(self, mine: float) -> float:
        """The sum over all ranks; waits for all of them."""
        if self.is_alone:
            return mine
        own = self._number(mine)
        every = [torch.empty_like(own) for _ in range(self._num_ranks)]
        with telling_lost_peers("the gradient norm"):
            dist.all_gather(every, own, group=self._groups.pipeline)
        total = 0.0
        for number in torch.cat(every).tolist():  # not sum(), which rounds otherwise than the running sum
            total += number
        return total

    def begin(self, mine: float) -> Prefix:
        """Add `mine` to the sum of the ranks before, and pass it on; waits for those ranks only."""
        self.finish()
        prefix = Prefix(mine, mine)
        if self._rank > 0:
            before = Prefix(*self._receive(self._rank - 1))
            prefix = Prefix(before.mine + mine, before.first)
        # The last rank's is the whole sum, for everyone.
        if not self.is_alone:
            self._send(prefix, range(self._rank) if self.is_last else [self._rank + 1])
        return prefix

    def end(self) -> Prefix:
        """What `begin` returned on the last rank; waits until that rank has called it. Not for the last rank."""
        return Prefix(*self._receive(self._num_ranks - 1))

    def finish(self) -> None:
        """Wait until what this rank has sent is received."""
        with telling_lost_peers("the gradient norm"):
            for work, _numbers in self._on_the_way:
                work.wait()
        self._on_the_way.clear()

    def let_go(self) -> None:
        """Forget the process groups: nothing can be summed any more."""
        del self._groups, self._group

    def _number(self, *values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._groups.device)

    def _receive(self, rank: int) -> Sequence[float]:
        numbers = self._number(0.0, 0.0)
        with telling_lost_peers("the gradient norm"):
            for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, numbers, group=self._group, group_peer=rank)]):
                work.wait()
        found: list[float] = numbers.tolist()
        return found

    def _send(self, prefix: Prefix, ranks: Sequence[int]) -> None:
        numbers = self._number(*prefix)
        with telling_lost_peers("the gradient norm"):
            # In one batch: all in one communicator on NCCL, and none waits for the others' receivers.
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, numbers, group=self._group, group_peer=rank) for rank in ranks]
            )
        self._on_the_way += [(work, numbers) for work in works]


def _own_group(groups: Groups, layout: Layout, timeout: timedelta) -> dist.ProcessGroup:
    """The ranks of this pipeline once more, so that these few numbers never queue behind tensors."""
    own: dist.ProcessGroup | None = None
    width = layout.dp * layout.tp
    for other in range(width):
        ranks = [rank * width + other for rank in range(layout.pp)]
        group = dist.new_group(ranks, timeout=timeout)
        if groups.coordinates.global_rank in ranks:
            own = group
    assert own is not None
    with telling_lost_peers("the gradient norm"):
        dist.all_reduce(torch.zeros(1, device=groups.device), group=own)  # connected, as batched transfers need it
    return own
