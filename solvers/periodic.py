"""A periodic steady state, unrolled to any number of microbatches, with warm-up and cool-down tightened.

`solvers.modulo` finds patterns, whose search does not depend on the number of microbatches. A pattern gives every op of
every microbatch a time, and so every rank an order, which holds no more at any time than the steady state does and so
fits. What is left are the two ends, where ranks idle: the first microbatches find a pipeline to themselves, and
W of the last have nothing behind them.

Tightening is a list schedule that follows an order and only fills its gaps. A rank whose next op is not ready yet
looks ahead in its order for one that is, that ends (nearly) before the next op can start, and that leaves room: moving
an op to the front adds what it takes net to every peak up to its old place, so peaks are checked up to there. The order
that remains can always still be run, so nothing deadlocks. Run on the order backwards, from the last op to the
first, the same procedure moves ops later, into the gaps of the cool-down; alternating both directions is
forward-backward improvement (Li and Willis, 1992; Tormos and Lova, 2001) for pipelines.
"""

import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil

from solvers.backend import Event, OnProgress, infeasible
from solvers.bounds import Bound, best_bound
from solvers.layouts import LayoutPaths
from solvers.list_scheduling import quick_order
from solvers.modulo import Budget, OutOfBudgetError, Pattern, SteadyState, find_pattern, least_period, taken_and_given
from solvers.pipeline import Order, PipelineProblem, PipelineSolution, Status
from solvers.searched_ops import Key, duration_us, order_by, precedences, searched_ops
from solvers.timing import NO_NODE, TimingGraph

_FAR = 1 << 60
_LOOSE = ((0.5, 1.0), (0.0, 0.0), (0.25, 0.5), (0.5, 0.7))  # shares of the free memory, see `loosened`
_SEARCH_SHARE = 0.7  # of time and ops for finding patterns; the rest is for tightening the best of them further
_NUM_IMPROVED = 6
_PASSES = ((0.0, True), (0.0, False), (0.5, True))  # slack: by how much of itself an op may overrun its gap; which way
_TRY_WORK = 1.0  # deterministic units CP-SAT may use on one period
_MAX_CP_SAT_OPS = 150  # in a period; above, CP-SAT finds no better patterns than the layouts do
_NEAR_ROUNDS = 6
_MAX_STRETCH = 3.0  # periods so much longer than the lower bound are left to CP-SAT
_MAX_OPS_OF_MORE = 200  # above so many ops in a period, no larger k is tried
_NUM_SEEDS = 4

Sequences = list[list[int]]  # nodes per rank, in the order it runs them


