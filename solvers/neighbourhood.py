"""Large neighbourhood search: CP-SAT reorders a window of time on some or all ranks, again and again.

The incumbent is an order with a timing that attains its objective. One step takes the ops that start in a window
of time, frees those of a block of adjacent ranks, keeps every other op in its present order, and asks CP-SAT for a
better order of the free ones. Times outside are not fixed. Whatever the rest does to the window is a longest path
through ops whose order is fixed, so it is a constant:

    head   from the first op of rank k to a free op;
    tail   from a free op to the last op of rank k;
    detour from one free op to another, over ranks outside the block;
    bypass from the first op of rank k to the last of rank l, without a free op.

With x_k the start of rank k and e_k its end as variables, the model is exact for the window: its cost is the span of
the whole schedule. That takes a column of heads and tails per rank. On large problems one column serves all ranks:
their starts keep their present distances (the makespan needs no more anyway), and are readjusted now and then.

A step costs as much as its window, not as the problem; only an improvement is followed by a pass over all ops. The
order after a window holds at its end what it always did, so memory after it needs no look; inside it is a cumulative
constraint over what a microbatch holds, less what is held all through the window.

Which windows: at the start, at the end, where the critical path changes ranks, or anywhere; of all ranks or
of a few; a choice that improved lately is taken more often. Windows grow where CP-SAT proves there is nothing, and
shrink where it runs out of its limit. Half of the steps must improve the cost; the others may keep it and lower the
costs of the single ranks, so that plateaus have a slope.

Everything is counted in CP-SAT's deterministic time, so with a work limit the same seed gives the same order. If a
window of everything has no better order, the incumbent is optimal and the search ends.
"""

import random
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from solvers.backend import Event, OnProgress, infeasible
from solvers.bounds import Bound, best_bound
from solvers.list_scheduling import quick_order
from solvers.pipeline import Order, PipelineProblem, PipelineSolution, SolverError, Status
from solvers.searched_ops import Key, duration_us, order_by, searched_ops, starts_us
from solvers.timing import NO_NODE, TimingGraph

_Row = npt.NDArray[np.int64]  # one entry per column: a longest path, in µs

_NEVER = -(1 << 60)  # no path; adding durations to it never makes it a real time
_NEVER_LIMIT = -(1 << 59)
_EXACT_CELLS = 100_000  # ops × ranks up to which every rank has its own column: finds more, in more time
_STEP_WORK = 0.1  # deterministic time of CP-SAT per step
_BISECT_AFTER = 20  # conflicts; else CP-SAT may raise its bound µs by µs, which its deterministic time hardly counts
_BASE_WORK = 0.002  # what a step costs besides
_MIN_FREE, _MAX_FREE = 24, 1000  # free ops of a window
_FIRST_FREE = 90
_GROW, _SHRINK = 1.03, 0.93
_FLOOR = 0.02  # the costs of ranks count down to this share below the incumbent
_RELEASE_EVERY = 20  # improvements between two adjustments of the ranks' starts, on large problems


class _Ops:
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


