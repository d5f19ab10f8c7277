"""From a measured profile to a solver's schedule with recompute, put into a plan and trained under its memory limit."""

import pytest

import planner
from planner.executor.launch import run_plan
from planner.executor.trace import Trace
from planner.pipeline_costs import PipelineCosts
from planner.plans import Plan
from planner.schedule.actions import Kind, Schedule
from planner.scheduling import schedule_costs
from planner.verify import verify
from profiles.measure import profile_bundled
from profiles.measure.models import model_spec_for

NUM_MICROBATCHES = 6


@pytest.fixture(scope="module")
def plan():
    spec = model_spec_for("gpt2", num_layers=4, hidden_size=32, num_heads=4, vocab_size=61, sequence_length=32)
    profile = profile_bundled(
        "gpt2", spec, dtype="float64", micro_batch_sizes=(1,), repeats=2, warmups=1, num_threads=1, with_links=False
    )
    return planner.plan(
        profile,
        "1x2xcpu",
        global_batch_size=NUM_MICROBATCHES,
        pp=2,
        dp=1,
        micro_batch_size=1,
        family="gpipe",
        recompute="none",
        time_limit_s=10,
    )


def recomputed(plan: Plan, capacity_bytes: list[int]) -> Plan:
    """The plan with a schedule in which every stage recomputes, within these bytes of activations per rank."""
    stages = plan.stages
    costs = PipelineCosts(
        forward_us=[s.forward_us for s in stages],
        backward_us=[s.backward_input_us for s in stages],
        weight_us=[s.backward_weight_us for s in stages],
        p2p_us=[s.transfer_us for s in stages[:-1]],
        activation_bytes=[s.activation_bytes for s in stages],
        weight_activation_bytes=[s.weight_activation_bytes for s in stages],
        recompute_us=[s.recompute_us for s in stages],
        checkpoint_bytes=[s.checkpoint_bytes for s in stages],
    )
    answer = schedule_costs(
        costs, num_ranks=2, num_microbatches=NUM_MICROBATCHES, capacity_bytes=capacity_bytes, time_limit_s=5
    )
    return planner.with_schedule(plan, Schedule.from_lines(answer.schedule))


def test_a_solvers_schedule_with_recompute_trains_exactly(plan, tmp_path):
    limits = [2 * max(s.activation_bytes, s.weight_activation_bytes) for s in plan.stages]
    given = recomputed(plan, limits)
    verify(given)
    kinds = [action.kind for actions in given.parsed_schedule.ranks for action in actions]
    assert kinds.count(Kind.R) == 2 * NUM_MICROBATCHES
    for memory, before, limit in zip(given.prediction.memory, plan.prediction.memory, limits, strict=True):
        assert memory.activation_bytes <= limit < before.activation_bytes
    given.save(tmp_path / "plan.json")
    trace_path = tmp_path / "trace.json"
    report = run_plan(tmp_path / "plan.json", steps=3, device="cpu", check=True, trace_path=trace_path)
    assert report.exactness is not None
    assert report.exactness.worst_loss_relative_difference < 1e-10
    assert report.exactness.gradient_relative_difference < 1e-10
    again = {action.stage: action for action in report.actions if action.kind == "R"}
    assert [again[stage].predicted_us for stage in (0, 1)] == [s.recompute_us for s in plan.stages]
    assert all(action.measured_us > 0 for action in again.values())
    events = [event.kind for event in Trace.load(trace_path).ranks[0].steps[0].events]
    assert [kind for kind in events if kind not in ("drain", "optimizer")] == [
        a.kind.value for a in given.parsed_schedule.ranks[0]
    ]
