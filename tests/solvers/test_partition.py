"""Stage partition: every backend meets the same zoo, agrees with enumeration on drawn instances, and is rescored."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.partition import (
    PARTITION_BACKENDS,
    StagePartition,
    partition_backend,
    rescored,
    solve_partition,
)
from solvers.status import SolverError, Status

CASES = {  # name: (problem, optimum in us; None is infeasible)
    "heavy_tail": (StagePartition((1, 1, 1, 9), 2), 9),  # 1+1+1 | 9
    "even": (StagePartition((2, 2, 2, 2), 2), 4),
    "one_layer_each": (StagePartition((5, 1, 3), 3), 5),
    "one_stage": (StagePartition((5, 1, 3), 1), 9),
    "more_stages_than_layers": (StagePartition((5,), 2), None),
    "free_layers_fill_stages": (StagePartition((0, 0, 7), 3), 7),
    "memory_moves_the_cut": (
        StagePartition((1, 1, 1, 1), 2, static_bytes=(4, 4, 1, 1), capacity_bytes=(4, 9)),
        3,  # 1 | 1+1+1
    ),
    "in_flight_counts": (
        StagePartition((1, 1, 1), 2, activation_bytes=(2, 2, 2), in_flight=(2, 1), capacity_bytes=(4, 4)),
        2,  # one layer held twice | two held once
    ),
    "memory_forbids": (StagePartition((1, 1), 2, static_bytes=(5, 5), capacity_bytes=(5, 4)), None),
    "an_earlier_start_is_needed": (  # stage 1 cannot hold layer 3, so stage 0 must stop before layer 2
        StagePartition((1, 1, 1, 1), 3, static_bytes=(1, 1, 1, 9), capacity_bytes=(9, 1, 9)),
        2,
    ),
    "negative_room": (StagePartition((1, 1), 2, capacity_bytes=(-1, 5)), None),
    "ranks_share": (  # stages 0 and 2 on rank 0: 1 | 2 | 1
        StagePartition((1, 2, 1), 3, rank_of_stage=(0, 1, 0)),
        2,
    ),
    "ranks_share_memory": (
        StagePartition((1, 1, 1, 1), 3, static_bytes=(1, 1, 1, 1), capacity_bytes=(2, 2), rank_of_stage=(0, 1, 0)),
        2,
    ),
}


def takers(problem):
    return [name for name in PARTITION_BACKENDS if partition_backend(name).why_not(problem) is None]


@pytest.mark.parametrize("name", CASES)
def test_every_backend_proves_the_known_optimum(name):
    problem, want_us = CASES[name]
    for backend in takers(problem):
        got = solve_partition(problem, solver=backend, time_limit_s=20)
        assert got.status is (Status.INFEASIBLE if want_us is None else Status.OPTIMAL), f"{backend}: {got}"
        assert got.bottleneck_us == want_us, f"{backend}: {got}, want {want_us}"


@st.composite
def problems(draw):
    num_layers, num_stages = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    small = st.integers(0, 6)
    layers = st.lists(small, min_size=num_layers, max_size=num_layers).map(tuple)
    num_ranks = draw(st.integers(1, num_stages))
    shared = tuple(stage % num_ranks for stage in range(num_stages))
    limited = draw(st.booleans())
    return StagePartition(
        times_us=draw(layers),
        num_stages=num_stages,
        static_bytes=draw(layers),
        activation_bytes=draw(layers),
        in_flight=tuple(draw(st.integers(1, 3)) for _ in range(num_stages)),
        weight_activation_bytes=draw(layers),
        weights_in_flight=tuple(draw(st.integers(0, 2)) for _ in range(num_stages)),
        temporary_bytes=draw(layers),
        capacity_bytes=tuple(draw(st.integers(0, 30)) for _ in range(num_ranks)) if limited else None,
        rank_of_stage=shared,
    )


def enumerated(problem):
    """Least bottleneck over all cuts, written down without the problem's own scoring."""
    best = None
    for cuts in combinations(range(1, problem.num_layers), problem.num_stages - 1):
        bounds = (0, *cuts, problem.num_layers)
        loads, used, temporary = {}, {}, {}
        for stage in range(problem.num_stages):
            rank = problem.rank_of_stage[stage]
            for layer in range(bounds[stage], bounds[stage + 1]):
                loads[rank] = loads.get(rank, 0) + problem.times_us[layer]
                size = problem.static_bytes[layer] + problem.in_flight[stage] * problem.activation_bytes[layer]
                size += problem.weights_in_flight[stage] * problem.weight_activation_bytes[layer]
                used[rank] = used.get(rank, 0) + size
                temporary[rank] = max(temporary.get(rank, 0), problem.temporary_bytes[layer])
        fits = problem.capacity_bytes is None or all(
            used[rank] + temporary[rank] <= problem.capacity_bytes[rank] for rank in used
        )
        if fits and (best is None or max(loads.values()) < best):
            best = max(loads.values())
    return best


