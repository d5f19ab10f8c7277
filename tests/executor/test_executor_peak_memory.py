"""The memory of a running plan: it does not grow with the microbatches, and a limit that was planned for holds."""

from pathlib import Path
from typing import Any

import pytest
from worker_launch import found_by

import planner
from planner.pipeline_costs import PipelineCosts
from planner.plans import Plan
from planner.schedule.actions import Kind, Schedule
from planner.schedule.residency import peak_per_rank
from planner.scheduling import schedule_costs
from profiles.measure import profile_bundled
from profiles.measure.models import model_spec_for

WORKER = Path(__file__).with_name("memory_worker.py")
NUM_MICROBATCHES = 8
LOSS_BYTES = 4
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once


def found_in(mode: str, directory: Path) -> list[dict[str, Any]]:
    return found_by(WORKER, 2, mode, directory, may_warn=True, environment=ALLOCATOR)


def test_resident_memory_does_not_grow_with_the_microbatches(tmp_path):
    """torch's own runtime, which keeps buffers for all microbatches, shows that the measurement would see it."""
    for cases in found_in("growth", tmp_path):
        few, many = cases["ours m=4"], cases["ours m=32"]
        assert (few["graphs"], few["buffers"]) == (many["graphs"], many["buffers"])
        assert max(few["boundary tensors"], many["boundary tensors"]) < 9
        assert many["boundary tensors"] - few["boundary tensors"] < 3
        assert cases["torch m=32"]["boundary tensors"] - cases["torch m=4"]["boundary tensors"] > 20


@pytest.fixture(scope="module")
def plan():
    spec = model_spec_for("gpt2", num_layers=4, hidden_size=32, num_heads=4, vocab_size=61, sequence_length=32)
    profile = profile_bundled(
        "gpt2", spec, micro_batch_sizes=(2,), repeats=2, warmups=1, num_threads=1, with_links=False
    )
    return planner.plan(
        profile,
        "1x2xcpu",
        global_batch_size=2 * NUM_MICROBATCHES,
        pp=2,
        dp=1,
        micro_batch_size=2,
        family="gpipe",
        recompute="none",
        time_limit_s=10,
    )


def within(plan: Plan, capacity_bytes: list[int], *, recomputes: bool) -> Plan:
    """The plan with an order that a solver made for this much room for activations per rank."""
    stages = plan.stages
    again = {
        "recompute_us": [s.recompute_us for s in stages],
        "checkpoint_bytes": [s.checkpoint_bytes for s in stages],
    }
    costs = PipelineCosts(
        forward_us=[s.forward_us for s in stages],
        backward_us=[s.backward_input_us for s in stages],
        weight_us=[s.backward_weight_us for s in stages],
        activation_bytes=[s.activation_bytes for s in stages],
        weight_activation_bytes=[s.weight_activation_bytes for s in stages],
        **(again if recomputes else {}),
    )
    answer = schedule_costs(
        costs, num_ranks=2, num_microbatches=NUM_MICROBATCHES, capacity_bytes=capacity_bytes, time_limit_s=3
    )
    return planner.with_schedule(plan, Schedule.from_lines(answer.schedule))


@pytest.mark.parametrize(("microbatches", "recomputes"), [(3, False), (2, False), (2, True)])
def test_a_plan_for_a_memory_limit_stays_under_it_when_run(plan, tmp_path, microbatches, recomputes):
    limits = [microbatches * max(s.activation_bytes, s.weight_activation_bytes) for s in plan.stages]
    given = within(plan, limits, recomputes=recomputes)
    kinds = {action.kind for actions in given.parsed_schedule.ranks for action in actions}
    assert (Kind.R in kinds) == recomputes
    assert Kind.W in kinds
    given.save(tmp_path / "plan.json")
    in_flight = max(held for held, _ in peak_per_rank(given.parsed_schedule))
    for rank, found in enumerate(found_in("limit", tmp_path)):
        memory = given.prediction.memory[rank]
        assert memory.activation_bytes <= limits[rank], (rank, memory, limits)
        # The plan counts two tensors on their way; sends that nobody has confirmed are more while the pipeline fills,
        # one for every microbatch in flight, and one more is being received and one sent.
        assert found["buffers"] <= in_flight + 2, (rank, found, in_flight)
        buffers = max(memory.buffer_bytes, found["buffers"] * plan.stages[0].output_bytes)
        planned = memory.activation_bytes + memory.temporary_bytes + buffers
        losses = NUM_MICROBATCHES * LOSS_BYTES if rank == 1 else 0
        assert found["peak bytes"] <= planned + 2 * losses, (rank, found, memory)  # of microbatches and their mean
        assert found["peak bytes"] > 0.5 * planned, (rank, found, memory)  # what is planned is needed
        assert found["left bytes"] <= losses, (rank, found, losses)
        unlimited = plan.prediction.memory[rank].activation_bytes
        assert found["peak bytes"] < unlimited, "the limit binds"
