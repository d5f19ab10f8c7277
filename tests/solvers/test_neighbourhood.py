"""Large neighbourhood search: never worse than its hint, within memory, repeatable, and as good as it gets on small ones.

What every backend must do is in `test_pipeline_backends.py`.
"""

import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_cases import ZOO, even, one_f_one_b, problems
from pipeline_oracle import optimum_us, order_cost_us

from solvers import neighbourhood
from solvers.bounds import Bound, best_bound
from solvers.neighbourhood import NeighbourhoodSearch
from solvers.pipeline import Op, PipelineProblem, Status

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


@st.composite
def larger_problems(draw):
    """Up to a few hundred ops: placements, uneven costs, tight memory, limits in flight, recomputation."""
    placement = draw(
        st.sampled_from([(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5), (0, 1, 1, 0), (0, 1, 2, 0, 1, 2), (0, 0, 1)])
    )
    num_stages, num_ranks, m = len(placement), max(placement) + 1, draw(st.integers(2, 10))

    def column(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(num_stages))

    recomputes = draw(st.booleans())
    held = column(1, 6)
    problem = PipelineProblem(
        forward_us=column(1, 30),
        backward_us=column(1, 30),
        weight_us=column(0, 20),
        split=tuple(draw(st.booleans()) for _ in range(num_stages)),
        transfer_us=tuple(draw(st.integers(0, 9)) for _ in range(num_stages - 1)),
        rank_of_stage=placement,
        num_microbatches=m,
        activation_bytes=held,
        weight_activation_bytes=column(0, 7),
        objective=draw(st.sampled_from(["span", "makespan"])),
        max_in_flight=column(1, m) if draw(st.booleans()) else None,
        recompute_us=column(0, 20) if recomputes else None,
        checkpoint_bytes=tuple(draw(st.integers(0, size)) for size in held) if recomputes else None,
        fixed_bytes=tuple(draw(st.integers(0, 5)) for _ in range(num_ranks)) if draw(st.booleans()) else None,
    )
    slack = draw(st.sampled_from([None, 0, 2, 7, 20]))
    if slack is None:
        return replace(problem, fixed_bytes=None)
    return replace(problem, capacity_bytes=tuple(need + slack for need in problem.single_microbatch_bytes()))


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
    if problem.recompute_us is None:
        assert order_cost_us(problem, solution.order) == solution.objective_us