def loosened(problem: PipelineProblem, pattern: Pattern, forward_share: float, weight_share: float) -> Pattern:
    """The pattern with F started whole periods earlier and W later, as far as shares of the free memory allow.

    That costs no time in the steady state, and gives the two ends more to do: F before the first backward, W
    after the last. Source of the idea: ZB-H2 beside ZB-H1 (Qi et al., arXiv 2401.10241).
    """
    if not (forward_share or weight_share):
        return pattern
    k = pattern.num_microbatches
    starts, period = dict(pattern.starts), pattern.period
    most_ahead = []  # enough to fill the time until the first backward comes
    for s in range(problem.num_stages):
        until_back = starts["B", s, 0] - starts["F", s, 0]
        in_flight = ceil((until_back + problem.back_us[s] / pattern.tick_us) / period)
        wanted = ceil(until_back * pattern.tick_us / (problem.forward_us[s] * k))
        allowed = problem.in_flight_limit[s] // k if problem.max_in_flight is not None else wanted
        most_ahead.append(max(0, min(wanted, allowed) - in_flight))
    room = problem.room_bytes
    if room is None:
        whole = problem.activation_bytes
        free = [2 * sum(whole[s] * most_ahead[s] for s in stages) for stages in problem.stages_of_rank]
    else:  # one period more in flight holds the bytes of k microbatches
        held = SteadyState(problem, k).peak_bytes(pattern)
        free = [(there - now) // k for there, now in zip(room, held, strict=True)]
    ahead = [0] * problem.num_stages
    most = max(most_ahead)
    for s in range(problem.num_stages):
        rank = problem.rank_of_stage[s]
        size = problem.taken_by_forward_bytes[s] * len(problem.stages_of_rank[rank])
        most = min(most, most_ahead[s])
        if size:
            most = min(most, int(free[rank] * forward_share) // size)
        ahead[s] = most
    for rank, stages in enumerate(problem.stages_of_rank):
        left = free[rank] - sum(ahead[s] * problem.taken_by_forward_bytes[s] for s in stages)
        for s in stages:
            size = problem.kept_bytes[s] * len(stages)
            behind = min(problem.num_microbatches, int(left * weight_share) // size) if size else 0
            for i in range(k):
                starts["F", s, i] -= ahead[s] * period
                if problem.has_weight_op[s]:
                    starts["W", s, i] += behind * period
    return replace(pattern, starts=starts)


class Unrolled:
    """The ops of a problem as numbers, ready to be simulated in either direction."""

    def __init__(self, problem: PipelineProblem) -> None:
        self.problem = problem
        self.keys: list[Key] = searched_ops(problem)
        self._node_of = {key: node for node, key in enumerate(self.keys)}
        self.rank = [problem.rank_of_stage[s] for _, s, _ in self.keys]
        self.length = [duration_us(problem, key) for key in self.keys]
        classes: dict[tuple[str, int], int] = {}
        self.class_of = [classes.setdefault(key[:2], len(classes)) for key in self.keys]
        bytes_of = {(kind, s): taken_and_given(problem, kind, s) for kind, s in classes}
        self.take = [bytes_of[key[:2]][0] for key in self.keys]
        self.give = [bytes_of[key[:2]][1] for key in self.keys]
        room = problem.room_bytes
        self.room = [_FAR] * problem.num_ranks if room is None else list(room)
        self.before: list[list[tuple[int, int]]] = [[] for _ in self.keys]
        self.after: list[list[tuple[int, int]]] = [[] for _ in self.keys]
        for before, after, delay_us in precedences(problem):
            if before[:2] != after[:2]:  # runs in microbatch order are kept by always taking a kind's first op
                one, other = self._node_of[before], self._node_of[after]
                self.before[other].append((one, delay_us))
                self.after[one].append((other, delay_us))

    def sequences(self, pattern: Pattern) -> Sequences:
        """The order of every rank in the pattern."""
        when = [pattern.start(key) for key in self.keys]
        ranks: Sequences = [[] for _ in range(self.problem.num_ranks)]
        for node in sorted(range(len(when)), key=when.__getitem__):
            ranks[self.rank[node]].append(node)
        return ranks

    def order(self, sequences: Sequences) -> Order:
        """The problem's own form."""
        place = [0] * len(self.keys)
        for nodes in sequences:
            for index, node in enumerate(nodes):
                place[node] = index
        return order_by(self.problem, lambda key: place[self._node_of[key]])

    def cost_us(self, sequences: Sequences) -> int:
        """The objective of an order."""
        first = [0, *accumulate(map(len, sequences))]
        place = [0] * len(self.keys)
        for begin, nodes in zip(first, sequences, strict=False):
            for index, node in enumerate(nodes, begin):
                place[node] = index
        wait_for: list[int] = []
        delay_us: list[int] = []
        length: list[int] = []
        keys, last = self.keys, self.problem.num_stages - 1
        for nodes in sequences:
            for node in nodes:
                kind, s, _ = keys[node]
                needs, delay = NO_NODE, 0
                if (kind == "F" and s > 0) or (kind == "B" and s < last):
                    for one, after_us in self.before[node]:
                        if keys[one][0] == kind:
                            needs, delay = place[one], after_us
                wait_for.append(needs)
                delay_us.append(delay)
                length.append(self.length[node])
        graph = TimingGraph(first, length, wait_for, delay_us)
        return graph.least_cost_us(span=self.problem.objective == "span")

    def filled(self, sequences: Sequences, slack: float) -> Sequences:
        """The order with its gaps filled by ops from behind, see the module's docstring."""
        return self._fill(sequences, slack, self.before, self.after, self.take, self.give)

    def filled_backwards(self, sequences: Sequences, slack: float) -> Sequences:
        """The order with its gaps, seen from the end, filled by ops from in front."""
        backwards = [nodes[::-1] for nodes in sequences]
        filled = self._fill(backwards, slack, self.after, self.before, self.give, self.take)
        return [nodes[::-1] for nodes in filled]

    def _fill(
        self,
        sequences: Sequences,
        slack: float,
        before: Sequence[Sequence[tuple[int, int]]],
        after: Sequence[Sequence[tuple[int, int]]],
        take: Sequence[int],
        give: Sequence[int],
    ) -> Sequences:
        length, rank_of, class_of, room = self.length, self.rank, self.class_of, self.room
        missing = [len(arcs) for arcs in before]
        arrival = [0] * len(length)
        done = bytearray(len(length))
        num_ranks = len(sequences)
        head, busy_until, held = [0] * num_ranks, [0] * num_ranks, [0] * num_ranks
        place = [0] * len(length)
        of_class: list[dict[int, list[int]]] = [{} for _ in range(num_ranks)]
        for rank, nodes in enumerate(sequences):
            for index, node in enumerate(nodes):
                place[node] = index
                of_class[rank].setdefault(class_of[node], []).append(node)
        next_of_class = [dict.fromkeys(lists, 0) for lists in of_class]
        result: Sequences = [[] for _ in range(num_ranks)]
        wakes = [(0, rank) for rank in range(num_ranks)]
        push, pop = heapq.heappush, heapq.heappop
        left = len(length)
        while left:
            now, rank = pop(wakes)  # never empty: the order that remains can be run
            if busy_until[rank] > now:
                continue
            nodes, position = sequences[rank], head[rank]
            while position < len(nodes) and done[nodes[position]]:
                position += 1
            head[rank] = position
            if position == len(nodes):
                continue
            chosen = nodes[position]
            if missing[chosen] or arrival[chosen] > now:
                until = _FAR if missing[chosen] else arrival[chosen]
                ready = []
                for name, index in next_of_class[rank].items():
                    if index < len(of_class[rank][name]):
                        node = of_class[rank][name][index]
                        if not missing[node] and arrival[node] <= now and now + length[node] * (1 - slack) <= until:
                            ready.append((place[node], node))
                ready.sort()
                chosen = -1
                peak = level = held[rank]
                for index, node in ready:
                    net = take[node] - give[node]
                    if held[rank] + take[node] > room[rank]:
                        continue
                    if net > 0:  # it is held while all that was in front of it runs
                        for passed in nodes[position:index]:
                            if not done[passed]:
                                peak = max(peak, level + take[passed])
                                level += take[passed] - give[passed]
                        position = index
                        if peak + net > room[rank]:
                            continue
                    chosen = node
                    break
                if chosen < 0:
                    continue  # what the next op waits for wakes the rank
            done[chosen] = 1
            left -= 1
            next_of_class[rank][class_of[chosen]] += 1
            result[rank].append(chosen)
            held[rank] += take[chosen] - give[chosen]
            end = busy_until[rank] = now + length[chosen]
            push(wakes, (end, rank))
            for node, delay_us in after[chosen]:
                arrival[node] = max(arrival[node], end + delay_us)
                missing[node] -= 1
                if not missing[node]:
                    push(wakes, (arrival[node], rank_of[node]))
        return result


@dataclass
class _Best:
    """The incumbent."""

    cost_us: int
    order: Order


class PeriodicSchedule:
    """The backend. `work_limit`, in CP-SAT's deterministic units, and `max_ops` make a seed give the same answer.

    `ks` are the microbatches per period that are tried; `max_ops` limits the ops simulated while tightening.
    """

    name = "periodic"
    is_exact = False

    def __init__(
        self, work_limit: float | None = 6.0, max_ops: int | None = 3_000_000, ks: Sequence[int] = (1, 2, 3)
    ) -> None:
        self.work_limit = work_limit
        self.max_ops = max_ops
        self.ks = tuple(ks)

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
        """The best of several patterns, unrolled and tightened, or the hint if that is better.

        `workers` is ignored. Ctrl-C returns the best so far. Without any pattern in the limits, a list schedule.
        """
        del workers
        began = time.monotonic()
        if not problem.is_feasible():
            return infeasible(self.name, seed, time.monotonic() - began)
        if bound is None:
            bound = best_bound(problem)
        search = _Search(problem, bound, self, began, time_limit_s, on_progress, hint)
        interrupted = False
        try:
            search.run(seed)
        except KeyboardInterrupt:
            interrupted = True
        score = problem.evaluate(search.best_order)
        proven = score.objective_us <= bound.value_us
        return PipelineSolution(
            status=Status.OPTIMAL if proven else Status.FEASIBLE,
            order=search.best_order,
            score=score,
            lower_bound_us=bound.value_us,
            lower_bound_kind=bound.kind,
            solver=self.name,
            seconds=time.monotonic() - began,
            seed=seed,
            interrupted=interrupted,
            limited_by_time=search.out_of_time and not proven and not interrupted,
            note=search.note,
        )


class _Search:
    """The state of one solve."""

    def __init__(
        self,
        problem: PipelineProblem,
        bound: Bound,
        limits: PeriodicSchedule,
        began: float,
        time_limit_s: float,
        on_progress: OnProgress | None,
        hint: Order | None,
    ) -> None:
        self.problem, self.bound = problem, bound
        self.began, self.on_progress = began, on_progress
        self.ks = limits.ks
        work_limit = float("inf") if limits.work_limit is None else limits.work_limit
        self.budget = Budget(time_limit_s * _SEARCH_SHARE, work_limit)
        self.deadline = began + time_limit_s
        self.out_of_time = False
        max_ops = _FAR if limits.max_ops is None else limits.max_ops
        self.ops_left, self._ops_kept = max_ops, max_ops - int(max_ops * _SEARCH_SHARE)
        self._found: list[tuple[int, int, Sequences, Pattern]] = []  # cost after a first pass, number, order, pattern
        self.best_order = quick_order(problem, hint)
        self.best_us = problem.evaluate(self.best_order).objective_us
        self.best_pattern: Pattern | None = None
        self.num_patterns = 0
        self.shortest: Pattern | None = None  # the least period per microbatch
        self._seen = set[int]()  # hashes of the orders that patterns gave
        self.net = Unrolled(problem)

    @property
    def note(self) -> str:
        if self.best_pattern is None:
            return f"{self.num_patterns} patterns, none better than a list schedule"
        p = self.best_pattern
        return f"period {float(p.period_us):.10g} µs per microbatch, {p.num_microbatches} per period"

    def run(self, seed: int) -> None:
        """Patterns, each unrolled and filled once; then the best few in more ways, until the bound is met."""
        try:
            self._try_patterns(seed)
        except OutOfBudgetError:
            self.out_of_time = self.budget.out_of_time
        self.budget = Budget(self.deadline - time.monotonic(), 1.0)
        self._ops_kept = 0
        try:
            for _, _, sequences, pattern in sorted(self._found, key=lambda found: found[:2])[:_NUM_IMPROVED]:
                for slack, backwards_first in _PASSES:
                    self._improve(sequences, pattern, slack, backwards_first)
        except OutOfBudgetError:
            self.out_of_time = self.out_of_time or self.budget.out_of_time

    def _try_patterns(self, seed: int) -> None:
        """The shortest for all k first, then others about as short."""
        shortest = dict[int, Pattern]()
        num_ops = len(SteadyState(self.problem, 1).keys)
        for k in self.ks:
            if k > self.problem.num_microbatches or (shortest and k * num_ops > _MAX_OPS_OF_MORE):
                break
            if self.shortest is not None and is_as_short_as_can_be(self.problem, self.shortest):
                break
            for pattern in shortest_patterns(SteadyState(self.problem, k), self.budget, seed, self.shortest):
                self._unroll(pattern)
                if k not in shortest or pattern.period < shortest[k].period:
                    shortest[k] = pattern
        for k, pattern in shortest.items():
            assert self.shortest is not None
            if pattern.period_us * 100 <= self.shortest.period_us * 103:
                for other in other_patterns(SteadyState(self.problem, k), self.budget, seed, pattern.period):
                    self._unroll(other)

    def _unroll(self, pattern: Pattern) -> None:
        self.num_patterns += 1
        if self.shortest is None or pattern.period_us < self.shortest.period_us:
            self.shortest = pattern
        for forward_share, weight_share in _LOOSE:
            start = self.net.sequences(loosened(self.problem, pattern, forward_share, weight_share))
            fingerprint = hash(tuple(map(tuple, start)))
            if fingerprint in self._seen:
                continue
            self._seen.add(fingerprint)
            cost_us = self._attempt(start, pattern)
            filled = self.net.filled_backwards(start, 0.0)
            cost_us = min(cost_us, self._attempt(filled, pattern))
            filled = self.net.filled(filled, 0.0)
            cost_us = min(cost_us, self._attempt(filled, pattern))
            self._found.append((cost_us, len(self._found), start, pattern))

    def _improve(self, sequences: Sequences, pattern: Pattern, slack: float, backwards: bool) -> None:
        """Fill in both directions in turn until that does not help any more."""
        least_us, since = _FAR, 0
        while since < 2:
            sequences = (self.net.filled_backwards if backwards else self.net.filled)(sequences, slack)
            backwards = not backwards
            cost_us = self._attempt(sequences, pattern)
            since = 0 if cost_us < least_us else since + 1
            least_us = min(cost_us, least_us)

    def _attempt(self, sequences: Sequences, pattern: Pattern) -> int:
        """Cost of an order; kept if it is the best so far. OutOfBudgetError after the last that may be tried."""
        cost_us = self.net.cost_us(sequences)
        if cost_us < self.best_us:
            self.best_us, self.best_order, self.best_pattern = cost_us, self.net.order(sequences), pattern
            if self.on_progress is not None:
                seconds = time.monotonic() - self.began
                self.on_progress(Event(PeriodicSchedule.name, seconds, cost_us, self.bound.value_us))
        self.ops_left -= len(self.net.keys)
        if self.best_us <= self.bound.value_us or self.ops_left <= self._ops_kept:
            raise OutOfBudgetError
        self.budget.check()
        return cost_us


def shortest_patterns(state: SteadyState, budget: Budget, seed: int, known: Pattern | None) -> Iterator[Pattern]:
    """Ever shorter patterns of one k, by layouts, then by CP-SAT. `known`: only shorter ones than this."""
    lower = least_period(state)
    upper = None if known is None else ceil(known.period_us / state.tick_us * state.k)
    best = known.repeated(state.k) if known is not None and state.k % known.num_microbatches == 0 else None
    for pattern in _by_layouts(state, budget, lower, upper, known):
        if upper is None or pattern.period < upper:
            best, upper = pattern, pattern.period
        yield pattern
    if len(state.keys) <= _MAX_CP_SAT_OPS or best is None:
        for pattern in _by_cp_sat(state, budget, lower, upper, best, seed):
            yield state.shortened(pattern)


def _by_layouts(
    state: SteadyState, budget: Budget, lower: int, upper: int | None, known: Pattern | None
) -> Iterator[Pattern]:
    """The shortest period found by trying longer and longer ones, then bisecting; and others on the way."""
    shares = _shares(state.problem)

    def attempt(period: int) -> list[Pattern]:
        paths = [LayoutPaths.of_all(state, period)]
        if known is not None:
            paths.append(LayoutPaths.like(state, known, period))
        found = []
        for path in paths:
            for share in shares:
                budget.check()
                budget.spend(path.work)
                pattern = path.cheapest(share)
                for _ in range(_NEAR_ROUNDS):
                    if state.fits(pattern):
                        found.append(state.shortened(pattern))
                        break
                    budget.check()
                    near = LayoutPaths.near(state, pattern)
                    budget.spend(near.work)
                    nearby = near.cheapest(share)
                    if nearby.starts == pattern.starts:
                        break
                    pattern = nearby
        return found

    short, stretch, best = lower - 1, 0.0, upper
    while True:
        period = ceil(lower * (1 + stretch))
        if stretch > _MAX_STRETCH or (upper is not None and period >= upper):
            break
        found = attempt(period)
        yield from found
        if found:
            best = min(pattern.period for pattern in found)
            break
        short, stretch = period, stretch * 1.6 + 0.01
    while best is not None and best - short > max(1, lower // 500):
        middle = (short + best) // 2
        found = attempt(middle)
        yield from found
        if found:
            best = min(best, *(pattern.period for pattern in found))
        else:
            short = middle


def _shares(problem: PipelineProblem) -> list[tuple[float, ...]]:
    """Prices of memory on every rank: on the two ends of the ranks, in several proportions, and on all."""
    last = problem.num_ranks - 1
    shares = [(1.0,) * problem.num_ranks]
    for front in (0.5, 0.3):
        if last:
            shares.append(tuple(front if r == 0 else 1 - front if r == last else 0.0 for r in range(last + 1)))
    return shares


def _by_cp_sat(
    state: SteadyState, budget: Budget, lower: int, upper: int | None, best: Pattern | None, seed: int
) -> Iterator[Pattern]:
    """Ever shorter periods below `upper`, by bisection, for half of the work that is left."""
    enough = 0.0 if budget.work_left == float("inf") else budget.work_left / 2
    high, low = upper, lower - 1
    if high is None:
        period, step = lower, max(1, lower // 50)
        while best is None:
            best = find_pattern(state, period, budget, work_limit=_TRY_WORK, seed=seed)[0]
            if best is None:
                low, period, step = period, period + step, 2 * step
                if period > 4 * state.latency * state.k:
                    return
        yield best
        high = best.period
    while high - low > max(1, lower // 500) and budget.work_left > enough:
        middle = lower if low < lower else (low + high) // 2
        found = find_pattern(state, middle, budget, work_limit=_TRY_WORK, seed=seed, hint=best)[0]
        if found is None:
            low = middle
        else:
            best, high = state.shortened(found), middle
            high = best.period
            yield best


def other_patterns(state: SteadyState, budget: Budget, seed: int, period: int) -> Iterator[Pattern]:
    """Other patterns of a period that there is one for, and of slightly longer ones."""
    longer = sorted({period + period * stretch // 1000 for stretch in (10, 20, 30, 50)} - {period})
    for other in longer:
        paths = LayoutPaths.of_all(state, other)
        for share in _shares(state.problem):
            budget.check()
            budget.spend(paths.work)
            pattern = paths.cheapest(share)
            if state.fits(pattern):
                yield pattern
    if len(state.keys) <= _MAX_CP_SAT_OPS:
        for index in range(1, 1 + _NUM_SEEDS):
            for other in [period, *longer[::2]]:
                found = find_pattern(state, other, budget, work_limit=_TRY_WORK, seed=seed + index)[0]
                if found is not None:
                    yield found


def is_as_short_as_can_be(problem: PipelineProblem, pattern: Pattern) -> bool:
    """Whether the busiest rank has no idle time, but for a few per mille."""
    return pattern.period_us * problem.num_microbatches * 998 <= max(problem.work_us) * 1000
