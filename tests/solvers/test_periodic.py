"""Patterns obey an independent check; their unrolled orders are valid, fit, and find the published V shapes."""

import random
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_cases import ZOO, even, problems, zero_bubble_profile
from pipeline_oracle import order_cost_us

from solvers.bounds import Bound, best_bound
from solvers.layouts import LayoutPaths
from solvers.modulo import Budget, SteadyState, find_pattern, least_period
from solvers.periodic import PeriodicSchedule, Unrolled, loosened, shortest_patterns
from solvers.pipeline import Status


def vee(num_ranks, num_microbatches, forward=1, backward=1, weight=1, transfer=0, *, chunks):
    """Two chunks per rank, placed down and up again; room for so many chunks of M_B = 2 on every rank."""
    rank_of_stage = (*range(num_ranks), *reversed(range(num_ranks)))
    problem = even(
        num_ranks, num_microbatches, forward, backward, weight, rank_of_stage=rank_of_stage, memory=2 * chunks
    )
    hops = tuple(0 if s == num_ranks - 1 else transfer for s in range(2 * num_ranks - 1))
    return replace(problem, transfer_us=hops)


def with_room(problem, room):
    """The problem with just these capacities."""
    return replace(problem, capacity_bytes=tuple(room), fixed_bytes=None)


def generous():
    """A budget no small case uses up."""
    return Budget(60, 60)


def faults(problem, pattern, num_groups=12):
    """What is wrong with a pattern, by playing it: overlaps, broken precedences, memory, limits. Nothing shared."""
    tick = pattern.tick_us
    k = pattern.num_microbatches
    found = []
    fused = [not split or w == 0 for split, w in zip(problem.split, problem.weight_us, strict=True)]
    recompute = problem.recompute_us or (0,) * problem.num_stages
    checkpoint = problem.checkpoint_bytes or problem.activation_bytes
    start, end = {}, {}
    for (kind, s, i), at in pattern.starts.items():
        length = {
            "F": problem.forward_us[s],
            "R": recompute[s],
            "B": problem.backward_us[s] + (problem.weight_us[s] if fused[s] else 0),
            "W": problem.weight_us[s],
        }[kind]
        for group in range(num_groups):
            op = kind, s, group * k + i
            start[op] = Fraction(at + group * pattern.period) * tick
            end[op] = start[op] + length
    for rank in range(problem.num_ranks):
        ops = sorted((op for op in start if problem.rank_of_stage[op[1]] == rank), key=start.get)
        for one, other in pairwise(ops):
            if end[one] > start[other]:
                found.append(f"{one} overlaps {other}")
        changes = []
        for kind, s, j in ops:
            op = kind, s, j
            whole, kept = problem.activation_bytes[s], 0 if fused[s] else problem.weight_activation_bytes[s]
            extra = max(0, problem.weight_activation_bytes[s] - whole) if problem.split[s] else 0
            first = checkpoint[s] if recompute[s] else whole
            take, give = {
                "F": (first, 0),
                "R": (whole - first, 0),
                "B": (extra, whole + extra - kept),
                "W": (0, kept),
            }[kind]
            changes += [(start[op], 1, take), (end[op], 0, -give)]
        held = peak = 0
        for _, _, change in sorted(changes):
            held += change
            peak = max(peak, held)
        if problem.capacity_bytes is not None:
            room = problem.capacity_bytes[rank] - (problem.fixed_bytes[rank] if problem.fixed_bytes else 0)
            if peak > room:
                found.append(f"rank {rank} holds {peak} of {room}")
    last = problem.num_stages - 1
    for kind, s, j in start:
        needs = []
        if kind == "F" and s:
            needs.append((("F", s - 1, j), problem.transfer_us[s - 1]))
        if kind == "B":
            needs.append((("R" if recompute[s] else "F", s, j), 0))
            if s < last:
                needs.append((("B", s + 1, j), problem.transfer_us[s]))
        if kind == "W":
            needs.append((("B", s, j), 0))
        if kind == "R":
            needs.append((("F", s, j), 0))
        for op, delay in needs:
            if end[op] + delay > start[kind, s, j]:
                found.append(f"{(kind, s, j)} starts before {op} has arrived")
    if problem.max_in_flight is not None:
        for s in range(problem.num_stages):
            for j in range(num_groups * k):
                now = start["F", s, j]
                flying = sum(start["F", s, i] <= now < end["B", s, i] for i in range(num_groups * k))
                if flying > problem.max_in_flight[s]:
                    found.append(f"stage {s} has {flying} in flight")
    return found


