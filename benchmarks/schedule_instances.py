"""The pipeline problems of `schedules.py`: published settings, drawn ones, and the optimum of tiny ones by enumeration.

Everything drawn comes from one whole seed per instance, which is printed. Times are whole µs. The enumeration shares
the problem's fields, and no code, with scoring, bounds and search.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from math import floor, gcd
from pathlib import Path
from typing import Any, cast

from planner.placements import named_placement
from solvers.pipeline import Objective, PipelineProblem

FACTS = cast(dict[str, Any], json.loads((Path(__file__).parent / "schedules.json").read_text(encoding="utf-8")))

MAX_COMBINATIONS = 3000  # of the ranks' orders, for an instance that is enumerated
_CHUNKS = {"linear": 1, "vee": 2}

RankOp = tuple[str, int, int]  # kind, stage, microbatch


def pipeline(
    forward_us: Sequence[int],
    backward_us: Sequence[int],
    weight_us: Sequence[int],
    transfer_us: Sequence[int],
    m: int,
    *,
    memory: float,
    held: int = 2,
    kept: int = 1,
    placement: str = "linear",
    objective: Objective = "span",
) -> PipelineProblem:
    """A pipeline from the costs of its p ranks; every rank has room for memory · p microbatches of `held` (M_B).

    With the placement vee every rank's costs are shared out to its two chunks, in whole numbers that add up to them.
    """
    p, chunks = len(forward_us), _CHUNKS[placement]
    home = named_placement(placement, p, chunks).rank_of_stage

    def shared(per_rank: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            per_rank[rank] // chunks + (1 if stage >= p and per_rank[rank] % chunks else 0)
            for stage, rank in enumerate(home)
        )

    return PipelineProblem(
        forward_us=shared(forward_us),
        backward_us=shared(backward_us),
        weight_us=shared(weight_us),
        split=(True,) * len(home),
        transfer_us=tuple(0 if a == b else transfer_us[min(a, b)] for a, b in pairwise(home)),
        rank_of_stage=home,
        num_microbatches=m,
        activation_bytes=(held,) * len(home),
        weight_activation_bytes=(kept,) * len(home),
        capacity_bytes=(floor(memory * p * chunks * held + 1e-9),) * p,
        objective=objective,
    )


def even(
    p: int,
    m: int,
    costs: Sequence[int],
    transfer_us: int,
    *,
    memory: float,
    held: int = 2,
    kept: int = 1,
    scale: Sequence[float] | None = None,
    placement: str = "linear",
    objective: Objective = "span",
) -> PipelineProblem:
    """A pipeline whose ranks all cost (F, B, W) = `costs`, times `scale` of the rank where that is given."""
    factors = (1.0,) * p if scale is None else scale
    forward_us, backward_us, weight_us = ([round(cost * factor) for factor in factors] for cost in costs)
    return pipeline(
        forward_us,
        backward_us,
        weight_us,
        [transfer_us] * (p - 1),
        m,
        memory=memory,
        held=held,
        kept=kept,
        placement=placement,
        objective=objective,
    )


def activation_sizes(model: str) -> tuple[int, int]:
    """(M_B, M_W) of a microbatch of a published model, in the largest unit in which both are whole.

    M_B = 34h + 5as and M_W = 32h per token and layer. Source: arXiv 2401.10241.
    """
    shape = FACTS["models"][model]
    h, a, s = shape["hidden_size"], shape["attention_heads"], shape["sequence_length"]
    held, kept = 34 * h + 5 * a * s, 32 * h
    unit = gcd(held, kept)
    return held // unit, kept // unit


def published(
    setting: dict[str, Any], *, memory: float, placement: str = "linear", objective: Objective = "span"
) -> PipelineProblem:
    """A setting of the zero-bubble paper, an entry of FACTS["paper"], with the paper's own memory."""
    held, kept = activation_sizes(setting["model"])
    times = [round(setting[name] * 1000) for name in ("forward_ms", "backward_ms", "weight_ms")]
    return even(
        setting["p"],
        setting["m"],
        times,
        round(setting["p2p_ms"] * 1000),
        memory=memory,
        held=held,
        kept=kept,
        placement=placement,
        objective=objective,
    )


def large(p: int, m: int, *, memory: float, within: float = 0.0, seed: int = 0) -> PipelineProblem:
    """Costs like the paper's on 16 stages and more; with `within`, stages draw a factor of 1 ± that."""
    facts = FACTS["large"]
    draw = random.Random(seed)
    factors = [draw.uniform(1 - within, 1 + within) if within else 1.0 for _ in range(p)]
    return even(
        p,
        m,
        (facts["forward_us"], facts["backward_us"], facts["weight_us"]),
        facts["transfer_us"],
        memory=memory,
        held=facts["activation_bytes"],
        kept=facts["weight_activation_bytes"],
        scale=factors,
    )


