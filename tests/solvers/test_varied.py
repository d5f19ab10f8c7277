"""Microbatches that differ: brute force over all orders, bounds, list schedules and CP-SAT on the same problems."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_cases import even, larger_problems, problems
from pipeline_oracle import optimum_us

from solvers.list_scheduling import quick_order
from solvers.pipeline import Op, PipelineProblem, Status
from solvers.varied import VariedProblem, entry_orders, lower_bound, solve_varied

TABLES = ("forward_us", "backward_us", "weight_us", "activation_bytes", "weight_activation_bytes")


def flat(problem):
    """The fields of base and tables in one object, as the brute-force oracle reads them."""
    fields = {name: getattr(problem.base, name) for name in PipelineProblem.__dataclass_fields__}
    return SimpleNamespace(**{**fields, **{name: getattr(problem, name) for name in TABLES}})


def varied(base, **tables):
    """The base's own values for all microbatches, but for the tables given."""
    m = base.num_microbatches
    return VariedProblem(
        base, **{name: tables.get(name, tuple((v,) * m for v in getattr(base, name))) for name in TABLES}
    )


# name: (problem, optimum in µs; None is infeasible)
ZOO = {
    "one_rank_has_no_bubble": (VariedProblem.scaled(even(1, 3, 3, 2, 1), (100, 200, 300)), 36),
    "the_quick_one_comes_first": (  # rank 1 idles until 1 µs, works 8, and rank 0 ends with 1; the other way round, 14
        varied(even(2, 2, split=False, weight=0, objective="makespan"), forward_us=((5, 1), (1, 5))),
        10,
    ),
    "not_both_fit_at_once": (  # on rank 0: 3 + 1 bytes are too many, so twice F F BW BW
        varied(even(2, 2, split=False, memory=3), activation_bytes=((3, 1), (1, 1))),
        12,
    ),
    "the_long_one_does_not_fit": (varied(even(2, 2, memory=3), activation_bytes=((2, 4), (2, 2))), None),
    "one_in_flight": (VariedProblem.scaled(even(2, 2, 2, 2, 0, split=False, in_flight=1), (50, 100)), 12),
}


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_solved_and_proven(name):
    problem, optimum = ZOO[name]
    solution = solve_varied(problem, time_limit_s=30)
    check(solution, problem, optimum)
    assert optimum_us(flat(problem), any_microbatch_order=True) == optimum


def check(solution, problem, optimum):
    """What holds for every answer to a small problem."""
    if optimum is None:
        assert solution.status is Status.INFEASIBLE
        assert solution.order is solution.score is None
        assert solution.note == "a microbatch alone does not fit"
        return
    assert solution.status is Status.OPTIMAL, solution
    assert solution.score == problem.evaluate(solution.order)
    assert solution.score.fits
    assert solution.objective_us == solution.lower_bound_us == optimum


@st.composite
def varied_problems(draw, bases):
    """A drawn base with drawn tables; the capacity as tight for the largest microbatch as it was for the base's own."""
    drawn = draw(bases)
    base = replace(drawn, recompute_us=None, checkpoint_bytes=None)

    def table(least, most):
        return tuple(tuple(draw(st.integers(least, most)) for _ in range(base.num_microbatches)) for _ in base.split)

    loose = replace(base, capacity_bytes=None)
    problem = VariedProblem(loose, table(1, 4), table(1, 4), table(0, 4), table(0, 4), table(0, 4))
    if base.capacity_bytes is None:
        return problem
    slack = [a - b for a, b in zip(drawn.capacity_bytes, drawn.single_microbatch_bytes(), strict=True)]
    needs = [max(column) for column in zip(*(one.single_microbatch_bytes() for one in problem.alone), strict=True)]
    capacity = tuple(max(0, need + more) for need, more in zip(needs, slack, strict=True))
    return replace(problem, base=replace(loose, capacity_bytes=capacity))


def small_enough(problem):
    """Whether brute force over every order of microbatches takes no more than a moment."""
    base = problem.base
    return base.num_microbatches < 3 or base.num_ranks == 1 or not any(base.split)


@given(varied_problems(problems(general=True)).filter(small_enough))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_answers_and_bounds_agree_with_brute_force(problem):
    optimum = optimum_us(flat(problem), any_microbatch_order=True)
    assert problem.is_feasible() == (optimum is not None)
    check(solve_varied(problem, time_limit_s=60, workers=1), problem, optimum)
    assert optimum is None or lower_bound(problem).value_us <= optimum