def shortest(problem, k=1):
    """The least period of patterns with k microbatches, in ticks of the problem's unit, proven by trying all below."""
    state = SteadyState(problem, k)
    period = 1
    while True:
        pattern, proven = find_pattern(state, period, generous(), work_limit=60)
        if pattern is not None:
            assert faults(problem, pattern) == []
            return pattern.period
        assert proven
        period += 1


def test_the_check_sees_every_kind_of_fault():
    problem = even(2, 4, memory=4)
    pattern, _ = find_pattern(SteadyState(problem, 1), 3, generous(), work_limit=10)
    assert faults(problem, pattern) == []
    early = replace(pattern, starts=pattern.starts | {("B", 0, 0): pattern.starts["F", 0, 0] + 1})
    assert any("starts before" in fault for fault in faults(problem, early))
    tight = replace(problem, capacity_bytes=(3, 4))
    assert any("rank 0 holds 4 of 3" in fault for fault in faults(tight, pattern))
    crowded = replace(pattern, period=2)
    assert any("overlaps" in fault for fault in faults(problem, crowded))
    limited = replace(problem, max_in_flight=(1, 1))
    assert any("in flight" in fault for fault in faults(limited, pattern))


@pytest.mark.parametrize(
    ("problem", "k", "want"),
    [
        (even(1, 9, 3, 2, 1), 1, 6),
        (even(2, 9, memory=4), 1, 3),  # 1F1B with two microbatches in flight has no bubble
        (even(2, 9, memory=2), 1, 5),  # one in flight: F, F and B of stage 1, B, W, one after the other on rank 0
        (even(2, 9, memory=2), 2, 10),
        (even(2, 9, memory=3), 1, 4),  # F B W of rank 1 is no bottleneck; rank 0: F . B W
        (even(2, 9, 1, 1, 1, 10, memory=2), 1, 25),  # 1 + 10 + 2 + 10 + 1 + 1
        (even(3, 9, split=False, memory=2), 1, 9),  # three F, three BW of 2
        (even(2, 9, rank_of_stage=(0, 1, 0, 1)), 1, 6),
        (replace(even(2, 9), max_in_flight=(1, 9)), 1, 4),  # F, F and B of stage 1, B; W in the gap
        (replace(even(1, 9), recompute_us=(2,), checkpoint_bytes=(1,)), 1, 5),
        (replace(even(2, 9, memory=5), fixed_bytes=(3, 0)), 1, 5),
    ],
)
def test_least_periods_that_can_be_checked_in_the_head(problem, k, want):
    assert shortest(problem, k) == want
    assert least_period(SteadyState(problem, k)) <= want


def test_two_microbatches_per_period_can_beat_one():
    """Room for six of eight forwards of the 1.5B profile of Qi et al.: least periods as proven, cut to 0.1 %."""
    problem = zero_bubble_profile("1.5b-m24", memory=12)
    problem = replace(problem, activation_bytes=(10000,) * 8, weight_activation_bytes=(3664,) * 8)
    problem = replace(problem, capacity_bytes=(60000,) * 8)
    one, two = SteadyState(problem, 1), SteadyState(problem, 2)
    assert find_pattern(one, 74300, generous(), work_limit=60) == (None, True)
    pattern, _ = find_pattern(one, 74450, generous(), work_limit=60)
    assert faults(problem, pattern) == []
    pattern = min(shortest_patterns(two, generous(), 0, pattern), key=lambda found: found.period)
    assert faults(problem, pattern) == []
    assert pattern.period <= 2 * 56600
    assert find_pattern(two, 2 * 56300, generous(), work_limit=60) == (None, True)


@given(problems())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_patterns_of_drawn_problems_obey_the_check(problem):
    if not problem.is_feasible():
        return
    problem = replace(problem, num_microbatches=9)
    for k in (1, 2):
        state = SteadyState(problem, k)
        pattern, _ = find_pattern(state, k * state.latency, generous(), work_limit=10)
        assert pattern is not None  # one microbatch after the other
        assert faults(problem, pattern) == []
        net = Unrolled(problem)
        order = net.order(net.sequences(pattern))
        score = problem.evaluate(order)
        assert score.fits
        assert score.objective_us == net.cost_us(net.sequences(pattern)) == order_cost_us(problem, order)
        least = least_period(state)
        assert not (pattern.period < least)


