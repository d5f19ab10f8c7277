"""Memory of one device, part by part.

Model states per parameter, in bytes: with 16-bit compute 2 for the weight, 4 for the gradient that is accumulated
in float32, 12 for the optimizer (float32 master weight and AdamW's two moments); with float32 or float64 the
weight is its own master. ZeRO stage 1 shards the optimizer's part over the data-parallel group.
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
    shard = -(-optimizer // dp) if zero_stage >= 1 else optimizer
    return parameter_bytes, num_parameters * GRADIENT_BYTES[dtype], shard


def buffer_bytes(stages: Sequence[StageCosts], num_ranks: int) -> int:
    """Boundary tensors in flight: one being received and one being sent, forward and backward."""
    return 0 if num_ranks == 1 else 4 * max(stage.output_bytes for stage in stages)


def rank_memory(
    hosted: Sequence[StageCosts],
    *,
    dtype: Dtype,
    zero_stage: int,
    dp: int,
    num_ranks: int,
    peak_activation_bytes: int,
    capacity: int,
) -> RankMemory:
    """Memory of one device of the rank that hosts these stages."""
    weights, gradients, optimizer = model_state_bytes(
        sum(stage.parameter_bytes for stage in hosted), dtype, zero_stage, dp
    )
    return RankMemory(
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        activation_bytes=peak_activation_bytes,
        temporary_bytes=max(stage.temporary_bytes for stage in hosted),
        buffer_bytes=buffer_bytes(hosted, num_ranks),
        capacity_bytes=capacity,
    )