def uneven(seed: int) -> tuple[PipelineProblem, str]:
    """A drawn pipeline with stage costs within 25 %, and its numbers in words.

    p 4 to 16, m from 2p to 4p, transfers of 0 to 10 % of F, memory for 0.5 to 2 p microbatches. Even seeds draw one
    factor per stage, odd seeds one for each of F, B and W. Every fourth has a head: its last stage costs 1.35 times.
    """
    draw = random.Random(seed)
    p = draw.randint(4, 16)
    m = draw.randint(2 * p, 4 * p)
    costs = (10_000, draw.randint(9_000, 14_000), draw.randint(5_000, 10_000))
    transfer_us = draw.randint(0, 1_000)
    memory = round(draw.uniform(0.5, 2.0), 2)
    has_head = seed % 4 == 3
    f, b, w = _drawn_costs(draw, p, costs, within=0.25, together=seed % 2 == 0, head=1.35 if has_head else 1.0)
    problem = pipeline(f, b, w, [transfer_us] * (p - 1), m, memory=memory, held=5, kept=2)
    return problem, f"p={p} m={m} memory {memory:.2f}{' head' if has_head else ''}"


def wild(seed: int) -> PipelineProblem:
    """A drawn pipeline with F, B and W of every stage within 50 %: p 4 to 8, m from p to 3p, memory for 1 to 2 p."""
    draw = random.Random(seed)
    p = draw.randint(4, 8)
    m = draw.randint(p, 3 * p)
    costs = (1_000, draw.choice((1_000, 1_200, 1_500)), draw.choice((500, 800, 1_000)))
    f, b, w = _drawn_costs(draw, p, costs, within=0.5, together=False)
    transfers_us = [draw.choice((0, 50, 100))] * (p - 1)
    return pipeline(f, b, w, transfers_us, m, memory=draw.choice((1.0, 1.5, 2.0)))


def _drawn_costs(
    draw: random.Random, p: int, costs: Sequence[int], *, within: float, together: bool, head: float = 1.0
) -> list[list[int]]:
    """F, B and W of p stages, each a list; every factor in 1 ± within, one per stage where they vary together."""
    rows: list[list[int]] = [[], [], []]
    for stage in range(p):
        factor = draw.uniform(1 - within, 1 + within)
        for row, cost in zip(rows, costs, strict=True):
            own = factor if together else draw.uniform(1 - within, 1 + within)
            row.append(max(1, round(cost * own * (head if stage == p - 1 else 1.0))))
    return rows


def tiny(seed: int) -> PipelineProblem:
    """A drawn instance that can be enumerated: up to three ranks, one or two chunks, some stages not split."""
    draw = random.Random(seed)
    while True:
        home = draw.choice(((0,), (0, 0), (0, 1), (0, 1), (0, 1, 2), (0, 1, 0), (0, 1, 1, 0)))
        split = tuple(draw.random() < 0.8 for _ in home)
        held = tuple(draw.randint(1, 3) for _ in home)
        problem = PipelineProblem(
            forward_us=tuple(draw.randint(1, 6) for _ in home),
            backward_us=tuple(draw.randint(1, 6) for _ in home),
            weight_us=tuple(draw.randint(0, 5) for _ in home),
            split=split,
            transfer_us=tuple(0 if a == b else draw.randint(0, 3) for a, b in pairwise(home)),
            rank_of_stage=home,
            num_microbatches=draw.randint(1, 4),
            activation_bytes=held,
            weight_activation_bytes=tuple(draw.randint(0, most) for most in held),
            capacity_bytes=None,
            objective=draw.choice(("span", "makespan")),
        )
        if draw.random() < 0.8:
            room = tuple(least + draw.randint(0, 5) for least in problem.single_microbatch_bytes())
            problem = replace(problem, capacity_bytes=room)
        if num_combinations(problem) <= MAX_COMBINATIONS:
            return problem


# --- the optimum of tiny problems, by enumeration ---------------------------------------------------------------------


def num_combinations(problem: PipelineProblem) -> int:
    """How many combinations of the ranks' orders there are; counting stops above `MAX_COMBINATIONS`."""
    total = 1
    for rank in range(max(problem.rank_of_stage) + 1):
        count = 0
        for _ in rank_orders(problem, rank):
            count += 1
            if total * count > MAX_COMBINATIONS:
                return total * count
        total *= count
    return total


def least_cost_us(problem: PipelineProblem) -> int:
    """The optimum, by timing every combination of the ranks' orders. ValueError where nothing fits."""
    p = max(problem.rank_of_stage) + 1
    costs = (
        cost
        for orders in product(*(list(rank_orders(problem, rank)) for rank in range(p)))
        if (cost := _cost_us(problem, orders)) is not None
    )
    return min(costs)


