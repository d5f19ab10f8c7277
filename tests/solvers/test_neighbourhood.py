"""Large neighbourhood search: never worse than its hint, within memory, repeatable, the optimum on small problems.

What every backend must do is in `test_pipeline_backends.py`.
"""

import signal
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_cases import ZOO, even, larger_problems, problems, zero_bubble_profile
from pipeline_oracle import optimum_us, order_cost_us

from solvers import neighbourhood
from solvers.bounds import Bound, best_bound
from solvers.neighbourhood import NeighbourhoodSearch
from solvers.pipeline import Op, SolverError, Status

NO_HELP = Bound(1, "none")


def one_after_the_other(problem):
    """A bad order that fits whenever any does: a microbatch runs up and down before the next begins."""
    rows = [[] for _ in range(problem.num_ranks)]
    recompute = problem.recompute_us or (0,) * problem.num_stages
    for j in range(problem.num_microbatches):
        for s, rank in enumerate(problem.rank_of_stage):
            rows[rank].append(Op("F", s, j))
        for s, rank in reversed(list(enumerate(problem.rank_of_stage))):
            if recompute[s]:
                rows[rank].append(Op("R", s, j))
            rows[rank] += [Op("B", s, j), Op("W", s, j)] if problem.split[s] else [Op("BW", s, j)]
    return tuple(map(tuple, rows))


def check(solution, problem, hint):
    """What holds for every answer."""
    assert solution.score == problem.evaluate(solution.order)
    assert solution.order == problem.canonical(solution.order)
    assert solution.score.fits
    assert solution.lower_bound_us <= solution.objective_us <= problem.evaluate(hint).objective_us
    assert (solution.status is Status.OPTIMAL) == (solution.lower_bound_us == solution.objective_us)


@pytest.mark.parametrize("name", [name for name, (_, optimum) in ZOO.items() if optimum is not None])
def test_a_bad_order_of_the_zoo_becomes_the_best(name):
    problem, optimum = ZOO[name]
    hint = one_after_the_other(problem)
    solution = NeighbourhoodSearch(work_limit=5).solve(problem, time_limit_s=60, hint=hint, bound=NO_HELP)
    check(solution, problem, hint)
    assert solution.objective_us == optimum
    assert solution.status is Status.OPTIMAL
    assert solution.lower_bound_kind == "lns"


@pytest.mark.parametrize("name", [name for name, (_, optimum) in ZOO.items() if optimum is None])
def test_what_fits_nowhere_is_infeasible(name):
    assert NeighbourhoodSearch().solve(ZOO[name][0], time_limit_s=60).status is Status.INFEASIBLE


@given(problems())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_a_window_of_everything_finds_the_optimum(problem):
    optimum = optimum_us(problem)
    if optimum is None:
        return
    hint = one_after_the_other(problem)
    solution = NeighbourhoodSearch(work_limit=5).solve(problem, time_limit_s=60, hint=hint, bound=NO_HELP)
    check(solution, problem, hint)
    assert solution.objective_us == optimum
    assert solution.status is Status.OPTIMAL


@pytest.mark.parametrize("cells", [0, 10**9])  # one column for all ranks, or one each
@given(larger_problems(), st.integers(0, 3))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_every_answer_is_valid_within_memory_and_not_worse(cells, problem, seed):
    hint = one_after_the_other(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbourhood, "_EXACT_CELLS", cells)
        patch.setattr(neighbourhood, "_FIRST_FREE", 30)
        patch.setattr(neighbourhood, "_STEP_WORK", 0.02)
        solution = NeighbourhoodSearch(work_limit=0.4).solve(problem, time_limit_s=60, seed=seed, hint=hint)
    check(solution, problem, hint)
    assert order_cost_us(problem, solution.order) == solution.objective_us


UNEVEN = replace(
    even(6, 14, 100, 110, 60, 7, memory=7),
    forward_us=(100, 88, 117, 94, 121, 80),
    backward_us=(91, 105, 120, 83, 99, 124),
)


@pytest.mark.parametrize("cells", [0, 10**9])
def test_windows_of_a_part_improve_an_order_that_is_too_large_for_one(cells, monkeypatch):
    monkeypatch.setattr(neighbourhood, "_EXACT_CELLS", cells)
    monkeypatch.setattr(neighbourhood, "_MAX_FREE", 100)  # of 252
    hint = one_after_the_other(UNEVEN)
    solution = NeighbourhoodSearch(work_limit=1.5).solve(UNEVEN, time_limit_s=60, hint=hint)
    check(solution, UNEVEN, hint)
    assert solution.objective_us < 0.6 * UNEVEN.evaluate(hint).objective_us