@given(varied_problems(larger_problems()), st.integers(0, 10**6))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_list_schedules_of_larger_problems_fit_and_beat_no_bound(problem, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("solvers.varied._MAX_RUNS", 12)
        patch.setattr("solvers.varied._EXACT_OPS", 0)
        solution = solve_varied(problem, time_limit_s=60, seed=seed)
    assert solution.score.fits
    assert solution.score == problem.evaluate(solution.order)
    assert lower_bound(problem).value_us == solution.lower_bound_us <= solution.objective_us


@given(problems(general=True))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_microbatches_that_do_not_differ_are_the_usual_problem(base):
    base = replace(base, recompute_us=None, checkpoint_bytes=None)
    problem = VariedProblem.scaled(base, [100] * base.num_microbatches)
    assert problem.is_feasible() == base.is_feasible()
    assert problem.work_us == base.work_us
    if base.is_feasible():
        order = quick_order(base, None)
        assert problem.evaluate(order) == base.evaluate(order)


def test_memory_is_that_of_the_microbatches_that_are_held():
    problem = varied(even(1, 3, fixed=100), activation_bytes=((5, 7, 1),), weight_activation_bytes=((2, 0, 4),))
    order = (tuple(Op(kind, 0, j) for kind, j in zip("FBFWBWFBW", (0, 0, 1, 0, 1, 1, 2, 2, 2), strict=True)),)
    assert problem.evaluate(order).peak_bytes == (100 + 2 + 7,)


def test_every_stage_may_keep_its_own_order():
    problem, _ = ZOO["the_quick_one_comes_first"]
    order = (
        (Op("F", 0, 1), Op("F", 0, 0), Op("BW", 0, 1), Op("BW", 0, 0)),
        (Op("F", 1, 1), Op("F", 1, 0), Op("BW", 1, 0), Op("BW", 1, 1)),
    )
    assert problem.evaluate(order).starts_us == ((0, 1, 9, 10), (1, 6, 7, 8))


def test_entry_orders_sort_by_work():
    problem = VariedProblem.scaled(even(2, 5, 10, 10, 10), (300, 100, 500, 200, 400))
    longest, shortest, given_order, alternating, *shuffled = entry_orders(problem, random.Random(0))
    assert longest == (2, 4, 0, 3, 1)
    assert shortest == longest[::-1]
    assert given_order == (0, 1, 2, 3, 4)
    assert alternating == (1, 2, 3, 4, 0)
    assert all(sorted(entry) == [0, 1, 2, 3, 4] for entry in shuffled)


def test_the_same_seed_gives_the_same_answer():
    problem = VariedProblem.scaled(even(2, 4, 5, 6, 4, 1, memory=6), (60, 100, 140, 100))
    first, second = (solve_varied(problem, time_limit_s=60, seed=3) for _ in range(2))
    assert not first.limited_by_time
    assert replace(first, seconds=0) == replace(second, seconds=0)


def test_large_problems_are_answered_by_list_schedules():
    problem = VariedProblem.scaled(even(8, 26, 50, 50, 40, 2, memory=24), [60 + 5 * (j % 17) for j in range(26)])
    solution = solve_varied(problem, time_limit_s=60)
    assert solution.score.fits
    assert solution.solver == "list-scheduling"
    assert "list schedules; CP-SAT not tried: 624 ops" in solution.note
    assert solution.gap < 0.1


@pytest.mark.parametrize("after", [1, 3])
def test_ctrl_c_returns_the_best_so_far(after):
    problem = VariedProblem.scaled(even(4, 6, 50, 50, 40, 2, memory=5), (60, 130, 80, 100, 150, 90))
    events = []

    def press_ctrl_c(event):
        events.append(event)
        if len(events) == after:
            raise KeyboardInterrupt

    solution = solve_varied(problem, time_limit_s=120, on_progress=press_ctrl_c)
    assert solution.interrupted
    assert solution.status is Status.FEASIBLE
    assert solution.objective_us == events[-1].objective_us
    assert solution.score.fits


def test_no_time_is_refused():
    with pytest.raises(ValueError, match="time_limit_s is 0, it must be positive"):
        solve_varied(ZOO["one_rank_has_no_bubble"][0], time_limit_s=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward_us": ((1, 1),)}, "forward_us has 1 rows, 2 stages need 2"),
        ({"weight_us": ((1, 1), (1,))}, r"weight_us\[1\] has 1 entries, 2 microbatches need 2"),
        ({"backward_us": ((1, 1), (1, 0))}, r"microbatch 1: backward_us\[1\] is 0, it must be between 1"),
        ({"activation_bytes": ((1, 1), (1.5, 0))}, r"microbatch 0: activation_bytes\[1\] is 1.5, a whole number"),
        ({"base": even(2, 2, recompute=1)}, "a problem with different microbatches cannot recompute"),
    ],
)
def test_tables_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(varied(even(2, 2)), **change)
