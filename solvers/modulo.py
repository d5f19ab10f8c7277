"""Periodic steady states of a pipeline: modulo scheduling, in a model whose size does not depend on the microbatches.

A pattern runs k consecutive microbatches every `period`: op o of microbatch g·k + i starts at start[o, i] + g·period.
Let A_r be the start of a rank's first F of microbatch 0, its *anchor*. Every other op of the rank starts at
A_r + offset + period · laps with 0 < offset < period, laps whole. Since nothing overlaps the anchor, nothing crosses
the ends of the window [A_r, A_r + period), and the ops of one rank must not overlap in it: the circle is cut open.

Memory. When op x of the rank starts, another op i has started, and ended, laps_x − laps_i + [offset_i < offset_x] times
more than in the lap of x. Every microbatch takes in all what it gives back, so laps_x cancels, and the rank holds

    take_x + Σ_i (take_i − give_i) · ([offset_i < offset_x] − laps_i),

which is linear in the laps and in one boolean per pair of ops.

For a fixed period this is a feasibility problem of integer programming, solved by CP-SAT. Whatever fits a period fits
any longer one: stretch all starts in proportion, the order in the window and the laps stay. So the least period can be
bisected. Sources: modulo scheduling of loops (Rau, MICRO 1994); controllable memory by repeating building blocks (Qi et
al., arXiv 2405.15362), whose V-Half and V-Min are patterns with k = 1 that the model finds.
"""

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from solvers.pipeline import PipelineProblem, SolverError, Status
from solvers.searched_ops import Key, duration_us, time_unit_us

Ints = npt.NDArray[np.int64]

_POLL_S = 0.05

_STATUS = {
    cp_model.OPTIMAL: Status.OPTIMAL,
    cp_model.FEASIBLE: Status.FEASIBLE,
    cp_model.INFEASIBLE: Status.INFEASIBLE,
    cp_model.UNKNOWN: Status.NO_SOLUTION,
}


class OutOfBudgetError(Exception):
    """The time or the work of a search is used up; what was found until then stands."""


class Budget:
    """Time and work that several searches share. Work is counted in CP-SAT's deterministic units, about a second."""

    def __init__(self, time_limit_s: float, work_limit: float) -> None:
        self.deadline = time.monotonic() + time_limit_s
        self.work_left = work_limit
        self.out_of_time = False

    def check(self) -> None:
        """OutOfBudgetError if nothing is left."""
        if time.monotonic() >= self.deadline:
            self.out_of_time = True
        if self.out_of_time or self.work_left <= 0:
            raise OutOfBudgetError

    def spend(self, work: float) -> None:
        """Take work from what is left."""
        self.work_left -= work


@dataclass(frozen=True)
class Pattern:
    """A periodic steady state; times in ticks of tick_us."""

    num_microbatches: int  # k, per period
    period: int
    tick_us: Fraction
    starts: Mapping[Key, int]  # of (kind, stage, i), i < k; kinds as in `solvers.searched_ops`

    @property
    def period_us(self) -> Fraction:
        """Time per microbatch."""
        return self.period * self.tick_us / self.num_microbatches

    def repeated(self, num_microbatches: int) -> "Pattern":
        """The same steady state as a pattern of a multiple of its microbatches."""
        times = num_microbatches // self.num_microbatches
        keys = [
            (kind, s, i)
            for kind, s, first in self.starts
            for i in range(first, num_microbatches, self.num_microbatches)
        ]
        return Pattern(num_microbatches, self.period * times, self.tick_us, {key: self.start(key) for key in keys})

    def start(self, key: Key) -> int:
        """When the op of any microbatch starts, in ticks."""
        kind, stage, microbatch = key
        group, index = divmod(microbatch, self.num_microbatches)
        return self.starts[kind, stage, index] + group * self.period


@dataclass(frozen=True)
class Arc:
    """`after` starts at least `distance` after `before` of as many periods ago as `laps` says."""

    before: Key
    after: Key
    distance: int
    laps: int


