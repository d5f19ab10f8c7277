"""Pipelines whose microbatches differ: sequences of different lengths cost different times and bytes.

The problem is that of `solvers.pipeline`, with times and bytes per stage and microbatch. Microbatches can then no
longer be renamed: the order in which they enter is part of the answer, and a stage need not keep it. Recomputation
is not part of this variant.

The answer comes from list schedules, which let all stages keep one entry order, over several such orders and rules, and
from local search over both; then, where the problem is small enough, from CP-SAT without any order of microbatches. Its
lower bound is the largest of the arguments in `lower_bound`.
"""

import heapq
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from solvers.backend import Event, OnProgress, infeasible
from solvers.bounds import Bound, Chains, upper_hull
from solvers.list_scheduling import Rule, changed_rule, rule_family
from solvers.pipeline import Op, Order, PipelineProblem, PipelineScore, PipelineSolution, Status

Table = tuple[tuple[int, ...], ...]  # shape (S, m)

_FAR = 1 << 60
_NUM_RULES = 6  # of the family, tried on every entry order
_NUM_SHUFFLES = 4
_MAX_RUNS = 600  # list schedules of small problems
_MAX_OPS = 400_000  # ops of all list schedules of large ones, some 3 seconds
_EXACT_OPS = 600  # above this, CP-SAT is not tried