@given(problems())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_tightening_keeps_drawn_orders_valid_and_fitting(problem):
    if not problem.is_feasible():
        return
    problem = replace(problem, num_microbatches=5)
    state = SteadyState(problem, 1)
    pattern, _ = find_pattern(state, state.latency, generous(), work_limit=10)
    net = Unrolled(problem)
    sequences = net.sequences(pattern)
    before_us = net.cost_us(sequences)
    for slack in (0.0, 1.0):
        for fill in (net.filled, net.filled_backwards):
            sequences = fill(sequences, slack)
            order = net.order(sequences)
            score = problem.evaluate(order)
            assert score.fits
            assert order == problem.canonical(order)
            assert score.objective_us == net.cost_us(sequences)
            if slack == 0.0 and problem.objective == "makespan" and fill == net.filled:
                assert score.makespan_us <= before_us  # filling a gap delays nothing


@pytest.mark.parametrize(
    ("num_ranks", "chunks"),
    [(4, 6), (8, 10), (5, 6), (4, 4), (8, 8), (4, 8), (8, 16)],
    ids=["half-4", "half-8", "half-5", "min-4", "min-8", "zbv-4", "zbv-8"],
)
def test_v_patterns_without_bubble_are_found_at_their_memory(num_ranks, chunks):
    """V-Half holds floor(p/2) + 1 and V-Min floor((p + 4)/3) microbatches of two chunks (arXiv 2405.15362); ZB-V p."""
    problem = vee(num_ranks, 3 * num_ranks, chunks=chunks)
    pattern, _ = find_pattern(SteadyState(problem, 1), 6, generous(), work_limit=10)
    assert pattern is not None
    assert faults(problem, pattern, 40) == []


@pytest.mark.parametrize(
    ("num_ranks", "chunks"),
    [(8, 8), (8, 10), (16, 12), (16, 18), (32, 24), (32, 34), (64, 66)],
)
@pytest.mark.parametrize("costs", [(1, 1, 1, 0), (1000, 1000, 500, 30)], ids=["even", "uneven"])
def test_layouts_give_v_patterns_of_any_length(num_ranks, chunks, costs):
    problem = vee(num_ranks, 3 * num_ranks, *costs, chunks=chunks)
    state = SteadyState(problem, 1)
    v_min = 2 * chunks <= num_ranks or chunks in (8, 12, 24)
    period = state.work if costs[0] == 1 or not v_min else state.work * 5 // 4
    pattern = LayoutPaths.of_all(state, period).cheapest((1.0,) * num_ranks)
    assert state.fits(pattern)
    assert faults(problem, pattern, num_ranks + 4) == []


