"""The price of a layout's stages, and a floor under the price of every cut and order of a candidate.

step time = max over ranks of (end of its last action + data-parallel traffic that shows) + optimizer step.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

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
            )
        )
    return tuple(stages)


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


class LayerFloor(NamedTuple):
    """The least a layer can cost, over its choices of recomputation and over devices."""

    forward_us: float
    backward_us: float  # until the gradient leaves it: B, or the fused backward if that is less
    fused_us: float  # fused backward
    work_us: float  # F and backward, split or fused, whichever is less
    dense_parameters: float
    expert_parameters: float
    optimizer_us: float
    output_bytes: int
    hull: tuple[tuple[float, float], ...]  # (work µs, bytes × µs held per microbatch), more work for less memory


@dataclass(frozen=True)
class StepFloor:
    """A lower bound on the step time of every cut, choice of recomputation and order of one candidate.

    Every rank r ends with exposed traffic e_r ≥ fixed + busy_r − hidden_r and the slowest optimizer step o ≥ o_r. All
    of busy, hidden and optimizer are sums over a rank's layers, so a deadline M for the step leaves every layer a
    *load* that a rank adds up:

        head_r + m · work_r ≤ M − fixed − (rest: least optimizer) and head_r + m · work_r + busy_r − hidden_r + o_r ≤ M

    with head_r the time before rank r can start. `step_us` is the least M at which the layers can be dealt to the
    ranks so that neither is broken. Between a rank's first F and last B lie all its F and B, and the gradient then has
    to go back through all layers before: head_r + m · (F + B)_r + tail_r ≤ M, with W in it where it is not split.

    With one chunk per rank, ranks take consecutive layers, and giving each as many as fit is best: a later cut never
    hurts the ranks behind. With several chunks, the k-th rank that is entered waits for at least k layers (slower ranks
    are taken to wait longest), and ranks are only asked to hold enough load between them, whole blocks at a time.
    """

    layers: tuple[LayerFloor, ...]
    totals: LayerFloor  # sums over the layers
    candidate: Candidate
    traffic: StepTraffic
    speeds: tuple[float, ...]  # of every rank's devices relative to the fastest, as `layers` are costed; shape (p,)
    hop_us: float  # least transfer to the next rank
    room_bytes: float = math.inf  # what all ranks of one replica together have for activations

    @cached_property
    def _forward(self) -> list[float]:
        return list(accumulate((layer.forward_us for layer in self.layers), initial=0.0))

    @cached_property
    def _backward(self) -> list[float]:
        return list(accumulate((layer.fused_us for layer in self.layers), initial=0.0))

    @cached_property
    def _inward(self) -> list[float]:
        return list(accumulate((layer.backward_us for layer in self.layers), initial=0.0))

    @cached_property
    def _passing(self) -> list[float]:
        """m · (F + B) of every layer, summed from the front: what lies between a rank's first F and last B."""
        m = self.candidate.num_microbatches
        return list(accumulate((m * (layer.forward_us + layer.backward_us) for layer in self.layers), initial=0.0))

    @cached_property
    def _plain(self) -> list[float]:
        """m · work of every layer, summed from the front."""
        m = self.candidate.num_microbatches
        return list(accumulate((m * layer.work_us for layer in self.layers), initial=0.0))

    @cached_property
    def _loaded(self) -> list[float]:
        """The same with traffic and optimizer."""
        m = self.candidate.num_microbatches
        return list(accumulate((m * layer.work_us + self._after_us(layer) for layer in self.layers), initial=0.0))

    @cached_property
    def _ascends(self) -> bool:
        return all(a <= b for a, b in pairwise(self._loaded))

    def _after_us(self, layer: LayerFloor) -> float:
        busy = self.traffic.busy_us(layer.dense_parameters, layer.expert_parameters)
        hidden = self.traffic.hidden_us(layer.forward_us, layer.fused_us)
        return busy - hidden + optimizer_us(layer.optimizer_us, self.candidate)

    @cached_property
    def quick_us(self) -> float:
        """A weaker bound in no time: the average rank."""
        totals, m, pp = self.totals, self.candidate.num_microbatches, self.candidate.pp
        ranks = sum(self.speeds)
        plain = m * totals.work_us / ranks
        loaded = plain + self._after_us(totals) / pp if ranks == pp else 0.0
        return max(plain, loaded) + self.traffic.fixed_us

    def step_us(self, *, splits_backward: bool) -> float:
        """The bound on the whole step; `splits_backward` if any order may run B and W apart."""
        low = max(self.quick_us, self._memory_us() + self.traffic.fixed_us)
        if self.candidate.pp == 1:
            return low
        low = max(low, self._chain_us(splits_backward) + self.traffic.fixed_us)
        chunks = self.candidate.virtual_stages > 1
        high = 2 * low + self._forward[-1] + self._backward[-1] + 2 * self.candidate.pp * self.hop_us
        fits = self._fits_chunks if chunks else self._fits
        while not fits(high, splits_backward):
            high *= 2
        for _ in range(60):
            if high - low <= 1e-4 * low:
                break
            middle = (low + high) / 2
            if fits(middle, splits_backward):
                high = middle
            else:
                low = middle
        return low

    def _chain_us(self, splits_backward: bool) -> float:
        """One microbatch passes all stages forth and back, and the others pass the largest stage besides.

        Between the first F and the last B of a stage lie all its F and B, before that the F of every stage before it,
        after that their B. Of S stages, one has at least ⌈(L − 2) / S⌉ blocks.
        """
        c, totals, blocks = self.candidate, self.totals, self.layers[1:-1]
        hops_us = 2 * (c.pp - 1) * self.hop_us
        passed = [b.forward_us + (b.backward_us if splits_backward else b.fused_us) for b in blocks]
        largest_us = -(-len(blocks) // c.num_stages) * min(passed, default=0.0)
        through_us = totals.forward_us + (totals.backward_us if splits_backward else totals.fused_us)
        return through_us + hops_us + (c.num_microbatches - 1) * largest_us

    def _memory_us(self) -> float:
        """Bytes × lifetime of all microbatches fit in the room × makespan, at the cost of recomputing what does not.

        A layer holds a microbatch from the start of its F to the end of its B; in between the microbatch passes every
        later layer, forward and back. Each layer may choose any point of its hull: taking the steepest pieces first,
        M ≥ max(m · work(x) / p, m · held(x) / room) is least where the two meet.
        """
        m, pp = self.candidate.num_microbatches, sum(self.speeds)
        work = sum(layer.hull[0][0] for layer in self.layers)
        held = sum(layer.hull[0][1] for layer in self.layers)
        if math.isinf(self.room_bytes) or held / self.room_bytes <= work / pp:
            return m * work / pp
        pieces: list[tuple[float, float]] = []
        for layer in self.layers:
            for (work_a, held_a), (work_b, held_b) in pairwise(layer.hull):
                pieces.append((work_b - work_a, held_a - held_b))
        pieces.sort(key=lambda piece: piece[0] / piece[1])
        for more_work, less_held in pieces:
            if (held - less_held) / self.room_bytes <= (work + more_work) / pp:
                share = (held / self.room_bytes - work / pp) / (more_work / pp + less_held / self.room_bytes)
                return m * (work + share * more_work) / pp
            work, held = work + more_work, held - less_held
        return m * held / self.room_bytes

    def _fits(self, deadline_us: float, splits_backward: bool) -> bool:
        cut, last = 0, len(self.layers)
        left = deadline_us - self.traffic.fixed_us
        for rank, speed in enumerate(self.speeds):
            hops = rank * self.hop_us
            head = self._forward[cut] + hops
            tail = self._inward[cut] + hops
            if splits_backward:
                reach = min(
                    bisect_right(self._plain, self._plain[cut] + (left - head) * speed),
                    bisect_right(self._passing, self._passing[cut] + (left - head - tail) * speed),
                )
            else:
                tail = self._backward[cut] + hops
                reach = bisect_right(self._plain, self._plain[cut] + (left - head - tail) * speed)
            if self._ascends and speed == 1.0:
                reach = min(reach, bisect_right(self._loaded, self._loaded[cut] + left - head))
            cut = max(cut, reach - 1)
            if cut >= last:
                return True
        return False

    def _fits_chunks(self, deadline_us: float, splits_backward: bool) -> bool:
        """Whether the ranks can hold all blocks between them, each as many whole ones as its time allows."""
        m, left = self.candidate.num_microbatches, deadline_us - self.traffic.fixed_us
        blocks = self.layers[1:-1]
        if not blocks:
            return True
        lightest = min(blocks, key=lambda layer: layer.work_us)
        each_us = m * (lightest.work_us + max(0.0, min(map(self._after_us, blocks)) / m))
        passed_us = m * min(layer.forward_us + layer.backward_us for layer in blocks)
        head_us = min(layer.forward_us for layer in blocks) + self.hop_us
        tail_us = min(layer.backward_us if splits_backward else layer.fused_us for layer in blocks) + self.hop_us
        held, total = 0, 0.0
        for rank, speed in enumerate(sorted(self.speeds, reverse=True)):
            before = max(0, rank - 1)
            room = left - before * (head_us if splits_backward else head_us + tail_us)
            most = room * speed / (each_us if speed == 1.0 else m * lightest.work_us)
            if splits_backward:
                most = min(most, (left - before * (head_us + tail_us)) * speed / passed_us)
            held += max(0, math.floor(most + 1e-9))
            total += max(0.0, room * speed)
        needed = max(self._plain[-1], self._loaded[-1]) if min(self.speeds) == 1.0 else self._plain[-1]
        return held >= len(blocks) and total >= needed


def least_work_us(layer: LayerProfile) -> float:
    """F and the backward, in one piece or apart."""
    return layer.forward_us + min(layer.fused_backward_us, layer.backward_input_us + layer.backward_weight_us)
