"""Every backend meets the same zoo, agrees with brute force on drawn problems, and honours limits, hints and Ctrl-C."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_cases import ZOO, even, larger_problems, problems, zero_bubble_profile
from pipeline_oracle import optimum_us

from solvers.bounds import Bound, best_bound
from solvers.cbc import Cbc
from solvers.list_scheduling import ListScheduling, Simulator, rule_family
from solvers.pipeline import PipelineProblem, PipelineSolution, Status
from solvers.registry import BACKENDS, get_backend, solve_pipeline
from solvers.status import SolverError

ALL = [*BACKENDS, "auto"]
EXACT = [name for name in BACKENDS if get_backend(name).is_exact] + ["auto"]


def check(solution, problem, optimum):
    """What holds for every answer of every backend."""
    assert isinstance(solution, PipelineSolution)
    if optimum is None:
        assert solution.status is Status.INFEASIBLE
        assert solution.order is solution.score is solution.gap is solution.objective_us is None
        return
    assert solution.status.has_solution, solution
    assert solution.score == problem.evaluate(solution.order)
    assert solution.order == problem.canonical(solution.order)
    assert solution.score.fits
    assert solution.lower_bound_us <= optimum <= solution.objective_us, solution
    proven = solution.lower_bound_us == solution.objective_us
    assert (solution.status is Status.OPTIMAL) == proven == (solution.gap == 0)


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("name", ZOO)
def test_every_backend_passes_the_zoo(name, solver):
    problem, optimum = ZOO[name]
    solution = solve_pipeline(problem, solver=solver, time_limit_s=30)
    check(solution, problem, optimum)
    if optimum is not None and solver in EXACT:
        assert solution.status is Status.OPTIMAL


NO_HELP = Bound(1, "none")  # makes an exact backend search even where `best_bound` would have proven its hint


@pytest.mark.parametrize("solver", [name for name in EXACT if name != "auto"])
@pytest.mark.parametrize("name", [name for name, (_, optimum) in ZOO.items() if optimum is not None])
def test_exact_backends_prove_the_zoo_without_our_bounds(name, solver):
    problem, optimum = ZOO[name]
    solution = get_backend(solver).solve(problem, time_limit_s=30, bound=NO_HELP)
    check(solution, problem, optimum)
    assert solution.status is Status.OPTIMAL
    assert solution.lower_bound_kind == solver


@given(st.booleans().flatmap(lambda general: problems(general=general)))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_exact_backends_agree_with_brute_force(problem):
    optimum = optimum_us(problem)
    assert problem.is_feasible() == (optimum is not None)
    for solver in EXACT:
        if solver == "auto":
            solution = solve_pipeline(problem, solver=solver, time_limit_s=30)
        else:
            solution = get_backend(solver).solve(problem, time_limit_s=30, bound=NO_HELP)
        check(solution, problem, optimum)
        assert optimum is None or solution.status is Status.OPTIMAL, solver


@given(st.booleans().flatmap(lambda general: problems(general=general)))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_list_scheduling_is_feasible_whenever_anything_is(problem):
    solution = ListScheduling(max_rules=40).solve(problem, time_limit_s=30)
    check(solution, problem, optimum_us(problem))


@given(larger_problems(), st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_no_rule_ever_deadlocks_or_exceeds_memory_or_the_limit_in_flight(problem, rng):
    simulator = Simulator(problem)
    rules = rule_family(problem)
    for rule in rng.sample(rules, min(8, len(rules))):
        chosen = simulator.run(rule)
        order = simulator.order(chosen)
        score = problem.evaluate(order)
        assert score.fits, rule
        assert order == problem.canonical(order)
        assert score.objective_us == simulator.cost_us(chosen)


@given(problems())
@settings(derandomize=True, deadline=None, max_examples=30)
def test_times_with_a_common_divisor_are_solved_exactly(problem):
    scaled = replace(
        problem,
        **{
            name: tuple(6 * value for value in getattr(problem, name))
            for name in ("forward_us", "backward_us", "weight_us", "transfer_us")
        },
    )
    solution = get_backend("cp-sat").solve(scaled, time_limit_s=30, bound=NO_HELP)
    optimum = optimum_us(scaled)
    check(solution, scaled, optimum)
    assert optimum is None or solution.status is Status.OPTIMAL


@pytest.mark.parametrize(
    "placement", [(0, 1, 2, 3, 3, 2, 1, 0), (0, 1, 2, 3, 0, 1, 2, 3), (0, 1, 1, 0, 0, 1), (0, 0, 0)]
)
@pytest.mark.parametrize("slack", [0, 1, 4])
def test_list_scheduling_never_deadlocks_in_tight_memory(placement, slack):
    ranks = max(placement) + 1
    loose = even(ranks, 10, 3, 4, 2, 1, rank_of_stage=placement)
    for kept in (0, 2, 5):  # 5: a backward takes 3 more when it starts
        problem = replace(loose, weight_activation_bytes=(kept,) * len(placement))
        problem = replace(problem, capacity_bytes=tuple(need + slack for need in problem.single_microbatch_bytes()))
        for max_rules in (1, 60):
            solution = ListScheduling(max_rules=max_rules).solve(problem, time_limit_s=30)
            assert solution.score.fits


@pytest.mark.parametrize(
    ("setting", "memory", "rate"),
    [
        ("1.5b-m24", 16, 0.1585),  # ZB-1p of Qi et al., ICLR 2024, Table 5, and here proven
        ("1.5b-m64", 16, 0.0674),
        ("6.2b-m24", 16, 0.1323),
        ("6.2b-m32", 16, 0.1045),
    ],
)
def test_list_scheduling_proves_the_published_zb_1p_rates(setting, memory, rate):
    solution = solve_pipeline(zero_bubble_profile(setting, memory=memory), solver="list-scheduling")
    assert solution.status is Status.OPTIMAL
    assert round(solution.score.bubble_rate_span, 4) == rate


@pytest.mark.parametrize(
    ("setting", "rate"), [("1.5b-m24", 0.0443), ("1.5b-m64", 0.0026), ("6.2b-m24", 0.0029), ("6.2b-m32", 0.0022)]
)
def test_list_scheduling_reaches_the_published_zb_2p_rates(setting, rate):
    # 0.0433 is published for the first, which CP-SAT proves from here; the others are bettered
    solution = solve_pipeline(zero_bubble_profile(setting, memory=32), solver="list-scheduling", time_limit_s=120)
    assert solution.score.bubble_rate_span <= rate


@pytest.mark.parametrize(
    ("problem", "optimum"),
    [  # costs × 1000 where they are fractions; proven before by other means, peers leave a gap
        (even(4, 12, 5, 6, 4, memory=16), 181),
        (even(4, 12, 1000, 1500, 600, 100, memory=16), 38700),
        (even(4, 12, 1000, 1000, 500, 50, memory=12), 31300),
        (even(4, 12, memory=6), 44),
        (even(4, 12, memory=4), 61),
    ],
)
def test_auto_proves_what_heuristics_miss(problem, optimum):
    solution = solve_pipeline(problem, time_limit_s=120)
    assert solution.status is Status.OPTIMAL
    assert solution.objective_us == optimum


def test_the_same_seed_gives_the_same_answer():
    problem = even(4, 8, 5, 6, 4, 1, memory=6)
    for solver in ("list-scheduling", "cp-sat", "auto"):
        first, second = (solve_pipeline(problem, solver=solver, time_limit_s=60, seed=3) for _ in range(2))
        assert not first.limited_by_time
        assert replace(first, seconds=0, note="") == replace(second, seconds=0, note="")


@pytest.mark.parametrize("solver", EXACT)
def test_a_limit_that_bites_is_told_and_still_leaves_an_answer(solver):
    problem = even(3, 7, 11, 13, 7, 3, memory=5)
    backend = get_backend("list-scheduling" if solver == "auto" else solver)
    assert backend.why_not(problem) is None
    solution = solve_pipeline(problem, solver=solver, time_limit_s=0.15)
    check(solution, problem, solution.objective_us)
    assert solution.limited_by_time == (solution.status is Status.FEASIBLE)


def test_a_hint_is_never_made_worse():
    problem = even(4, 8, 5, 6, 4, 1, memory=6)
    good = solve_pipeline(problem, solver="list-scheduling")
    for name in BACKENDS:
        solution = get_backend(name).solve(problem, time_limit_s=0.2, hint=good.order)
        assert solution.objective_us <= good.objective_us
        assert solution.lower_bound_us >= good.lower_bound_us


def test_a_hint_that_does_not_fit_is_not_returned():
    loose, tight = even(2, 4, 2, 3, 1), even(2, 4, 2, 3, 1, memory=2)
    hint = solve_pipeline(loose, solver="list-scheduling").order
    assert not tight.evaluate(hint).fits
    for name in BACKENDS:
        assert get_backend(name).solve(tight, time_limit_s=30, hint=hint).score.fits


@pytest.mark.parametrize("solver", ["list-scheduling", "cp-sat", "auto"])
def test_progress_is_told_as_it_happens(solver):
    events = []
    problem = even(4, 8, 5, 6, 4, 1, memory=12)
    solution = solve_pipeline(problem, solver=solver, time_limit_s=60, on_progress=events.append)
    assert events
    assert all(event.lower_bound_us <= solution.objective_us <= event.objective_us for event in events)
    seconds = [event.seconds for event in events]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("solver", ["list-scheduling", "cp-sat", "auto"])
def test_ctrl_c_returns_the_best_so_far(solver):
    problem = zero_bubble_profile(memory=8)

    def press_ctrl_c(event):
        raise KeyboardInterrupt

    solution = solve_pipeline(problem, solver=solver, time_limit_s=250, on_progress=press_ctrl_c)
    assert solution.interrupted
    assert solution.status is Status.FEASIBLE
    assert solution.score.fits
    assert solution.lower_bound_us == best_bound(problem).value_us


def test_ctrl_c_in_cbc_returns_the_hint(monkeypatch):
    def press_ctrl_c(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("solvers.cbc._Model.solve", press_ctrl_c)
    problem = even(3, 4, 2, 3, 1, memory=4)
    hint = solve_pipeline(problem, solver="list-scheduling").order
    solution = Cbc().solve(problem, time_limit_s=30, hint=hint)
    assert solution.interrupted
    assert solution.order == hint


def test_an_error_in_the_progress_display_stops_the_search_and_is_not_lost():
    def fail(event):
        raise RuntimeError("no terminal")

    with pytest.raises(RuntimeError, match="no terminal"):
        solve_pipeline(zero_bubble_profile(memory=8), solver="cp-sat", time_limit_s=250, on_progress=fail)
    assert "cp-sat" not in {thread.name for thread in threading.enumerate()}


def test_cbc_refuses_what_is_too_large_for_it():
    problem = zero_bubble_profile()
    reason = "6624 ordering binaries, more than the 1500 this formulation is good for"
    assert Cbc().why_not(problem) == reason
    with pytest.raises(ValueError, match="solver 'cbc' does not take this problem: 6624 ordering"):
        solve_pipeline(problem, solver="cbc")
    solution = Cbc().solve(problem, time_limit_s=30)
    assert solution.status is Status.NO_SOLUTION
    assert solution.note == reason
    assert solution.lower_bound_us == best_bound(problem).value_us


def test_cbc_has_the_papers_number_of_binaries():
    # 3·p·m·(m-1)/2 ordering decisions for one split stage per rank: 1500 is just enough for p = 5, m = 14 with 1365
    assert Cbc().why_not(even(5, 14)) is None
    assert Cbc().why_not(even(5, 15)) == "1575 ordering binaries, more than the 1500 this formulation is good for"


def test_large_problems_are_not_given_to_cp_sat():
    problem = even(16, 40, 3, 4, 2, 1, memory=24)
    solution = solve_pipeline(problem, time_limit_s=3)
    assert solution.status is Status.OPTIMAL or "cp-sat not tried: 1920 ops, more than 1000" in solution.note


def test_a_broken_backend_is_found_out(monkeypatch):
    monkeypatch.setattr("solvers.cp_sat._Model.cost_us", lambda model, value: 1)
    with pytest.raises(SolverError, match="its model says"):
        get_backend("cp-sat").solve(even(2, 2), time_limit_s=30, bound=NO_HELP)


def test_the_rules_of_a_problem_are_distinct_and_leave_room_for_one():
    for problem, _ in ZOO.values():
        rules = rule_family(problem)
        assert len(set(rules)) == len(rules)
        assert all(min(rule.in_flight) >= 1 for rule in rules)


def test_an_unknown_solver_and_no_time_are_refused():
    with pytest.raises(ValueError, match="no solver is called 'gurobi'; known: auto, list-scheduling, periodic, lns"):
        solve_pipeline(even(2, 2), solver="gurobi")
    with pytest.raises(ValueError, match="time_limit_s is 0, it must be positive"):
        solve_pipeline(even(2, 2), time_limit_s=0)


def test_importing_the_problem_its_bounds_and_its_registry_loads_no_solver():
    program = (
        "import sys, solvers, solvers.pipeline, solvers.bounds, solvers.list_scheduling, solvers.registry\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'ortools', 'pulp', 'torch', 'pandas'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_solve_keeps_to_its_seconds_field():
    before = time.monotonic()
    solution = solve_pipeline(even(2, 3, 2, 3, 1), solver="list-scheduling")
    assert 0 <= solution.seconds <= time.monotonic() - before


def test_recomputation_runs_ahead_only_where_the_rule_looks_ahead():
    problem = even(4, 4, recompute=2)
    rules = rule_family(problem)
    assert {rule.look_ahead for rule in rules} == {0, 1, 4}
    simulator = Simulator(problem)
    for rule in rules:
        for ops in simulator.order(simulator.run(rule)):
            ahead = most_ahead = 0
            for op, following in zip(ops, [*ops[1:], None], strict=True):
                if op.kind == "R":
                    ahead += 1
                    if following.kind != "B":
                        most_ahead = max(most_ahead, ahead)
                elif op.kind == "B":
                    ahead -= 1
            assert most_ahead <= rule.look_ahead


def test_recomputation_fills_the_wait_for_the_first_backward():
    problem = even(4, 4, transfer=2, recompute=1)
    assert {rule.look_ahead for rule in rule_family(even(4, 4))} == {0}
    simulator, rule = Simulator(problem), rule_family(problem)[0]
    ahead, in_front = (simulator.run(replace(rule, look_ahead=n)) for n in (4, 0))
    assert " ".join(map(str, simulator.order(ahead)[0][:9])) == "F0.0 F0.1 F0.2 F0.3 R0.0 R0.1 R0.2 R0.3 B0.0"
    assert simulator.cost_us(ahead) == best_bound(problem).value_us == 31
    assert simulator.cost_us(in_front) == 32


def test_a_backward_that_takes_more_waits_until_there_is_room():
    # B1.1 is ready while microbatch 0 still needs the room: found by drawing, once chosen all the same
    problem = PipelineProblem((1, 1), (1, 1), (1, 1), (True, True), (0,), (0, 0), 2, (1, 1), (2, 3), (4,))
    simulator = Simulator(problem)
    for rule in rule_family(problem):
        assert problem.evaluate(simulator.order(simulator.run(rule))).fits
