"""List scheduling: run the pipeline in thought, every free rank choosing its next op by a rule; keep the best rule.

About a microsecond per op, so hundreds of rules can be tried: first a small family that covered our even and uneven
test instances (each rule was the best on some of them), then hill climbing from its best members, changing the rules
stage by stage. Finds an order whenever there is one, proves nothing by itself: the bound is that of `solvers.bounds`.

A rule sees the time now, what has arrived, and what is known to arrive because its producer is already running. An
F or W that would keep a known backward waiting is held back, more or less, as the rule's slack says.

R runs right in front of its back op, as one op with it, or earlier: a rank that would otherwise idle runs the R of
backwards to come, in their order, as far as the rule looks ahead.

Memory never deadlocks. An F, or an R ahead of its back op, starts only if afterwards the microbatches in flight
could still be finished one after the other, oldest first, on every rank by itself (the banker's rule; a W can always
run, so bytes that wait for a W do not count). The oldest microbatch's next op, an F or a back op with its R if that
has not run, keeps that promise by construction: it takes what the promise has set aside for it. And every rule
allows it, since neither rule nor problem limits a stage to less than one microbatch in flight, and all before the
oldest are finished: so some op can always start. No R ahead is ever needed for that.
"""

import heapq
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil

from solvers.backend import Event, OnProgress, infeasible
from solvers.bounds import Bound, Chains, best_bound
from solvers.pipeline import Op, Order, PipelineProblem, PipelineSolution, Status
from solvers.timing import NO_NODE, TimingGraph

_FAR = 1 << 60
_FORWARD, _BACK, _WEIGHT, _RECOMPUTE, _WHOLE = 0, 1, 2, 3, 4
_NUM_CLIMBERS = 4
_MAX_RULES = 1000  # rules tried on small problems
_MAX_OPS = 2_500_000  # ops simulated in all on large ones, some 5 to 8 seconds
_SLACKS = (0.0, 0.25, 0.5, 0.75, 1.0)

_Choice = tuple[int, int, int]  # kind, stage, microbatch


@dataclass(frozen=True)
class Rule:
    """How a free rank chooses. A ready backward first, except during warm-up; then F, then W, as far as allowed.

    Tuples have one entry per stage.
    """

    in_flight: tuple[int, ...]  # no F while this many microbatches of the stage wait for their backward; at least 1
    warm_up: tuple[int, ...]  # F goes before a ready backward while fewer than this many do
    weight_lag: tuple[int, ...]  # W goes before F once more than this many of the stage are pending
    forward_slack: float  # an F may overrun the arrival of a backward by this fraction of itself
    weight_slack: float  # a W that of a backward or of an F that could start
    deep_first: bool = True  # of several F, that of the rank's last chunk first; else of its first
    look_ahead: int = 0  # R of a stage that may have run before their back op starts; only where the rank would idle


@dataclass(frozen=True)
class WholeBackwards:
    """When a rank runs BW instead of B, and W later, on a stage that is split.

    A pending W is what a rank can fill idle time with. BW leaves none and keeps the gradient back for longer, so it
    runs only while its own rank and the one that waits for the gradient have enough of them. `solvers.mixed_backwards`
    looks for the best numbers.
    """

    whole_us: tuple[int, ...]  # of BW, per stage; 0: always B and W
    num_pending: int  # W that both ranks must have pending
    num_split: int  # the last microbatches of every stage, which are split in any case


