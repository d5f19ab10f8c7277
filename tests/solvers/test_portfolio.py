"""The portfolio: every stage starts from the best so far, the proof runs beside the search, and work counts."""

import threading
from dataclasses import replace

import pytest
from pipeline_cases import even, zero_bubble_profile

from solvers import portfolio
from solvers.bounds import Bound, best_bound
from solvers.list_scheduling import ListScheduling
from solvers.pipeline import Status
from solvers.registry import get_backend, solve_pipeline
from solvers.status import SolverError

HARD = even(6, 12, 11, 13, 7, 3, memory=6)  # half of the memory that p microbatches take: nothing proves it at once


def test_the_nested_bound_proves_more_than_the_bounds_without_a_solver():
    solution = solve_pipeline(HARD, time_limit_s=60, work_limit=30)
    assert solution.lower_bound_us > best_bound(HARD).value_us
    assert solution.lower_bound_us <= solution.objective_us


def test_a_work_limit_gives_the_same_answer_twice():
    first, second = (solve_pipeline(HARD, time_limit_s=250, work_limit=4, seed=5) for _ in range(2))
    assert not first.limited_by_time
    assert replace(first, seconds=0, note="") == replace(second, seconds=0, note="")


def test_the_answer_is_never_worse_than_a_hint_that_fits():
    good = solve_pipeline(HARD, time_limit_s=60, work_limit=10)
    again = solve_pipeline(HARD, time_limit_s=0.2, hint=good.order)
    assert again.objective_us <= good.objective_us


def test_a_hint_that_does_not_fit_is_not_used():
    loose = replace(HARD, capacity_bytes=None)
    hint = ListScheduling(max_rules=1).solve(loose, time_limit_s=60).order
    solution = solve_pipeline(HARD, time_limit_s=0.2, hint=hint)
    assert solution.score.fits


def test_an_optimal_hint_ends_it_at_once():
    problem = zero_bubble_profile(memory=16)
    good = solve_pipeline(problem)
    assert good.status is Status.OPTIMAL
    again = solve_pipeline(problem, hint=good.order)
    assert again.order == good.order
    assert again.note == ""  # no stage had to run


def test_stages_share_the_bound_and_the_order(monkeypatch):
    seen = []

    class Probe:
        name = "probe"
        is_exact = False

        def why_not(self, problem):
            return None

        def solve(self, problem, *, hint, bound, **limits):
            seen.append((hint, bound))
            return ListScheduling(max_rules=1).solve(problem, time_limit_s=60, hint=hint, bound=Bound(7, "probe"))

    monkeypatch.setattr(portfolio, "CpSat", lambda work_limit: Probe())
    solve_pipeline(HARD, time_limit_s=3)
    (hint, bound), *_ = seen
    assert HARD.evaluate(hint).fits
    assert bound == best_bound(HARD)


def test_an_error_of_the_proof_is_not_lost(monkeypatch):
    def fail(self, *arguments, **limits):
        raise SolverError("no proof")

    monkeypatch.setattr("solvers.nested.NestedBound.run", fail)
    with pytest.raises(SolverError, match="no proof"):
        solve_pipeline(HARD, time_limit_s=60, work_limit=2)
    assert "proof" not in {thread.name for thread in threading.enumerate()}


def test_a_solver_that_counts_no_work_refuses_a_work_limit():
    with pytest.raises(ValueError, match="solver 'cbc' does not count its work; a work limit goes with auto, periodic"):
        get_backend("cbc", work_limit=3)
    with pytest.raises(ValueError, match="work_limit is -1, it must be positive"):
        solve_pipeline(HARD, work_limit=-1)
