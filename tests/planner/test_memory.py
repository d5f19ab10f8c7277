"""Memory of a device, part by part, and what a measurement shows of it."""

from typing import Any

import pytest

from planner.layout import Candidate
from planner.memory import (
    BUCKET_PARAMETERS,
    CONTEXT_BYTES,
    RESERVE_FRACTION,
    bucket_bytes,
    capacity_bytes,
    copied_gradient_bytes,
    model_state_bytes,
    observed_bytes,
    rank_memory,
)
from planner.plans import Precision, RankMemory, StageCosts
from profiles import catalog

BF16 = Precision.of("bfloat16")
FP16 = Precision(compute="float16", gradients="float16")
N = 10**9


def candidate(**changes: Any) -> Candidate:
    base = Candidate(
        tp=1,
        pp=1,
        dp=8,
        virtual_stages=1,
        micro_batch_size=1,
        num_microbatches=1,
        zero_stage=0,
        recompute="none",
    )
    return base._replace(**changes)


def stage(**changes: int) -> StageCosts:
    base = StageCosts(
        forward_us=1,
        backward_input_us=1,
        backward_weight_us=1,
        fused_backward_us=2,
        optimizer_us=1,
        parameter_bytes=2 * N,
        activation_bytes=10,
        weight_activation_bytes=5,
        output_bytes=7,
        temporary_bytes=100,
        transfer_us=1,
    )
    return base.model_copy(update=changes)


@pytest.mark.parametrize(
    ("zero_stage", "want"),
    [
        (0, (2 * N, 4 * N, 12 * N)),
        (1, (2 * N, 4 * N, 1.5 * N)),
        (2, (2 * N, N / 2, 1.5 * N)),
        (3, (N / 4, N / 2, 1.5 * N)),
    ],
)
def test_zero_shards_optimizer_then_gradients_then_weights(zero_stage: int, want: tuple[float, ...]) -> None:
    c = candidate(zero_stage=zero_stage, shard_degree=8 if zero_stage else 1)
    assert model_state_bytes(2 * N, 0, c, BF16) == want


def test_experts_are_sharded_over_the_devices_that_hold_the_same_ones() -> None:
    c = candidate(zero_stage=1, shard_degree=8, ep=4)
    _, _, optimizer = model_state_bytes(2 * N, N, c, BF16)
    assert optimizer == (N // 2) * 12 // 8 + (N // 2) * 12 // 2
    uneven = candidate(zero_stage=1, dp=12, shard_degree=4, ep=2)  # six devices hold the same experts: three share them
    assert model_state_bytes(2 * N, N, uneven, BF16)[2] == (N // 2) * 12 // 4 + (N // 2) * 12 // 3


def test_16_bit_gradients_are_copied_to_32_bits_when_activations_are_gone() -> None:
    assert copied_gradient_bytes(N, candidate(), FP16) == 4 * N
    assert copied_gradient_bytes(N, candidate(zero_stage=1, shard_degree=8), FP16) == N // 2
    assert copied_gradient_bytes(N, candidate(), BF16) == 0

    def temporary(activations: int) -> int:
        memory = rank_memory(
            [stage()], [0], 0, candidate=candidate(), precision=FP16, peak_activation_bytes=activations, capacity=1
        )
        return memory.temporary_bytes

    assert temporary(N) == 3 * N
    assert temporary(5 * N) == 100


def test_zero_1_and_2_reduce_gradients_in_buckets() -> None:
    assert bucket_bytes(N, candidate(zero_stage=1, shard_degree=8), FP16) == 2 * BUCKET_PARAMETERS
    assert bucket_bytes(1000, candidate(zero_stage=2, shard_degree=8), BF16) == 4000
    assert bucket_bytes(N, candidate(), FP16) == 0
    assert bucket_bytes(N, candidate(zero_stage=3, shard_degree=8), FP16) == 0


def test_a_rank_in_the_middle_has_boundary_tensors_on_both_sides() -> None:
    stages = [stage(), stage(), stage()]
    buffers = [
        rank_memory(
            stages, [0, 1, 2], rank, candidate=candidate(pp=3), precision=BF16, peak_activation_bytes=0, capacity=1
        ).buffer_bytes
        for rank in range(3)
    ]
    assert buffers == [14, 28, 14]


def test_capacity_leaves_room_for_the_context_and_what_lies_idle_between_blocks() -> None:
    device = catalog.device("a100-80gb")
    assert capacity_bytes(device) == int((device.memory_bytes - CONTEXT_BYTES) * (1 - RESERVE_FRACTION))
    cpu = catalog.device("cpu")
    assert capacity_bytes(cpu) == int(cpu.memory_bytes * (1 - RESERVE_FRACTION))


def test_nvidia_smi_shows_more_than_the_allocator_and_that_more_than_tensors() -> None:
    memory = RankMemory(
        weight_bytes=N,
        gradient_bytes=N,
        optimizer_bytes=N,
        activation_bytes=N,
        temporary_bytes=N,
        buffer_bytes=N,
        capacity_bytes=10 * N,
    )
    assert observed_bytes(memory, reserved=False) == 6 * N
    assert observed_bytes(memory) == pytest.approx(6 * N / (1 - RESERVE_FRACTION))
    assert observed_bytes(memory, outside=True) == pytest.approx(observed_bytes(memory) + CONTEXT_BYTES)


def test_a_device_that_observes_its_capacity_is_just_full() -> None:
    device = catalog.device("h100-sxm")
    memory = RankMemory(
        weight_bytes=capacity_bytes(device),
        gradient_bytes=0,
        optimizer_bytes=0,
        activation_bytes=0,
        temporary_bytes=0,
        buffer_bytes=0,
        capacity_bytes=capacity_bytes(device),
    )
    assert observed_bytes(memory, outside=True) == pytest.approx(device.memory_bytes)