class SteadyState:
    """What a pattern of k microbatches must obey, in ticks."""

    def __init__(self, problem: PipelineProblem, num_microbatches: int, refine: int = 1) -> None:
        self.problem = problem
        self.k = num_microbatches
        self.tick_us = Fraction(time_unit_us(problem), refine)
        self.ops_of_rank = [
            [(kind, s, i) for s in stages for kind in _kinds(problem, s) for i in range(self.k)]
            for stages in problem.stages_of_rank
        ]
        self.keys = [key for keys in self.ops_of_rank for key in keys]
        self.length = {key: self.ticks(duration_us(problem, key)) for key in self.keys}
        self.take, self.give = dict[Key, int](), dict[Key, int]()
        for key in self.keys:
            self.take[key], self.give[key] = taken_and_given(problem, key[0], key[1])
        self.arcs = list(self._arcs())

    def ticks(self, time_us: int) -> int:
        """A time of the problem in ticks."""
        return int(time_us / self.tick_us)

    def period_us(self, period: int) -> Fraction:
        """Time per microbatch of a period in ticks."""
        return period * self.tick_us / self.k

    @property
    def work(self) -> int:
        """The busiest rank's work in a period, ticks."""
        return max(sum(self.length[key] for key in keys) for keys in self.ops_of_rank)

    @property
    def latency(self) -> int:
        """Time of one microbatch through an empty pipeline, all its ops one after the other, ticks."""
        one = [self.length[key] for key in self.keys if key[2] == 0]
        return sum(one) + 2 * sum(self.ticks(us) for us in self.problem.transfer_us)

    def fits(self, pattern: Pattern) -> bool:
        """Whether no rank holds more than it has room for, and no arc, limits in flight among them, is too short."""
        room = self.problem.room_bytes
        starts, period = pattern.starts, pattern.period
        if any(starts[a.after] + a.laps * period < starts[a.before] + a.distance for a in self.arcs):
            return False
        return room is None or all(map(int.__le__, self.peak_bytes(pattern), room))

    def peak_bytes(self, pattern: Pattern) -> list[int]:
        """The most every rank holds beside what is fixed, shape (p,); see the module's docstring."""
        peaks = []
        for keys in self.ops_of_rank:
            begin = pattern.starts[keys[0]]
            ops = sorted((*divmod(pattern.starts[key] - begin, pattern.period)[::-1], key) for key in keys)
            held = sum((self.give[key] - self.take[key]) * laps for _, laps, key in ops)
            peak = 0
            for _, _, key in ops:
                peak = max(peak, held + self.take[key])
                held += self.take[key] - self.give[key]
            peaks.append(peak)
        return peaks

    def shortened(self, pattern: Pattern) -> Pattern:
        """The pattern of least period with the same order and laps on every rank, hence the same memory.

        Longest paths under the arcs and the ranks' orders; a period is too short iff some circle is positive.
        """
        arcs = list(self.arcs)
        for keys in self.ops_of_rank:
            begin = pattern.starts[keys[0]]
            laps = {key: (pattern.starts[key] - begin) // pattern.period for key in keys}
            ops = sorted(keys, key=lambda key: (pattern.starts[key] - begin) % pattern.period)
            for one, other in pairwise(ops):
                arcs.append(Arc(one, other, self.length[one], laps[one] - laps[other]))
            arcs.append(Arc(ops[-1], ops[0], self.length[ops[-1]], laps[ops[-1]] - laps[ops[0]] + 1))
        number = {key: index for index, key in enumerate(self.keys)}
        paths = _Paths(
            len(number),
            np.array([number[arc.before] for arc in arcs]),
            np.array([number[arc.after] for arc in arcs]),
            np.array([arc.distance for arc in arcs]),
            np.array([arc.laps for arc in arcs]),
        )
        low, high = self.work - 1, pattern.period
        starts = paths.longest(high)
        if starts is None:
            raise SolverError("a pattern does not fit its own period")
        while high - low > 1:
            middle = (low + high) // 2
            found = paths.longest(middle)
            if found is None:
                low = middle
            else:
                high, starts = middle, found
        return Pattern(self.k, high, self.tick_us, {key: int(starts[index]) for key, index in number.items()})

    def _arcs(self) -> Iterator[Arc]:
        problem, k, length = self.problem, self.k, self.length
        last = problem.num_stages - 1

        def arc(before: tuple[str, int], after: tuple[str, int], i: int, delay_us: int = 0) -> Arc:
            key = (*before, i)
            return Arc(key, (*after, i), length[key] + self.ticks(delay_us), 0)

        for s in range(problem.num_stages):
            kinds = _kinds(problem, s)
            limit = problem.in_flight_limit[s]
            for i in range(k):
                if s < last:
                    yield arc(("F", s), ("F", s + 1), i, problem.transfer_us[s])
                    yield arc(("B", s + 1), ("B", s), i, problem.transfer_us[s])
                for before, after in pairwise(kinds):
                    if s == last or (before, after) != ("F", "B"):
                        yield arc((before, s), (after, s), i)
                if limit < problem.num_microbatches:
                    laps, source = divmod(i - limit, k)
                    yield Arc(("B", s, source), ("F", s, i), length["B", s, source], -laps)
                for kind in kinds:
                    if k > 1:
                        yield Arc((kind, s, i), (kind, s, (i + 1) % k), length[kind, s, i], int(i + 1 == k))


class _Paths:
    """Arcs between numbered nodes, as arrays."""

    def __init__(self, num_nodes: int, before: Ints, after: Ints, distance: Ints, laps: Ints) -> None:
        by_after = np.argsort(after, kind="stable")
        self._before, self._distance, self._laps = before[by_after], distance[by_after], laps[by_after]
        self._reached, self._first = np.unique(after[by_after], return_index=True)
        self._num_nodes = num_nodes

    def longest(self, period: int) -> Ints | None:
        """Earliest starts, all from 0 on, if the period is long enough; else None."""
        length = self._distance - self._laps * period
        starts = np.zeros(self._num_nodes, dtype=np.int64)
        for _ in range(self._num_nodes + 1):
            arrival = np.maximum.reduceat(starts[self._before] + length, self._first)
            late = arrival > starts[self._reached]
            if not late.any():
                return starts
            np.maximum.at(starts, self._reached[late], arrival[late])
        return None


def _kinds(problem: PipelineProblem, stage: int) -> tuple[str, ...]:
    """The searched kinds of a stage, each before the next."""
    return ("F", *(("R",) if problem.has_recompute[stage] else ()), "B", *("W" if problem.has_weight_op[stage] else ""))


def taken_and_given(problem: PipelineProblem, kind: str, stage: int) -> tuple[int, int]:
    """Bytes a searched op takes when it starts and gives back when it ends."""
    kept = problem.kept_bytes[stage] if problem.has_weight_op[stage] else 0
    extra = problem.extra_bytes[stage]
    return {
        "F": (problem.taken_by_forward_bytes[stage], 0),
        "R": (problem.restored_bytes[stage], 0),
        "B": (extra, problem.activation_bytes[stage] + extra - kept),
        "W": (0, kept),
    }[kind]


class _Model:
    """The CP model of one period."""

    def __init__(self, state: SteadyState, period: int, hint: Pattern | None) -> None:
        self.state, self.period = state, period
        model = self.model = cp_model.CpModel()
        problem = state.problem
        most = 2 * state.latency + 4 * period + problem.num_stages * period // 2
        most_laps = most // period + 1
        self._starts = dict[Key, Any]()
        laps, offset = dict[Key, Any](), dict[Key, Any]()
        for rank, keys in enumerate(state.ops_of_rank):
            anchor = keys[0]
            begin = model.new_int_var(0, most, "")
            for key in keys:
                if key == anchor:
                    laps[key], offset[key] = 0, 0
                    self._starts[key] = begin
                    continue
                offset[key] = model.new_int_var(state.length[anchor], period - state.length[key], "")
                laps[key] = 0 if key[:2] == anchor[:2] else model.new_int_var(0, most_laps, "")
                self._starts[key] = begin + offset[key] + period * laps[key]
            self._add_rank(rank, laps, offset)
        for arc in state.arcs:
            model.add(self._starts[arc.after] + arc.laps * period >= self._starts[arc.before] + arc.distance)
        model.add(self._starts["F", 0, 0] == 0)
        if hint is not None:
            self._hint(hint, laps, offset)

    def _add_rank(self, rank: int, laps: dict[Key, Any], offset: dict[Key, Any]) -> None:
        """No overlap, and the memory when something that takes memory starts."""
        state, model = self.state, self.model
        keys = state.ops_of_rank[rank]
        before = dict[tuple[Key, Key], Any]()
        for one, other in combinations(keys, 2):
            if one == keys[0]:
                before[one, other], before[other, one] = 1, 0
                continue
            first = model.new_bool_var("")
            model.add(offset[other] >= offset[one] + state.length[one]).only_enforce_if(first)
            model.add(offset[one] >= offset[other] + state.length[other]).only_enforce_if(~first)
            before[one, other], before[other, one] = first, 1 - first
        model.add_no_overlap([model.new_fixed_size_interval_var(offset[key], state.length[key], "") for key in keys])
        room = state.problem.room_bytes
        if room is None:
            return
        for key in keys:
            if state.take[key]:
                held = state.take[key]
                for other in keys:
                    net = state.take[other] - state.give[other]
                    held += net * ((before[other, key] if other != key else 0) - laps[other])
                model.add(held <= room[rank])

    def _hint(self, hint: Pattern, laps: dict[Key, Any], offset: dict[Key, Any]) -> None:
        for keys in self.state.ops_of_rank:
            begin = hint.starts[keys[0]]
            for key in keys[1:]:
                lap, where = divmod(hint.starts[key] - begin, hint.period)
                self.model.add_hint(offset[key], min(where * self.period // hint.period, self.period - 1))
                if not isinstance(laps[key], int):
                    self.model.add_hint(laps[key], lap)


def find_pattern(
    state: SteadyState, period: int, budget: Budget, *, work_limit: float, seed: int = 0, hint: Pattern | None = None
) -> tuple[Pattern | None, bool]:
    """A pattern of this period and whether, if there is none, that is proven. OutOfBudgetError without budget."""
    budget.check()
    if period < state.work:
        return None, True
    model = _Model(state, period, hint)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed & 0x7FFFFFFF
    solver.parameters.max_deterministic_time = min(work_limit, budget.work_left)
    solver.parameters.max_time_in_seconds = max(0.05, budget.deadline - time.monotonic())
    result = solve_in_thread(solver, model.model)
    if result not in _STATUS:
        raise SolverError(f"CP-SAT calls the model {solver.status_name(result)}: {model.model.validate()}")
    budget.spend(max(solver.response_proto.deterministic_time, 1e-3))
    status = _STATUS[result]
    if not status.has_solution:
        return None, status is Status.INFEASIBLE
    starts = {key: solver.value(start) for key, start in model._starts.items()}
    return Pattern(state.k, period, state.tick_us, starts), False


def solve_in_thread(solver: Any, model: Any) -> Any:
    """CP-SAT's status. KeyboardInterrupt, after the search has stopped, on Ctrl-C."""
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put(solver.solve(model))
        except BaseException as error:  # handed to the caller's thread below
            outcome.put(error)

    solver.parameters.catch_sigint_signal = False
    thread = threading.Thread(target=work, name="cp-sat", daemon=True)
    thread.start()
    result = None
    try:
        while result is None:  # not Thread.join: Ctrl-C inside it makes a running thread look ended on Python 3.11
            try:
                result = outcome.get(timeout=_POLL_S)
            except queue.Empty:
                continue
    finally:
        solver.stop_search()
        if result is None:
            outcome.get()
        thread.join()
    if isinstance(result, BaseException):
        raise result
    return result


def least_period(state: SteadyState, lower: int | None = None) -> int:
    """A period no pattern is shorter than: the busiest rank, and every microbatch's memory over its lifetime."""
    problem = state.problem
    best = state.work if lower is None else max(lower, state.work)
    if problem.room_bytes is None:
        return best
    forward = [state.ticks(us) for us in problem.forward_us]
    back = [state.ticks(us) for us in problem.back_us]
    hops = [state.ticks(us) for us in problem.transfer_us]
    for rank, stages in enumerate(problem.stages_of_rank):
        area = 0
        for s in stages:
            until_back_end = sum(forward[s:]) + sum(back[s:]) + 2 * sum(hops[s:])
            area += problem.taken_by_forward_bytes[s] * until_back_end
            area += problem.restored_bytes[s] * (state.ticks(problem.rerun_us[s]) + back[s])
            area += problem.extra_bytes[s] * back[s]
            if problem.has_weight_op[s]:
                area += problem.kept_bytes[s] * state.ticks(problem.weight_us[s])
        if area:
            best = max(best, ceil(Fraction(state.k * area, max(1, problem.room_bytes[rank]))))
    return best