class _Incumbent:
    """An order of the searched ops with its timing and its longest paths; a new one for every change.

    `topological` has all ops by ascending start. Columns: one per rank (`per_rank`), or a single one in which the
    ranks start no earlier than `release_us`, and the cost of a rank counts from its first op.
    """

    def __init__(
        self, ops: _Ops, topological: Sequence[int], per_rank: bool, release_us: Sequence[int] | None = None
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
        self.first_row = np.full((num_ranks, num_columns), _NEVER, dtype=np.int64)  # paths to the start of a rank
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

    def _starts_as_heads_us(self) -> _Row:
        return np.array([list(map(int.__add__, self.start_us, self.ops.duration_us))], dtype=np.int64).T

    def _heads_us(self) -> _Row:
        """Longest paths from the start of every rank to the end of every op; shape (N, columns)."""
        ops = self.ops
        rows = np.empty((ops.count, self.first_row.shape[1]), dtype=np.int64)
        latest: list[_Row] = list(self.first_row)
        for n in self.topological:
            row = rows[n]
            other = ops.wait_for[n]
            if other >= 0:
                np.maximum(latest[ops.rank[n]], rows[other] + ops.wait_us[n], out=row)
                row += ops.duration_us[n]
            else:
                np.add(latest[ops.rank[n]], ops.duration_us[n], out=row)
            latest[ops.rank[n]] = row
        return rows

    def _tails_us(self) -> _Row:
        """Longest paths from the start of every op to the end of every rank; shape (N, columns)."""
        ops = self.ops
        if not self.per_rank:
            return np.array([self._single_tails_us()], dtype=np.int64).T
        rows = np.empty((ops.count, self.last_row.shape[1]), dtype=np.int64)
        latest: list[_Row] = list(self.last_row)
        for n in reversed(self.topological):
            row = rows[n]
            other = ops.feeds[n]
            if other >= 0:
                np.maximum(latest[ops.rank[n]], rows[other] + ops.feed_us[n], out=row)
                row += ops.duration_us[n]
            else:
                np.add(latest[ops.rank[n]], ops.duration_us[n], out=row)
            latest[ops.rank[n]] = row
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
        position, every = self.position, range(self.ops.num_microbatches)
        return {
            name: bisect_left(every, place, key=lambda j, base=base: position[base + j])  # type: ignore[misc]
            for name, base in self.ops.base.items()
        }

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


@dataclass
class _Outside:
    """What the fixed order outside does to the free ops of a window, as longest paths."""

    arrivals: list[tuple[int, _Row]] = field(default_factory=list)  # (free op, paths to its start)
    detours: list[tuple[int, int, int]] = field(default_factory=list)  # (free op, free op, from end to start)
    departures: list[tuple[int, _Row]] = field(default_factory=list)  # (free op, paths from its end)
    bypass: _Row = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))  # past all free ops