@given(problems())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_backend_agrees_with_enumeration(problem):
    want_us = enumerated(problem)
    for backend in takers(problem):
        got = solve_partition(problem, solver=backend, time_limit_s=20)
        assert got.status is (Status.INFEASIBLE if want_us is None else Status.OPTIMAL), f"{backend}: {got}"
        assert got.bottleneck_us == want_us, f"{backend}: {got}, want {want_us}"


@given(problems())
@settings(derandomize=True, deadline=None, max_examples=400)
def test_the_chain_solver_agrees_with_enumeration(problem):
    chain = StagePartition(
        problem.times_us,
        problem.num_ranks,
        problem.static_bytes,
        problem.activation_bytes,
        problem.in_flight[: problem.num_ranks],
        problem.weight_activation_bytes,
        problem.weights_in_flight[: problem.num_ranks],
        problem.temporary_bytes,
        problem.capacity_bytes,
        tuple(range(problem.num_ranks)),
    )
    got = solve_partition(chain)
    assert got.solver == "chain"
    assert got.bottleneck_us == enumerated(chain)


def test_equal_bottlenecks_are_cut_evenly():
    # 9 | 1 1 1 1 1 1 : the head forces 9, the rest need not be lopsided
    got = solve_partition(StagePartition((9, 1, 1, 1, 1, 1, 1), 4))
    assert got.cuts == (1, 3, 5)


def test_llama_405b_on_16_ranks_is_cut_by_all_backends_alike():
    times = (120, *[19_000] * 126, 9_500)
    problem = StagePartition(times, 16, (5,) * 128, (2,) * 128, tuple(range(16, 0, -1)), capacity_bytes=(16 * 30,) * 16)
    chain, cp_sat = solve_partition(problem), solve_partition(problem, solver="cp-sat", time_limit_s=60)
    assert chain.status is cp_sat.status is Status.OPTIMAL
    assert chain.bottleneck_us == cp_sat.bottleneck_us


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times_us": (1, 2), "num_stages": 0}, "num_stages is 0"),
        ({"times_us": (1, -2), "num_stages": 1}, r"times_us\[1\] is -2"),
        ({"times_us": (1, 2.5), "num_stages": 1}, r"times_us\[1\] is 2.5"),
        ({"times_us": (1, 2), "num_stages": 1, "static_bytes": (1,)}, "static_bytes has 1 entries, 2 are needed"),
        ({"times_us": (1, 2), "num_stages": 2, "rank_of_stage": (0, 2)}, "leaves a rank below 3 without a stage"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StagePartition(**arguments)


def test_cuts_that_overflow_a_rank_are_a_bug_of_the_backend():
    with pytest.raises(SolverError, match="overflow a rank"):
        rescored(StagePartition((1, 1), 1, (3, 3), capacity_bytes=(5,)), (), Status.OPTIMAL, 0, "broken")


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="known: chain, cp-sat, cbc"):
        solve_partition(StagePartition((1,), 1), solver="gurobi")
