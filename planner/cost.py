"""The price of a layout: stage costs, transfers, data-parallel traffic, and a floor under all of it.

step time = pipeline (simulated, transfers included) + exposed data-parallel traffic + optimizer step.
Data-parallel reduction starts when a rank's last action has ended, so all of it is exposed: that is what the bundled
executor does, and an upper bound for engines that overlap it.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from planner.layout import Candidate
from planner.memory import GRADIENT_BYTES
from planner.plans import StageCosts
from profiles.cluster import Cluster, DeviceSpec, Link, NodeGroup
from profiles.model import BYTES_PER_ELEMENT, Dtype, LayerProfile, MeasuredLinks


def slowest_group(cluster: Cluster) -> NodeGroup:
    """The group whose devices set the pace when every stage must run anywhere: least peak, then least memory."""
    return min(cluster.groups, key=lambda g: (max(g.device.peak_flops.values()), g.device.memory_bytes))


def smallest_device(cluster: Cluster) -> DeviceSpec:
    """The device with the least memory."""
    return min((group.device for group in cluster.groups), key=lambda device: device.memory_bytes)


@dataclass(frozen=True)
class Network:
    """Links as one layout sees them: ranks are laid out tp fastest, then dp, then pp."""

    cluster: Cluster
    measured: MeasuredLinks | None = None

    def tensor_parallel(self) -> Link:
        """Between the devices of a tensor-parallel group."""
        return min((g.intra_node for g in self.cluster.groups), key=lambda link: link.bandwidth_bytes_per_s)

    def pipeline(self, candidate: Candidate) -> Link:
        """Between neighbouring pipeline ranks: the worst link that any pair of neighbours has."""
        if self.measured is not None:
            return self.measured.point_to_point
        stride = candidate.tp * candidate.dp
        node_size = min(group.devices_per_node for group in self.cluster.groups)
        if stride * candidate.pp <= node_size:
            return self.tensor_parallel()
        last = self.cluster.num_devices - 1
        return self.cluster.link_between(0, last) if self.cluster.inter_pod else self.cluster.inter_node

    def data_parallel(self, candidate: Candidate) -> Link:
        """What one device of a data-parallel group gets out of a ring over the whole group.

        A group with k members in each node it touches runs k rings, one per network card, so it gets k times a
        card's bandwidth, up to the bandwidth inside the node.
        """
        if self.measured is not None:
            return self.measured.all_reduce
        inside = self.tensor_parallel()
        node_size = min(group.devices_per_node for group in self.cluster.groups)
        if candidate.tp * candidate.dp <= node_size:
            return inside
        members_per_node = max(1, node_size // candidate.tp)
        outside = self.cluster.inter_pod if self._leaves_pod(candidate) else self.cluster.inter_node
        assert outside is not None
        bandwidth = min(
            inside.bandwidth_bytes_per_s * inside.efficiency,
            members_per_node * outside.bandwidth_bytes_per_s * outside.efficiency,
        )
        return Link(bandwidth_bytes_per_s=bandwidth, latency_us=outside.latency_us)

    def _leaves_pod(self, candidate: Candidate) -> bool:
        if self.cluster.nodes_per_pod is None:
            return False
        nodes = {self.cluster.node_of_device[rank] for rank in range(candidate.tp * candidate.dp)}
        return max(nodes) // self.cluster.nodes_per_pod > 0


def stage_costs(
    layers: Sequence[LayerProfile], cuts: Sequence[int], rank_of_stage: Sequence[int], link: Link
) -> tuple[StageCosts, ...]:
    """Sum layers into stages; `cuts` are the S − 1 inner bounds, stage s holds layers [cuts[s-1], cuts[s])."""
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
                activation_bytes=sum(layer.activation_bytes for layer in held),
                weight_activation_bytes=sum(layer.weight_activation_bytes for layer in held),
                output_bytes=0 if is_last else output,
                temporary_bytes=max(layer.temporary_bytes for layer in held),
                transfer_us=0.0 if local else link.transfer_us(output),
            )
        )
    return tuple(stages)


def data_parallel_us(parameter_bytes: int, dtype: Dtype, candidate: Candidate, link: Link) -> float:
    """Gradient reduction of one rank, in µs.

    ZeRO 0: a ring all-reduce of the gradients. ZeRO 1: a reduce-scatter of the gradients, then an all-gather of the
    updated weights in the compute dtype.
    """
    num_parameters = parameter_bytes // BYTES_PER_ELEMENT[dtype]
    gradient_bytes = num_parameters * GRADIENT_BYTES[dtype]
    if candidate.zero_stage == 0:
        return link.all_reduce_us(gradient_bytes, candidate.dp)
    return link.reduce_scatter_us(gradient_bytes, candidate.dp) + link.reduce_scatter_us(parameter_bytes, candidate.dp)


def optimizer_us(layer_sum_us: float, candidate: Candidate) -> float:
    """Optimizer step of one rank, in µs; sharded over the data-parallel group from ZeRO stage 1 on."""
    return layer_sum_us / candidate.dp if candidate.zero_stage >= 1 else layer_sum_us


@dataclass(frozen=True)
class StepFloor:
    """A lower bound on the step time of every partition and every schedule of one candidate."""

    layers: tuple[LayerProfile, ...]
    candidate: Candidate
    dtype: Dtype
    pipeline_link: Link
    data_link: Link
    room_bytes: float = math.inf  # what all ranks of one replica together have for activations

    @cached_property
    def _forward(self) -> list[float]:
        return list(accumulate((layer.forward_us for layer in self.layers), initial=0.0))

    @cached_property
    def _backward(self) -> list[float]:
        return list(accumulate((layer.fused_backward_us for layer in self.layers), initial=0.0))

    @cached_property
    def _work(self) -> list[float]:
        return list(accumulate((_least_work_us(layer) for layer in self.layers), initial=0.0))

    @cached_property
    def _byte_time(self) -> float:
        """Bytes × µs that one microbatch holds over all layers."""
        rest = held = 0.0
        for layer in reversed(self.layers):
            rest += layer.forward_us + min(layer.backward_input_us, layer.fused_backward_us)
            held += layer.activation_bytes * rest
        return held

    @property
    def after_pipeline_us(self) -> float:
        """Data-parallel traffic and optimizer of the busiest rank are at least those of the average rank."""
        pp = self.candidate.pp
        parameters = sum(layer.parameter_bytes for layer in self.layers)
        traffic = data_parallel_us(parameters // pp, self.dtype, self.candidate, self.data_link)
        return traffic + optimizer_us(sum(layer.optimizer_us for layer in self.layers) / pp, self.candidate)

    def step_us(self, *, splits_backward: bool) -> float:
        """The bound: pipeline floor plus what must follow it."""
        return self.pipeline_us(splits_backward=splits_backward) + self.after_pipeline_us

    def pipeline_us(self, *, splits_backward: bool) -> float:
        """A lower bound on the makespan over all partitions and orders.

        With one chunk per rank, rank r cannot start before the first microbatch has passed the stages before it, and
        then has m microbatches to do; with fused backwards the last one still has to go back through those stages.
        So makespan ≥ head(c_r) + m · work(c_r, c_{r+1}) for every r and the cuts c. Least over all cuts: with a
        deadline M, let each rank in turn take as many layers as fit; that is optimal because m · work of a layer is
        at least its share of the head, so a later cut never hurts the ranks behind it. M by bisection.

        With several chunks per rank, rank r > 0 waits for the first chunks of r ranks, all but the very first with a
        block each at least (`head`), and the average over the ranks is a bound: m · work / p + mean of the heads.

        Memory: a layer holds a microbatch from the start of its F to the end of its B, in between the microbatch passes
        every later layer forward and back. The sum of bytes × lifetime fits in the room for activations × makespan.
        """
        m, pp = self.candidate.num_microbatches, self.candidate.pp
        total = self._work[-1]
        low = m * max(
            total / pp, max(_least_work_us(layer) for layer in self.layers), self._byte_time / self.room_bytes
        )
        if pp == 1:
            return low
        if self.candidate.virtual_stages > 1:
            block = min(layer.forward_us for layer in self.layers[1:-1])
            if not splits_backward:
                block += min(layer.fused_backward_us for layer in self.layers[1:-1])
            return max(low, m * total / pp + block * (pp - 1) * (pp - 2) / (2 * pp))
        hop = self.pipeline_link.transfer_us(min(layer.output_bytes for layer in self.layers[:-1]))
        high = m * total + self._forward[-1] + self._backward[-1] + 2 * pp * hop
        while high - low > 1e-4 * low:
            middle = (low + high) / 2
            if self._fits(middle, hop, splits_backward):
                high = middle
            else:
                low = middle
        return low

    def _fits(self, deadline_us: float, hop_us: float, splits_backward: bool) -> bool:
        m, cut, last = self.candidate.num_microbatches, 0, len(self.layers)
        for rank in range(self.candidate.pp):
            head = self._forward[cut] + rank * hop_us
            if not splits_backward:
                head += self._backward[cut] + rank * hop_us
            reach = bisect_right(self._work, self._work[cut] + (deadline_us - head) / m) - 1
            cut = max(cut, reach)
            if cut >= last:
                return True
        return False


def _least_work_us(layer: LayerProfile) -> float:
    return layer.forward_us + min(layer.fused_backward_us, layer.backward_input_us + layer.backward_weight_us)
