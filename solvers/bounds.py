"""Lower bounds on the cost of every order of a pipeline problem. No solver, a fraction of a second.

Four arguments, each its own function, each with its proof: work, head-tail, memory-energy, chain. They
decide how good an answer can be claimed to be; `best_bound` takes the largest. All hold for every valid
order, not only for orders in microbatch order, because renaming microbatches changes no time (see
`solvers.pipeline`). For a problem that nothing fits they mean nothing, but still return a number.

Words used in the proofs. Rank r hosts the stages s_1 < .. < s_v, its chunks; microbatches j = 0 .. m-1 run in order.
The first op of r is F(s_1, 0), since F(s_i, j) needs F(s_1, j) and every backward its forward. The *back* op of a
stage is B where it is split, else BW. T is what F takes: M_B, or the checkpoint where the stage recomputes; then R
comes between F and back op, takes M_B − T, and makes R + back the least time for which all of M_B is held. The
*capacity* of r is what its fixed bytes leave of it. The *horizon* is what the objective measures: for the span, the
window of one rank from its first op to its last; for the makespan, the whole run. A *window* of rank r is a part of
its horizon; the horizon costs at least the rank's work plus the idle time of its windows.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from math import ceil, gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from solvers.pipeline import PipelineProblem
from solvers.timing import NEVER

_CHAIN_CELLS = 12_000_000  # ops × ranks above which `chain_bound_us` would take seconds and gigabytes
_ALL_PAIRS_RANKS = 16  # up to here `chain_bound_us` looks at every pair of ranks


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
        # the turn at stage s: from the end of F(s, j) to the start of its back op, by way of the stages above and of R
        self._turn_us = [problem.rerun_us[-1]] * problem.num_stages
        for s in range(problem.num_stages - 2, -1, -1):
            above_us = problem.forward_us[s + 1] + self._turn_us[s + 1] + problem.back_us[s + 1]
            self._turn_us[s] = max(problem.rerun_us[s], above_us + 2 * problem.transfer_us[s])
        # earliest start of F(s, 0) after the start of F(0, 0), shape (S,)
        self.reach_us = [a + b for a, b in zip(self._forward_us, self._hops_us, strict=False)]

    def window_us(self, up_from: int, down_to: int) -> int:
        """Least time from the start of F(up_from, j) to the start of the back op of (down_to, j)."""
        turn = max(up_from, down_to)  # R below it may have run before, above it is on the way
        up = self.reach_us[turn] - self.reach_us[up_from] + self._problem.forward_us[turn]
        down = self._back_us[turn + 1] - self._back_us[down_to + 1] + self._hops_us[turn] - self._hops_us[down_to]
        return up + self._turn_us[turn] + down

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

    Head. Cut the horizon of r at the start b of the first back op of chunk c. Microbatch 0 must first go up from s_1
    to the last stage and come down to s_c, so the window before b is at least that long (from the start of F(s_1, 0)
    for the span, from the start of the run for the makespan). What can r run in it? No back op of chunks up to c, so
    every microbatch is in one of few states: F of the first f chunks done; or all F done and the chunks above some
    chunk ≥ c done to the end (B without its W would hold more and have worked less). A state has an amount of work
    done and an amount of bytes held; at b the m states together hold no more than the capacity, with microbatch 0
    about to start its back op. The most work under that is a knapsack, solved exactly for one chunk, and by its
    linear relaxation, which is not less, for more. Idle in the head ≥ window − that work. R is work that may be done
    for every chunk with F done and back op not; microbatch 0 needs it on chunk c, and may have it on the chunks
    below, which is counted as done for no bytes. The limit in flight of every chunk is a knapsack of its own, in
    which a state weighs 1 if that chunk's F is done and its back op is not.

    Tail. Cut at the end f of the last F of chunk c. Microbatch m-1 still has to go up, come down to s_1 and run the
    backwards there (the makespan: down to stage 0), so the window after f is at least that long. What r can run in
    it is the work still to do for the states at f, where F of chunks up to c is done for all microbatches, and the
    states again hold no more than the capacity, nor more in flight than the limits. R is counted as still to do
    wherever the back op is: R done would hold more and leave less. Idle in the tail ≥ window − that work.

    Both. If b ≤ f the windows are disjoint and both idle times count. If f < b, just before b all m microbatches
    hold T on the chunks up to min(c_head, c_tail), none of which has begun a back op; if that exceeds the capacity,
    or m the limit in flight of one of them, it cannot be. If it can be, only the larger of the two idle times is
    counted.

    With one chunk per rank, M_W = M_B / 2 and room for p microbatches this proves ZB-H1 optimal for the span: idle
    on rank 0 is (p-1)·B + 2(p-1)·transfer in the head and (p-1)·(F - W) + 2(p-1)·transfer in the tail.
    """
    chains = Chains(problem)
    best = 0
    for rank, stages in enumerate(problem.stages_of_rank):
        capacity = None if problem.room_bytes is None else problem.room_bytes[rank]
        heads = [_head_idle_us(problem, chains, stages, chunk, capacity) for chunk in range(len(stages))]
        tails = [_tail_idle_us(problem, chains, stages, chunk, capacity) for chunk in range(len(stages))]
        held = list(accumulate(problem.taken_by_forward_bytes[s] for s in stages))
        limit = list(accumulate((problem.in_flight_limit[s] for s in stages), min))
        idle = 0
        for head_chunk, head in enumerate(heads):
            for tail_chunk, tail in enumerate(tails):
                low = min(head_chunk, tail_chunk)
                can_overlap = limit[low] >= problem.num_microbatches and (
                    capacity is None or problem.num_microbatches * held[low] <= capacity
                )
                idle = max(idle, max(head, tail) if can_overlap else head + tail)
        best = max(best, problem.work_us[rank] + idle)
    return best


