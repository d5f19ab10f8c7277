"""An order with its timing and its longest paths: what a neighbourhood search starts every step from.

Ops are numbers here, and orders lists of numbers; a new incumbent is made for every change, in one pass over all ops.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from solvers.pipeline import PipelineProblem
from solvers.searched_ops import Key, duration_us, searched_ops
from solvers.timing import NEVER, NO_NODE, TimingGraph

PathRow = npt.NDArray[np.int64]  # one entry per column: a longest path, in µs


class NumberedOps:
    """The searched ops as numbers 0..N-1, stage by stage, each kind in microbatch order, and what never changes."""

    def __init__(self, problem: PipelineProblem) -> None:
        self.problem = problem
        m = self.num_microbatches = problem.num_microbatches
        self.keys = searched_ops(problem)
        self.count = len(self.keys)
        self.base = {(kind, s): n for n, (kind, s, j) in enumerate(self.keys) if j == 0}  # microbatch 0
        self.duration_us: list[int] = []
        self.rank: list[int] = []
        self.wait_for, self.wait_us = [NO_NODE] * self.count, [0] * self.count  # the op of the neighbouring stage
        self.feeds, self.feed_us = [NO_NODE] * self.count, [0] * self.count  # that this one waits for, and feeds
        for (kind, s), first in self.base.items():
            self.duration_us += [duration_us(problem, (kind, s, 0))] * m
            self.rank += [problem.rank_of_stage[s]] * m
            other = self.base.get((kind, s - 1 if kind == "F" else s + 1))
            if kind in ("F", "B") and other is not None:
                delay = problem.transfer_us[s - 1 if kind == "F" else s]
                self.wait_for[first : first + m], self.wait_us[first : first + m] = range(other, other + m), [delay] * m
                self.feeds[other : other + m], self.feed_us[other : other + m] = range(first, first + m), [delay] * m
        self.holdings = [self._holdings(s) for s in range(problem.num_stages)]

    def number(self, key: Key) -> int:
        """The number of an op."""
        kind, s, j = key
        return self.base[kind, s] + j

    def own_needs(self, n: int) -> list[int]:
        """What an op waits for on its own stage, whatever the order: one before, and its microbatch's last op."""
        kind, s, j = self.keys[n]
        needs = [n - 1] if j else []
        kinds = [k for k in ("F", "R", "B", "W") if (k, s) in self.base]
        if kind != "F":
            needs.append(self.base[kinds[kinds.index(kind) - 1], s] + j)
        elif j >= self.problem.in_flight_limit[s]:
            needs.append(self.base["B", s] + j - self.problem.in_flight_limit[s])
        return needs

    def _holdings(self, stage: int) -> list[tuple[str, str, int]]:
        """(from the start of this kind, to the end of that kind, bytes) of one microbatch."""
        problem = self.problem
        last = "W" if problem.has_weight_op[stage] else "B"
        left = problem.kept_bytes[stage] if last == "W" else 0  # given back by the last op
        rows = []
        for kind, taken in (
            ("B", problem.extra_bytes[stage]),
            ("F", problem.taken_by_forward_bytes[stage]),
            ("R", problem.restored_bytes[stage]),
        ):
            late = taken if last == "B" else min(taken, left)
            left -= late
            rows += [(kind, last, late), (kind, "B", taken - late)]
        return [row for row in rows if row[2]]


