"""Lower bounds on the cost of every order of a pipeline problem. No solver, a fraction of a second.

Four arguments, each its own function, each with its proof: work, head-tail, memory-energy, chain. They
decide how good an answer can be claimed to be; `best_bound` takes the largest. All hold for every valid
order, not only for orders in microbatch order, because renaming microbatches changes no time (see
`solvers.pipeline`). For a problem that nothing fits they mean nothing, but still return a number.

Words used in the proofs. Rank r hosts the stages s_1 < .. < s_v, its chunks; microbatches j = 0 .. m-1 run
in order. The first op of r is F(s_1, 0), since F(s_i, j) needs F(s_1, j) and every backward its forward.
The *back* op of a stage is B where it is split, else BW. The *horizon* is what the objective measures: for the
span, the window of one rank from its first op to its last; for the makespan, the whole run. A *window* of
rank r is a part of its horizon; the horizon costs at least the rank's work plus the idle time of its windows.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from math import ceil, gcd

import numpy as np
import numpy.typing as npt

from solvers.pipeline import PipelineProblem

_CHAIN_CELLS = 12_000_000  # ops × ranks above which `chain_bound_us` would take seconds and gigabytes
_ALL_PAIRS_RANKS = 16  # up to here `chain_bound_us` looks at every pair of ranks
_NEVER = -(1 << 60)  # no path; adding durations to it never makes it a real time


@dataclass(frozen=True)
class Bound:
    """A proven lower bound on the objective, and the argument that proves it."""

    value_us: int
    kind: str


def best_bound(problem: PipelineProblem) -> Bound:
    """The largest of all bounds of this file; the argument named first wins a tie."""
    return max(
        (
            Bound(work_bound_us(problem), "work"),
            Bound(head_tail_bound_us(problem), "head-tail"),
            Bound(memory_energy_bound_us(problem), "memory-energy"),
            Bound(chain_bound_us(problem), "chain"),
        ),
        key=lambda bound: bound.value_us,
    )


class Chains:
    """Times one microbatch needs on its way up and down an otherwise empty pipeline."""

    def __init__(self, problem: PipelineProblem) -> None:
        self._problem = problem
        self._hops_us = [0, *accumulate(problem.transfer_us)]  # transfers below stage s
        self._forward_us = [0, *accumulate(problem.forward_us)]  # forwards below stage s
        self._back_us = [0, *accumulate(problem.back_us)]  # back ops below stage s
        # earliest start of F(s, 0) after the start of F(0, 0), shape (S,)
        self.reach_us = [a + b for a, b in zip(self._forward_us, self._hops_us, strict=False)]

    def window_us(self, up_from: int, down_to: int) -> int:
        """Least time from the start of F(up_from, j) to the start of the back op of (down_to, j)."""
        up = self._forward_us[-1] + self._hops_us[-1] - self.reach_us[up_from]
        back = self._back_us[-1] - self._back_us[down_to + 1]
        return up + back + self._hops_us[-1] - self._hops_us[down_to]

    def finish_us(self, stage: int, targets: Iterable[int]) -> int:
        """Least time from the end of F(stage, j) to the end of every op of j on the target stages."""
        problem = self._problem
        return max(
            self.window_us(stage, target)
            - problem.forward_us[stage]
            + problem.backward_us[target]
            + problem.weight_us[target]
            for target in targets
        )


def work_bound_us(problem: PipelineProblem) -> int:
    """The busiest rank.

    Span: a rank runs all its ops, one at a time, inside its horizon. Makespan: besides, nothing runs on
    r before F(s_1, 0) can start, which needs all forwards and transfers of microbatch 0 below s_1.
    """
    if problem.objective == "span":
        return max(problem.work_us)
    reach_us = Chains(problem).reach_us
    return max(w + reach_us[stages[0]] for w, stages in zip(problem.work_us, problem.stages_of_rank, strict=True))


# --- head and tail ----------------------------------------------------------------------------------------------------


def head_tail_bound_us(problem: PipelineProblem) -> int:
    """Work, plus the idle time a rank cannot avoid before its first backward and after its last forward.

    Head. Cut the horizon of r at the start b of the first back op of chunk c. Microbatch 0 must first go up from
    s_1 to the last stage and come down to s_c, so the window before b is at least that long (from the
    start of F(s_1, 0) for the span, from the start of the run for the makespan). What can r run in it? No back op of
    chunks up to c, so every microbatch is in one of few states: F of the first f chunks done; or all F done and
    the chunks above some chunk ≥ c done to the end (B without its W would hold more and have worked less). A state
    has an amount of work done and an amount of bytes held; at b the m states together hold no more than the
    capacity, with microbatch 0 about to start its back op. The most work under that is a knapsack, solved exactly
    for one chunk, and by its linear relaxation, which is not less, for more. Idle in the head ≥ window − that work.

    Tail. Cut at the end f of the last F of chunk c. Microbatch m-1 still has to go up, come down to s_1 and run the
    backwards there (the makespan: down to stage 0), so the window after f is at least that long. What r
    can run in it is the work still to do for the states at f, where F of chunks up to c is done for all
    microbatches, and the states again hold no more than the capacity. Idle in the tail ≥ window − that work.

    Both. If b ≤ f the windows are disjoint and both idle times count. If f < b, just before b all m
    microbatches hold M_B on the chunks up to min(c_head, c_tail), none of which has begun a back op; if that
    exceeds the capacity it cannot be. If it can be, only the larger of the two idle times is counted.

    With one chunk per rank, M_W = M_B / 2 and room for p microbatches this proves ZB-H1 optimal for the span: idle
    on rank 0 is (p-1)·B + 2(p-1)·transfer in the head and (p-1)·(F - W) + 2(p-1)·transfer in the tail.
    """
    chains = Chains(problem)
    best = 0
    for rank, stages in enumerate(problem.stages_of_rank):
        capacity = None if problem.capacity_bytes is None else problem.capacity_bytes[rank]
        heads = [_head_idle_us(problem, chains, stages, chunk, capacity) for chunk in range(len(stages))]
        tails = [_tail_idle_us(problem, chains, stages, chunk, capacity) for chunk in range(len(stages))]
        held = list(accumulate(problem.activation_bytes[s] for s in stages))
        idle = 0
        for head_chunk, head in enumerate(heads):
            for tail_chunk, tail in enumerate(tails):
                all_held = problem.num_microbatches * held[min(head_chunk, tail_chunk)]
                can_overlap = capacity is None or all_held <= capacity
                idle = max(idle, max(head, tail) if can_overlap else head + tail)
        best = max(best, problem.work_us[rank] + idle)
    return best


def _head_idle_us(
    problem: PipelineProblem, chains: Chains, stages: Sequence[int], chunk: int, capacity: int | None
) -> int:
    num_chunks = len(stages)
    forward = [problem.forward_us[s] for s in stages]
    backward = [problem.backward_us[s] + problem.weight_us[s] for s in stages]
    held = [0, *accumulate(problem.activation_bytes[s] for s in stages)]
    states = [(held[f], sum(forward[:f])) for f in range(num_chunks)]
    states += [(held[top], sum(forward) + sum(backward[top:])) for top in range(chunk + 1, num_chunks + 1)]
    first_bytes = held[chunk + 1] + problem.extra_bytes[stages[chunk]]
    first_us = sum(forward) + sum(backward[chunk + 1 :])
    others_us = _most_value(states, problem.num_microbatches - 1, None if capacity is None else capacity - first_bytes)
    start = stages[0] if problem.objective == "span" else 0
    return max(0, chains.window_us(start, stages[chunk]) - first_us - others_us)


def _tail_idle_us(
    problem: PipelineProblem, chains: Chains, stages: Sequence[int], chunk: int, capacity: int | None
) -> int:
    num_chunks = len(stages)
    forward = [problem.forward_us[s] for s in stages]
    weight = [problem.weight_us[s] if problem.split[s] else 0 for s in stages]
    backward = [problem.backward_us[s] + problem.weight_us[s] for s in stages]
    held = [0, *accumulate(problem.activation_bytes[s] for s in stages)]
    kept = [problem.kept_bytes[s] for s in stages]
    states = [(0, 0)]
    for f in range(chunk + 1, num_chunks):  # F done on f chunks, nothing else
        states.append((held[f], sum(backward) + sum(forward[f:])))
    for top in range(num_chunks + 1):  # all F done, back ops done on the chunks from `top` on
        bytes_held, left_us = held[top], sum(backward[:top])
        states.append((bytes_held, left_us))
        # W pending on some of those chunks: on the hull only the longest W per byte first
        pending = [c for c in range(top, num_chunks) if weight[c] > 0]
        for c in sorted(pending, key=lambda c: Fraction(kept[c], weight[c])):
            bytes_held += kept[c]
            left_us += weight[c]
            states.append((bytes_held, left_us))
    last_bytes = held[chunk + 1]
    last_us = sum(backward) + sum(forward[chunk + 1 :])
    others_us = _most_value(states, problem.num_microbatches - 1, None if capacity is None else capacity - last_bytes)
    targets = stages if problem.objective == "span" else range(problem.num_stages)
    return max(0, chains.finish_us(stages[chunk], targets) - last_us - others_us)


def _most_value(states: Sequence[tuple[int, int]], count: int, capacity: int | None) -> int:
    """Upper bound on the total value of `count` states whose bytes sum to at most `capacity` (None: no limit).

    States are (bytes, value), (0, 0) among them. Exact when at most two states are worth taking; else
    the linear relaxation, rounded down: all start in the best state of 0 bytes and climb the upper concave hull,
    steepest edge first.
    """
    if capacity is None:
        return count * max(value for _, value in states)
    capacity = max(0, capacity)
    hull: list[tuple[int, int]] = []
    for size, value in sorted(set(states), key=lambda state: (state[0], -state[1])):
        if hull and value <= hull[-1][1]:
            continue  # as many bytes or more, and not worth more
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (size - hull[-1][0]) <= (value - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((size, value))
    useful = {state for state in states if state[1] > 0}
    if len(useful) <= 2 and hull[0] == (0, 0):
        (size_a, value_a), (size_b, value_b) = [*useful, (1, 0), (1, 0)][:2]
        return max(
            x * value_a + min(count - x, (capacity - x * size_a) // size_b) * value_b
            for x in range(min(count, capacity // size_a) + 1)
        )
    total, left = count * hull[0][1], capacity
    for (size_low, value_low), (size_high, value_high) in pairwise(hull):
        price = count * (size_high - size_low)
        if price > left:
            return total + (value_high - value_low) * left // (size_high - size_low)
        total += count * (value_high - value_low)
        left -= price
    return total


# --- memory and energy ------------------------------------------------------------------------------------------------


def memory_energy_bound_us(problem: PipelineProblem) -> int:
    """Every microbatch occupies bytes × lifetime on a rank; the capacity × the horizon must cover it.

    On stage s a microbatch holds M_B from the start of its F to the end of its back op, at least
    L = F + (way up from s and down again) + back, and M_W while its W runs. Per rank, `_energy_by_bytes_us` adds
    the areas of all chunks; with one chunk `_energy_by_count_us` counts microbatches, so that capacity which is
    no multiple of M_B is not used. Both subtract what the horizon's ends cannot use: at its start memory fills
    no faster than F run, at its end it empties no faster than backwards run. The makespan adds the time before
    F(s_1, 0) can start, when r holds nothing.
    """
    if problem.capacity_bytes is None:
        return 0
    chains = Chains(problem)
    best = 0
    for rank, stages in enumerate(problem.stages_of_rank):
        horizon_us = _energy_by_bytes_us(problem, chains, rank)
        if len(stages) == 1:
            horizon_us = max(horizon_us, _energy_by_count_us(problem, chains, rank))
        wait_us = chains.reach_us[stages[0]] if problem.objective == "makespan" else 0
        best = max(best, wait_us + horizon_us)
    return best


def _energy_by_count_us(problem: PipelineProblem, chains: Chains, rank: int) -> int:
    """The memory-energy bound of a rank with one chunk, counting microbatches between F start and back op end.

    Let x be their number. x ≤ K = ⌊capacity / M_B⌋ (and ≤ m); while a W runs, whose microbatch is not in x but holds
    M_W, x ≤ K_W = ⌊(capacity − M_W) / M_B⌋; while a B runs that took extra bytes, x ≤ K_B, likewise. Over the
    horizon x sums to at least m·L, so K·horizon ≥ m·L + m·W·(K − K_W) + m·B·(K − K_B) + ends. Ends: before i+1
    forwards have ended, x ≤ i+1. And t µs before the horizon ends, x microbatches still have W and back op
    to run, at most one back op already begun: x·(back + W) ≤ t + back. What that leaves below min(K_W, K_B) is
    lost besides; at the start it counts against K itself if no back op can have begun by then. The two ends do not
    meet, since K·(F + back + W) is no more than the rank's work.
    """
    assert problem.capacity_bytes is not None
    (stage,) = problem.stages_of_rank[rank]
    capacity, size, m = problem.capacity_bytes[rank], problem.activation_bytes[stage], problem.num_microbatches
    forward, back = problem.forward_us[stage], problem.back_us[stage]
    weight = problem.weight_us[stage] if problem.split[stage] else 0
    if size == 0 or size > capacity:
        return 0
    most = min(m, capacity // size)
    most_in_weight = min(most, (capacity - problem.kept_bytes[stage]) // size) if weight else most
    most_in_back = min(most, (capacity - problem.extra_bytes[stage]) // size)
    if min(most_in_weight, most_in_back) < 0:
        return 0  # nothing fits
    ends = min(most_in_weight, most_in_back)
    until_back = chains.window_us(stage, stage)
    at_start = most if (most - 1) * forward <= until_back else ends
    lost = forward * (at_start * (at_start - 1) // 2 if at_start > 0 else 0)
    lost += ends * weight + (back + weight) * (ends * (ends - 1) // 2 if ends > 0 else 0)
    area = m * (until_back + back + weight * (most - most_in_weight) + back * (most - most_in_back))
    return -((-area - lost) // most)


def _energy_by_bytes_us(problem: PipelineProblem, chains: Chains, rank: int) -> int:
    """The memory-energy bound of a rank in bytes, any number of chunks.

    Let u be the bytes held by microbatches between F start and back op end, plus min(M_B, M_W) of the microbatch
    whose W runs now. u is at most what is held, so at most the capacity rounded down to a multiple of all sizes'
    greatest common divisor, and at most m·ΣM_B; over the horizon it sums to at least
    Σ_chunks m·(M_B·L + min(M_B, M_W)·W). Ends: t after the start, the forwards that have ended took at most t, so
    u ≤ ρ·t + max M_B with ρ = max M_B / F. t before the end, all microbatches in u have back op and W to run, at
    most one back op already begun, so u ≤ σ·(t + that back op) with σ = max M_B / (back + W), or, while a W runs,
    u ≤ σ·t + min(M_B, M_W). The area above these lines is lost; the two triangles are cut to fit side by side
    into the rank's work.
    """
    assert problem.capacity_bytes is not None
    stages, m = problem.stages_of_rank[rank], problem.num_microbatches
    size, kept, extra = problem.activation_bytes, problem.kept_bytes, problem.extra_bytes
    unit = gcd(*(value for s in stages for value in (size[s], kept[s], extra[s])))
    if unit == 0:
        return 0
    capacity = min(problem.capacity_bytes[rank] // unit * unit, m * sum(size[s] for s in stages))
    if capacity == 0:
        return 0
    weight = {s: problem.weight_us[s] if problem.split[s] else 0 for s in stages}
    area = 0
    for s in stages:
        area += m * size[s] * (chains.window_us(s, s) + problem.back_us[s]) + m * min(size[s], kept[s]) * weight[s]
    up = max(Fraction(size[s], problem.forward_us[s]) for s in stages)
    down = max(Fraction(size[s], problem.back_us[s] + weight[s]) for s in stages)
    up_room = capacity - max(size[s] for s in stages)
    down_room = capacity - max(max(down * problem.back_us[s], Fraction(min(size[s], kept[s]))) for s in stages)
    up_us = max(Fraction(0), up_room / up) if up else Fraction(0)
    down_us = max(Fraction(0), down_room / down) if down else Fraction(0)
    if up_us + down_us > problem.work_us[rank]:
        share = problem.work_us[rank] / (up_us + down_us)
        up_us, down_us = up_us * share, down_us * share
    lost = up_us * up_room - up * up_us**2 / 2 + down_us * down_room - down * down_us**2 / 2
    return ceil((area + lost) / capacity)


# --- chains -----------------------------------------------------------------------------------------------------------


def chain_bound_us(problem: PipelineProblem) -> int:
    """Longest paths, and one rank's work squeezed between them.

    Take the precedences of every order in microbatch order: those of the problem; each kind of a stage in
    microbatch order; and what memory enforces. Chunk i's microbatches between F and back op also hold
    M_B on the chunks before it (their F came earlier, their back op comes later), so at most
    K = ⌊capacity / (M_B of chunks up to i)⌋ of them exist, and F(s_i, j) runs after the back op of j − K. And with all
    earlier back ops done, j − w microbatches still hold M_W, so F(s_i, j) runs after W of
    j − 1 − ⌊(capacity − M_B of chunks up to i) / M_W⌋ (where M_W ≤ M_B).

    A longest path gives each op a head (no earlier start after the horizon's start) and a tail (no less time from its
    end to the horizon's end). Ops of one rank run one at a time, so running always the available op with the
    longest tail, with interruption allowed, is the best that heads and tails permit (Jackson; Carlier and Pinson), and
    the largest end + tail bounds the horizon. For the makespan, per rank. For the span, per pair (r, q): heads
    and tails against the horizon of r, over the ops of q that lie in it because a path leads from
    F(s_1, 0) of r to them and on to an op of r (q = r: all of them). On large pipelines only pairs q = r and
    r = the rank of stage 0 are tried; on very large ones (ops × ranks over 12 million) the function returns 0.
    """
    num_targets = problem.num_ranks if problem.objective == "span" else 1
    if problem.num_stages * problem.num_microbatches * 3 * num_targets > _CHAIN_CELLS:
        return 0
    heads = _heads_us(problem)
    tails = _tails_us(problem)
    best = 0
    every_pair = problem.num_ranks <= _ALL_PAIRS_RANKS
    for rank, stages in enumerate(problem.stages_of_rank):
        durations = np.array(
            [(problem.forward_us[s], problem.back_us[s], problem.weight_us[s]) for s in stages], dtype=np.int64
        )
        with_weight = np.array([(True, True, problem.has_weight_op[s]) for s in stages])
        shape = (len(stages), 3, problem.num_microbatches)
        duration = np.broadcast_to(durations[:, :, None], shape)
        real = np.broadcast_to(with_weight[:, :, None], shape)
        if num_targets == 1:
            horizons: Iterable[int] = (0,)
        else:
            horizons = range(num_targets) if every_pair else {rank, problem.rank_of_stage[0]}
        for horizon in horizons:
            head = heads[list(stages), :, :, horizon]
            tail = tails[list(stages), :, :, horizon]
            inside = real & (head >= 0) & (tail >= 0)
            if not inside.any():
                continue
            # what no interruption can beat is cheap to see first: one long path
            best = max(best, int((head + duration + tail)[inside].max()))
            best = max(best, _one_machine_us(head[inside].tolist(), duration[inside].tolist(), tail[inside].tolist()))
    return best


def _memory_lags(problem: PipelineProblem, stage: int) -> tuple[int, int]:
    """(a, b): F(stage, j) runs after the back op of j − a and after W of j − b, by memory; m or more is no limit."""
    m = problem.num_microbatches
    if problem.capacity_bytes is None:
        return m, m
    rank = problem.rank_of_stage[stage]
    held = sum(problem.activation_bytes[s] for s in problem.stages_of_rank[rank] if s <= stage)
    capacity = problem.capacity_bytes[rank]
    if held > capacity or held == 0:
        return m, m
    kept = problem.kept_bytes[stage]
    after_weight = m
    if problem.has_weight_op[stage] and 0 < kept <= problem.activation_bytes[stage]:
        after_weight = (capacity - held) // kept + 1
    return capacity // held, after_weight


def _heads_us(problem: PipelineProblem) -> npt.NDArray[np.int64]:
    """Earliest starts, shape (S, 3, m, horizons); 3: F, back, W. Very negative: no path from the horizon's start."""
    num_stages, m = problem.num_stages, problem.num_microbatches
    span = problem.objective == "span"
    heads = np.full((num_stages, 3, m, problem.num_ranks if span else 1), _NEVER, dtype=np.int64)
    forward, back, transfer = problem.forward_us, problem.back_us, problem.transfer_us
    weight = problem.weight_us
    lags = [_memory_lags(problem, s) for s in range(num_stages)]
    for j in range(m):
        for s in range(num_stages):
            row = heads[s, 0, j]
            if s:
                np.maximum(row, heads[s - 1, 0, j] + (forward[s - 1] + transfer[s - 1]), out=row)
            if j:
                np.maximum(row, heads[s, 0, j - 1] + forward[s], out=row)
            back_lag, weight_lag = lags[s]
            if j >= back_lag:
                np.maximum(row, heads[s, 1, j - back_lag] + back[s], out=row)
            if j >= weight_lag:
                np.maximum(row, heads[s, 2, j - weight_lag] + weight[s], out=row)
            horizon = problem.rank_of_stage[s] if span else 0
            row[horizon] = max(row[horizon], 0)
        for s in range(num_stages - 1, -1, -1):
            row = heads[s, 1, j]
            np.maximum(row, heads[s, 0, j] + forward[s], out=row)
            if s + 1 < num_stages:
                np.maximum(row, heads[s + 1, 1, j] + (back[s + 1] + transfer[s]), out=row)
            if j:
                np.maximum(row, heads[s, 1, j - 1] + back[s], out=row)
            weight_row = heads[s, 2, j]
            np.maximum(weight_row, row + back[s], out=weight_row)
            if j:
                np.maximum(weight_row, heads[s, 2, j - 1] + weight[s], out=weight_row)
    return heads


def _tails_us(problem: PipelineProblem) -> npt.NDArray[np.int64]:
    """Least times from an op's end to the horizon's end, shape and meaning as `_heads_us`."""
    num_stages, m = problem.num_stages, problem.num_microbatches
    span = problem.objective == "span"
    tails = np.full((num_stages, 3, m, problem.num_ranks if span else 1), _NEVER, dtype=np.int64)
    forward, back, transfer = problem.forward_us, problem.back_us, problem.transfer_us
    weight = [w if has else 0 for w, has in zip(problem.weight_us, problem.has_weight_op, strict=True)]
    lags = [_memory_lags(problem, s) for s in range(num_stages)]
    for j in range(m - 1, -1, -1):
        for s in range(num_stages):
            horizon = problem.rank_of_stage[s] if span else 0
            back_lag, weight_lag = lags[s]
            weight_row = tails[s, 2, j]
            weight_row[horizon] = 0
            if j + 1 < m:
                np.maximum(weight_row, tails[s, 2, j + 1] + weight[s], out=weight_row)
            if j + weight_lag < m:
                np.maximum(weight_row, tails[s, 0, j + weight_lag] + forward[s], out=weight_row)
            row = tails[s, 1, j]
            np.maximum(row, weight_row + weight[s], out=row)
            if s:
                np.maximum(row, tails[s - 1, 1, j] + (back[s - 1] + transfer[s - 1]), out=row)
            if j + 1 < m:
                np.maximum(row, tails[s, 1, j + 1] + back[s], out=row)
            if j + back_lag < m:
                np.maximum(row, tails[s, 0, j + back_lag] + forward[s], out=row)
        for s in range(num_stages - 1, -1, -1):
            row = tails[s, 0, j]
            np.maximum(row, tails[s, 1, j] + back[s], out=row)
            if s + 1 < num_stages:
                np.maximum(row, tails[s + 1, 0, j] + (forward[s + 1] + transfer[s]), out=row)
            if j + 1 < m:
                np.maximum(row, tails[s, 0, j + 1] + forward[s], out=row)
    return tails


def _one_machine_us(heads: Sequence[int], durations: Sequence[int], tails: Sequence[int]) -> int:
    """Least horizon of one machine with heads and tails when ops may be interrupted: Jackson's preemptive rule."""
    by_head = sorted(range(len(heads)), key=heads.__getitem__)
    available: list[tuple[int, int]] = []  # (−tail, remaining)
    best = now = index = 0
    while index < len(by_head) or available:
        if not available:
            now = max(now, heads[by_head[index]])
        while index < len(by_head) and heads[by_head[index]] <= now:
            op = by_head[index]
            heapq.heappush(available, (-tails[op], durations[op]))
            index += 1
        minus_tail, remaining = heapq.heappop(available)
        end = now + remaining
        if index < len(by_head) and heads[by_head[index]] < end:
            until = heads[by_head[index]]
            heapq.heappush(available, (minus_tail, end - until))
            now = until
        else:
            now = end
            best = max(best, end - minus_tail)
    return best
