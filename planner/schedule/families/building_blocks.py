"""V-Half and V-Min: one microbatch's slots, repeated every six slots, then squeezed.

Every action of a chunk takes one slot. Rank r hosts stages a = r and b = 2p − 1 − r. A building block says in which
slot microbatch 0 runs F a, F b, B b and B a; microbatch j runs 6j slots later. In every slot left free the rank runs
its oldest pending W, of either chunk. What is kept is each rank's order; it is then run as early as it can be.

The four slots of a rank differ modulo 6 for every p, so microbatches never collide. The slots are those of the authors'
code (see `v_half` and `v_min`); the authors also reorder warm-up and drain by a greedy rule, which is not done here.
"""

from collections import deque
from typing import NamedTuple

from planner.schedule.actions import Action, Kind, Schedule

_PERIOD = 6


class Block(NamedTuple):
    """The slots of microbatch 0 on one rank; W has none of its own."""

    forward_a: int
    forward_b: int
    backward_b: int
    backward_a: int


def repeated(blocks: list[Block], num_microbatches: int) -> Schedule:
    """The order that these building blocks, one per rank, give `num_microbatches`."""
    num_ranks = len(blocks)
    ranks = []
    for rank, block in enumerate(blocks):
        a, b = rank, 2 * num_ranks - 1 - rank
        slots = {
            slot + _PERIOD * j: Action(kind, stage, j)
            for slot, kind, stage in zip(block, (Kind.F, Kind.F, Kind.B, Kind.B), (a, b, b, a), strict=True)
            for j in range(num_microbatches)
        }
        order: list[Action] = []
        pending: deque[Action] = deque()
        for slot in range(max(slots) + 1):
            action = slots.get(slot)
            if action is not None:
                order.append(action)
                if action.kind is Kind.B:
                    pending.append(action._replace(kind=Kind.W))
            elif pending:
                order.append(pending.popleft())
        ranks.append((*order, *pending))
    return Schedule(tuple(ranks))