# (in flight, warm-up, weight lag, slacks): see `rule_family`. Ordered so that every prefix covers as much as it can.
_FAMILY = (
    ("window", 1.0, 0, "all", "any", 1.0, 0.5),
    ("even", 1.0, 0, "none", "any", 1.0, 0.0),
    ("window", 1.0, 0, "half", "any", 1.0, 1.0),
    ("window", 0.6, 0, "all", "any", 1.0, 0.5),
    ("window", 1.0, 0, "half", "any", 0.5, 0.5),
    ("window", 0.4, 0, "all", "any", 1.0, 0.0),
    ("even", 1.0, 0, "all", "any", 0.0, 1.0),
    ("even", 1.0, 0, "all", "any", 1.0, 0.5),
    ("window", 0.75, 0, "none", "any", 1.0, 0.5),
    ("memory", 0.0, 0, "half", "any", 1.0, 0.0),
    ("window", 0.4, 1, "none", "any", 0.5, 0.0),
    ("window", 0.6, 0, "all", "depth", 1.0, 1.0),
    ("window", 0.5, 0, "none", "any", 1.0, 0.0),
    ("window", 0.75, 0, "all", "any", 1.0, 0.5),
    ("window", 0.4, 0, "none", "any", 1.0, 0.5),
    ("memory", 0.0, 0, "none", "depth", 1.0, 1.0),
    ("window", 0.6, 1, "none", "any", 1.0, 0.0),
    ("window", 1.0, 1, "all", "any", 0.5, 1.0),
    ("window", 0.75, 0, "all", "any", 1.0, 1.0),
    ("ladder", 1.0, 0, "none", "depth", 1.0, 0.5),
    ("window", 1.0, 0, "all", "any", 1.0, 1.0),
    ("window", 1.2, 0, "none", "any", 1.0, 0.5),
    ("even", 1.0, 0, "none", "depth", 1.0, 0.5),
    ("ladder", 1.0, 0, "half", "any", 1.0, 0.5),
    ("even", 1.0, 0, "all", "none", 0.5, 0.0),
    ("memory", 0.0, 0, "none", "any", 1.0, 0.5),
)