@dataclass(frozen=True)
class _State:
    """What one microbatch has done on a rank: F of `up` chunks, back ops of those from `down` on."""

    up: int
    down: int
    size: int  # bytes held
    value_us: int  # work, done or left to do

    def in_flight(self, chunk: int) -> int:
        """1 if the chunk's F is done and its back op is not."""
        return int(chunk < min(self.up, self.down))


def _head_idle_us(
    problem: PipelineProblem, chains: Chains, stages: Sequence[int], chunk: int, capacity: int | None
) -> int:
    num_chunks = len(stages)
    forward = [problem.forward_us[s] for s in stages]
    rerun = [problem.rerun_us[s] for s in stages]
    backward = [problem.rerun_us[s] + problem.backward_us[s] + problem.weight_us[s] for s in stages]
    held = [0, *accumulate(problem.taken_by_forward_bytes[s] for s in stages)]
    restored = [problem.restored_bytes[s] for s in stages]
    states = []
    for up, down in [(f, num_chunks) for f in range(num_chunks)] + [
        (num_chunks, top) for top in range(chunk + 1, num_chunks + 1)
    ]:
        size, value_us = held[min(up, down)], sum(forward[:up]) + sum(backward[down:])
        states.append(_State(up, down, size, value_us))
        # R done on some of those chunks: on the hull only the longest R per byte first
        for c in _by_density([c for c in range(min(up, down)) if rerun[c] > 0], restored, rerun):
            size, value_us = size + restored[c], value_us + rerun[c]
            states.append(_State(up, down, size, value_us))
    first_bytes = held[chunk] + problem.activation_bytes[stages[chunk]] + problem.extra_bytes[stages[chunk]]
    first_us = sum(forward) + sum(rerun[: chunk + 1]) + sum(backward[chunk + 1 :])
    others_us = _most_work_us(problem, stages, states, chunk, None if capacity is None else capacity - first_bytes)
    start = stages[0] if problem.objective == "span" else 0
    return max(0, chains.window_us(start, stages[chunk]) - first_us - others_us)


