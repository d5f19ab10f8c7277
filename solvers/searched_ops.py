"""The ops that exact models decide about, and their precedences: the same for CP-SAT and CBC.

A searched op is (kind, stage, microbatch) with kind "F", "R", "B" or "W". "B" is the stage's back op: BW where the
stage is not split, and B with its W right behind it where the W takes no time. Every searched op takes time.

In microbatch order, a stage has no more than its limit in flight iff F(s, j) runs after the back op of (s, j - limit).
"""

from collections.abc import Callable, Iterator
from math import gcd

from solvers.pipeline import Op, Order, PipelineProblem

Key = tuple[str, int, int]


def searched_ops(problem: PipelineProblem) -> list[Key]:
    """All searched ops, stage by stage, each kind in microbatch order."""
    return [
        (kind, s, j)
        for s in range(problem.num_stages)
        for kind in ("F", "R", "B", "W")
        if (kind != "R" or problem.has_recompute[s]) and (kind != "W" or problem.has_weight_op[s])
        for j in range(problem.num_microbatches)
    ]


def duration_us(problem: PipelineProblem, key: Key) -> int:
    """How long a searched op runs."""
    kind, s, _ = key
    return {"F": problem.forward_us, "R": problem.rerun_us, "B": problem.back_us, "W": problem.weight_us}[kind][s]


def precedences(problem: PipelineProblem) -> Iterator[tuple[Key, Key, int]]:
    """(before, after, delay): `after` starts `delay` µs or more after `before` ends. Microbatch order and
    the limit in flight included."""
    last = problem.num_stages - 1
    for kind, s, j in searched_ops(problem):
        if j:
            yield (kind, s, j - 1), (kind, s, j), 0
        if kind == "F":
            if s:
                yield ("F", s - 1, j), ("F", s, j), problem.transfer_us[s - 1]
            if j >= problem.in_flight_limit[s]:
                yield ("B", s, j - problem.in_flight_limit[s]), ("F", s, j), 0
        elif kind == "R":
            yield ("F", s, j), ("R", s, j), 0
        elif kind == "B":
            if problem.has_recompute[s]:
                yield ("R", s, j), ("B", s, j), 0
            elif s == last:
                yield ("F", s, j), ("B", s, j), 0
            if s < last:
                yield ("B", s + 1, j), ("B", s, j), problem.transfer_us[s]
        elif kind == "W":
            yield ("B", s, j), ("W", s, j), 0


def time_unit_us(problem: PipelineProblem) -> int:
    """Greatest common divisor of all times: models count in it."""
    return gcd(*problem.forward_us, *problem.rerun_us, *problem.back_us, *problem.weight_us, *problem.transfer_us)


def starts_us(problem: PipelineProblem, order: Order) -> dict[Key, int]:
    """When the searched ops start in the timing of an order that attains its objective."""
    score = problem.evaluate(order)
    found = {
        ("B" if op.kind == "BW" else op.kind, op.stage, op.microbatch): start
        for ops, row in zip(order, score.starts_us, strict=True)
        for op, start in zip(ops, row, strict=True)
    }
    return {key: found[key] for key in searched_ops(problem)}


def order_by(problem: PipelineProblem, when: Callable[[Key], float]) -> Order:
    """The order in which every rank runs its searched ops by ascending `when`."""
    ranks: list[list[Key]] = [[] for _ in range(problem.num_ranks)]
    for key in searched_ops(problem):
        ranks[problem.rank_of_stage[key[1]]].append(key)
    return tuple(tuple(op for key in sorted(keys, key=when) for op in _ops(problem, key)) for keys in ranks)


def _ops(problem: PipelineProblem, key: Key) -> tuple[Op, ...]:
    kind, s, j = key
    if kind != "B":
        return (Op(kind, s, j),)
    if not problem.split[s]:
        return (Op("BW", s, j),)
    return (Op("B", s, j),) if problem.has_weight_op[s] else (Op("B", s, j), Op("W", s, j))