def rule_family(problem: PipelineProblem) -> list[Rule]:
    """The rules tried first, best covering ones first, without repetitions.

    In flight: "window" is a share of the forwards that would fill the way up and down; "ladder" one more on each
    stage than on the next; "even" a ladder whose slope just fills the tightest rank's memory; "memory" all that fits.
    Where a stage recomputes, every rule lets R run ahead, and then the first ones without that, or one R at most.
    """
    num_stages, m = problem.num_stages, problem.num_microbatches
    chains = Chains(problem)
    window = [
        chains.window_us(s, s) / problem.forward_us[s] for s in range(num_stages)
    ]  # counted in forwards of the stage
    most = list(problem.in_flight_limit)
    slope = float(m)
    if problem.room_bytes is not None:
        taken = problem.taken_by_forward_bytes
        for rank, stages in enumerate(problem.stages_of_rank):
            capacity = problem.room_bytes[rank]
            for s, held in zip(stages, accumulate(taken[s] for s in stages), strict=True):
                if held:
                    most[s] = max(1, min(most[s], capacity // held))
            ladder_bytes = sum((num_stages - s) * taken[s] for s in stages)
            if ladder_bytes:
                slope = min(slope, capacity / ladder_bytes)
    rules = []
    for name, share, more, warm_name, lag_name, forward_slack, weight_slack in _FAMILY:
        wanted = {
            "window": [ceil(share * w) + more for w in window],
            "ladder": [num_stages - s for s in range(num_stages)],
            "even": [round(slope * (num_stages - s)) for s in range(num_stages)],
            "memory": most,
        }[name]
        in_flight = tuple(max(1, min(a, b)) for a, b in zip(wanted, most, strict=True))
        warm_up = {"all": in_flight, "half": tuple((n + 1) // 2 for n in in_flight), "none": (0,) * num_stages}
        lag = {"any": (m,) * num_stages, "depth": tuple(2 * s for s in range(num_stages)), "none": (0,) * num_stages}
        rules.append(Rule(in_flight, warm_up[warm_name], lag[lag_name], forward_slack, weight_slack))
    if problem.num_ranks < num_stages:
        rules += [replace(rule, deep_first=False) for rule in rules[:4]]
    if any(problem.has_recompute):
        rules = [
            replace(rule, look_ahead=ahead)
            for ahead, some in ((m, rules), (0, rules[:8]), (1, rules[:4]))
            for rule in some
        ]
    return list(dict.fromkeys(rules))


class Simulator:
    """One problem, prepared for many rules."""

    def __init__(self, problem: PipelineProblem) -> None:
        self.problem = problem
        ranks = range(problem.num_ranks)
        self._room = [_FAR for _ in ranks] if problem.room_bytes is None else list(problem.room_bytes)
        self._whole_bytes = problem.least_room_bytes
        self._recomputes = any(problem.has_recompute)
        self._ops_per_microbatch = 2 * problem.num_stages + sum(problem.has_weight_op)
        # what a back op gives back at its end; a W of 0 µs is part of it
        self._freed = [
            whole + extra - (kept if has else 0)
            for whole, extra, kept, has in zip(
                problem.activation_bytes, problem.extra_bytes, problem.kept_bytes, problem.has_weight_op, strict=True
            )
        ]
        # what a back op takes when it starts, and how long it runs, with its R in front
        self._extra_with_r = tuple(map(int.__add__, problem.extra_bytes, problem.restored_bytes))
        self._back_with_r_us = tuple(map(int.__add__, problem.back_us, problem.rerun_us))

    @property
    def num_ops(self) -> int:
        """Choices of one run, an R with its back op being one."""
        return self._ops_per_microbatch * self.problem.num_microbatches

    def run(self, rule: Rule, whole_backwards: WholeBackwards | None = None) -> list[list[_Choice]]:
        """What every rank runs under the rule, in order. The problem must be feasible.

        `whole_backwards` is not for problems that recompute.
        """
        problem = self.problem
        num_stages, m = problem.num_stages, problem.num_microbatches
        forward_us, weight_us = problem.forward_us, problem.weight_us
        transfer_us, host, has_weight = problem.transfer_us, problem.rank_of_stage, problem.has_weight_op
        take, whole = problem.taken_by_forward_bytes, problem.activation_bytes
        kept, freed = problem.kept_bytes, self._freed
        room, chunks = self._room, problem.stages_of_rank
        limit, warm_up, lag = rule.in_flight, rule.warm_up, rule.weight_lag
        if problem.max_in_flight is not None:
            limit = tuple(map(min, limit, problem.max_in_flight))
        forward_slack, weight_slack = rule.forward_slack, rule.weight_slack
        down_first = [tuple(reversed(stages)) for stages in chunks]
        forward_first = down_first if rule.deep_first else chunks
        recomputes = self._recomputes
        # bytes and time of every stage's next back op, its R included unless that ran ahead
        extra, back_us = list(self._extra_with_r), list(self._back_with_r_us)
        last_stage = num_stages - 1

        started_f, started_b = [0] * num_stages, [0] * num_stages
        pending = [deque[int]() for _ in range(num_stages)]  # microbatches whose B has started and whose W has not
        num_pending = [0] * problem.num_ranks
        whole_us, enough, num_whole = (0,) * num_stages, 0, 0
        if whole_backwards is not None:
            whole_us, enough = whole_backwards.whole_us, whole_backwards.num_pending
            num_whole = m - whole_backwards.num_split
        started_r = [0] * num_stages  # those in front of their back op included; unused where nothing recomputes
        arrives_f = [[_FAR] * m for _ in range(num_stages)]
        arrives_b = [[_FAR] * m for _ in range(num_stages)]
        arrives_f[0] = [0] * m
        held = [0] * problem.num_ranks
        promised = [0] * problem.num_ranks  # held, without what only waits for a W
        running: list[_Choice | None] = [None] * problem.num_ranks
        busy_until = [0] * problem.num_ranks
        chosen: list[list[_Choice]] = [[] for _ in range(problem.num_ranks)]
        wakes = [(0, rank) for rank in range(problem.num_ranks)]
        left = self.num_ops
        push, pop = heapq.heappush, heapq.heappop
        while left:
            now, rank = pop(wakes)  # never empty: see the module's docstring
            if busy_until[rank] > now:
                continue
            ended = running[rank]
            if ended is not None:
                running[rank] = None
                kind, s, _ = ended
                if kind == _BACK:
                    held[rank] -= freed[s]
                    promised[rank] -= whole[s]
                elif kind == _WEIGHT:
                    held[rank] -= kept[s]
                elif kind == _WHOLE:
                    held[rank] -= whole[s]
                    promised[rank] -= whole[s]

            back_stage, next_back, back_needs_room = -1, _FAR, False
            for s in down_first[rank]:
                j = started_b[s]
                if j < m:
                    arrival = arrives_b[s][j]
                    if arrival > now:
                        next_back = min(next_back, arrival)
                    elif held[rank] + extra[s] > room[rank]:
                        back_needs_room = True
                    elif back_stage < 0:
                        back_stage = s
            forward_stage, next_forward = -1, _FAR
            for s in forward_first[rank]:
                j = started_f[s]
                if j < m and j - started_b[s] < limit[s]:
                    arrival = arrives_f[s][j]
                    if arrival > now:
                        if held[rank] + take[s] <= room[rank]:
                            next_forward = min(next_forward, arrival)
                    elif forward_stage < 0 and held[rank] + take[s] <= room[rank]:
                        after = promised[rank] + take[s]
                        if len(chunks[rank]) == 1:
                            if after + extra[s] <= room[rank]:
                                forward_stage = s
                        elif after + self._whole_bytes[rank] <= room[rank] or self._can_finish(
                            rank, s, started_f, started_r, started_b, room[rank] - after
                        ):
                            forward_stage = s
            weight_stage, most_pending = -1, 0
            for s in chunks[rank]:
                if len(pending[s]) > most_pending:
                    weight_stage, most_pending = s, len(pending[s])

            if back_needs_room and back_stage < 0 and weight_stage >= 0:
                kind, s = _WEIGHT, weight_stage
            elif back_stage >= 0 and not (
                forward_stage >= 0 and started_f[forward_stage] - started_b[forward_stage] < warm_up[forward_stage]
            ):
                kind, s = _BACK, back_stage
            elif (
                weight_stage >= 0
                and most_pending > lag[weight_stage]
                and now + weight_us[weight_stage] * (1 - weight_slack) <= next_back
            ):
                kind, s = _WEIGHT, weight_stage
            elif forward_stage >= 0 and now + forward_us[forward_stage] * (1 - forward_slack) <= next_back:
                kind, s = _FORWARD, forward_stage
            elif weight_stage >= 0 and now + weight_us[weight_stage] * (1 - weight_slack) <= min(
                next_back, next_forward
            ):
                kind, s = _WEIGHT, weight_stage
            else:
                s = -1
                if recomputes:
                    room_now, room_soon = room[rank] - held[rank], room[rank] - promised[rank]
                    s = self._ahead(rule, rank, next_back - now, room_now, room_soon, started_f, started_r, started_b)
                if s < 0:
                    continue  # what it waits for wakes it
                kind = _RECOMPUTE
            left -= 1
            if kind == _FORWARD:
                j = started_f[s]
                started_f[s] = j + 1
                end = now + forward_us[s]
                held[rank] += take[s]
                promised[rank] += take[s]
                if s == last_stage:
                    arrives_b[s][j] = end
                else:
                    arrives_f[s + 1][j] = end + transfer_us[s]
                    push(wakes, (end + transfer_us[s], host[s + 1]))
            elif kind == _BACK:
                j = started_b[s]
                started_b[s] = j + 1
                if (
                    j < num_whole
                    and whole_us[s]
                    and num_pending[rank] >= enough
                    and (s == 0 or num_pending[host[s - 1]] >= enough)
                ):
                    kind = _WHOLE
                    end = now + whole_us[s]
                    left -= 1
                else:
                    end = now + back_us[s]
                    held[rank] += extra[s]
                    if has_weight[s]:
                        num_pending[rank] += 1
                        pending[s].append(j)
                if s:
                    arrives_b[s - 1][j] = end + transfer_us[s - 1]
                    push(wakes, (end + transfer_us[s - 1], host[s - 1]))
                if recomputes:
                    if started_r[s] == j:
                        started_r[s] = j + 1
                        promised[rank] += problem.restored_bytes[s]
                        if problem.has_recompute[s]:
                            chosen[rank].append((_RECOMPUTE, s, j))
                    if started_r[s] == j + 1:
                        extra[s], back_us[s] = self._extra_with_r[s], self._back_with_r_us[s]
            elif kind == _WEIGHT:
                j = pending[s].popleft()
                num_pending[rank] -= 1
                end = now + weight_us[s]
            else:
                left += 1  # part of the choice of its back op
                j = started_r[s]
                started_r[s] = j + 1
                end = now + problem.rerun_us[s]
                held[rank] += problem.restored_bytes[s]
                promised[rank] += problem.restored_bytes[s]
                if j == started_b[s]:
                    extra[s], back_us[s] = problem.extra_bytes[s], problem.back_us[s]
            chosen[rank].append((kind, s, j))
            running[rank] = (kind, s, j)
            busy_until[rank] = end
            push(wakes, (end, rank))
        return chosen

    def _ahead(
        self,
        rule: Rule,
        rank: int,
        until_back_us: int,
        room_now: int,
        room_soon: int,
        started_f: Sequence[int],
        started_r: Sequence[int],
        started_b: Sequence[int],
    ) -> int:
        """The stage of which an idle rank runs the next R ahead of its back op; -1 if it had better wait.

        `room_soon` is the room once every pending W has run.
        """
        problem = self.problem
        for s in reversed(problem.stages_of_rank[rank]):
            j = started_r[s]
            rest = problem.restored_bytes[s]
            if not problem.has_recompute[s] or j >= started_f[s] or j - started_b[s] >= rule.look_ahead:
                continue
            if j > started_b[s] and problem.rerun_us[s] * (1 - rule.weight_slack) > until_back_us:
                continue  # the back op that is known to come is another one
            if rest <= room_now:
                with_this = [*started_r[:s], j + 1, *started_r[s + 1 :]]
                if self._can_finish(rank, None, started_f, with_this, started_b, room_soon - rest):
                    return s
        return -1

    def _can_finish(
        self,
        rank: int,
        stage: int | None,
        started_f: Sequence[int],
        started_r: Sequence[int],
        started_b: Sequence[int],
        left: int,
    ) -> bool:
        """Banker's rule: can one rank with `left` bytes finish, oldest first, what runs and one F more of `stage`?"""
        problem = self.problem
        take, restored = problem.taken_by_forward_bytes, problem.restored_bytes
        chunks = problem.stages_of_rank[rank]
        lowest = chunks[0]
        num_started = started_f[lowest] if stage is None else max(started_f[lowest], started_f[stage] + 1)
        for j in range(started_b[lowest], num_started):
            held = climb = peak = 0
            for s in chunks:
                if started_b[s] <= j:  # its back op is still to come, with all chunks up to s held
                    ahead = restored[s] if j < started_r[s] else 0
                    climb += take[s] + ahead
                    peak = max(peak, climb + self._extra_with_r[s] - ahead)
                    if j < started_f[s] + (s == stage):
                        held += take[s] + ahead
            left += held
            if peak > left:
                return False
        return True

    def order(self, chosen: Sequence[Sequence[_Choice]]) -> Order:
        """The problem's own form of a run."""
        problem = self.problem
        ranks = []
        for choices in chosen:
            ops: list[Op] = []
            for kind, s, j in choices:
                if kind == _FORWARD:
                    ops.append(Op("F", s, j))
                elif kind == _RECOMPUTE:
                    ops.append(Op("R", s, j))
                elif kind == _WEIGHT:
                    ops.append(Op("W", s, j))
                elif kind == _WHOLE or not problem.split[s]:
                    ops.append(Op("BW", s, j))
                else:
                    ops.append(Op("B", s, j))
                    if not problem.has_weight_op[s]:
                        ops.append(Op("W", s, j))
            ranks.append(tuple(ops))
        return tuple(ranks)

    def cost_us(self, chosen: Sequence[Sequence[_Choice]], whole_us: Sequence[int] = ()) -> int:
        """The objective of a run, without the detour over `Op`; `whole_us` as in `WholeBackwards`."""
        problem = self.problem
        m, last_stage = problem.num_microbatches, problem.num_stages - 1
        durations = (problem.forward_us, problem.back_us, problem.weight_us, problem.rerun_us, whole_us)
        node_of = [[[NO_NODE] * m for _ in range(problem.num_stages)] for _ in range(4 if self._recomputes else 3)]
        duration_us: list[int] = []
        first = [0]
        for choices in chosen:
            for kind, s, j in choices:
                node_of[_BACK if kind == _WHOLE else kind][s][j] = len(duration_us)
                duration_us.append(durations[kind][s])
            first.append(len(duration_us))
        wait_for: list[int] = []
        delay_us: list[int] = []
        for choices in chosen:
            for kind, s, j in choices:
                if kind == _FORWARD and s:
                    wait_for.append(node_of[_FORWARD][s - 1][j])
                    delay_us.append(problem.transfer_us[s - 1])
                elif kind in (_BACK, _WHOLE) and s < last_stage:
                    wait_for.append(node_of[_BACK][s + 1][j])
                    delay_us.append(problem.transfer_us[s])
                else:  # its own rank runs what it needs, earlier
                    wait_for.append(NO_NODE)
                    delay_us.append(0)
        graph = TimingGraph(first, duration_us, wait_for, delay_us)
        return graph.least_cost_us(span=problem.objective == "span")


def changed_rule(rule: Rule, rng: random.Random, m: int, *, recomputes: bool) -> Rule:
    """A neighbour of a rule: one or two of its parts moved a little."""

    def moved(values: tuple[int, ...], least: int) -> tuple[int, ...]:
        new = list(values)
        low = high = rng.randrange(len(new))
        step = rng.choice((-2, -1, 1, 2))
        if rng.random() < 0.5:
            low, high = sorted((low, rng.randrange(len(new))))
            step = rng.choice((-1, 1))
        for s in range(low, high + 1):
            new[s] = max(least, min(m, new[s] + step))
        return tuple(new)

    for _ in range(rng.choice((1, 1, 2))):
        part = rng.randrange(6 if recomputes else 5)
        if part == 0:
            rule = replace(rule, in_flight=moved(rule.in_flight, 1))
        elif part == 1:
            rule = replace(rule, warm_up=moved(rule.warm_up, 0))
        elif part == 2:
            lag = tuple(min(n, 2 * len(rule.weight_lag)) for n in rule.weight_lag)
            rule = replace(rule, weight_lag=moved(lag, 0))
        elif part == 3:
            rule = replace(rule, forward_slack=rng.choice(_SLACKS))
        elif part == 4:
            rule = replace(rule, weight_slack=rng.choice(_SLACKS))
        else:
            rule = replace(rule, look_ahead=rng.choice((0, 1, 2, m)))
    return rule


class ListScheduling:
    """The backend. `max_rules` and `max_ops` limit the work, so that the same seed gives the same answer."""

    name = "list-scheduling"
    is_exact = False

    def __init__(self, max_rules: int | None = _MAX_RULES, max_ops: int | None = _MAX_OPS) -> None:
        self.max_rules = max_rules
        self.max_ops = max_ops

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
        """Try rules until the bound is met or the work or the time is used up; at least one rule is always tried.

        `hint` is returned if nothing better is found; `workers` is ignored. Ctrl-C returns the best so far.
        """
        del workers
        began = time.monotonic()
        if not problem.is_feasible():
            return infeasible(self.name, seed, time.monotonic() - began)
        if bound is None:
            bound = best_bound(problem)
        search = _Search(problem, bound, began, time_limit_s, on_progress)
        if hint is not None:
            score = problem.evaluate(hint)
            if score.fits:
                search.best_us, search.best_order = score.objective_us, hint
        interrupted = False
        try:
            search.climb(seed, self.max_rules, self.max_ops)
        except KeyboardInterrupt:
            interrupted = True
            if search.best_order is None:
                search.attempt(rule_family(problem)[0])
        order = search.best_order
        assert order is not None
        score = problem.evaluate(order)
        return PipelineSolution(
            status=Status.OPTIMAL if score.objective_us <= bound.value_us else Status.FEASIBLE,
            order=order,
            score=score,
            lower_bound_us=bound.value_us,
            lower_bound_kind=bound.kind,
            solver=self.name,
            seconds=time.monotonic() - began,
            seed=seed,
            interrupted=interrupted,
            limited_by_time=search.out_of_time,
            note=f"{search.num_tried} rules tried",
        )


def quick_order(problem: PipelineProblem, hint: Order | None) -> Order:
    """The hint in microbatch order if it fits, else what the first rule makes; the problem must be feasible."""
    if hint is not None and problem.evaluate(hint).fits:
        return problem.canonical(hint)
    simulator = Simulator(problem)
    return simulator.order(simulator.run(rule_family(problem)[0]))


class _Search:
    """The state of one solve: the incumbent, and what was spent."""

    def __init__(
        self,
        problem: PipelineProblem,
        bound: Bound,
        began: float,
        time_limit_s: float,
        on_progress: OnProgress | None,
    ) -> None:
        self.simulator = Simulator(problem)
        self.bound = bound
        self.began, self.deadline = began, began + time_limit_s
        self.on_progress = on_progress
        self.best_us: int | None = None
        self.best_order: Order | None = None
        self.num_tried = 0
        self.out_of_time = False

    def attempt(self, rule: Rule) -> int:
        """Cost of a rule; keeps its order if it is the best so far."""
        chosen = self.simulator.run(rule)
        cost_us = self.simulator.cost_us(chosen)
        self.num_tried += 1
        if self.best_us is None or cost_us < self.best_us:
            self.best_us, self.best_order = cost_us, self.simulator.order(chosen)
            if self.on_progress is not None:
                seconds = time.monotonic() - self.began
                self.on_progress(Event(ListScheduling.name, seconds, cost_us, self.bound.value_us))
        return cost_us

    def climb(self, seed: int, max_rules: int | None, max_ops: int | None) -> None:
        """The family, then hill climbing from its best rules in turn, sideways steps allowed."""
        problem = self.simulator.problem
        limit = max_rules
        if max_ops is not None:
            affordable = max(1, max_ops // self.simulator.num_ops)
            limit = affordable if limit is None else min(limit, affordable)
        found: list[tuple[int, int, Rule]] = []
        for index, rule in enumerate(rule_family(problem)):
            if self._should_stop(limit):
                return
            found.append((self.attempt(rule), index, rule))
        found.sort()
        climbers = [(cost, rule) for cost, _, rule in found[:_NUM_CLIMBERS]]
        rng = random.Random(seed)
        seen = {rule for _, _, rule in found}
        turn = 0
        while not self._should_stop(limit):
            cost, rule = climbers[turn % len(climbers)]
            neighbour = changed_rule(rule, rng, problem.num_microbatches, recomputes=any(problem.has_recompute))
            turn += 1
            if turn > 50 * (len(seen) + 1000):
                return  # a tiny problem: every rule has been seen
            if neighbour in seen:
                continue
            seen.add(neighbour)
            new_cost = self.attempt(neighbour)
            if new_cost <= cost:
                climbers[(turn - 1) % len(climbers)] = (new_cost, neighbour)

    def _should_stop(self, limit: int | None) -> bool:
        if self.best_us is not None and self.best_us <= self.bound.value_us:
            return True
        if limit is not None and self.num_tried >= limit:
            return True
        if self.num_tried and time.monotonic() >= self.deadline:
            self.out_of_time = True
            return True
        return False
