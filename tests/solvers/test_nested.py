"""The nested bound against brute force, best known orders and values found by hand."""

import threading
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pipeline_cases import ZOO, even, larger_problems, problems, zero_bubble_profile
from pipeline_oracle import optimum_us

from solvers.bounds import best_bound
from solvers.list_scheduling import ListScheduling
from solvers.nested import NestedBound
from solvers.pipeline import PipelineProblem

_NEVER_US = 1 << 62


def _run(proof, enough_us=_NEVER_US, work_limit=None):
    return proof.run(lambda: enough_us, deadline=time.monotonic() + 600, work_limit=work_limit).value_us


@pytest.mark.parametrize("name", [name for name, (_, optimum) in ZOO.items() if optimum is not None])
def test_no_bound_exceeds_an_optimum_known_by_hand(name):
    problem, optimum = ZOO[name]
    for rank in range(problem.num_ranks):
        assert _run(NestedBound(problem, observed=[rank])) <= optimum
    assert _run(NestedBound(problem)) <= optimum


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(general=True))
def test_no_bound_exceeds_the_optimum_by_brute_force(problem):
    assume(problem.is_feasible())
    optimum = optimum_us(problem)
    for rank in range(problem.num_ranks):
        assert _run(NestedBound(problem, observed=[rank])) <= optimum
    assert _run(NestedBound(problem)) <= optimum


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(larger_problems(), st.data())
def test_no_bound_exceeds_the_cost_of_an_order(problem, data):
    assume(problem.is_feasible())
    found = ListScheduling(max_rules=40).solve(problem, time_limit_s=60)
    observed = data.draw(st.one_of(st.none(), st.lists(st.integers(0, problem.num_ranks - 1), min_size=1, max_size=1)))
    assert _run(NestedBound(problem, observed), work_limit=0.1) <= found.score.objective_us


def test_two_of_five_microbatches_at_a_time():
    """Three ranks, all ops 1 µs, room for two microbatches.

    On rank 0 a microbatch stays 3 µs up and 3 µs down, and a third has room only once the first has had its W, or the
    second its B, which ends no earlier: so F(0, 2) starts 7 µs after F(0, 0), F(0, 4) after 14, and its own 7 follow.
    """
    problem = even(3, 5, memory=4)
    assert _run(NestedBound(problem)) == 21
    assert best_bound(problem).value_us == 20


def test_one_at_a_time_is_found_exactly():
    """Room for one: F . . B W on rank 0, m times; by makespan the same, as rank 0 ends last."""
    for objective in ("span", "makespan"):
        assert _run(NestedBound(even(2, 4, memory=2, objective=objective))) == 20


def test_limits_in_flight_and_recomputation_count():
    """One in flight: rank 0 waits for F, R and B of rank 1, F R . . B, twice; the first W fits between."""
    assert _run(NestedBound(even(2, 2, in_flight=1, recompute=1))) == 11


def test_ranks_below_the_observed_one_may_do_much_before_it_begins():
    """Rank 1 runs F B F B F B without idling, if rank 0 has run two R of 20 µs before, so that F(0, 2) can follow."""
    problem = replace(
        even(2, 3, 1, 1, 0), max_in_flight=(2, 1), recompute_us=(20, 0), checkpoint_bytes=(0, 0), split=(False, False)
    )
    assert _run(NestedBound(problem, observed=[1])) == 6


def test_phases_that_collide_where_memory_is_short():
    """Half of p microbatches fit: no other bound sees how those going up delay those coming down."""
    problem = zero_bubble_profile(memory=8)
    found = ListScheduling(max_rules=200).solve(problem, time_limit_s=60).score.objective_us
    proof = NestedBound(problem)
    value = _run(proof, work_limit=0.1)
    assert best_bound(problem).value_us < value < found
    assert value == proof.bound.value_us
    assert proof.bound.kind == "nested"


def test_nothing_is_done_where_everything_fits():
    for problem in (even(3, 5), even(3, 5, memory=10), even(3, 5, in_flight=5, objective="makespan")):
        proof = NestedBound(problem)
        assert _run(proof) == 0
        assert proof.work == 0


def test_the_same_work_gives_the_same_bound_in_one_run_or_many():
    problem = zero_bubble_profile(memory=8)
    at_once, by_steps = NestedBound(problem), NestedBound(problem)
    value = _run(at_once, work_limit=0.05)
    limit, values = 0.0, [0]
    while by_steps.work < 0.05:
        limit += 0.01
        values.append(_run(by_steps, work_limit=min(limit, 0.05)))
    assert values == sorted(values)
    assert (values[-1], by_steps.work) == (value, at_once.work)
    assert not at_once.limited_by_time


def test_it_stops_at_enough_which_is_asked_anew():
    problem = zero_bubble_profile(memory=8)
    proof, asked = NestedBound(problem), []

    def enough_us():
        asked.append(proof.bound.value_us)
        return _NEVER_US if len(asked) < 10 else asked[-1]

    bound = proof.run(enough_us, deadline=time.monotonic() + 600)
    assert bound.value_us == asked[-1]
    assert len(asked) == 10
    assert _run(proof, enough_us=bound.value_us + 1) > bound.value_us  # and it goes on


def test_it_stops_at_the_work_limit_and_the_deadline():
    problem = zero_bubble_profile(memory=8)
    proof = NestedBound(problem)
    _run(proof, work_limit=1e-6)
    first = proof.work
    assert first > 0
    _run(proof, work_limit=1e-6)
    assert proof.work == first  # nothing left
    assert not proof.limited_by_time
    assert proof.run(lambda: _NEVER_US, deadline=time.monotonic()) == proof.bound
    assert proof.work == first
    assert proof.limited_by_time


def test_another_thread_stops_it():
    proof = NestedBound(zero_bubble_profile("1.5b-m64", memory=8))
    begun = threading.Event()

    def enough_us():
        begun.set()
        return _NEVER_US

    thread = threading.Thread(target=lambda: proof.run(enough_us, deadline=time.monotonic() + 600), daemon=True)
    thread.start()
    assert begun.wait(60)
    proof.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert 0 <= proof.bound.value_us < _NEVER_US


def test_times_and_bytes_too_large_for_the_solver_are_left_alone():
    most = 10**15
    slow = PipelineProblem(
        (most, most - 1), (most, most), (most, most), (True, True), (0,), (0, 1), 24, (2, 2), (1, 1), (2, 2)
    )
    heavy = replace(even(2, 24), activation_bytes=(10**18,) * 2, capacity_bytes=(10**18,) * 2)
    for problem in (slow, heavy):
        assert _run(NestedBound(problem), work_limit=1.0) <= problem.num_microbatches * 10 * most