@given(problems(), st.integers(1, 3), st.integers(0, 20))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_layouts_of_drawn_problems_obey_the_check_but_for_memory(problem, k, more):
    """Whatever the layouts give is a pattern; it holds what `peak_bytes` says; shortening and loosening keep that."""
    problem = replace(problem, num_microbatches=9, max_in_flight=None)
    state = SteadyState(problem, k)
    period = state.work + more
    paths = [LayoutPaths.plain(state, period), LayoutPaths.of_all(state, period)]
    shares = (1.0,) * problem.num_ranks
    for path in paths:
        pattern = path.cheapest(shares)
        near = LayoutPaths.near(state, pattern).cheapest(shares)
        like = LayoutPaths.like(state, pattern, period + 3).cheapest(shares)
        for one in (pattern, near, like, pattern.repeated(2 * k)):
            there = SteadyState(problem, one.num_microbatches)
            roomy = with_room(problem, there.peak_bytes(one))
            assert faults(roomy, one, 24 // k) == []
            short = there.shortened(one)
            assert short.period <= one.period
            assert there.peak_bytes(short) == there.peak_bytes(one)
            assert faults(roomy, short, 24 // k) == []
            loose = with_room(problem, [2 * held + 3 for held in there.peak_bytes(one)])
            assert faults(loose, loosened(loose, short, 0.5, 1.0), 24 // k) == []
        if max(there.peak_bytes(one)):
            tight = with_room(problem, [max(0, held - 1) for held in state.peak_bytes(pattern)])
            assert faults(tight, pattern, 24 // k)


def test_near_layouts_never_hold_more_by_their_price():
    problem = vee(8, 24, 1000, 1500, 600, 100, chunks=8)
    state = SteadyState(problem, 1)
    shares = (1.0,) * 8
    pattern = LayoutPaths.plain(state, state.work * 6 // 5).cheapest(shares)
    first = latest = sum(state.peak_bytes(pattern))
    for _ in range(10):
        pattern = LayoutPaths.near(state, pattern).cheapest(shares)
        assert faults(with_room(problem, state.peak_bytes(pattern)), pattern) == []
        latest = sum(state.peak_bytes(pattern))
    assert latest < first


@pytest.mark.parametrize("memory", [1, 2])
def test_uneven_stages_with_many_microbatches_come_close_to_their_bound(memory):
    rng = random.Random(5)
    columns = [tuple(round(mean * rng.uniform(0.75, 1.25)) for _ in range(8)) for mean in (1000, 1000, 700)]
    problem = replace(even(8, 256, transfer=50, memory=16 * memory), forward_us=columns[0])
    problem = replace(problem, backward_us=columns[1], weight_us=columns[2])
    solution = PeriodicSchedule(work_limit=3, max_ops=200_000, ks=(1,)).solve(problem, time_limit_s=100)
    assert solution.gap < 0.01


@pytest.mark.parametrize(
    ("problem", "bubble"),
    [
        (vee(8, 24, chunks=8), 0.1579),  # V-Min's own
        (vee(8, 24, chunks=10), 0.1056),  # V-Half's own
        (vee(8, 24, chunks=16), 0.0),  # ZB-V's own
        (vee(8, 24, 1000, 1000, 500, 30, chunks=10), 0.1689),
        (vee(8, 24, 1000, 1500, 600, 100, chunks=16), 0.1185),
    ],
    ids=["min", "half", "zbv", "half-uneven", "zbv-uneven"],
)
def test_unrolled_patterns_are_no_worse_than_the_published_ones(problem, bubble):
    solution = PeriodicSchedule(work_limit=3, ks=(1,)).solve(problem, time_limit_s=100)
    assert solution.score.bubble_rate_span <= bubble + 5e-5
    assert solution.score == problem.evaluate(solution.order)
    assert solution.score.fits


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_answered_within_its_bounds(name):
    problem, optimum = ZOO[name]
    solution = PeriodicSchedule(work_limit=1).solve(problem, time_limit_s=60)
    if optimum is None:
        assert solution.status is Status.INFEASIBLE
        return
    assert solution.order == problem.canonical(solution.order)
    assert solution.score == problem.evaluate(solution.order)
    assert solution.score.fits
    assert solution.lower_bound_us <= optimum <= solution.objective_us


def test_the_same_seed_gives_the_same_answer():
    problem = vee(4, 9, 1000, 1500, 600, 100, chunks=5)
    answers = {PeriodicSchedule(work_limit=2).solve(problem, time_limit_s=100, seed=3).order for _ in range(2)}
    assert len(answers) == 1


def test_a_better_hint_is_returned_and_the_bound_given_is_used():
    problem = even(2, 2)
    hint = PeriodicSchedule().solve(problem, time_limit_s=10).order
    solution = PeriodicSchedule(ks=()).solve(problem, time_limit_s=10, hint=hint, bound=Bound(5, "told"))
    assert solution.order == hint
    assert (solution.lower_bound_us, solution.lower_bound_kind) == (5, "told")
    assert solution.status is Status.FEASIBLE


def test_progress_is_told_and_ctrl_c_keeps_the_best():
    problem = vee(4, 12, 1000, 1500, 600, 100, chunks=5)
    events = []

    def on_progress(event):
        events.append(event)
        if len(events) == 2:
            raise KeyboardInterrupt

    solution = PeriodicSchedule().solve(problem, time_limit_s=100, on_progress=on_progress)
    assert solution.interrupted
    assert len(events) == 2
    assert solution.objective_us == events[-1].objective_us < events[0].objective_us
    assert solution.lower_bound_us == best_bound(problem).value_us
