"""What every action leaves alive in a running pipeline is what the stage costs of the plan say, byte by byte."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import pytest
import torch
from executor_cases import make_plan
from live_bytes import LiveBytes

from planner.cost import stage_costs
from planner.executor import Pipeline
from planner.executor.gradients import NoSync
from planner.executor.stage import Stage
from planner.plans import StageCosts
from planner.schedule.actions import Kind, Schedule
from profiles.measure import profile_bundled
from profiles.measure.models import Architecture, build_layers, loss_fn, model_spec_for, synthetic_batch
from profiles.measure.split_backward import WeightGradStore
from profiles.model import ModelSpec

LAYERS_PER_STAGE = (2, 2, 2)
NUM_MICROBATCHES, MICRO_BATCH_SIZE = 3, 2
LOSS_BYTES, TOKEN_BYTES = 4, 8

SCHEDULES = {
    "one after the other": "F0.{j} F1.{j} F2.{j} BW2.{j} BW1.{j} BW0.{j}",
    "split": "F0.{j} F1.{j} F2.{j} B2.{j} B1.{j} W2.{j} B0.{j} W0.{j} W1.{j}",
    "recomputed": "F0.{j} F1.{j} F2.{j} R2.{j} BW2.{j} R1.{j} B1.{j} W1.{j} BW0.{j}",
}


def spec_of(architecture: Architecture) -> ModelSpec:
    return model_spec_for(architecture, num_layers=4, hidden_size=32, num_heads=4, vocab_size=61, sequence_length=16)


@cache
def costs_of(architecture: Architecture) -> tuple[StageCosts, ...]:
    profile = profile_bundled(
        architecture,
        spec_of(architecture),
        micro_batch_sizes=(MICRO_BATCH_SIZE,),
        repeats=1,
        warmups=1,
        num_threads=1,
        with_links=False,
    )
    cuts = list(accumulate(LAYERS_PER_STAGE))[:-1]
    return stage_costs(profile.at(profile.variants[0]), cuts, (0,) * len(LAYERS_PER_STAGE), lambda _: 0.0)


def model_bytes(schedule: Schedule, stages: Sequence[StageCosts], tokens_bytes: int) -> list[int]:
    """Held after every action, by the stage costs: M_B, M_W, boundary tensors that nobody has taken yet, losses.

    The tokens are part of M_B of the first stage, but are the caller's batch and made by no action.
    """
    last = len(stages) - 1
    again = {(a.stage, a.microbatch) for a in schedule.ranks[0] if a.kind is Kind.R}
    split = {(a.stage, a.microbatch) for a in schedule.ranks[0] if a.kind is Kind.B}
    held, after = 0, []
    for kind, stage, microbatch in schedule.ranks[0]:
        into = stages[stage - 1].output_bytes if stage else 0
        out = stages[stage].output_bytes
        outside = 0 if stage else tokens_bytes
        kept = stages[stage].weight_activation_bytes - outside if (stage, microbatch) in split else 0
        if kind is Kind.F and (stage, microbatch) in again:
            held += stages[stage].checkpoint_bytes - into + (0 if stage == last else out)
        elif kind is Kind.R:
            held += stages[stage].activation_bytes - stages[stage].checkpoint_bytes
            held += LOSS_BYTES if stage == last else 0
        elif kind is Kind.F:
            held += stages[stage].activation_bytes - outside - into + (LOSS_BYTES if stage == last else out)
        elif kind is Kind.W:
            held -= kept
        else:
            held += into - (0 if stage == last else out) + kept - (stages[stage].activation_bytes - outside)
        after.append(held)
    return after


class Looker(NoSync):
    """Notes after every action what is alive."""

    def __init__(self, live: LiveBytes) -> None:
        self.live = live
        self.seen: list[int] = []

    def look(self) -> None:
        self.seen.append(self.live.now)


def measured_bytes(architecture: Architecture, schedule: Schedule) -> list[int]:
    """The second step of a pipeline in this process: by then gradients are there."""
    plan = make_plan(
        schedule,
        layers_per_stage=LAYERS_PER_STAGE,
        micro_batch_size=MICRO_BATCH_SIZE,
        model=spec_of(architecture),
        dtype="float32",
    )
    layers = build_layers(architecture, spec_of(architecture), dtype=torch.float32, device="cpu", seed=0)
    batch = synthetic_batch(spec_of(architecture), plan.global_batch_size, seed=0, step=0)
    with Pipeline(plan, layers, loss_fn, device="cpu", trace_steps=0) as pipe:
        pipe.step(*batch)
        live = LiveBytes()
        pipe._interpreter._sync = looker = Looker(live)
        with live:
            pipe.step(*batch)
        return looker.seen


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_after_every_action_as_many_bytes_are_alive_as_the_stage_costs_say(architecture, name):
    microbatches = [SCHEDULES[name].format(j=j).split() for j in range(NUM_MICROBATCHES)]
    # The forwards of the first two microbatches overlap.
    late = [*microbatches[0][:2], *microbatches[1][:1], *microbatches[0][2:], *microbatches[1][1:], *microbatches[2]]
    schedule = Schedule.from_lines([" ".join(late)])
    spec = spec_of(architecture)
    tokens_bytes = MICRO_BATCH_SIZE * spec.sequence_length * TOKEN_BYTES
    want = model_bytes(schedule, costs_of(architecture), tokens_bytes)
    assert measured_bytes(architecture, schedule) == want


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_after_b_no_more_is_held_than_after_f_on_a_block_and_nothing_after_w(architecture):
    """A stage with the embedding is the exception: it keeps output gradients where it kept tokens."""
    embedding_stage, *others = costs_of(architecture)
    for stage in others:
        assert 0 < stage.weight_activation_bytes <= stage.activation_bytes
    extra = embedding_stage.weight_activation_bytes - embedding_stage.activation_bytes
    assert extra <= 2 * embedding_stage.output_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_cuda_allocator_sees_what_the_stage_costs_say(architecture):
    """Up to the allocator's blocks of 512 bytes and what fused attention keeps beside its inputs."""
    layers_per_stage = (1, 4, 1)
    profile = profile_bundled(
        architecture,
        spec_of(architecture),
        device="cuda",
        micro_batch_sizes=(MICRO_BATCH_SIZE,),
        repeats=1,
        warmups=1,
        with_links=False,
    )
    costs = stage_costs(profile.at(profile.variants[0]), (1, 5), (0, 0, 0), lambda _: 0.0)[1]
    torch.manual_seed(0)
    layers = build_layers(architecture, spec_of(architecture), dtype=torch.float32, device="cuda", seed=0)
    stage = Stage(1, 1, layers[1:5], recompute=(), splits=True)
    x = torch.randn(MICRO_BATCH_SIZE, 16, 32, device="cuda").requires_grad_()
    assert sum(layers_per_stage) == len(layers)
    for turn in range(2):  # the first makes the gradients
        x.grad = None
        store = WeightGradStore()
        before = torch.cuda.memory_allocated()
        output = stage(x, store)
        after_forward = torch.cuda.memory_allocated() - before
        torch.autograd.backward(output, torch.ones_like(output))
        del output
        after_backward = torch.cuda.memory_allocated() - before
        store.run()
        after_weight = torch.cuda.memory_allocated() - before
        if turn:
            slack = 4096 * 4 + costs.output_bytes
            assert after_forward == pytest.approx(costs.activation_bytes, abs=slack)
            assert after_backward == pytest.approx(costs.weight_activation_bytes + costs.output_bytes, abs=slack)
            assert after_weight == pytest.approx(costs.output_bytes, abs=512)  # the gradient of x