def rank_orders(problem: PipelineProblem, rank: int) -> Iterator[tuple[RankOp, ...]]:
    """Every order of one rank's ops that fits its memory and can run as far as the rank itself can see.

    F, B, W and BW of a stage run in microbatch order, which loses nothing while microbatches are alike.
    """
    stages = [s for s, home in enumerate(problem.rank_of_stage) if home == rank]
    m = problem.num_microbatches
    room = None if problem.capacity_bytes is None else problem.capacity_bytes[rank]
    kinds = {s: ("F", "B", "W") if problem.split[s] else ("F", "BW") for s in stages}
    total = m * sum(map(len, kinds.values()))
    done = {(kind, s): 0 for s in stages for kind in kinds[s]}
    order: list[RankOp] = []

    def extend(held: int) -> Iterator[tuple[RankOp, ...]]:
        if len(order) == total:
            yield tuple(order)
            return
        for (kind, s), j in list(done.items()):
            if j == m:
                continue
            size, rest = problem.activation_bytes[s], problem.weight_activation_bytes[s]
            if kind == "F":
                # the stages between pass microbatches on in order, so an earlier chunk is ahead, a later one behind
                ready = all(done["F", t] > j for t in stages if t < s)
                during, after = held + size, held + size
            elif kind == "W":
                ready = done["B", s] > j
                during, after = held, held - rest
            else:
                ready = all(done["F", t] > j for t in stages)
                ready = ready and all(done[kinds[t][1], t] > j for t in stages if t > s)
                during, after = (
                    (held, held - size) if kind == "BW" else (held + max(0, rest - size), held - size + rest)
                )
            if ready and (room is None or during <= room):
                done[kind, s] += 1
                order.append((kind, s, j))
                yield from extend(after)
                order.pop()
                done[kind, s] -= 1

    yield from extend(0)


def _cost_us(problem: PipelineProblem, orders: Sequence[Sequence[RankOp]]) -> int | None:
    """The objective of complete orders; None where they deadlock.

    Span: let x_a be the start of rank a, and d_ab the longest path from a's start to b's end. A span of D is possible
    iff x_b + D ≥ x_a + d_ab can be satisfied, which is iff no cycle of ranks has a mean of d above D.
    """
    before: dict[RankOp, list[tuple[RankOp, int]]] = {}
    for ops in orders:
        for op in ops:
            before[op] = _inputs(problem, op)
        for first, second in pairwise(ops):
            before[second].append((first, 0))
    sequence: list[RankOp] = []
    state: dict[RankOp, int] = {}  # 1: being visited, 2: done

    def visit(op: RankOp) -> bool:
        if op in state:
            return state[op] == 2
        state[op] = 1
        if not all(visit(other) for other, _ in before[op]):
            return False
        state[op] = 2
        sequence.append(op)
        return True

    if not all(visit(ops[-1]) for ops in orders):
        return None

    def ends_us(source: RankOp | None) -> list[int | None]:
        """End of every rank's last op after the source starts, or after everything that waits for nothing starts."""
        end: dict[RankOp, int | None] = {}
        for op in sequence:
            starts = [e + delay for other, delay in before[op] if (e := end[other]) is not None]
            if source is None or op == source:
                starts.append(0)
            end[op] = max(starts) + _duration_us(problem, op) if starts else None
        return [end[ops[-1]] for ops in orders]

    if problem.objective == "makespan":
        return max(end for end in ends_us(None) if end is not None)
    paths = [ends_us(ops[0]) for ops in orders]
    cost = 0

    def walk(cycle: list[int], length: int) -> None:
        nonlocal cost
        for rank, path in enumerate(paths[cycle[-1]]):
            if path is None:
                continue
            if rank == cycle[0]:
                cost = max(cost, -(-(length + path) // len(cycle)))
            elif rank > cycle[0] and rank not in cycle:
                walk([*cycle, rank], length + path)

    for rank in range(len(orders)):
        walk([rank], 0)
    return cost


def _inputs(problem: PipelineProblem, op: RankOp) -> list[tuple[RankOp, int]]:
    """What an op waits for, with the delay after its end."""
    kind, s, j = op
    if kind == "W":
        return [(("B", s, j), 0)]
    if kind == "F":
        return [(("F", s - 1, j), problem.transfer_us[s - 1])] if s else []
    inputs: list[tuple[RankOp, int]] = [(("F", s, j), 0)]
    if s + 1 < len(problem.rank_of_stage):
        inputs.append((("B" if problem.split[s + 1] else "BW", s + 1, j), problem.transfer_us[s]))
    return inputs


def _duration_us(problem: PipelineProblem, op: RankOp) -> int:
    kind, s, _ = op
    if kind == "F":
        return problem.forward_us[s]
    if kind == "W":
        return problem.weight_us[s]
    return problem.backward_us[s] + (problem.weight_us[s] if kind == "BW" else 0)