@dataclass(frozen=True)
class VariedProblem:
    """A pipeline problem with times and bytes per microbatch; `base` gives all else, and its own are not read.

    ValueError if a table does not have S rows of m entries, if a microbatch alone would make no pipeline problem, or if
    the base recomputes.
    """

    base: PipelineProblem
    forward_us: Table
    backward_us: Table
    weight_us: Table
    activation_bytes: Table  # M_B
    weight_activation_bytes: Table  # M_W, not read where the stage is not split

    def __post_init__(self) -> None:
        if self.base.recompute_us is not None:
            raise ValueError("a problem with different microbatches cannot recompute, recompute_us must be absent")
        num_stages, m = self.base.num_stages, self.base.num_microbatches
        for name in ("forward_us", "backward_us", "weight_us", "activation_bytes", "weight_activation_bytes"):
            table = getattr(self, name)
            if len(table) != num_stages:
                raise ValueError(f"{name} has {len(table)} rows, {num_stages} stages need {num_stages}")
            for stage, row in enumerate(table):
                if len(row) != m:
                    raise ValueError(f"{name}[{stage}] has {len(row)} entries, {m} microbatches need {m}")
        _ = self.alone

    @classmethod
    def scaled(cls, base: PipelineProblem, percent: Sequence[int]) -> "VariedProblem":
        """Microbatch j costs `percent[j]` % of the times and bytes of the base, rounded, F and B at least 1 µs."""

        def table(values: Sequence[int], least: int) -> Table:
            return tuple(tuple(max(least, (value * share + 50) // 100) for share in percent) for value in values)

        return cls(
            base,
            table(base.forward_us, 1),
            table(base.backward_us, 1),
            table(base.weight_us, 0),
            table(base.activation_bytes, 0),
            table(base.weight_activation_bytes, 0),
        )

    @cached_property
    def alone(self) -> tuple[PipelineProblem, ...]:
        """Every microbatch as a pipeline problem of its own; shape (m,)."""
        problems = []
        for j in range(self.base.num_microbatches):
            try:
                problems.append(
                    replace(
                        self.base,
                        num_microbatches=1,
                        forward_us=tuple(row[j] for row in self.forward_us),
                        backward_us=tuple(row[j] for row in self.backward_us),
                        weight_us=tuple(row[j] for row in self.weight_us),
                        activation_bytes=tuple(row[j] for row in self.activation_bytes),
                        weight_activation_bytes=tuple(row[j] for row in self.weight_activation_bytes),
                    )
                )
            except ValueError as error:
                raise ValueError(f"microbatch {j}: {error}") from None
        return tuple(problems)

    @cached_property
    def back_us(self) -> Table:
        """Times of the back op, B or BW."""
        return tuple(zip(*(alone.back_us for alone in self.alone), strict=True))

    @cached_property
    def extra_bytes(self) -> Table:
        """What a B takes when it starts, max(0, M_W − M_B)."""
        return tuple(zip(*(alone.extra_bytes for alone in self.alone), strict=True))

    @cached_property
    def kept_bytes(self) -> Table:
        """What is held from the end of a B to the end of its W."""
        return tuple(zip(*(alone.kept_bytes for alone in self.alone), strict=True))

    @cached_property
    def work_us(self) -> tuple[int, ...]:
        """Time every rank is busy; shape (p,)."""
        return tuple(map(sum, zip(*(alone.work_us for alone in self.alone), strict=True)))

    def duration_us(self, op: Op) -> int:
        """How long an op runs."""
        kind, stage, microbatch = op
        table = {"F": self.forward_us, "W": self.weight_us}.get(kind)
        if table is None:
            table = self.backward_us if kind == "B" else self.back_us
        return table[stage][microbatch]

    def taken_bytes(self, op: Op) -> int:
        """What an op takes when it starts."""
        kind, stage, microbatch = op
        table = {"F": self.activation_bytes, "B": self.extra_bytes}.get(kind)
        return 0 if table is None else table[stage][microbatch]

    def freed_bytes(self, op: Op) -> int:
        """What an op gives back when it ends."""
        kind, stage, microbatch = op
        if kind == "F":
            return 0
        kept = self.kept_bytes[stage][microbatch]
        if kind == "W":
            return kept
        return self.activation_bytes[stage][microbatch] + self.extra_bytes[stage][microbatch] - kept

    def is_feasible(self) -> bool:
        """Whether any order fits: iff every microbatch fits alone, for they can run one after the other."""
        return all(alone.is_feasible() for alone in self.alone)

    def evaluate(self, order: Order) -> PipelineScore:
        """Time and memory of an order, exactly and without a solver; as `PipelineProblem.evaluate`, and its errors."""
        graph = self.base.timing_graph(order)
        durations_us = [self.duration_us(Op(*op)) for ops in order for op in ops]
        fixed_bytes = self.base.fixed_bytes or (0,) * self.base.num_ranks
        peak_bytes = tuple(fixed + self._peak_bytes(ops) for fixed, ops in zip(fixed_bytes, order, strict=True))
        return self.base.timed(order, replace(graph, duration_us=durations_us), peak_bytes, max(self.work_us))

    def _peak_bytes(self, ops: Sequence[Op]) -> int:
        held = peak = 0
        for op in ops:
            held += self.taken_bytes(op)
            peak = max(peak, held)
            held -= self.freed_bytes(op)
        return peak


# --- bounds -----------------------------------------------------------------------------------------------------------


def lower_bound(problem: VariedProblem) -> Bound:
    """The largest of four lower bounds on the cost of every order; the words are those of `solvers.bounds`.

    Work. As there; for the makespan, nothing runs on r before some microbatch has come up to it, the quickest at best.

    Chain. One microbatch alone: from the start of its F on stage 0 to the end of its ops on the rank of that
    stage (the makespan: on all stages). The horizon, of that rank, contains all of them.

    Memory-energy. A microbatch holds M_B from the start of its F to the end of its back op, at least as long as it
    takes alone, and M_W while its W runs; the capacity × the horizon must cover the sum.

    Head-tail, for ranks with one chunk. Head: just before the first back op some microbatch has gone up and come down,
    in no less than the least time any of them needs alone. In that time r has only run F, of microbatches that
    are all held now: their work is at most a knapsack of F in M_B, or in the limit in flight. Tail: from the end of
    the last F some microbatch still has to go up, come down and end, in no less than the least time any needs. The work
    r has left is at most a knapsack of back op and W for M_B, or W for M_W, or nothing, per microbatch; in the limit
    in flight likewise, W weighing nothing. Both: if the first back op starts before the last F ends, the idle times of
    head and tail add up; else all microbatches are held at once, and if they can be, only the larger counts.
    """
    base = problem.base
    chains = [Chains(alone) for alone in problem.alone]
    span = base.objective == "span"
    bounds = [
        Bound(0, "work"),
        Bound(max(_whole_us(problem, chain, j) for j, chain in enumerate(chains)), "chain"),
    ]
    for rank, stages in enumerate(base.stages_of_rank):
        wait_us = 0 if span else min(chain.reach_us[stages[0]] for chain in chains)
        bounds.append(Bound(wait_us + problem.work_us[rank], "work"))
        if base.room_bytes is not None and base.room_bytes[rank] > 0:
            area = sum(
                problem.activation_bytes[s][j] * (chain.window_us(s, s) + problem.back_us[s][j])
                + min(problem.activation_bytes[s][j], problem.kept_bytes[s][j]) * problem.weight_us[s][j]
                for s in stages
                for j, chain in enumerate(chains)
            )
            bounds.append(Bound(wait_us - (-area // base.room_bytes[rank]), "memory-energy"))
        if len(stages) == 1:
            bounds.append(Bound(problem.work_us[rank] + _idle_us(problem, chains, rank), "head-tail"))
    return max(bounds, key=lambda bound: bound.value_us)


def _whole_us(problem: VariedProblem, chain: Chains, microbatch: int) -> int:
    base = problem.base
    targets = base.stages_of_rank[base.rank_of_stage[0]] if base.objective == "span" else range(base.num_stages)
    return problem.forward_us[0][microbatch] + chain.finish_us(0, targets)


def _idle_us(problem: VariedProblem, chains: Sequence[Chains], rank: int) -> int:
    """Idle time of head and tail on a rank with one chunk."""
    base = problem.base
    (s,) = base.stages_of_rank[rank]
    m, limit = base.num_microbatches, base.in_flight_limit[s]
    room = None if base.room_bytes is None else base.room_bytes[rank]
    size, kept, forward = problem.activation_bytes[s], problem.kept_bytes[s], problem.forward_us[s]
    weight = problem.weight_us[s] if base.split[s] else (0,) * m
    after = tuple(map(int.__add__, problem.back_us[s], weight))
    span = base.objective == "span"
    window_us = min(chain.window_us(s, s) + (0 if span else chain.reach_us[s]) for chain in chains)
    before_us = min(
        _most_value([[(0, 0), (size[j], forward[j])] for j in range(m)], room),
        _most_value([[(0, 0), (1, forward[j])] for j in range(m)], limit),
    )
    finish_us = min(chain.finish_us(s, [s] if span else range(base.num_stages)) for chain in chains)
    left_us = min(
        _most_value([[(0, 0), (kept[j], weight[j]), (size[j], after[j])] for j in range(m)], room),
        _most_value([[(0, weight[j]), (1, after[j])] for j in range(m)], limit),
    )
    head_us, tail_us = max(0, window_us - before_us), max(0, finish_us - left_us)
    can_overlap = limit == m and (room is None or sum(size) <= room)
    return max(head_us, tail_us) if can_overlap else head_us + tail_us


def _most_value(choices: Sequence[Sequence[tuple[int, int]]], capacity: int | None) -> int:
    """Upper bound on the total value of one (size, value) of each choice whose sizes sum to at most the capacity.

    The linear relaxation, rounded down: every choice climbs its upper concave hull, steepest edges of all first.
    """
    if capacity is None:
        return sum(max(value for _, value in choice) for choice in choices)
    total = 0
    edges = []
    for choice in choices:
        hull = upper_hull(choice)
        total += hull[0][1]
        for (size_low, value_low), (size_high, value_high) in pairwise(hull):
            size, value = size_high - size_low, value_high - value_low
            edges.append((Fraction(value, size), size, value))
    left = max(0, capacity)
    for _, size, value in sorted(edges, reverse=True):
        if size > left:
            return total + value * left // size
        total += value
        left -= size
    return total


# --- list schedules ---------------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """A rule and the order in which microbatches enter."""

    entry: tuple[int, ...]
    rule: Rule


class _ListSchedule:
    """One run of a rule of `solvers.list_scheduling` over microbatches that differ, all stages in one entry order.

    Memory never deadlocks, as there, with the order of entry for age: an F starts only if afterwards all in flight
    could be finished one after the other, those that entered first first. Positions in that order are called k.
    """

    def __init__(self, problem: VariedProblem, choice: _Choice) -> None:
        base = problem.base
        num_stages, m = base.num_stages, base.num_microbatches
        self._problem, self._base, self._entry, self._rule = problem, base, choice.entry, choice.rule
        self._limit = [min(a, b) for a, b in zip(choice.rule.in_flight, base.in_flight_limit, strict=True)]
        self._room = (_FAR,) * base.num_ranks if base.room_bytes is None else base.room_bytes
        self._started = {kind: [0] * num_stages for kind in "FBW"}
        self._arrives_f = [[0 if s == 0 else _FAR] * m for s in range(num_stages)]
        self._arrives_b = [[_FAR] * m for _ in range(num_stages)]
        self._held = [0] * base.num_ranks
        self._pending = [0] * base.num_ranks  # of that, what only waits for a W
        self._running: list[Op | None] = [None] * base.num_ranks
        self._busy_until = [0] * base.num_ranks
        self._wakes = [(0, rank) for rank in range(base.num_ranks)]
        self._ranks: list[list[Op]] = [[] for _ in range(base.num_ranks)]

    def order(self) -> Order:
        """The order of the run; every microbatch must fit alone."""
        for _ in range(self._base.num_ops):
            op = None
            while op is None:
                now, rank = heapq.heappop(self._wakes)  # never empty: some op can always start
                if self._busy_until[rank] <= now:
                    self._end(rank)
                    op = self._next(rank, now)
            self._start(rank, now, op)
        return tuple(map(tuple, self._ranks))

    def _end(self, rank: int) -> None:
        op, self._running[rank] = self._running[rank], None
        if op is not None:
            self._held[rank] -= self._problem.freed_bytes(op)
            kept = self._problem.kept_bytes[op.stage][op.microbatch]
            if op.kind == "B":
                self._pending[rank] += kept
            elif op.kind == "W":
                self._pending[rank] -= kept

    def _start(self, rank: int, now: int, op: Op) -> None:
        kind, s, _ = op
        count = self._started["B" if kind == "BW" else kind]
        k, count[s] = count[s], count[s] + 1
        end = now + self._problem.duration_us(op)
        self._held[rank] += self._problem.taken_bytes(op)
        transfer_us, host = self._base.transfer_us, self._base.rank_of_stage
        if kind == "F" and s == self._base.num_stages - 1:
            self._arrives_b[s][k] = end
        elif kind == "F":
            self._arrives_f[s + 1][k] = end + transfer_us[s]
            heapq.heappush(self._wakes, (end + transfer_us[s], host[s + 1]))
        elif kind != "W" and s:
            self._arrives_b[s - 1][k] = end + transfer_us[s - 1]
            heapq.heappush(self._wakes, (end + transfer_us[s - 1], host[s - 1]))
        self._ranks[rank].append(op)
        self._running[rank], self._busy_until[rank] = op, end
        heapq.heappush(self._wakes, (end, rank))

    def _next(self, rank: int, now: int) -> Op | None:
        """What a free rank starts now, by the rule; None if it waits."""
        rule, m = self._rule, self._base.num_microbatches
        started_f, started_b, started_w = (self._started[kind] for kind in "FBW")
        stages = self._base.stages_of_rank[rank]
        room = self._room[rank] - self._held[rank]
        back, next_back, back_needs_room = None, _FAR, False
        for s in reversed(stages):
            k = started_b[s]
            if k < m and self._arrives_b[s][k] > now:
                next_back = min(next_back, self._arrives_b[s][k])
            elif k < m and back is None:
                op = Op("B" if self._base.split[s] else "BW", s, self._entry[k])
                if self._problem.taken_bytes(op) <= room:
                    back = op
                else:
                    back_needs_room = True
        forward, warming_up, next_forward = None, False, _FAR
        for s in reversed(stages) if rule.deep_first else stages:
            k = started_f[s]
            if k < m and k - started_b[s] < self._limit[s]:
                op = Op("F", s, self._entry[k])
                if self._problem.taken_bytes(op) > room:
                    continue
                if self._arrives_f[s][k] > now:
                    next_forward = min(next_forward, self._arrives_f[s][k])
                elif forward is None and self._can_finish(rank, op):
                    forward, warming_up = op, k - started_b[s] < rule.warm_up[s]
        pending = [(started_b[s] - started_w[s], s) for s in stages if self._base.split[s]]
        num_pending, s = max(pending, default=(0, -1))
        weight = Op("W", s, self._entry[started_w[s]]) if num_pending else None

        def fits_before(op: Op, slack: float, when: int) -> bool:
            return now + self._problem.duration_us(op) * (1 - slack) <= when

        if back_needs_room and back is None and weight is not None:
            return weight
        if back is not None and not warming_up:
            return back
        lags_too_far = num_pending > rule.weight_lag[s]
        if weight is not None and lags_too_far and fits_before(weight, rule.weight_slack, next_back):
            return weight
        if forward is not None and fits_before(forward, rule.forward_slack, next_back):
            return forward
        if weight is not None and fits_before(weight, rule.weight_slack, min(next_back, next_forward)):
            return weight
        return None

    def _can_finish(self, rank: int, forward: Op) -> bool:
        """Banker's rule on one rank: with this F, can all in flight be finished, in order of entry?"""
        problem, started_f, started_b = self._problem, self._started["F"], self._started["B"]
        stages = self._base.stages_of_rank[rank]
        left = self._room[rank] - self._held[rank] + self._pending[rank] - problem.taken_bytes(forward)
        last = max(started_f[stages[0]], started_f[forward.stage] + 1)
        for k in range(started_b[stages[0]], last):
            j = self._entry[k]
            held = climb = peak = 0
            for s in stages:
                if started_b[s] <= k:  # its back op is still to come, with all chunks up to s held
                    climb += problem.activation_bytes[s][j]
                    peak = max(peak, climb + problem.extra_bytes[s][j])
                    if k < started_f[s] + (s == forward.stage):
                        held += problem.activation_bytes[s][j]
            left += held
            if peak > left:
                return False
        return True


def _typical(problem: VariedProblem) -> PipelineProblem:
    """The base with the mean times and bytes of all microbatches, for rules that ask for no more."""
    m = problem.base.num_microbatches

    def mean(table: Table, least: int) -> tuple[int, ...]:
        return tuple(max(least, sum(row) // m) for row in table)

    return replace(
        problem.base,
        forward_us=mean(problem.forward_us, 1),
        backward_us=mean(problem.backward_us, 1),
        weight_us=mean(problem.weight_us, 0),
        activation_bytes=mean(problem.activation_bytes, 0),
        weight_activation_bytes=mean(problem.weight_activation_bytes, 0),
    )


def entry_orders(problem: VariedProblem, rng: random.Random) -> list[tuple[int, ...]]:
    """Orders in which microbatches may enter: longest first, shortest first, as given, alternating, and shuffled."""
    given = range(problem.base.num_microbatches)
    ascending = sorted(given, key=lambda j: sum(problem.alone[j].work_us))
    longest = ascending[::-1]
    alternating = [j for pair in zip(ascending, longest, strict=True) for j in pair][: len(given)]
    shuffles = [rng.sample(given, len(given)) for _ in range(_NUM_SHUFFLES)]
    return list(dict.fromkeys(map(tuple, [longest, ascending, [*given], alternating, *shuffles])))


class _Search:
    """The incumbent of a solve, and what was spent on it."""

    def __init__(
        self, problem: VariedProblem, bound: Bound, began: float, time_limit_s: float, on_progress: OnProgress | None
    ) -> None:
        self.problem, self.bound = problem, bound
        self.began, self.deadline, self.on_progress = began, began + time_limit_s, on_progress
        self.best: tuple[PipelineScore, Order] | None = None
        self.num_tried = 0
        self.max_runs = max(1, min(_MAX_RUNS, _MAX_OPS // problem.base.num_ops))
        self.out_of_time = False

    def attempt(self, choice: _Choice) -> int:
        """Cost of a list schedule; keeps it if it is the best so far."""
        order = _ListSchedule(self.problem, choice).order()
        score = self.problem.evaluate(order)
        self.num_tried += 1
        if self.best is None or score.objective_us < self.best[0].objective_us:
            self.best = score, order
            if self.on_progress is not None:
                seconds = time.monotonic() - self.began
                self.on_progress(Event("list-scheduling", seconds, score.objective_us, self.bound.value_us))
        return score.objective_us

    def climb(self, seed: int) -> None:
        """Some entry orders with some rules, then the best of them, two microbatches swapped or the rule changed."""
        rng = random.Random(seed)
        m = self.problem.base.num_microbatches
        found: list[tuple[int, int, _Choice]] = []
        for rule in rule_family(_typical(self.problem))[:_NUM_RULES]:
            for entry in entry_orders(self.problem, random.Random(seed)):
                if self.is_over():
                    return
                choice = _Choice(entry, rule)
                found.append((self.attempt(choice), len(found), choice))
        cost, _, choice = min(found)
        for _ in range(50 * self.max_runs):
            if self.is_over():
                return
            if m > 1 and rng.random() < 0.7:
                a, b = rng.sample(range(m), 2)
                swapped = list(choice.entry)
                swapped[a], swapped[b] = swapped[b], swapped[a]
                new = choice._replace(entry=tuple(swapped))
            else:
                new = choice._replace(rule=changed_rule(choice.rule, rng, m, recomputes=False))
            new_cost = self.attempt(new)
            if new_cost <= cost:
                cost, choice = new_cost, new

    def is_over(self) -> bool:
        """Whether the bound is met, or the work or the time is used up."""
        if self.best is None:
            return False
        if time.monotonic() >= self.deadline:
            self.out_of_time = True
        return self.best[0].objective_us <= self.bound.value_us or self.num_tried >= self.max_runs or self.out_of_time


# --- solving ----------------------------------------------------------------------------------------------------------


def solve_varied(
    problem: VariedProblem,
    *,
    time_limit_s: float = 30.0,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    workers: int = 2,
) -> PipelineSolution:
    """List schedules, then CP-SAT from the best of them unless that is proven or too large.

    Ctrl-C returns the best so far, marked `interrupted`. The same seed gives the same answer unless the answer says
    `limited_by_time`. ValueError without time.
    """
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s is {time_limit_s}, it must be positive")
    began = time.monotonic()
    if not problem.is_feasible():
        return replace(infeasible("varied", seed, time.monotonic() - began), note="a microbatch alone does not fit")
    bound = lower_bound(problem)
    search = _Search(problem, bound, began, time_limit_s, on_progress)
    interrupted = False
    try:
        search.climb(seed)
    except KeyboardInterrupt:
        interrupted = True
        if search.best is None:
            search.attempt(_Choice(tuple(range(problem.base.num_microbatches)), rule_family(_typical(problem))[0]))
    assert search.best is not None
    score, order = search.best
    solver, limited_by_time = "list-scheduling", search.out_of_time
    note = f"{search.num_tried} list schedules"
    left_s = time_limit_s - (time.monotonic() - began)
    if problem.base.num_ops > _EXACT_OPS:
        note += f"; CP-SAT not tried: {problem.base.num_ops} ops, more than {_EXACT_OPS}"
    elif score.objective_us > bound.value_us and not interrupted and left_s > 0:
        from solvers.varied_cp_sat import improve  # loads OR-Tools

        found = improve(problem, order, bound, left_s, seed, workers, on_progress, began)
        interrupted, limited_by_time = found.interrupted, found.limited_by_time
        bound = found.bound
        if found.score.objective_us < score.objective_us:
            score, order, solver = found.score, found.order, "cp-sat"
    proven = score.objective_us <= bound.value_us
    return PipelineSolution(
        status=Status.OPTIMAL if proven else Status.FEASIBLE,
        order=order,
        score=score,
        lower_bound_us=bound.value_us,
        lower_bound_kind=bound.kind,
        solver=solver,
        seconds=time.monotonic() - began,
        seed=seed,
        interrupted=interrupted,
        limited_by_time=limited_by_time and not proven,
        note=note,
    )
