"""Orders that split some backwards only: brute force over every choice, the relaxed bound, memory, and limits."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_oracle import optimum_us

from planner.schedule.actions import Kind, Schedule
from planner.schedule.simulation import StageTimes, simulate
from planner.schedule.validation import check
from solvers.bounds import best_bound
from solvers.list_scheduling import ListScheduling
from solvers.mixed_backwards import gains_by_mixing, mix_backwards, relaxed
from solvers.pipeline import PipelineProblem

TABLES = ("forward_us", "backward_us", "weight_us", "activation_bytes", "weight_activation_bytes")


def problem_of(
    forward, backward, weight, *, m=2, transfer=0, placement=(0, 1), kept=1, capacity=None, objective="makespan"
):
    num_stages = len(forward)
    return PipelineProblem(
        forward_us=tuple(forward),
        backward_us=tuple(backward),
        weight_us=tuple(weight),
        split=(True,) * num_stages,
        transfer_us=(transfer,) * (num_stages - 1),
        rank_of_stage=placement,
        num_microbatches=m,
        activation_bytes=(2,) * num_stages,
        weight_activation_bytes=(kept,) * num_stages,
        capacity_bytes=None if capacity is None else (capacity,) * (max(placement) + 1),
        objective=objective,
    )


def with_whole(problem, whole_us, flags):
    """The problem in which flagged (stage, microbatch) run BW: as a B that takes as long, gives all back, and no W."""
    m = problem.num_microbatches
    tables = {name: [[value] * m for value in getattr(problem, name)] for name in TABLES}
    for (stage, microbatch), flag in flags.items():
        if flag:
            tables["backward_us"][stage][microbatch] = whole_us[stage]
            tables["weight_us"][stage][microbatch] = 0
            tables["weight_activation_bytes"][stage][microbatch] = 0
    fields = {name: getattr(problem, name) for name in PipelineProblem.__dataclass_fields__}
    frozen = {name: tuple(map(tuple, rows)) for name, rows in tables.items()}
    return SimpleNamespace(**{**fields, **frozen})


def best_of_all_mixes(problem, whole_us):
    keys = list(product(range(problem.num_stages), range(problem.num_microbatches)))
    optima = [
        optimum_us(with_whole(problem, whole_us, dict(zip(keys, flags, strict=True))))
        for flags in product((False, True), repeat=len(keys))
    ]
    return min((us for us in optima if us is not None), default=None)


def stages_of(problem, whole_us):
    return [
        StageTimes(f, b, w, whole, hop, activation_bytes=size, weight_activation_bytes=kept)
        for f, b, w, whole, hop, size, kept in zip(
            problem.forward_us,
            problem.backward_us,
            problem.weight_us,
            whole_us,
            (*problem.transfer_us, 0),
            problem.activation_bytes,
            problem.weight_activation_bytes,
            strict=True,
        )
    ]


small = st.tuples(
    *[st.lists(st.integers(1, 5), min_size=2, max_size=2)] * 3,
    st.integers(0, 2),
    st.sampled_from([(0, 1), (0, 0)]),
    st.integers(0, 2),
    st.sampled_from([None, 2, 4, 5, 6]),
    st.lists(st.integers(1, 5), min_size=2, max_size=2),
    st.sampled_from(["span", "makespan"]),
)


@given(small)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_no_mix_beats_the_relaxed_bound_and_no_answer_beats_brute_force(drawn):
    forward, backward, weight, transfer, placement, kept, capacity, saved, objective = drawn
    problem = problem_of(
        forward,
        backward,
        weight,
        transfer=transfer,
        placement=placement,
        kept=kept,
        capacity=capacity,
        objective=objective,
    )
    whole_us = [max(1, b + w - less) for b, w, less in zip(backward, weight, saved, strict=True)]
    optimum = best_of_all_mixes(problem, whole_us)
    if optimum is None:
        assert not problem.is_feasible()
        return
    bound = best_bound(relaxed(problem, whole_us)).value_us
    assert bound <= optimum, f"{problem} with BW {whole_us}: bound {bound}, brute force {optimum}"
    found = mix_backwards(problem, whole_us, time_limit_s=10, seed=0, max_ops=2000)
    assert found.cost_us >= optimum, f"{problem} with BW {whole_us}: {found}, brute force {optimum}"


def test_answers_cost_what_the_simulation_says_and_fit_in_memory():
    m, p, v = 12, 4, 2
    placement = tuple(range(p)) * v
    problem = problem_of(
        [4, 5, 6, 5] * v, [5, 6, 5, 4] * v, [4, 4, 5, 6] * v, m=m, transfer=1, placement=placement, kept=2, capacity=22
    )
    whole_us = [b + w - 1 for b, w in zip(problem.backward_us, problem.weight_us, strict=True)]
    found = mix_backwards(problem, whole_us, time_limit_s=30, seed=0, max_ops=30_000)
    schedule = Schedule.from_orders(found.order)
    check(schedule, num_stages=p * v, num_microbatches=m, rank_of_stage=placement)
    kinds = {action.kind for actions in schedule.ranks for action in actions}
    assert kinds == {Kind.F, Kind.B, Kind.W, Kind.BW}
    timeline = simulate(schedule, stages_of(problem, whole_us))
    assert timeline.makespan_us == found.cost_us
    assert max(timeline.peak_activation_bytes) <= 22
    assert found.cost_us >= best_bound(relaxed(problem, whole_us)).value_us


def test_mixing_is_better_than_splitting_all_or_none_where_work_counts_most():
    m, p = 64, 4
    problem = problem_of([10] * p, [10] * p, [10] * p, m=m, placement=tuple(range(p)), kept=2)
    whole_us = [17] * p
    split = ListScheduling().solve(problem, time_limit_s=10)
    whole = replace(problem, split=(False,) * p, backward_us=(17,) * p, weight_us=(0,) * p)
    fused = ListScheduling().solve(whole, time_limit_s=10)
    mixed = mix_backwards(problem, whole_us, time_limit_s=30, seed=0)
    assert mixed.cost_us < min(split.score.makespan_us, fused.score.makespan_us)


def test_the_same_seed_gives_the_same_order():
    problem = problem_of([4, 5, 6], [5, 6, 5], [4, 4, 5], m=8, placement=(0, 1, 2))
    found = [mix_backwards(problem, [8, 9, 9], time_limit_s=60, seed=3, max_ops=10_000) for _ in range(2)]
    assert found[0] == found[1]


def test_nothing_is_gained_where_backwards_take_no_less_in_one_piece():
    problem = problem_of([4, 5], [5, 6], [4, 4])
    assert not gains_by_mixing(problem, [9, 10])
    assert gains_by_mixing(problem, [9, 9])
    found = mix_backwards(problem, [9, 10], time_limit_s=10, seed=0, max_ops=2000)
    assert {op.kind for ops in found.order for op in ops} == {"F", "B", "W"}
