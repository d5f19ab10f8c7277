"""The price of a layout: stage costs, transfers, data-parallel traffic, and a floor under all of it.

step time = pipeline (simulated, transfers included) + exposed data-parallel traffic + optimizer step.
Data-parallel reduction starts when the whole pipeline has ended, so all of it is exposed: close to what the bundled
executor does, and an upper bound for engines that overlap it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from planner.layout import Candidate
from planner.memory import GRADIENT_BYTES
from planner.plans import StageCosts
from profiles.cluster import Cluster, DeviceSpec, Link, NodeGroup
from profiles.model import BYTES_PER_ELEMENT, Dtype, LayerProfile, MeasuredLinks


def slowest_group(cluster: Cluster, dtype: Dtype) -> NodeGroup:
    """The group whose devices set the pace when any stage may run anywhere: least achievable FLOP/s in `dtype`."""
    return min(
        cluster.groups,
        key=lambda g: (g.device.peak_flops.get(dtype, 0.0) * g.device.matmul_efficiency, g.device.memory_bytes),
    )


def smallest_device(cluster: Cluster) -> DeviceSpec:
    """The device with the least memory."""
    return min((group.device for group in cluster.groups), key=lambda device: device.memory_bytes)


def narrower(links: Iterable[Link]) -> Link:
    """The link that gives the least to large transfers."""
    return min(links, key=lambda link: (link.bandwidth_bytes_per_s * link.efficiency, -link.latency_us))


class Network:
    """Links as one layout sees them: global ranks are devices in order, tp fastest, then dp, then pp.

    `measured` links, where a profile has them, stand for every link.
    """

    def __init__(self, cluster: Cluster, measured: MeasuredLinks | None = None) -> None:
        self.cluster, self.measured = cluster, measured
        self._nodes = np.array(cluster.node_of_device)
        self._links: dict[tuple[str, int, int, int], Link] = {}

    def tensor_parallel(self) -> Link:
        """Between the devices of a tensor-parallel group, which stays inside a node."""
        return narrower(group.intra_node for group in self.cluster.groups)

    def pipeline(self, candidate: Candidate) -> Link:
        """Between neighbouring pipeline ranks: the worst link that any pair of neighbours has."""
        return self._cached("pipeline", candidate, self._pipeline)

    def data_parallel(self, candidate: Candidate) -> Link:
        """What one device gets out of a ring over its data-parallel group, in the worst of all groups.

        A group with k members in a node runs k rings, one per network card, so it gets k times a card's bandwidth, up
        to the bandwidth inside the node; the node with the fewest members sets the pace.
        """
        return self._cached("data", candidate, self._data_parallel)

    def _cached(self, kind: str, candidate: Candidate, find: Callable[[Candidate], Link]) -> Link:
        if self.measured is not None:
            return self.measured.point_to_point if kind == "pipeline" else self.measured.all_reduce
        key = (kind, candidate.tp, candidate.pp, candidate.dp)
        if key not in self._links:
            self._links[key] = find(candidate)
        return self._links[key]

    def _grid(self, candidate: Candidate) -> NDArray[np.int64]:
        """The node of every device, shape (pp, dp, tp)."""
        return self._nodes.reshape(candidate.pp, candidate.dp, candidate.tp)

    def _pods(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        return nodes // (self.cluster.nodes_per_pod or self.cluster.num_nodes)

    def _outside(self, *, leaves_pod: bool) -> Link:
        inter_pod = self.cluster.inter_pod
        return narrower((self.cluster.inter_node, inter_pod)) if leaves_pod and inter_pod else self.cluster.inter_node

    def _pipeline(self, candidate: Candidate) -> Link:
        nodes = self._grid(candidate)
        inside = self.tensor_parallel()
        if bool((nodes[1:] == nodes[:-1]).all()):
            return inside
        pods = self._pods(nodes)
        return narrower((inside, self._outside(leaves_pod=bool((pods[1:] != pods[:-1]).any()))))

    def _data_parallel(self, candidate: Candidate) -> Link:
        inside = self.tensor_parallel()
        groups = np.unique(self._grid(candidate)[:, :, 0], axis=0)  # devices of one tensor-parallel group share a node
        spread = [group for group in groups if group[0] != group[-1]]
        if not spread:
            return inside
        outside = self._outside(leaves_pod=any(np.ptp(self._pods(group[[0, -1]])) for group in spread))
        fewest = min(int(np.unique(group, return_counts=True)[1].min()) for group in spread)
        bandwidth = min(
            inside.bandwidth_bytes_per_s * inside.efficiency,
            fewest * outside.bandwidth_bytes_per_s * outside.efficiency,
        )
        return Link(bandwidth_bytes_per_s=bandwidth, latency_us=outside.latency_us)


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
        deadline M, let each rank in turn take as many layers as fit; that is optimal because m · (F + backward) of a
        layer is at least its share of the head, so a later cut never hurts the ranks behind it. M by bisection.

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
        for _ in range(100):
            if high - low <= 1e-4 * low:
                break
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
