"""Memory of one device, part by part.

Model states per parameter, in bytes: with 16-bit compute 2 for the weight, 4 for the gradient that is accumulated
in float32, 12 for the optimizer (float32 master weight and AdamW's two moments); with float32 or float64 the
weight is its own master. ZeRO stage 1 shards the optimizer's part over the data-parallel group (a share of a
parameter's bytes that does not divide is dropped, less than a byte per layer).
Source: ZeRO, arXiv 1910.02054, section 3.1; Megatron-LM's distributed optimizer accumulates in float32 likewise.
"""

from collections.abc import Sequence

from planner.plans import RankMemory, StageCosts
from profiles.cluster import DeviceSpec
from profiles.model import BYTES_PER_ELEMENT, Dtype

RESERVE_FRACTION = 0.06  # CUDA context, communicator buffers, allocator fragmentation: not a process's to fill
GRADIENT_BYTES: dict[Dtype, int] = {"bfloat16": 4, "float16": 4, "float32": 4, "float64": 8}
OPTIMIZER_BYTES: dict[Dtype, int] = {"bfloat16": 12, "float16": 12, "float32": 8, "float64": 16}


def capacity_bytes(device: DeviceSpec) -> int:
    """What a process may use of this device's memory, in bytes."""
    return int(device.memory_bytes * (1 - RESERVE_FRACTION))


def model_state_bytes(parameter_bytes: int, dtype: Dtype, zero_stage: int, dp: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state for weights that take `parameter_bytes` in `dtype`."""
    num_parameters = parameter_bytes // BYTES_PER_ELEMENT[dtype]
    optimizer = num_parameters * OPTIMIZER_BYTES[dtype]
    shard = optimizer // dp if zero_stage >= 1 else optimizer
    return parameter_bytes, num_parameters * GRADIENT_BYTES[dtype], shard


def num_neighbours(rank_of_stage: Sequence[int], rank: int) -> int:
    """The most stages on other ranks that any one stage of this rank sends to or receives from: 0, 1 or 2."""
    last = len(rank_of_stage) - 1
    return max(
        sum(0 <= other <= last and rank_of_stage[other] != rank for other in (stage - 1, stage + 1))
        for stage, host in enumerate(rank_of_stage)
        if host == rank
    )


def buffer_bytes(boundary_bytes: int, neighbours: int) -> int:
    """Boundary tensors in flight: one being received from and one being sent to every neighbour."""
    return 2 * neighbours * boundary_bytes


def rank_memory(
    stages: Sequence[StageCosts],
    rank_of_stage: Sequence[int],
    rank: int,
    *,
    dtype: Dtype,
    zero_stage: int,
    dp: int,
    peak_activation_bytes: int,
    capacity: int,
) -> RankMemory:
    """Memory of one device of this pipeline rank, given what its activations take at their peak."""
    hosted = [stage for stage, host in zip(stages, rank_of_stage, strict=True) if host == rank]
    weights, gradients, optimizer = model_state_bytes(
        sum(stage.parameter_bytes for stage in hosted), dtype, zero_stage, dp
    )
    return RankMemory(
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        activation_bytes=peak_activation_bytes,
        temporary_bytes=max(stage.temporary_bytes for stage in hosted),
        buffer_bytes=buffer_bytes(max(stage.output_bytes for stage in stages), num_neighbours(rank_of_stage, rank)),
        capacity_bytes=capacity,
    )