def _tail_idle_us(
    problem: PipelineProblem, chains: Chains, stages: Sequence[int], chunk: int, capacity: int | None
) -> int:
    num_chunks = len(stages)
    forward = [problem.forward_us[s] for s in stages]
    weight = [problem.weight_us[s] if problem.split[s] else 0 for s in stages]
    backward = [problem.rerun_us[s] + problem.backward_us[s] + problem.weight_us[s] for s in stages]
    held = [0, *accumulate(problem.taken_by_forward_bytes[s] for s in stages)]
    kept = [problem.kept_bytes[s] for s in stages]
    states = [_State(num_chunks, 0, 0, 0)]
    for f in range(chunk + 1, num_chunks):  # F done on f chunks, nothing else
        states.append(_State(f, num_chunks, held[f], sum(backward) + sum(forward[f:])))
    for top in range(num_chunks + 1):  # all F done, back ops done on the chunks from `top` on
        size, left_us = held[top], sum(backward[:top])
        states.append(_State(num_chunks, top, size, left_us))
        # W pending on some of those chunks: on the hull only the longest W per byte first
        for c in _by_density([c for c in range(top, num_chunks) if weight[c] > 0], kept, weight):
            size, left_us = size + kept[c], left_us + weight[c]
            states.append(_State(num_chunks, top, size, left_us))
    last_bytes = held[chunk + 1]
    last_us = sum(backward) + sum(forward[chunk + 1 :])
    others_us = _most_work_us(problem, stages, states, chunk, None if capacity is None else capacity - last_bytes)
    targets = stages if problem.objective == "span" else range(problem.num_stages)
    return max(0, chains.finish_us(stages[chunk], targets) - last_us - others_us)


def _by_density(chunks: Sequence[int], size: Sequence[int], value: Sequence[int]) -> list[int]:
    """Those of most value per byte first; values are positive."""
    return sorted(chunks, key=lambda c: Fraction(size[c], value[c]))


def _most_work_us(
    problem: PipelineProblem, stages: Sequence[int], states: Sequence[_State], chunk: int, room: int | None
) -> int:
    """Upper bound on the total value of the states of all microbatches but the one that decides the cut at `chunk`.

    That one is in flight on the chunks up to `chunk`; `room` is what it leaves of the capacity.
    """
    count = problem.num_microbatches - 1
    most_us = _most_value([(state.size, state.value_us) for state in states], count, room)
    for c, stage in enumerate(stages):
        if problem.in_flight_limit[stage] < problem.num_microbatches:
            left = problem.in_flight_limit[stage] - (c <= chunk)
            weighed = [(state.in_flight(c), state.value_us) for state in states]
            most_us = min(most_us, _most_value(weighed, count, left))
    return most_us


