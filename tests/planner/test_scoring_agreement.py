"""Two scorings that share no code, the solvers' in whole µs and the simulator's in floats, agree on every order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import numbers_for

from planner.ordering import Task, by_family
from planner.pipeline_costs import PipelineCosts
from planner.placements import placement_of_family
from planner.plans import StageCosts
from planner.problems import order_of, pipeline_problem
from planner.schedule.families import FAMILIES
from planner.schedule.simulation import simulate
from planner.schedule.validation import check
from solvers.bounds import Bound

times = st.integers(1, 40)
ONE_PLACE = sorted(name for name, family in FAMILIES.items() if family.num_replicas == 1)  # as solvers see stages


@st.composite
def pipelines(draw):
    family = FAMILIES[
        draw(st.sampled_from([name for name in ONE_PLACE if name != "dualpipev"]))
    ]  # solvers do not mix B and BW
    p, m, v = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    if family.supports(p, m, v) is not None:
        m, v = numbers_for(family, p, m)
    placement = family.placement(p, v)
    stages = []
    for s in range(p * v):
        backward, weight = draw(times), draw(times)
        local = s == p * v - 1 or placement[s] == placement[s + 1]
        stages.append(
            StageCosts(
                forward_us=draw(times),
                backward_input_us=backward,
                backward_weight_us=weight,
                fused_backward_us=backward + weight,
                optimizer_us=0.0,
                parameter_bytes=0,
                activation_bytes=draw(st.integers(0, 9)),
                weight_activation_bytes=draw(st.integers(0, 9)),
                output_bytes=0,
                temporary_bytes=0,
                transfer_us=0.0 if local else draw(st.integers(0, 9)),
            )
        )
    return family, p, m, v, placement, stages


@given(pipelines())
@settings(derandomize=True, deadline=None, max_examples=150)
def test_both_scorings_agree_on_makespan_span_and_memory(pipeline):
    family, p, m, v, placement, stages = pipeline
    schedule = family.generate(p, m, v)
    problem = pipeline_problem(
        stages, placement, m, splits_backward=family.splits_backward, capacity_bytes=None, objective="span"
    )
    score = problem.evaluate(order_of(schedule))
    timeline = simulate(schedule, stages)
    assert timeline.makespan_us == pytest.approx(score.makespan_us)
    assert timeline.span_us == pytest.approx(score.span_us)
    assert timeline.bubble_rate_span == pytest.approx(score.bubble_rate_span)
    assert timeline.bubble_rate_makespan == pytest.approx(score.bubble_rate_makespan)
    assert tuple(timeline.peak_activation_bytes) == score.peak_bytes


sizes = st.integers(1, 9)


@given(
    st.sampled_from(ONE_PLACE),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from(["span", "makespan"]),
    st.data(),
)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_both_scorings_agree_where_stages_are_fused_or_limited_or_recompute(name, p, m, objective, data):
    family = FAMILIES[name]
    m, v = numbers_for(family, p, m)

    def column(entries):
        return tuple(data.draw(entries) for _ in range(p * v))

    whole = column(sizes)
    costs = PipelineCosts(
        column(times),
        column(times),
        column(times),
        tuple(data.draw(times) for _ in range(p * v - 1)) or 0,
        whole,
        column(sizes),
        fused_stages=tuple(s for s in range(p * v) if data.draw(st.booleans())),
        max_in_flight=column(st.integers(1, m)),
        recompute_us=column(st.integers(0, 9)),
        checkpoint_bytes=tuple(data.draw(st.integers(0, most)) for most in whole),
    )
    place = placement_of_family(family, p, v)
    problem = costs.problem(
        place.rank_of_stage,
        m,
        objective=objective,
        capacity_bytes=[data.draw(st.integers(1, 99)) for _ in range(p)],
        fixed_bytes=[data.draw(st.integers(0, 9)) for _ in range(p)],
    )
    task = Task(problem, place)
    found = by_family(family, task, Bound(0, ""), splits=True)
    score = problem.evaluate(order_of(found.schedule))
    assert (found.span_us, found.makespan_us) == (score.span_us, score.makespan_us)
    assert (found.bubble_rate_span, found.bubble_rate_makespan) == pytest.approx(
        (score.bubble_rate_span, score.bubble_rate_makespan)
    )
    assert found.peak_bytes == score.peak_bytes
    assert (found.overflow is None) == score.fits
    check(found.schedule, num_stages=p * v, num_microbatches=m, rank_of_stage=place.rank_of_stage)
    fused = by_family(family, task, Bound(0, ""))
    bound = task.bound_of_any_backward()
    assert fused.overflow is not None or bound.value_us <= fused.objective_us
