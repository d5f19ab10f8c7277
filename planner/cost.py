"""The price of a layout's stages.

step time = max over ranks of (end of its last action + data-parallel traffic that shows) + optimizer step.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from planner.layout import Candidate
from planner.plans import StageCosts
from planner.traffic import StepTraffic, optimizer_us
from profiles.cluster import Cluster, DeviceSpec, NodeGroup
from profiles.model import BYTES_PER_ELEMENT, Dtype, LayerProfile


def slowest_group(cluster: Cluster, dtype: Dtype) -> NodeGroup:
    """The group whose devices set the pace when any stage may run anywhere: least achievable FLOP/s in `dtype`."""
    return min(
        cluster.groups,
        key=lambda g: (g.device.peak_flops.get(dtype, 0.0) * g.device.matmul_efficiency, g.device.memory_bytes),
    )


def smallest_device(cluster: Cluster) -> DeviceSpec:
    """The device with the least memory."""
    return min((group.device for group in cluster.groups), key=lambda device: device.memory_bytes)


def stage_costs(
    layers: Sequence[LayerProfile],
    cuts: Sequence[int],
    rank_of_stage: Sequence[int],
    transfer_us: Callable[[int], float],
) -> tuple[StageCosts, ...]:
    """Sum layers into stages; `cuts` are the S − 1 inner bounds, stage s holds layers [cuts[s-1], cuts[s]).

    `transfer_us` is the time of that many bytes to the next pipeline rank.
    """
    bounds = (0, *cuts, len(layers))
    stages = []
    for stage, (first, last) in enumerate(pairwise(bounds)):
        held = layers[first:last]
        output = held[-1].output_bytes
        is_last = stage == len(bounds) - 2
        local = is_last or rank_of_stage[stage] == rank_of_stage[stage + 1]
        stages.append(
            StageCosts(
                forward_us=sum(layer.forward_us for layer in held),
                backward_input_us=sum(layer.backward_input_us for layer in held),
                backward_weight_us=sum(layer.backward_weight_us for layer in held),
                fused_backward_us=sum(layer.fused_backward_us for layer in held),
                optimizer_us=sum(layer.optimizer_us for layer in held),
                parameter_bytes=sum(layer.parameter_bytes for layer in held),
                expert_parameter_bytes=sum(layer.expert_parameter_bytes for layer in held),
                activation_bytes=sum(layer.activation_bytes for layer in held),
                weight_activation_bytes=sum(layer.weight_activation_bytes for layer in held),
                output_bytes=0 if is_last else output,
                temporary_bytes=max(layer.temporary_bytes for layer in held),
                transfer_us=0.0 if local else transfer_us(output),
                splits_backward=all(layer.variant.recompute == "none" for layer in held),
                deferred_parameter_bytes=_sum_if_all(layer.deferred_parameter_bytes for layer in held),
                recompute_us=sum(layer.forward_us for layer in held),
                # The first stage's input is no layer's output; its first layer keeps it, and maybe more.
                checkpoint_bytes=layers[first - 1].output_bytes if first else held[0].activation_bytes,
            )
        )
    return tuple(stages)


def _sum_if_all(sizes: Iterable[int | None]) -> int | None:
    """None where one is None."""
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    return total


def after_us(
    stages: Sequence[StageCosts], candidate: Candidate, traffic: StepTraffic, dtype: Dtype
) -> tuple[float, float]:
    """(data-parallel traffic that shows, optimizer step) of the rank that hosts these stages."""
    size = BYTES_PER_ELEMENT[dtype]
    experts = sum(stage.expert_parameter_bytes for stage in stages)
    dense = sum(stage.parameter_bytes for stage in stages) - experts
    exposed = traffic.exposed_us(
        dense / size,
        experts / size,
        sum(stage.forward_us for stage in stages),
        sum(stage.fused_backward_us for stage in stages),
    )
    return exposed, optimizer_us(sum(stage.optimizer_us for stage in stages), candidate)


def least_work_us(layer: LayerProfile) -> float:
    """F and the backward, in one piece or apart."""
    return layer.forward_us + least_back_us(layer)


def least_back_us(layer: LayerProfile) -> float:
    """The backward, in one piece or apart."""
    return min(layer.fused_backward_us, layer.backward_input_us + layer.backward_weight_us)
