"""One window of a neighbourhood search, as a program for CP-SAT: some ops free, all others in their present order.

The window has the ops that start in a span of time; those of a block of adjacent ranks are free.
Times outside are not fixed. Whatever the rest does to the window is a longest path through ops whose order is fixed,
so it is a constant:

    head   from the first op of rank k to a free op;
    tail   from a free op to the last op of rank k;
    detour from one free op to another, over ranks outside the block;
    bypass from the first op of rank k to the last of rank l, without a free op.

With x_k the start of rank k and e_k its end as variables, the model is exact for the window: its cost is the span of
the whole schedule. That takes a column of heads and tails per rank. On large problems one column serves all ranks:
their starts keep their present distances (the makespan needs no more anyway), and are readjusted now and then.

The order after a window holds at its end what it always did, so memory after it needs no look; inside it is a
cumulative constraint over what a microbatch holds, less what is held all through the window.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from solvers.cp_sat_memory import add_held
from solvers.incumbent import Incumbent, PathRow
from solvers.status import SolverError
from solvers.timing import NEVER, NEVER_LIMIT

_FLOOR = 0.02  # the costs of ranks count down to this share below the incumbent


@dataclass
class _Outside:
    """What the fixed order outside does to the free ops of a window, as longest paths."""

    arrivals: list[tuple[int, PathRow]] = field(default_factory=list)  # (free op, paths to its start)
    detours: list[tuple[int, int, int]] = field(default_factory=list)  # (free op, free op, from end to start)
    departures: list[tuple[int, PathRow]] = field(default_factory=list)  # (free op, paths from its end)
    bypass: PathRow = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))  # past all free ops


class Window:
    """The ops in places [low, high) of the incumbent's topological order, free on the ranks of the block."""

    def __init__(self, incumbent: Incumbent, low: int, high: int, block: range) -> None:
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
        bypass = np.full((num_columns, num_columns), NEVER, dtype=np.int64)
        latest: list[PathRow] = []
        for r, row in enumerate(self.ready):
            wide = np.full(width, NEVER, dtype=np.int64)
            wide[:num_columns] = row
            latest.append(wide)
            if not self.rank_nodes[r]:
                np.maximum(bypass, row[:, None] + self.done[r][None, :], out=bypass)
        through: dict[int, PathRow] = {}  # paths to the end of an op outside the block: from columns and from exits
        for n in self.nodes:
            other = ops.wait_for[n]
            if rank[n] in block:
                if other >= 0 and position[other] < low:
                    found.arrivals.append((n, heads[other] + ops.wait_us[n]))
                elif other in through:
                    row = through[other] + ops.wait_us[n]
                    found.arrivals.append((n, row[:num_columns]))
                    found.detours += [
                        (a, n, int(row[column])) for a, column in exit_column.items() if row[column] > NEVER_LIMIT
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

        back: dict[int, PathRow] = {}  # paths from the start of an op outside the block
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


class WindowModel:
    """The CP model of a window. `must_improve`: the cost is to be lower; else it may stay and the ranks' go down."""

    def __init__(self, window: Window, least_us: int, must_improve: bool) -> None:
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
        for r, other in np.argwhere(window.outside.bypass > NEVER_LIMIT).tolist():
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

    def _add_head(self, after: Any, head: PathRow, known: PathRow | None) -> None:
        """`after` comes that long after the columns' begins, where that is not known from another head."""
        for k, value in enumerate(head.tolist()):
            if value > NEVER_LIMIT and (known is None or value > known[k]):
                self.model.add(after >= self.begins[k] + value)

    def _add_tail(self, r: int, before: Any, tail: PathRow, known: PathRow | None) -> None:
        """The columns' ends come that long after `before`, an op of rank r."""
        for k, value in enumerate(tail.tolist()):
            if value > NEVER_LIMIT and (known is None or value > known[k]):
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
            later, far_us = latest.get((b, kind, s), (j, NEVER))
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
        add_held(model, rows, room, self.high_us - self.low_us + 2)

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