def upper_hull(states: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The (bytes, value) states of the upper concave hull: rising in both, ever less value per byte."""
    hull: list[tuple[int, int]] = []
    for size, value in sorted(set(states), key=lambda state: (state[0], -state[1])):
        if hull and value <= hull[-1][1]:
            continue  # as many bytes or more, and not worth more
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (size - hull[-1][0]) <= (value - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((size, value))
    return hull


def _most_value(states: Sequence[tuple[int, int]], count: int, capacity: int | None) -> int:
    """Upper bound on the total value of `count` states whose bytes sum to at most `capacity` (None: no limit).

    States are (bytes, value), (0, 0) among them. Exact when at most two states are worth taking; else
    the linear relaxation, rounded down: all start in the best state of 0 bytes and climb the upper concave hull,
    steepest edge first.
    """
    if capacity is None:
        return count * max(value for _, value in states)
    capacity = max(0, capacity)
    hull = upper_hull(states)
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

    On stage s a microbatch holds T from the start of its F to the end of its back op, at least
    L = F + (way up from s and down again) + back, M_B − T from the start of its R, at least R + back of that, and M_W
    while its W runs. Per rank, `_energy_by_bytes_us` adds
    the areas of all chunks; with one chunk `_energy_by_count_us` counts microbatches, so that capacity which is
    no multiple of M_B is not used. Both subtract what the horizon's ends cannot use: at its start memory fills
    no faster than F run, at its end it empties no faster than backwards run. The makespan adds the time before
    F(s_1, 0) can start, when r holds nothing.
    """
    if problem.room_bytes is None and problem.max_in_flight is None:
        return 0
    chains = Chains(problem)
    best = 0
    for rank, stages in enumerate(problem.stages_of_rank):
        horizon_us = 0 if problem.room_bytes is None else _energy_by_bytes_us(problem, chains, rank)
        if len(stages) == 1:
            horizon_us = max(horizon_us, _energy_by_count_us(problem, chains, rank))
        wait_us = chains.reach_us[stages[0]] if problem.objective == "makespan" else 0
        best = max(best, wait_us + horizon_us)
    return best


def _energy_by_count_us(problem: PipelineProblem, chains: Chains, rank: int) -> int:
    """The memory-energy bound of a rank with one chunk, counting microbatches between F start and back op end.

    Let x be their number. x ≤ K = ⌊capacity / T⌋ (and ≤ m, and ≤ the limit in flight); while a W runs, whose
    microbatch is not in x but holds M_W, x ≤ K_W = ⌊(capacity − M_W) / T⌋; while an R runs, one of them holds M_B,
    so x ≤ K_R = ⌊(capacity − M_B + T) / T⌋; while a back op runs, x ≤ K_B, likewise with B's extra bytes. Over the
    horizon x sums to at least m·L, so K·horizon ≥ m·L + m·W·(K − K_W) + m·R·(K − K_R) + m·back·(K − K_B) + ends.
    Ends: before i+1 forwards have ended, x ≤ i+1. And t µs before the horizon ends, x microbatches still have W and
    back op to run, at most one back op already begun: x·(back + W) ≤ t + back. What that leaves below min(K_W, K_R,
    K_B) is lost besides; at the start it counts against K itself if no back op can have begun by then and K_R = K.
    The two ends do not meet, since K·(F + back + W) is no more than the rank's work.
    """
    (stage,) = problem.stages_of_rank[rank]
    size, restored = problem.taken_by_forward_bytes[stage], problem.restored_bytes[stage]
    m, limit = problem.num_microbatches, problem.in_flight_limit[stage]
    forward, rerun, back = problem.forward_us[stage], problem.rerun_us[stage], problem.back_us[stage]
    weight = problem.weight_us[stage] if problem.split[stage] else 0
    if problem.room_bytes is None or size == 0:
        if limit == m:
            return 0
        most = most_in_weight = most_in_rerun = most_in_back = limit
    else:
        capacity = problem.room_bytes[rank]
        if size > capacity:
            return 0
        most = min(limit, capacity // size)
        most_in_weight = min(most, (capacity - problem.kept_bytes[stage]) // size) if weight else most
        most_in_rerun = min(most, (capacity - restored) // size)
        most_in_back = min(most, (capacity - restored - problem.extra_bytes[stage]) // size)
    ends = min(most_in_weight, most_in_rerun, most_in_back)
    if ends < 0:
        return 0  # nothing fits
    until_back = chains.window_us(stage, stage)
    at_start = most if (most - 1) * forward <= until_back and most_in_rerun == most else ends
    lost = forward * (at_start * (at_start - 1) // 2 if at_start > 0 else 0)
    lost += ends * weight + (back + weight) * (ends * (ends - 1) // 2 if ends > 0 else 0)
    area = m * (until_back + back + weight * (most - most_in_weight) + back * (most - most_in_back))
    area += m * rerun * (most - most_in_rerun)
    return -((-area - lost) // most)


def _energy_by_bytes_us(problem: PipelineProblem, chains: Chains, rank: int) -> int:
    """The memory-energy bound of a rank in bytes, any number of chunks.

    Let u be the bytes held by microbatches between F start and back op end, without B's extra, plus min(M_B, M_W) of
    the microbatch whose W runs now. u is at most what is held, so at most the capacity rounded down to a multiple of
    all sizes' greatest common divisor, and at most m·ΣM_B; over the horizon it sums to at least Σ_chunks m·(T·L +
    (M_B − T)·(R + back) + min(M_B, M_W)·W). Ends: t after the start, the F and R that have ended took at most t, so
    u ≤ ρ·t + max(T, M_B − T) with ρ = max of T / F and M_B / (F + R). t before the end, all microbatches in u have
    back op and W to run, at most one back op already begun, so u ≤ σ·(t + that back op) with σ = max M_B / (back +
    W), or, while a W runs, u ≤ σ·t + min(M_B, M_W). The area above these lines is lost; the two triangles are cut to
    fit side by side into the rank's work.
    """
    assert problem.room_bytes is not None
    stages, m = problem.stages_of_rank[rank], problem.num_microbatches
    size, kept, extra = problem.activation_bytes, problem.kept_bytes, problem.extra_bytes
    first, rest, rerun = problem.taken_by_forward_bytes, problem.restored_bytes, problem.rerun_us
    unit = gcd(*(value for s in stages for value in (first[s], rest[s], kept[s], extra[s])))
    if unit == 0:
        return 0
    capacity = min(problem.room_bytes[rank] // unit * unit, m * sum(size[s] for s in stages))
    if capacity <= 0:
        return 0
    weight = {s: problem.weight_us[s] if problem.split[s] else 0 for s in stages}
    area = 0
    for s in stages:
        area += m * first[s] * (chains.window_us(s, s) + problem.back_us[s]) + m * min(size[s], kept[s]) * weight[s]
        area += m * rest[s] * (rerun[s] + problem.back_us[s])
    up = max(
        max(Fraction(first[s], problem.forward_us[s]), Fraction(size[s], problem.forward_us[s] + rerun[s]))
        for s in stages
    )
    down = max(Fraction(size[s], problem.back_us[s] + weight[s]) for s in stages)
    up_room = capacity - max(max(first[s], rest[s]) for s in stages)
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

    Take the precedences of every order in microbatch order: those of the problem; each kind of a stage in microbatch
    order; and what memory and the limits in flight enforce. Chunk i's microbatches between F and back op also hold T
    on the chunks before it (their F came earlier, their back op comes later), so at most K = ⌊capacity / (T of
    chunks up to i)⌋ of them exist, or the limit in flight if that is less, and F(s_i, j) runs after the back op of j
    − K. Likewise R(s_i, j) after that of j − ⌊capacity / (T of chunks before i, and M_B)⌋. And a microbatch whose W
    is to come holds min(T, M_W) or more, so F(s_i, j) runs after W of j − 1 − ⌊(capacity − T of chunks up to i) /
    min(T, M_W)⌋ (where M_W ≤ M_B).

    A longest path gives each op a head (no earlier start after the horizon's start) and a tail (no less time from its
    end to the horizon's end). Ops of one rank run one at a time, so running always the available op with the
    longest tail, with interruption allowed, is the best that heads and tails permit (Jackson; Carlier and Pinson), and
    the largest end + tail bounds the horizon. For the makespan, per rank. For the span, per pair (r, q): heads
    and tails against the horizon of r, over the ops of q that lie in it because a path leads from
    F(s_1, 0) of r to them and on to an op of r (q = r: all of them). On large pipelines only pairs q = r and
    r = the rank of stage 0 are tried; on very large ones (ops × ranks over 12 million) the function returns 0.
    """
    num_targets = problem.num_ranks if problem.objective == "span" else 1
    num_kinds = 4 if any(problem.has_recompute) else 3
    if problem.num_stages * problem.num_microbatches * num_kinds * num_targets > _CHAIN_CELLS:
        return 0
    heads = _heads_us(problem)
    tails = _tails_us(problem)
    best = 0
    every_pair = problem.num_ranks <= _ALL_PAIRS_RANKS
    for rank, stages in enumerate(problem.stages_of_rank):
        durations = np.array(
            [
                (problem.forward_us[s], problem.back_us[s], problem.weight_us[s], problem.rerun_us[s])[:num_kinds]
                for s in stages
            ],
            dtype=np.int64,
        )
        exists = np.array(
            [(True, True, problem.has_weight_op[s], problem.has_recompute[s])[:num_kinds] for s in stages]
        )
        shape = (len(stages), num_kinds, problem.num_microbatches)
        duration = np.broadcast_to(durations[:, :, None], shape)
        real = np.broadcast_to(exists[:, :, None], shape)
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


class _Lags(NamedTuple):
    """What memory and the limit in flight force on a stage; m or more is no limit."""

    forward_after_back: int  # F(s, j) runs after the back op of j − this
    forward_after_weight: int  # and after W of j − this
    rerun_after_back: int  # R(s, j) after the back op of j − this


def _lags(problem: PipelineProblem, stage: int) -> _Lags:
    m, limit = problem.num_microbatches, problem.in_flight_limit[stage]
    unlimited = _Lags(limit, m, m)
    if problem.room_bytes is None:
        return unlimited
    rank = problem.rank_of_stage[stage]
    taken = problem.taken_by_forward_bytes[stage]
    held = sum(problem.taken_by_forward_bytes[s] for s in problem.stages_of_rank[rank] if s <= stage)
    with_rerun = held + problem.restored_bytes[stage]
    capacity = problem.room_bytes[rank]
    if with_rerun > capacity or with_rerun == 0:
        return unlimited
    kept = problem.kept_bytes[stage]
    after_weight = m
    if problem.has_weight_op[stage] and kept <= problem.activation_bytes[stage] and min(kept, taken) > 0:
        after_weight = (capacity - held) // min(kept, taken) + 1
    return _Lags(min(limit, capacity // held) if held else limit, after_weight, capacity // with_rerun)


def _heads_us(problem: PipelineProblem) -> npt.NDArray[np.int64]:
    """Earliest starts, shape (S, kinds, m, horizons). Very negative: no path from the horizon's start.

    The kinds are F, back op, W, and, if any stage recomputes, R.
    """
    num_stages, m = problem.num_stages, problem.num_microbatches
    span = problem.objective == "span"
    num_kinds = 4 if any(problem.has_recompute) else 3
    heads = np.full((num_stages, num_kinds, m, problem.num_ranks if span else 1), NEVER, dtype=np.int64)
    forward, back, transfer = problem.forward_us, problem.back_us, problem.transfer_us
    weight = problem.weight_us
    rerun, recomputes = problem.rerun_us, problem.has_recompute
    lags = [_lags(problem, s) for s in range(num_stages)]
    for j in range(m):
        for s in range(num_stages):
            row = heads[s, 0, j]
            if s:
                np.maximum(row, heads[s - 1, 0, j] + (forward[s - 1] + transfer[s - 1]), out=row)
            if j:
                np.maximum(row, heads[s, 0, j - 1] + forward[s], out=row)
            back_lag, weight_lag, _ = lags[s]
            if j >= back_lag:
                np.maximum(row, heads[s, 1, j - back_lag] + back[s], out=row)
            if j >= weight_lag:
                np.maximum(row, heads[s, 2, j - weight_lag] + weight[s], out=row)
            horizon = problem.rank_of_stage[s] if span else 0
            row[horizon] = max(row[horizon], 0)
        for s in range(num_stages - 1, -1, -1):
            row = heads[s, 1, j]
            np.maximum(row, heads[s, 0, j] + forward[s], out=row)
            if recomputes[s]:
                rerun_row = heads[s, 3, j]
                np.maximum(rerun_row, heads[s, 0, j] + forward[s], out=rerun_row)
                if j:
                    np.maximum(rerun_row, heads[s, 3, j - 1] + rerun[s], out=rerun_row)
                if j >= lags[s].rerun_after_back:
                    np.maximum(rerun_row, heads[s, 1, j - lags[s].rerun_after_back] + back[s], out=rerun_row)
                np.maximum(row, rerun_row + rerun[s], out=row)
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
    num_kinds = 4 if any(problem.has_recompute) else 3
    tails = np.full((num_stages, num_kinds, m, problem.num_ranks if span else 1), NEVER, dtype=np.int64)
    forward, back, transfer = problem.forward_us, problem.back_us, problem.transfer_us
    weight = [w if has else 0 for w, has in zip(problem.weight_us, problem.has_weight_op, strict=True)]
    rerun, recomputes = problem.rerun_us, problem.has_recompute
    lags = [_lags(problem, s) for s in range(num_stages)]
    for j in range(m - 1, -1, -1):
        for s in range(num_stages):
            horizon = problem.rank_of_stage[s] if span else 0
            back_lag, weight_lag, rerun_lag = lags[s]
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
            if recomputes[s]:
                if j + rerun_lag < m:
                    np.maximum(row, tails[s, 3, j + rerun_lag] + rerun[s], out=row)
                rerun_row = tails[s, 3, j]
                np.maximum(rerun_row, row + back[s], out=rerun_row)
                if j + 1 < m:
                    np.maximum(rerun_row, tails[s, 3, j + 1] + rerun[s], out=rerun_row)
        for s in range(num_stages - 1, -1, -1):
            row = tails[s, 0, j]
            np.maximum(row, tails[s, 1, j] + back[s], out=row)
            if recomputes[s]:
                np.maximum(row, tails[s, 3, j] + rerun[s], out=row)
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
