"""Longest paths through given orders: when every op of every rank starts, and how short the span can be.

An order fixes, for every rank, the sequence of its ops. With it, each op has at most two direct predecessors: the op
before it on its rank, and one op it waits for (its producer on the neighbouring stage; for the first backward of a
microbatch, its own forward). That makes all timing questions longest-path questions on a sparse graph. Nothing
here knows stages or memory: nodes are numbered rank by rank, in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NO_NODE = -1
NEVER = -(1 << 60)  # no path; adding durations to it never makes it a real time
NEVER_LIMIT = -(1 << 59)


class DeadlockError(ValueError):
    """The orders wait for each other in a circle; `node` is the first op, of the lowest rank, that never starts."""

    def __init__(self, node: int) -> None:
        super().__init__(f"node {node} can never start")
        self.node = node


@dataclass(frozen=True)
class TimingGraph:
    """Nodes 0..N-1, rank r owning nodes first[r] .. first[r + 1] - 1 in the order it runs them.

    `wait_for[n]` is the node n waits for (NO_NODE: none) and `delay_us[n]` how long after its end n may start.
    """

    first: Sequence[int]  # shape (p + 1,)
    duration_us: Sequence[int]  # shape (N,)
    wait_for: Sequence[int]  # shape (N,)
    delay_us: Sequence[int]  # shape (N,)

    @property
    def num_ranks(self) -> int:
        """Ranks, p."""
        return len(self.first) - 1

    def topological_order(self) -> list[int]:
        """All nodes, each after what it waits for; DeadlockError if that is impossible. O(N)."""
        first, wait_for = self.first, self.wait_for
        done = bytearray(self.first[-1])
        waiting: dict[int, list[int]] = {}
        position = list(first[:-1])
        order: list[int] = []
        stack = list(range(self.num_ranks - 1, -1, -1))
        while stack:
            rank = stack.pop()
            node, stop = position[rank], first[rank + 1]
            while node < stop:
                needs = wait_for[node]
                if needs >= 0 and not done[needs]:
                    waiting.setdefault(needs, []).append(rank)
                    break
                done[node] = 1
                order.append(node)
                if node in waiting:
                    stack.extend(waiting.pop(node))
                node += 1
            position[rank] = node
        for rank in range(self.num_ranks):
            if position[rank] < first[rank + 1]:
                raise DeadlockError(position[rank])
        return order

    def earliest_starts_us(self, order: Sequence[int], release_us: Sequence[int]) -> list[int]:
        """Start of every node, as soon as possible but nothing on rank r before release_us[r]; shape (N,)."""
        duration_us, wait_for, delay_us = self.duration_us, self.wait_for, self.delay_us
        rank_start = {self.first[r]: release_us[r] for r in range(self.num_ranks)}
        start_us = [0] * len(duration_us)
        for node in order:
            released = rank_start.get(node)
            start = start_us[node - 1] + duration_us[node - 1] if released is None else released
            needs = wait_for[node]
            if needs >= 0:
                arrival = start_us[needs] + duration_us[needs] + delay_us[node]
                if arrival > start:
                    start = arrival
            start_us[node] = start
        return start_us

    def longest_from_us(self, order: Sequence[int], source: int) -> list[int]:
        """Longest path from the start of `source` to the end of every node; very negative where there is none."""
        duration_us, wait_for, delay_us = self.duration_us, self.wait_for, self.delay_us
        firsts = set(self.first[:-1])
        end_us = [NEVER] * len(duration_us)
        for node in order:
            start = NEVER if node in firsts else end_us[node - 1]
            needs = wait_for[node]
            if needs >= 0:
                arrival = end_us[needs] + delay_us[node]
                if arrival > start:
                    start = arrival
            if node == source and start < 0:
                start = 0
            end_us[node] = start + duration_us[node]
        return end_us

    def longest_between_ranks_us(self, order: Sequence[int]) -> npt.NDArray[np.int64]:
        """L[r, q]: longest path from the start of rank r's first node to the end of rank q's last. Shape (p, p)."""
        num_ranks = self.num_ranks
        duration_us, wait_for, delay_us = self.duration_us, self.wait_for, self.delay_us
        rank_of_first = {self.first[r]: r for r in range(num_ranks)}
        end_us = np.full((len(duration_us), num_ranks), NEVER, dtype=np.int64)
        for node in order:
            row = end_us[node]
            rank = rank_of_first.get(node)
            if rank is None:
                row[:] = end_us[node - 1]
            needs = wait_for[node]
            if needs >= 0:
                np.maximum(row, end_us[needs] + delay_us[node], out=row)
            if rank is not None and row[rank] < 0:
                row[rank] = 0
            row += duration_us[node]
        last = [self.first[r + 1] - 1 for r in range(num_ranks)]
        return np.ascontiguousarray(end_us[last].T)

    def least_cost_us(self, *, span: bool) -> int:
        """The least span, or the makespan with every node as soon as possible; DeadlockError if it cannot run."""
        order = self.topological_order()
        if span:
            return self.least_span(order)[0]
        starts_us = self.earliest_starts_us(order, [0] * self.num_ranks)
        return max(starts_us[n - 1] + self.duration_us[n - 1] for n in self.first[1:])

    def least_span(self, order: Sequence[int]) -> tuple[int, list[int]]:
        """The least possible max over ranks of (end of last node − start of first node), and starts that attain it.

        Exact over whole µs. A span C can be had iff the longest-path system together with
        "first start of r ≥ last end of r − C" has no positive circle. A circle through the ranks r1, r2, .., rk has
        weight L[r1, r2] + .. + L[rk, r1] − k·C, so feasibility needs only the matrix L of longest paths between first
        starts and last ends: closing L − C under max-plus products leaves the diagonal ≤ 0 iff C is feasible.
        """
        num_ranks, first = self.num_ranks, self.first
        asap_us = self.earliest_starts_us(order, [0] * num_ranks)
        spans_us = [
            asap_us[first[r + 1] - 1] + self.duration_us[first[r + 1] - 1] - asap_us[first[r]] for r in range(num_ranks)
        ]
        upper = max(spans_us)
        worst = spans_us.index(upper)
        if self.longest_from_us(order, first[worst])[first[worst + 1] - 1] == upper:
            return upper, asap_us  # a path inside the longest rank: no delay anywhere shortens it
        longest_us = self.longest_between_ranks_us(order)
        lower = int(longest_us.diagonal().max())
        while lower < upper:
            middle = (lower + upper) // 2
            if _close(longest_us, middle) is None:
                lower = middle + 1
            else:
                upper = middle
        closed = _close(longest_us, upper)
        assert closed is not None  # the ASAP span is feasible, and the search only moves to feasible values
        release_us = [int(value) for value in np.maximum(closed.max(axis=0), 0)]
        starts_us = self.earliest_starts_us(order, release_us)
        origin = min(starts_us[first[r]] for r in range(num_ranks))
        return upper, [start - origin for start in starts_us]


def _close(longest_us: npt.NDArray[np.int64], span_us: int) -> npt.NDArray[np.int64] | None:
    """Max-plus closure of L − C: the delays ranks force on each other, or None if a circle is positive."""
    closed = np.where(longest_us > NEVER_LIMIT, longest_us - span_us, NEVER)
    for via in range(closed.shape[0]):
        if closed[via, via] > 0:
            return None
        through = closed[:, via, None] + closed[None, via, :]
        np.maximum(closed, through, out=closed, where=through > NEVER_LIMIT)
    return None if (closed.diagonal() > 0).any() else closed