def test_the_same_seed_and_work_give_the_same_order():
    hint = one_after_the_other(UNEVEN)
    first, second, other = (
        NeighbourhoodSearch(work_limit=0.6).solve(UNEVEN, time_limit_s=60, seed=seed, hint=hint) for seed in (3, 3, 4)
    )
    assert not first.limited_by_time
    assert replace(first, seconds=0) == replace(second, seconds=0)
    assert first.order != other.order


def test_a_clock_that_ends_the_search_is_told():
    hint = one_after_the_other(UNEVEN)
    solution = NeighbourhoodSearch().solve(UNEVEN, time_limit_s=0.5, hint=hint)
    check(solution, UNEVEN, hint)
    assert solution.limited_by_time
    assert not solution.interrupted


def test_an_order_that_meets_the_bound_is_returned_at_once(monkeypatch):
    def fail(*arguments):
        raise AssertionError("searched")

    monkeypatch.setattr(neighbourhood, "_Search", fail)
    hint = one_after_the_other(UNEVEN)
    met = Bound(UNEVEN.evaluate(hint).objective_us, "test")
    solution = NeighbourhoodSearch().solve(UNEVEN, time_limit_s=60, hint=hint, bound=met)
    assert solution.order == hint
    assert solution.status is Status.OPTIMAL
    assert solution.lower_bound_kind == "test"


def test_the_search_ends_when_it_meets_the_bound():
    problem = even(4, 8)
    hint = one_after_the_other(problem)
    solution = NeighbourhoodSearch().solve(problem, time_limit_s=250, hint=hint)
    assert solution.status is Status.OPTIMAL
    assert not solution.limited_by_time
    assert solution.lower_bound_us == best_bound(problem).value_us


def test_progress_is_told_as_it_happens_and_only_gets_better():
    events = []
    hint = one_after_the_other(UNEVEN)
    search = NeighbourhoodSearch(work_limit=0.5)
    solution = search.solve(UNEVEN, time_limit_s=60, hint=hint, on_progress=events.append)
    costs = [event.objective_us for event in events]
    assert len(costs) > 1
    assert costs == sorted(set(costs), reverse=True)
    assert costs[-1] >= solution.objective_us
    assert {event.solver for event in events} == {"lns"}


def test_ctrl_c_returns_the_best_so_far():
    events = []

    def press_ctrl_c(event):
        events.append(event)
        if len(events) == 3:
            raise KeyboardInterrupt

    hint = one_after_the_other(UNEVEN)
    solution = NeighbourhoodSearch().solve(UNEVEN, time_limit_s=250, hint=hint, on_progress=press_ctrl_c)
    check(solution, UNEVEN, hint)
    assert solution.interrupted
    assert not solution.limited_by_time
    assert len(events) == 3
    assert solution.objective_us <= events[-1].objective_us


def test_a_real_signal_is_not_lost_in_the_solver():
    problem = zero_bubble_profile(memory=8)
    timer = threading.Timer(2.0, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        solution = NeighbourhoodSearch().solve(problem, time_limit_s=250)
    finally:
        timer.cancel()
    assert solution.interrupted
    assert solution.score.fits


def test_another_thread_can_end_it():
    cancel = threading.Event()
    hint = one_after_the_other(UNEVEN)
    search = NeighbourhoodSearch(cancel=cancel)
    solution = search.solve(UNEVEN, time_limit_s=250, hint=hint, on_progress=lambda event: cancel.set())
    check(solution, UNEVEN, hint)
    assert solution.interrupted


def test_an_order_worse_than_its_hint_is_an_error(monkeypatch):
    bad = one_after_the_other(UNEVEN)
    good = NeighbourhoodSearch(work_limit=0.3).solve(UNEVEN, time_limit_s=60, hint=bad).order
    monkeypatch.setattr(neighbourhood._Search, "order", lambda self: bad)
    with pytest.raises(SolverError, match="began with"):
        NeighbourhoodSearch(work_limit=3).solve(UNEVEN, time_limit_s=60, hint=good)
