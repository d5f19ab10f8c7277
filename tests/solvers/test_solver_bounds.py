"""No order, found by brute force, ever beats a bound; and each bound is decisive somewhere."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_cases import ZOO, even, larger_problems, problems, zero_bubble_profile
from pipeline_oracle import optimum_us

from solvers.bounds import (
    Bound,
    Chains,
    best_bound,
    chain_bound_us,
    head_tail_bound_us,
    memory_energy_bound_us,
    work_bound_us,
)
from solvers.list_scheduling import ListScheduling
from solvers.pipeline import PipelineProblem

ALL_BOUNDS = (work_bound_us, head_tail_bound_us, memory_energy_bound_us, chain_bound_us)


@given(st.booleans().flatmap(lambda general: problems(general=general)))
@settings(derandomize=True, deadline=None, max_examples=600)
def test_no_order_beats_any_bound(problem):
    optimum = optimum_us(problem)
    if optimum is not None:
        found = {bound.__name__: bound(problem) for bound in ALL_BOUNDS}
        assert all(value <= optimum for value in found.values()), f"optimum {optimum}, bounds {found}"


@given(larger_problems())
@settings(derandomize=True, deadline=None, max_examples=150)
def test_no_order_found_beats_any_bound(problem):
    cost = ListScheduling(max_rules=25).solve(problem, time_limit_s=60, bound=Bound(1, "none")).objective_us
    found = {bound.__name__: bound(problem) for bound in ALL_BOUNDS}
    assert all(value <= cost for value in found.values()), f"an order costs {cost}, bounds {found}"


@pytest.mark.parametrize("name", [name for name, (_, optimum) in ZOO.items() if optimum is not None])
def test_no_bound_exceeds_a_known_optimum(name):
    problem, optimum = ZOO[name]
    for bound in ALL_BOUNDS:
        assert bound(problem) <= optimum, bound.__name__


def test_head_and_tail_prove_zb_h1_optimal_on_the_published_profile():
    problem = zero_bubble_profile()
    work = 24 * (18522 + 18086 + 9337)
    head = 7 * 18086 + 14 * 601
    tail = 7 * (18522 - 9337) + 14 * 601
    assert head_tail_bound_us(problem) == work + head + tail == 1310405
    assert best_bound(problem) == Bound(1310405, "head-tail")
    assert round(1 - work / 1310405, 4) == 0.1585  # the published rate of ZB-H1 and ZB-1p


@pytest.mark.parametrize(
    ("setting", "rate"), [("1.5b-m24", 0.1585), ("1.5b-m64", 0.0674), ("6.2b-m24", 0.1323), ("6.2b-m32", 0.1045)]
)
def test_the_published_zb_1p_rates_cannot_be_beaten(setting, rate):
    problem = zero_bubble_profile(setting)
    assert round(1 - max(problem.work_us) / best_bound(problem).value_us, 4) == rate


def test_with_memory_for_two_pipelines_the_chain_proves_the_published_zb_2p_rate():
    problem = zero_bubble_profile(memory=32)
    bound = best_bound(problem)
    assert bound.kind == "chain"
    assert round(1 - max(problem.work_us) / bound.value_us, 4) == 0.0433


def test_half_the_memory_is_bounded_by_energy():
    problem = zero_bubble_profile("1.5b-m64", memory=8)
    bound = best_bound(problem)
    assert bound.kind == "memory-energy"
    assert round(1 - max(problem.work_us) / bound.value_us, 3) == 0.419


def test_memory_that_is_no_multiple_of_a_microbatch_counts_as_the_multiple_below():
    exact, more = even(4, 12, memory=2 * 10, held=10, kept=0), even(4, 12, memory=2 * 10 + 9, held=10, kept=0)
    assert memory_energy_bound_us(exact) == memory_energy_bound_us(more)


def test_the_work_bound_of_the_makespan_includes_the_way_to_the_rank():
    problem = even(3, 4, 2, 3, 1, 5, objective="makespan")
    assert work_bound_us(problem) == 4 * 6 + 2 * (2 + 5)


def test_fused_stages_are_bounded_by_the_classical_bubble():
    problem = even(4, 8, split=False, objective="makespan")
    assert best_bound(problem).value_us == (8 + 4 - 1) * 3


def test_bounds_of_several_chunks_use_the_first_microbatch_that_comes_back_to_the_rank():
    vee = even(2, 1, rank_of_stage=(0, 1, 1, 0))
    assert best_bound(vee).value_us == 9


def test_huge_problems_are_still_bounded_quickly():
    problem = even(64, 2048, 3, 3, 2, 1, memory=300)
    assert chain_bound_us(problem) == 0  # too large for this one
    assert best_bound(problem).value_us >= 2048 * 8


def test_the_way_of_a_microbatch_passes_the_longest_recomputation_above():
    problem = replace(even(3, 1, 2, 3, 1, 5), recompute_us=(9, 40, 1), checkpoint_bytes=(0, 0, 0))
    chains = Chains(problem)
    assert chains.window_us(2, 2) == 2 + 1
    assert chains.window_us(1, 1) == 2 + 40  # more than 2 + 5 + 2 + 1 + 3 + 5
    assert chains.window_us(0, 0) == 2 + 5 + 42 + 3 + 5
    assert chains.window_us(2, 0) == 2 + 1 + 3 + 5 + 3 + 5  # R of stage 1 may have run before F of stage 2


def test_a_limit_in_flight_is_bounded_as_memory_for_as_many():
    for objective in ("span", "makespan"):
        limited = even(4, 12, 5, 6, 4, 1, in_flight=2, kept=0, objective=objective)
        room = even(4, 12, 5, 6, 4, 1, memory=4, kept=0, objective=objective)
        assert best_bound(limited).value_us == best_bound(room).value_us > 1.5 * max(limited.work_us)


def test_what_is_fixed_is_taken_off_the_capacity_in_every_bound():
    fixed, less = even(4, 12, 5, 6, 4, 1, memory=106, fixed=100), even(4, 12, 5, 6, 4, 1, memory=6)
    assert [bound(fixed) for bound in ALL_BOUNDS] == [bound(less) for bound in ALL_BOUNDS]


def test_checkpoints_count_where_all_activations_would():
    # room for three checkpoints and one microbatch, or for two microbatches: the limit is one of time held
    whole = even(4, 12, 5, 6, 4, memory=6, held=3, kept=0)
    checkpoints = even(4, 12, 5, 6, 4, memory=6, held=3, kept=0, recompute=1, checkpoint=1)
    assert memory_energy_bound_us(checkpoints) - 12 < memory_energy_bound_us(whole)
    assert best_bound(checkpoints).value_us < best_bound(whole).value_us


def test_recomputation_in_the_window_before_the_first_backward_is_work_like_any_other():
    # rank 0 waits 4 · 2 + 1 + 3 · 3 µs for its first backward, and has F and R of 5 microbatches to run until then
    problem = even(4, 5, 2, 3, 3, recompute=1, checkpoint=0)
    assert head_tail_bound_us(problem) == 5 * 9 + 18 - 5 * 3
    # room for the checkpoints of all, and for all of one microbatch: no other R may have run
    assert head_tail_bound_us(replace(problem, capacity_bytes=(2,) * 4)) >= 5 * 9 + 18 - 5 * 2 - 1


@pytest.mark.parametrize(
    ("problem", "optimum"),
    [  # where a little more than the truth is provable with a wrong argument: found by drawing
        (  # three chunks: R of the first backward's lower chunks need not have run
            PipelineProblem(
                (7, 8, 4), (9, 8, 9), (3, 6, 7), (True, True, False), (0, 3), (0, 0, 0), 3, (1, 2, 2), (2, 0, 1), (6,),
                fixed_bytes=(1,), max_in_flight=(3, 3, 3), recompute_us=(1, 1, 1), checkpoint_bytes=(1, 0, 2),
            ),
            192,
        ),
        (  # M_W is 4 and the checkpoint 1: microbatches before their B hold less than before their W
            PipelineProblem(
                (3, 1), (4, 3), (1, 1), (True, True), (2,), (0, 1), 6, (6, 2), (4, 1), (7, 3),
                recompute_us=(1, 0), checkpoint_bytes=(1, 0),
            ),
            58,
        ),
    ],
)  # fmt: skip
def test_bounds_of_recomputation_are_tight_and_no_more(problem, optimum):
    assert best_bound(problem).value_us == optimum
    assert ListScheduling().solve(problem, time_limit_s=60, bound=Bound(1, "none")).objective_us == optimum