class Incumbent:
    """An order of the searched ops with its timing and its longest paths; a new one for every change.

    `topological` has all ops by ascending start. Columns: one per rank (`per_rank`), or a single one in which the
    ranks start no earlier than `release_us`, and the cost of a rank counts from its first op.
    """

    def __init__(
        self, ops: NumberedOps, topological: Sequence[int], per_rank: bool, release_us: Sequence[int] | None = None
    ) -> None:
        """`release_us` None: the starts of the ranks are chosen anew so that the objective is least."""
        self.ops = ops
        problem = ops.problem
        num_ranks, rank, duration_us = problem.num_ranks, ops.rank, ops.duration_us
        self.is_span = problem.objective == "span"
        self.per_rank = per_rank and self.is_span
        self.sequence: list[list[int]] = [[] for _ in range(num_ranks)]
        for n in topological:
            self.sequence[rank[n]].append(n)
        if not self.is_span:
            release_us = [0] * num_ranks
        if release_us is None:
            self.start_us = self._least_span_starts_us(topological)
            release_us = [self.start_us[row[0]] for row in self.sequence]
        else:
            self.start_us = self._earliest_starts_us(topological, release_us)
        self.topological = sorted(topological, key=self.start_us.__getitem__)
        self.position = [0] * ops.count
        for i, n in enumerate(self.topological):
            self.position[n] = i
        begins_us = [self.start_us[row[0]] if self.is_span else 0 for row in self.sequence]
        self.rank_cost_us = [
            self.start_us[row[-1]] + duration_us[row[-1]] - begin
            for row, begin in zip(self.sequence, begins_us, strict=True)
        ]
        self.cost_us = max(self.rank_cost_us)
        self.begins_us = begins_us
        num_columns = num_ranks if self.per_rank else 1
        self.first_row = np.full((num_ranks, num_columns), NEVER, dtype=np.int64)  # paths to the start of a rank
        self.last_row = self.first_row.copy()  # paths from the end of a rank
        if self.per_rank:
            np.fill_diagonal(self.first_row, 0)
            np.fill_diagonal(self.last_row, 0)
        else:
            self.first_row[:, 0] = begins_us
            self.last_row[:, 0] = [-begin for begin in begins_us]
        self.to_end_of = self._heads_us() if self.per_rank else self._starts_as_heads_us()
        self.from_start_of = self._tails_us()

    def _least_span_starts_us(self, topological: Sequence[int]) -> list[int]:
        ops = self.ops
        flat = [n for row in self.sequence for n in row]
        place = [0] * ops.count
        for i, n in enumerate(flat):
            place[n] = i
        first = [0]
        for row in self.sequence:
            first.append(first[-1] + len(row))
        graph = TimingGraph(
            first,
            [ops.duration_us[n] for n in flat],
            [place[ops.wait_for[n]] if ops.wait_for[n] >= 0 else NO_NODE for n in flat],
            [ops.wait_us[n] for n in flat],
        )
        _, starts = graph.least_span([place[n] for n in topological])
        return [starts[i] for i in place]

    def _earliest_starts_us(self, topological: Sequence[int], release_us: Sequence[int]) -> list[int]:
        ops = self.ops
        rank, duration_us, wait_for, wait_us = ops.rank, ops.duration_us, ops.wait_for, ops.wait_us
        start_us = [0] * ops.count
        free_us = list(release_us)
        for n in topological:
            start = free_us[rank[n]]
            other = wait_for[n]
            if other >= 0:
                arrival = start_us[other] + duration_us[other] + wait_us[n]
                if arrival > start:
                    start = arrival
            start_us[n] = start
            free_us[rank[n]] = start + duration_us[n]
        return start_us

    def _starts_as_heads_us(self) -> PathRow:
        return np.array([list(map(int.__add__, self.start_us, self.ops.duration_us))], dtype=np.int64).T

    def _heads_us(self) -> PathRow:
        """Longest paths from the start of every rank to the end of every op; shape (N, columns)."""
        return self._longest_us(self.topological, self.first_row, self.ops.wait_for, self.ops.wait_us)

    def _tails_us(self) -> PathRow:
        """Longest paths from the start of every op to the end of every rank; shape (N, columns)."""
        if not self.per_rank:
            return np.array([self._single_tails_us()], dtype=np.int64).T
        return self._longest_us(self.topological[::-1], self.last_row, self.ops.feeds, self.ops.feed_us)

    def _longest_us(
        self, order: Sequence[int], end_row: PathRow, neighbour: Sequence[int], neighbour_us: Sequence[int]
    ) -> PathRow:
        """Longest paths from one end of every rank through every op, the op included; `order` starts at that end.

        `end_row` is what comes before the first op of every rank; an op's `neighbour` on another rank (−1: none) lies
        towards that end, `neighbour_us` away. Shape (N, columns).
        """
        rank, duration_us = self.ops.rank, self.ops.duration_us
        rows = np.empty((self.ops.count, end_row.shape[1]), dtype=np.int64)
        latest: list[PathRow] = list(end_row)
        for n in order:
            row = rows[n]
            other = neighbour[n]
            if other >= 0:
                np.maximum(latest[rank[n]], rows[other] + neighbour_us[n], out=row)
                row += duration_us[n]
            else:
                np.add(latest[rank[n]], duration_us[n], out=row)
            latest[rank[n]] = row
        return rows

    def _single_tails_us(self) -> list[int]:
        ops = self.ops
        rank, duration_us, feeds, feed_us = ops.rank, ops.duration_us, ops.feeds, ops.feed_us
        tail_us = [0] * ops.count
        latest = [int(value) for value in self.last_row[:, 0]]
        for n in reversed(self.topological):
            tail = latest[rank[n]]
            other = feeds[n]
            if other >= 0:
                through = tail_us[other] + feed_us[n]
                if through > tail:
                    tail = through
            tail_us[n] = latest[rank[n]] = tail + duration_us[n]
        return tail_us

    def counts_before(self, place: int) -> dict[tuple[str, int], int]:
        """How many ops of every kind and stage come before this place in `topological`."""
        position, m = self.position, self.ops.num_microbatches
        return {name: bisect_left(position, place, base, base + m) - base for name, base in self.ops.base.items()}

    def crossings(self) -> list[int]:
        """Ops on critical paths that wait for an op of another rank, latest first."""
        ops, start_us = self.ops, self.start_us
        found = []
        before = [NO_NODE] * ops.count
        for row in self.sequence:
            for a, b in pairwise(row):
                before[b] = a
        for rank, row in enumerate(self.sequence):
            if self.rank_cost_us[rank] < self.cost_us:
                continue
            n = row[-1]
            while n >= 0:
                other = ops.wait_for[n]
                if other >= 0 and start_us[other] + ops.duration_us[other] + ops.wait_us[n] == start_us[n]:
                    if ops.rank[other] != ops.rank[n]:
                        found.append(n)
                    n = other
                elif before[n] >= 0 and start_us[before[n]] + ops.duration_us[before[n]] == start_us[n]:
                    n = before[n]
                else:
                    break
        return found
