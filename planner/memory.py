"""Memory of one device, part by part.

Model states per parameter: the weight in the compute dtype, the gradient that is accumulated, the optimizer's master
weight and two moments, each in its dtype (`planner.plans.Precision`). ZeRO stage 1 shards the optimizer's part over
`shard_degree` devices, 2 the gradients too, 3 the weights too; what a layer then holds whole while it runs is part of
its temporary bytes (`planner.traffic`).
Source: ZeRO, arXiv 1910.02054, section 3.1; Megatron-LM's distributed optimizer accumulates in float32 likewise.
"""

from collections.abc import Sequence

from planner.layout import Candidate
from planner.plans import Precision, RankMemory, StageCosts
from planner.traffic import BYTES_OF
from profiles.cluster import DeviceSpec
from profiles.model import BYTES_PER_ELEMENT

RESERVE_FRACTION = 0.05
"""Share of what the allocator has taken that lies idle between blocks when a process runs out of memory."""

CONTEXT_BYTES = 2_800_000_000
"""What is taken outside of the allocator: the CUDA context with its kernels, and NCCL's buffers."""

COPIED_GRADIENT_BYTES = 4
"""Per parameter, while the optimizer runs, where gradients are kept in fewer bits than master weights: AdamW gets them
in float32 (Megatron-LM, DeepSpeed). By then activations are gone."""

BUCKET_PARAMETERS = 500_000_000
"""Parameters whose gradients are reduced at a time under ZeRO 1 and 2; DeepSpeed's default."""


def capacity_bytes(device: DeviceSpec) -> int:
    """What tensors may take of this device's memory, in bytes."""
    room = device.memory_bytes - (CONTEXT_BYTES if device.kind != "cpu" else 0)
    return int(max(0, room) * (1 - RESERVE_FRACTION))


def observed_bytes(memory: RankMemory, *, outside: bool = False, reserved: bool = True) -> float:
    """What a measurement shows for this rank: tensors alone; what the allocator `reserved` for them; or, from
    `outside` of the process (nvidia-smi), that and the context."""
    total = memory.total_bytes / (1 - RESERVE_FRACTION if reserved or outside else 1)
    return total + (CONTEXT_BYTES if outside else 0)


def state_bytes_per_parameter(precision: Precision) -> tuple[int, int, int]:
    """Of the weight in the compute dtype, the gradient, and what the optimizer keeps."""
    master = 0 if precision.master_weights is None else BYTES_OF[precision.master_weights]
    weight, gradient = BYTES_PER_ELEMENT[precision.compute], BYTES_OF[precision.gradients]
    return weight, gradient, master + 2 * BYTES_OF[precision.optimizer]


def model_state_bytes(
    parameter_bytes: int, expert_parameter_bytes: int, candidate: Candidate, precision: Precision
) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state for weights that take these bytes in the compute dtype.

    Shards that do not divide are rounded down: less than a byte per layer.
    """
    per_parameter = state_bytes_per_parameter(precision)
    size = per_parameter[0]
    totals = []
    for stage, each in zip((3, 2, 1), per_parameter, strict=True):
        sharded = candidate.zero_stage >= stage
        dense = (parameter_bytes - expert_parameter_bytes) // size * each
        experts = expert_parameter_bytes // size * each
        totals.append(
            dense // candidate.shard_degree + experts // candidate.expert_shard_degree if sharded else dense + experts
        )
    return totals[0], totals[1], totals[2]


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
    candidate: Candidate,
    precision: Precision,
    peak_activation_bytes: int,
    capacity: int,
    num_replicas: int = 1,
) -> RankMemory:
    """Memory of one device of this pipeline rank, given what its activations take at their peak.

    With two replicas it holds the model states of its own stages and of the mirrored rank's.
    """
    homes = {rank, len(set(rank_of_stage)) - 1 - rank} if num_replicas == 2 else {rank}
    hosted = [stage for stage, host in zip(stages, rank_of_stage, strict=True) if host in homes]
    parameter_bytes = sum(stage.parameter_bytes for stage in hosted)
    weights, gradients, optimizer = model_state_bytes(
        parameter_bytes, sum(stage.expert_parameter_bytes for stage in hosted), candidate, precision
    )
    num_parameters = parameter_bytes // BYTES_PER_ELEMENT[precision.compute]
    return RankMemory(
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        activation_bytes=peak_activation_bytes,
        temporary_bytes=max(
            *(stage.temporary_bytes for stage in hosted),
            copied_gradient_bytes(num_parameters, candidate, precision) - peak_activation_bytes,
        ),
        buffer_bytes=buffer_bytes(
            max(stage.output_bytes for stage in stages), num_replicas * num_neighbours(rank_of_stage, rank)
        )
        + bucket_bytes(num_parameters, candidate, precision),
        capacity_bytes=capacity,
    )


def copied_gradient_bytes(num_parameters: int, candidate: Candidate, precision: Precision) -> int:
    """What the optimizer copies of gradients while it runs."""
    master = 0 if precision.master_weights is None else BYTES_OF[precision.master_weights]
    if BYTES_OF[precision.gradients] >= master or candidate.zero_stage == 3:
        return 0
    return num_parameters * COPIED_GRADIENT_BYTES // (candidate.shard_degree if candidate.zero_stage else 1)


def bucket_bytes(num_parameters: int, candidate: Candidate, precision: Precision) -> int:
    """Gradients on their way to their shards."""
    if candidate.zero_stage not in (1, 2) or candidate.shard_degree == 1:
        return 0
    return min(num_parameters, BUCKET_PARAMETERS) * BYTES_OF[precision.gradients]
