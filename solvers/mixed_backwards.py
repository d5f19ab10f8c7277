"""Orders that run the backward of some microbatches in one piece and split that of others.

BW often takes less than B and W apart, so splitting costs work; what it buys, gradients that leave earlier and W to
fill idle time with, is needed near the ends of a step and little in between. No other backend mixes the two on one
stage: here list schedules do (`solvers.list_scheduling.WholeBackwards`), over a few rules and then by hill climbing.

Lower bounds for mixed orders are those of `relaxed`.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from solvers.list_scheduling import Rule, Simulator, WholeBackwards, changed_rule, rule_family
from solvers.pipeline import Order, PipelineProblem

MAX_OPS = 6_000_000  # ops simulated in all, some 20 to 30 seconds
_MAX_TRIES = 400
_NUM_RULES = 5  # of the family, tried first
_NUM_KEPT = 2  # of these, whose numbers are looked at closely
_PENDING = (0.25, 0.125, 0.18, 0.35)  # shares of all W of a rank
_SPLIT = (0.125, 0.0, 0.25)  # shares of the microbatches


@dataclass(frozen=True)
class MixedOrder:
    """The best order found. Its cost is that of the problem with BW at `whole_us`."""

    order: Order
    cost_us: int
    num_tried: int
    limited_by_time: bool
    interrupted: bool


def gains_by_mixing(problem: PipelineProblem, whole_us: Sequence[int]) -> bool:
    """Whether BW takes less than B and W anywhere that has both, so that mixing can pay."""
    return not any(problem.has_recompute) and any(_useful_us(problem, whole_us))


def relaxed(problem: PipelineProblem, whole_us: Sequence[int]) -> PipelineProblem:
    """A problem without BW on split stages whose lower bounds hold for mixed orders, BW taking `whole_us`.

    B takes min(B, BW) there and W min(W, BW − B). A mixed order is an order of that problem: put W right behind B where
    there is BW. Nothing takes longer then, the gradient leaves no later, and nothing is held for longer, as M_W is not
    more than M_B in it.
    """
    backward = tuple(
        min(b, whole) if split else b
        for b, whole, split in zip(problem.backward_us, whole_us, problem.split, strict=True)
    )
    weight = tuple(
        min(w, whole - b) if split else w
        for w, b, whole, split in zip(problem.weight_us, backward, whole_us, problem.split, strict=True)
    )
    kept = tuple(map(min, problem.activation_bytes, problem.weight_activation_bytes))
    return replace(problem, backward_us=backward, weight_us=weight, weight_activation_bytes=kept)


def mix_backwards(
    problem: PipelineProblem,
    whole_us: Sequence[int],
    *,
    time_limit_s: float,
    seed: int,
    max_ops: int = MAX_OPS,
) -> MixedOrder:
    """The best mixed order found; BW of stage s takes `whole_us[s]`, and is only run where B and W take more.

    The problem must be feasible and recompute nothing. At least one order is always made. Ctrl-C returns the best so
    far; the same seed gives the same order unless the time limit comes first.
    """
    search = _Search(problem, tuple(_useful_us(problem, whole_us)), time.monotonic() + time_limit_s, max_ops)
    interrupted = False
    try:
        search.climb(seed)
    except KeyboardInterrupt:
        interrupted = True
    if search.best is None:
        search.attempt(rule_family(problem)[0], 0, 0)
    assert search.best is not None
    cost_us, order = search.best
    return MixedOrder(order, cost_us, search.num_tried, search.out_of_time, interrupted)


def _useful_us(problem: PipelineProblem, whole_us: Sequence[int]) -> list[int]:
    """`whole_us`, 0 where B and W take no more."""
    return [
        whole if has_weight and whole < b + w else 0
        for b, w, whole, has_weight in zip(
            problem.backward_us, problem.weight_us, whole_us, problem.has_weight_op, strict=True
        )
    ]


def _steps(largest: int) -> list[int]:
    """`largest` and its halves, down to 1."""
    steps = [max(1, largest)]
    while steps[-1] > 1:
        steps.append(steps[-1] // 2)
    return steps


class _Search:
    def __init__(self, problem: PipelineProblem, whole_us: tuple[int, ...], deadline: float, max_ops: int) -> None:
        self.problem, self.whole_us, self.deadline = problem, whole_us, deadline
        self.simulator = Simulator(problem)
        self.max_tries = max(1, min(_MAX_TRIES, max_ops // self.simulator.num_ops))
        self.num_tried = 0
        self.best: tuple[int, Order] | None = None
        self.out_of_time = False

    def attempt(self, rule: Rule, num_pending: int, num_split: int) -> int:
        """Cost of these numbers; keeps their order if it is the best so far."""
        chosen = self.simulator.run(rule, WholeBackwards(self.whole_us, num_pending, num_split))
        cost_us = self.simulator.cost_us(chosen, self.whole_us)
        self.num_tried += 1
        if self.best is None or cost_us < self.best[0]:
            self.best = cost_us, self.simulator.order(chosen)
        return cost_us

    def climb(self, seed: int) -> None:
        """The first rules with the first numbers, the best with all numbers, then neighbours of the best."""
        m = self.problem.num_microbatches
        per_rank = m * max(map(len, self.problem.stages_of_rank))
        tried: dict[tuple[Rule, int, int], int] = {}
        rules = rule_family(self.problem)[:_NUM_RULES]
        for share in _SPLIT:
            for pending in _PENDING:
                for rule in rules:
                    numbers = rule, round(pending * per_rank), round(share * m)
                    if self._should_stop():
                        return
                    if numbers not in tried:
                        tried[numbers] = self.attempt(*numbers)
                if len(rules) > _NUM_KEPT:
                    best_rules = sorted(tried, key=lambda numbers: tried[numbers])
                    rules = list(dict.fromkeys(rule for rule, _, _ in best_rules))[:_NUM_KEPT]
        now = min(tried, key=lambda numbers: tried[numbers])
        steps = [(step, sign) for step in _steps(per_rank // 16) for sign in (-1, 1)]
        rng = random.Random(seed)
        for turn in range(50 * self.max_tries):
            if self._should_stop():
                return
            rule, pending, split = now
            part = 0 if turn < len(steps) else rng.randrange(3)
            if part == 0:
                step, sign = steps[turn] if turn < len(steps) else rng.choice(steps)
                pending = max(0, pending + sign * step)
            elif part == 1:
                split = min(m, max(0, split + rng.choice((-2, -1, 1, 2))))
            else:
                rule = changed_rule(rule, rng, m, recomputes=False)
            numbers = rule, pending, split
            if numbers not in tried:
                tried[numbers] = self.attempt(*numbers)
                if tried[numbers] <= tried[now]:
                    now = numbers

    def _should_stop(self) -> bool:
        if self.num_tried >= self.max_tries:
            return True
        if self.num_tried and time.monotonic() >= self.deadline:
            self.out_of_time = True
            return True
        return False