class _Window:
    """The ops in places [low, high) of the incumbent's topological order, free on the ranks of the block."""

    def __init__(self, incumbent: _Incumbent, low: int, high: int, block: range) -> None:
        self.incumbent = incumbent
        ops = self.ops = incumbent.ops
        problem = ops.problem
        self.low, self.high, self.block = low, high, block
        self.nodes = incumbent.topological[low:high]
        self.free = [n for n in self.nodes if ops.rank[n] in block]
        self.is_whole = len(self.free) == ops.count
        self.is_exact = self.is_whole and (incumbent.per_rank or not incumbent.is_span)
        self.before = incumbent.counts_before(low)
        self.after = dict(self.before)  # counts at the end of the window
        for n in self.nodes:
            kind, s, _ = ops.keys[n]
            self.after[kind, s] += 1
        num_before = [0] * problem.num_ranks
        num_until = [0] * problem.num_ranks
        for (kind, s), count in self.before.items():
            num_before[problem.rank_of_stage[s]] += count
            num_until[problem.rank_of_stage[s]] += self.after[kind, s]
        self.rank_nodes = [row[a:b] for row, a, b in zip(incumbent.sequence, num_before, num_until, strict=True)]
        heads, tails = incumbent.to_end_of, incumbent.from_start_of
        self.ready = [  # paths to where a rank enters the window
            heads[row[a - 1]] if a else incumbent.first_row[r]
            for r, (row, a) in enumerate(zip(incumbent.sequence, num_before, strict=True))
        ]
        self.done = [  # paths from where it leaves it
            tails[row[b]] if b < len(row) else incumbent.last_row[r]
            for r, (row, b) in enumerate(zip(incumbent.sequence, num_until, strict=True))
        ]
        self.begins_inside = [a == 0 and b > 0 for a, b in zip(num_before, num_until, strict=True)]
        self.outside = self._look_outside()

    def _look_outside(self) -> _Outside:
        """Longest paths over the ops of the window outside the block, forwards and backwards."""
        incumbent, ops, low, high = self.incumbent, self.ops, self.low, self.high
        rank, position = ops.rank, incumbent.position
        heads, tails = incumbent.to_end_of, incumbent.from_start_of
        block = self.block
        num_columns = incumbent.first_row.shape[1]
        found = _Outside()

        exits = [
            n
            for n in self.free
            if ops.feeds[n] >= 0 and position[ops.feeds[n]] < high and rank[ops.feeds[n]] not in block
        ]
        exit_column = {n: num_columns + i for i, n in enumerate(exits)}
        width = num_columns + len(exits)
        bypass = np.full((num_columns, num_columns), _NEVER, dtype=np.int64)
        latest: list[_Row] = []
        for r, row in enumerate(self.ready):
            wide = np.full(width, _NEVER, dtype=np.int64)
            wide[:num_columns] = row
            latest.append(wide)
            if not self.rank_nodes[r]:
                np.maximum(bypass, row[:, None] + self.done[r][None, :], out=bypass)
        through: dict[int, _Row] = {}  # paths to the end of an op outside the block: from columns and from exits
        for n in self.nodes:
            other = ops.wait_for[n]
            if rank[n] in block:
                if other >= 0 and position[other] < low:
                    found.arrivals.append((n, heads[other] + ops.wait_us[n]))
                elif other in through:
                    row = through[other] + ops.wait_us[n]
                    found.arrivals.append((n, row[:num_columns]))
                    found.detours += [
                        (a, n, int(row[column])) for a, column in exit_column.items() if row[column] > _NEVER_LIMIT
                    ]
                continue
            row = latest[rank[n]].copy()
            if other >= 0:
                if other in through:
                    np.maximum(row, through[other] + ops.wait_us[n], out=row)
                elif position[other] < low:
                    np.maximum(row[:num_columns], heads[other] + ops.wait_us[n], out=row[:num_columns])
                else:
                    column = exit_column[other]
                    row[column] = max(row[column], ops.wait_us[n])
            row += ops.duration_us[n]
            through[n] = latest[rank[n]] = row
        for n, row in through.items():
            feeds = ops.feeds[n]
            if feeds >= 0 and position[feeds] >= high:
                tail = tails[feeds] + ops.feed_us[n]
                np.maximum(bypass, row[:num_columns, None] + tail[None, :], out=bypass)
        for r, nodes in enumerate(self.rank_nodes):
            if nodes and r not in block:
                np.maximum(bypass, latest[r][:num_columns, None] + self.done[r][None, :], out=bypass)
        problem = ops.problem
        for s in range(problem.num_stages):
            for kind, t in (("F", s + 1), ("B", s - 1)):
                if not 0 <= t < problem.num_stages:
                    continue
                for j in range(self.after[kind, t], self.before[kind, s]):  # sent before, received after
                    a, b = ops.base[kind, s] + j, ops.base[kind, t] + j
                    np.maximum(bypass, (heads[a] + ops.feed_us[a])[:, None] + tails[b][None, :], out=bypass)
        found.bypass = bypass

        back: dict[int, _Row] = {}  # paths from the start of an op outside the block
        leave = list(self.done)
        for n in reversed(self.nodes):
            other = ops.feeds[n]
            if rank[n] in block:
                if other >= 0 and position[other] >= high:
                    found.departures.append((n, tails[other] + ops.feed_us[n]))
                elif other in back:
                    found.departures.append((n, back[other] + ops.feed_us[n]))
                continue
            row = leave[rank[n]].copy()
            if other in back:
                np.maximum(row, back[other] + ops.feed_us[n], out=row)
            elif other >= 0 and position[other] >= high:
                np.maximum(row, tails[other] + ops.feed_us[n], out=row)
            row += ops.duration_us[n]
            back[n] = leave[rank[n]] = row
        return found

    def can_improve(self) -> bool:
        """Whether no critical path is known to pass by all free ops."""
        return bool(self.outside.bypass.diagonal().max() < self.incumbent.cost_us)


class _Model:
    """The CP model of a window. `must_improve`: the cost is to be lower; else it may stay and the ranks' go down."""

    def __init__(self, window: _Window, least_us: int, must_improve: bool) -> None:
        self.window = window
        incumbent, ops = window.incumbent, window.ops
        problem = ops.problem
        model = self.model = cp_model.CpModel()
        duration_us, start_us = ops.duration_us, incumbent.start_us
        cost_us = incumbent.cost_us
        first_us = min(start_us[n] for n in window.free)
        last_us = max(start_us[n] + duration_us[n] for n in window.free)
        # a whole window lies within the cost of the start of F(S-1, 0), which every rank's horizon contains
        slack = 2 * cost_us if window.is_whole else (last_us - first_us) // 2 + 1
        self.low_us, self.high_us = first_us - slack, last_us + slack
        cost = self.cost = model.new_int_var(least_us, cost_us - must_improve, "")
        model.add_hint(cost, cost_us)
        start = self.start = {n: model.new_int_var(self.low_us, self.high_us - duration_us[n], "") for n in window.free}
        for n in window.free:
            model.add_hint(start[n], start_us[n])

        self.begins: list[Any] = [0]  # of the columns
        self.ends: list[Any] = [cost]
        self.costs: dict[int, Any] = {}  # of single ranks, counted down to a floor; empty where only the cost counts
        floor_us = max(least_us, int(cost_us * (1 - _FLOOR)))
        if not must_improve:
            ranks = (
                range(problem.num_ranks) if incumbent.per_rank else [r for r in window.block if window.rank_nodes[r]]
            )
            self.costs = {r: model.new_int_var(floor_us, cost_us, "") for r in ranks}
        if incumbent.per_rank:
            self._add_columns(slack)
        else:
            model.add(cost >= max(least_us, int(window.outside.bypass[0, 0])))
        for r in window.block:
            if window.rank_nodes[r]:
                self._add_rank(r)
        for a, b, distance_us in self._needed_detours():
            model.add(start[b] >= start[a] + (duration_us[a] + distance_us))
        for n in window.free:
            for other in ops.own_needs(n):
                if other in start:
                    model.add(start[n] >= start[other] + duration_us[other])
            other = ops.wait_for[n]
            if other in start:
                model.add(start[n] >= start[other] + (duration_us[other] + ops.wait_us[n]))
        if problem.room_bytes is not None:
            for r in window.block:
                self._add_memory(r, problem.room_bytes[r])
        late_starts = []
        if incumbent.is_span and not incumbent.per_rank:  # all that a late start can save, it saves its rank
            late_starts = [start[row[0]] for row in incumbent.sequence if row[0] in start]
        if must_improve:
            model.minimize(cost)
        else:
            model.minimize(4 * cost + sum(self.costs.values()) - sum(late_starts))

    def _add_columns(self, slack_us: int) -> None:
        """Start and end of every rank; the span is the longest of them."""
        window, model, start = self.window, self.model, self.start
        incumbent, duration_us = window.incumbent, window.ops.duration_us
        self.begins, self.ends = [], []
        for r, row in enumerate(incumbent.sequence):
            begin_us, end_us = incumbent.start_us[row[0]], incumbent.start_us[row[-1]] + duration_us[row[-1]]
            begin = start.get(row[0])
            if begin is None:
                begin = model.new_int_var(begin_us - slack_us, begin_us + slack_us, "")
                model.add_hint(begin, begin_us)
            end = model.new_int_var(end_us - 2 * slack_us, end_us + 2 * slack_us, "")
            model.add_hint(end, end_us)
            model.add(self.cost >= end - begin)
            if r in self.costs:
                model.add(self.costs[r] >= end - begin)
            self.begins.append(begin)
            self.ends.append(end)
        model.add(self.begins[0] == incumbent.start_us[incumbent.sequence[0][0]])
        for r, other in np.argwhere(window.outside.bypass > _NEVER_LIMIT).tolist():
            model.add(self.ends[other] >= self.begins[r] + int(window.outside.bypass[r, other]))

    def _add_rank(self, r: int) -> None:
        """One rank of the block: one op at a time, and its heads and tails."""
        window, model, start = self.window, self.model, self.start
        incumbent, ops = window.incumbent, window.ops
        nodes, duration_us, keys = window.rank_nodes[r], ops.duration_us, ops.keys
        model.add_no_overlap([model.new_fixed_size_interval_var(start[n], duration_us[n], "") for n in nodes])
        ready = model.new_int_var(self.low_us, self.high_us, "")
        done = model.new_int_var(self.low_us, self.high_us, "")
        model.add_hint(ready, incumbent.start_us[nodes[0]])
        model.add_hint(done, incumbent.start_us[nodes[-1]] + duration_us[nodes[-1]])
        for n in {keys[n][:2]: n for n in reversed(nodes)}.values():  # the first of every kind and stage
            model.add(start[n] >= ready)
        for n in {keys[n][:2]: n for n in nodes}.values():  # the last
            model.add(done >= start[n] + duration_us[n])
        if not (incumbent.per_rank and window.begins_inside[r]):
            self._add_head(ready, window.ready[r], None)
        for n, row in window.outside.arrivals:
            if ops.rank[n] == r:
                self._add_head(start[n], row, window.ready[r])
        self._add_tail(r, done, window.done[r], None)
        for n, row in window.outside.departures:
            if ops.rank[n] == r:
                self._add_tail(r, start[n] + duration_us[n], row, window.done[r])

    def _add_head(self, after: Any, head: _Row, known: _Row | None) -> None:
        """`after` comes that long after the columns' begins, where that is not known from another head."""
        for k, value in enumerate(head.tolist()):
            if value > _NEVER_LIMIT and (known is None or value > known[k]):
                self.model.add(after >= self.begins[k] + value)

    def _add_tail(self, r: int, before: Any, tail: _Row, known: _Row | None) -> None:
        """The columns' ends come that long after `before`, an op of rank r."""
        for k, value in enumerate(tail.tolist()):
            if value > _NEVER_LIMIT and (known is None or value > known[k]):
                self.model.add(self.ends[k] >= before + value)
                if r in self.costs and not self.window.incumbent.per_rank:
                    self.model.add(self.costs[r] >= before + value)

    def _needed_detours(self) -> list[tuple[int, int, int]]:
        """Detours that no later one of the same kind and stage implies."""
        keys, duration_us = self.window.ops.keys, self.window.ops.duration_us
        kept = []
        latest: dict[tuple[int, str, int], tuple[int, int]] = {}  # (microbatch, distance) of the last one kept
        for a, b, distance_us in sorted(self.window.outside.detours, key=lambda d: (d[1], -keys[d[0]][2])):
            kind, s, j = keys[a]
            later, far_us = latest.get((b, kind, s), (j, _NEVER))
            if distance_us > far_us + (later - j) * duration_us[a]:
                latest[b, kind, s] = (j, distance_us)
                kept.append((a, b, distance_us))
        return kept

    def _add_memory(self, rank: int, room: int) -> None:
        window, model, start, ops = self.window, self.model, self.start, self.window.ops
        duration_us = ops.duration_us
        rows: list[tuple[Any, Any, int]] = []
        for s in ops.problem.stages_of_rank[rank]:
            for from_kind, to_kind, size in ops.holdings[s]:
                taker, giver = ops.base[from_kind, s], ops.base[to_kind, s]
                taken, given = window.before[from_kind, s], window.before[to_kind, s]
                taken_until, given_until = window.after[from_kind, s], window.after[to_kind, s]
                for j in range(given, taken_until):
                    if j < taken and j >= given_until:
                        room -= size  # held all through the window
                        continue
                    since = self.low_us - 1 if j < taken else start[taker + j]
                    until = self.high_us + 1 if j >= given_until else start[giver + j] + duration_us[giver + j]
                    rows.append((since, until, size))
        if sum(size for _, _, size in rows) <= room:
            return
        unit = gcd(*(size for _, _, size in rows))
        longest = self.high_us - self.low_us + 2
        intervals = [
            model.new_interval_var(since, model.new_int_var(0, longest, ""), until, "") for since, until, _ in rows
        ]
        model.add_cumulative(intervals, [size // unit for _, _, size in rows], room // unit)

    def topological(self, solver: Any) -> list[int] | None:
        """All ops with the window in the solver's order; None if that is the order they have."""
        window, ops = self.window, self.window.ops
        when = {n: solver.value(variable) for n, variable in self.start.items()}
        rows = [
            sorted(nodes, key=when.__getitem__) if r in window.block else nodes
            for r, nodes in enumerate(window.rank_nodes)
        ]
        if rows == window.rank_nodes:
            return None
        done: set[int] = set()
        inside = set(window.nodes)
        place = [0] * len(rows)
        merged: list[int] = []
        while len(merged) < len(window.nodes):
            before = len(merged)
            for r, row in enumerate(rows):
                while place[r] < len(row):
                    other = ops.wait_for[row[place[r]]]
                    if other in inside and other not in done:
                        break
                    done.add(row[place[r]])
                    merged.append(row[place[r]])
                    place[r] += 1
            if len(merged) == before:
                raise SolverError("the neighbourhood's order deadlocks")
        whole = window.incumbent.topological
        return whole[: window.low] + merged + whole[window.high :]


@dataclass
class _Arm:
    """One kind of window, and how well it did lately."""

    place: str  # "start", "end", "critical" or "any"
    width: int  # ranks in the block
    gain: float = 1.0
    work: float = 1.0

    def count(self, gain: float, work: float) -> None:
        """Remember a step, and forget older ones a little."""
        self.gain = 0.97 * self.gain + gain
        self.work = 0.97 * self.work + work / _STEP_WORK


class NeighbourhoodSearch:
    """The backend. `work_limit` counts CP-SAT's deterministic time, so that the same seed gives the same answer.

    Setting `cancel` ends a search that runs in another thread, like Ctrl-C in the main one.
    """

    name = "lns"
    is_exact = False

    def __init__(self, work_limit: float | None = None, cancel: threading.Event | None = None) -> None:
        self.work_limit = work_limit
        self.cancel = cancel

    def why_not(self, problem: PipelineProblem) -> str | None:
        """None: it takes every problem."""
        del problem
        return None

    def solve(
        self,
        problem: PipelineProblem,
        *,
        time_limit_s: float,
        seed: int = 0,
        hint: Order | None = None,
        on_progress: OnProgress | None = None,
        workers: int = 2,
        bound: Bound | None = None,
    ) -> PipelineSolution:
        """Improve the hint, or a quick list schedule, until the bound is met or the work or the time is used up.

        `workers` is ignored: steps are short, and one thread keeps them deterministic.
        """
        del workers
        began = time.monotonic()
        if not problem.is_feasible():
            return infeasible(self.name, seed, time.monotonic() - began)
        if bound is None:
            bound = best_bound(problem)
        first = quick_order(problem, hint)
        score = problem.evaluate(first)
        interrupted = out_of_time = False
        search = None
        if score.objective_us > bound.value_us:
            try:
                search = _Search(problem, first, bound, began, seed, on_progress)
                out_of_time = search.run(began + time_limit_s, self.work_limit, self.cancel)
            except KeyboardInterrupt:
                interrupted = True
        best = first
        note = "0 windows"
        if search is not None:
            interrupted = interrupted or search.cancelled
            note = f"{search.num_steps} windows, {search.num_improved} improved, work {search.work:.1f}"
            if search.proven is not None and search.proven.value_us > bound.value_us:
                bound = search.proven
            if search.incumbent.cost_us < score.objective_us:
                best = search.order()
        found = problem.evaluate(best)
        if not found.fits or found.objective_us > score.objective_us:
            raise SolverError(
                f"the neighbourhood search's order scores {found.objective_us} µs and {found.peak_bytes} bytes, it "
                f"began with {score.objective_us} µs within {problem.capacity_bytes} bytes"
            )
        return PipelineSolution(
            status=Status.OPTIMAL if found.objective_us <= bound.value_us else Status.FEASIBLE,
            order=best,
            score=found,
            lower_bound_us=bound.value_us,
            lower_bound_kind=bound.kind,
            solver=self.name,
            seconds=time.monotonic() - began,
            seed=seed,
            interrupted=interrupted,
            limited_by_time=out_of_time,
            note=note,
        )


class _Search:
    """The state of one solve."""

    def __init__(
        self,
        problem: PipelineProblem,
        order: Order,
        bound: Bound,
        began: float,
        seed: int,
        on_progress: OnProgress | None,
    ) -> None:
        self.problem = problem
        self.bound = bound
        self.proven: Bound | None = None
        self.began = began
        self.on_progress = on_progress
        self.random = random.Random(seed)
        self.work = 0.0
        self.num_steps = self.num_improved = 0
        self.cancelled = False
        ops = self.ops = _Ops(problem)
        start_us = starts_us(problem, order)
        topological = sorted(range(ops.count), key=lambda n: start_us[ops.keys[n]])
        self.per_rank = ops.count * problem.num_ranks <= _EXACT_CELLS
        self.incumbent = _Incumbent(ops, topological, self.per_rank)
        widths = sorted({w for w in (2, 4, 8) if w < problem.num_ranks} | {problem.num_ranks})
        self.arms = [_Arm(place, width) for place in ("start", "end", "critical", "any") for width in widths]
        self.free_ops = dict.fromkeys(widths, float(_FIRST_FREE))
        self.crossings: list[int] | None = None
        self.since_release = 0

    def order(self) -> Order:
        """The incumbent in the problem's own form."""
        position, number = self.incumbent.position, self.ops.number
        return order_by(self.problem, lambda key: position[number(key)])

    def run(self, deadline: float, work_limit: float | None, cancel: threading.Event | None) -> bool:
        """Steps until done; whether the clock ended them."""
        while self.incumbent.cost_us > self.bound.value_us and self.proven is None:
            if cancel is not None and cancel.is_set():
                self.cancelled = True
                return False
            if work_limit is not None and self.work >= work_limit:
                return False
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return True
            self._step(left_s)
        return False

    def _step(self, left_s: float) -> None:
        arm = self.random.choices(self.arms, [a.gain / a.work for a in self.arms])[0]
        window = self._window(arm)
        must_improve = window.is_whole or self.random.random() < 0.5
        self.num_steps += 1
        self.work += _BASE_WORK + 1e-5 * len(window.nodes)
        if not window.free or (must_improve and not window.can_improve()):
            arm.count(0.0, _BASE_WORK)
            return
        model = _Model(window, self.bound.value_us, must_improve)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = self.random.getrandbits(30)
        solver.parameters.max_deterministic_time = _STEP_WORK
        solver.parameters.max_time_in_seconds = left_s
        solver.parameters.catch_sigint_signal = False
        solver.parameters.linearization_level = 0
        solver.parameters.cp_model_probing_level = 0
        solver.parameters.symmetry_level = 0
        solver.parameters.search_branching = cp_model.PORTFOLIO_WITH_QUICK_RESTART_SEARCH
        solver.parameters.binary_search_num_conflicts = _BISECT_AFTER
        status = solver.solve(model.model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.INFEASIBLE, cp_model.UNKNOWN):
            raise SolverError(f"CP-SAT calls a window {solver.status_name(status)}: {model.model.validate()}")
        work = _BASE_WORK + solver.deterministic_time
        self.work += work
        gain = 0.0
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            gain = self._take(model, solver)
        if window.is_exact and status in (cp_model.OPTIMAL, cp_model.INFEASIBLE):
            self.proven = Bound(self.incumbent.cost_us, NeighbourhoodSearch.name)
        arm.count(gain, work)
        size = self.free_ops[arm.width]
        if work >= _STEP_WORK and gain < 1.0:
            size *= _SHRINK
        elif status in (cp_model.OPTIMAL, cp_model.INFEASIBLE) and gain == 0.0 and work < _STEP_WORK / 4:
            size *= _GROW
        self.free_ops[arm.width] = min(max(size, _MIN_FREE), _MAX_FREE)

    def _window(self, arm: _Arm) -> _Window:
        incumbent, ops, rng = self.incumbent, self.ops, self.random
        num_ranks = self.problem.num_ranks
        length = min(ops.count, round(self.free_ops[arm.width] * num_ranks / arm.width))
        first_rank = rng.randrange(num_ranks - arm.width + 1)
        middle = rng.randrange(ops.count)
        if arm.place == "start":
            middle = rng.randrange(length)
        elif arm.place == "end":
            middle = ops.count - 1 - rng.randrange(length)
        elif arm.place == "critical":
            if self.crossings is None:
                self.crossings = incumbent.crossings()
            if self.crossings:
                n = rng.choice(self.crossings)
                middle = incumbent.position[n] + rng.randrange(-length // 3, length // 3 + 1)
                first_rank = ops.rank[n] - rng.randrange(arm.width)
        low = min(max(middle - length // 2, 0), ops.count - length)
        first_rank = min(max(first_rank, 0), num_ranks - arm.width)
        return _Window(incumbent, low, low + length, range(first_rank, first_rank + arm.width))

    def _take(self, model: _Model, solver: Any) -> float:
        """Go on from the solver's order unless it is the same or worse; what that is worth."""
        topological = model.topological(solver)
        if topological is None:
            return 0.0
        old = self.incumbent
        release_us = None
        if not self.per_rank:
            self.since_release += 1
            if self.since_release < _RELEASE_EVERY:
                release_us = old.begins_us
            else:
                self.since_release = 0
        new = _Incumbent(self.ops, topological, self.per_rank, release_us)
        if new.cost_us > solver.value(model.cost):
            raise SolverError(f"a window costs {new.cost_us} µs, its model says {solver.value(model.cost)} µs")
        self.incumbent = new
        self.crossings = None
        if new.cost_us < old.cost_us:
            self.num_improved += 1
            if self.on_progress is not None:
                seconds = time.monotonic() - self.began
                self.on_progress(Event(NeighbourhoodSearch.name, seconds, new.cost_us, self.bound.value_us))
            return 1.0
        return 0.1 if sum(new.rank_cost_us) < sum(old.rank_cost_us) else 0.0
