"""What is sent beside the pipeline: by data, context and expert parallelism, and how much of it shows.

ZeRO 0 all-reduces gradients; 1 reduce-scatters gradients and all-gathers updated weights; 2 reduce-scatters a layer's
gradients after every B, as it keeps only its shard of them; 3 (FSDP) also gathers the weights of a layer before its F
and before its B of every microbatch.
With hybrid sharding the shards lie in groups of `shard_degree`, and gradients of shards are all-reduced between groups.
Sources: ZeRO, arXiv 1910.02054, sections 5 and 7; PyTorch FSDP, arXiv 2304.11277, section 3.2; ring attention,
arXiv 2310.01889; experts, arXiv 2006.16668, section 3.

What is sent once per step is linear in a rank's parameters: the floor under a layout (`planner.floor`) and its price
(`planner.pricing`) are made of the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from operator import add

from planner.layout import Candidate
from planner.plans import Precision
from profiles.collectives import Fabric, Span
from profiles.model import BYTES_PER_ELEMENT, LayerProfile

INTERFERENCE = 0.11
"""Share of a collective's time that computing beside it loses: it takes multiprocessors and memory bandwidth."""

STEP_US = 5_000.0
"""What every step takes beside all that is priced: gradient norm, overflow check, host, next batch."""

STEP_US_PER_DOUBLING = 3_000.0
"""What it takes more for every doubling of the devices: the slowest of more is waited for."""

BYTES_OF: dict[str, int] = {"float8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
"""Bytes of a stored gradient, master weight or moment."""


@dataclass(frozen=True)
class Spans:
    """How the groups of one candidate lie in a fabric."""

    tp: Span
    cp: Span
    ep: Span
    shard: Span  # devices that share the states of the dense layers under ZeRO
    replicas: Span  # devices that hold the same shard
    expert_shard: Span  # the same two for experts: dp × cp / ep devices hold the same experts
    expert_replicas: Span
    pp: Span  # neighbours in the pipeline

    @classmethod
    def packed(cls, candidate: Candidate, fabric: Fabric) -> "Spans":
        """Devices in order: tp innermost, then cp, then dp, with ep and ZeRO's shards inside dp × cp, then pp."""
        tp, copies, expert_shard = candidate.tp, candidate.copies, candidate.expert_shard_degree
        expert_copies = copies // candidate.ep
        return cls(
            tp=fabric.span(tp),
            cp=fabric.span(candidate.cp, tp),
            ep=fabric.span(candidate.ep, tp),
            shard=fabric.span(candidate.shard_degree, tp),
            replicas=fabric.span(copies // candidate.shard_degree, tp * candidate.shard_degree),
            expert_shard=fabric.span(expert_shard, tp * candidate.ep),
            expert_replicas=fabric.span(expert_copies // expert_shard, tp * candidate.ep * expert_shard),
            pp=fabric.span(candidate.pp, tp * copies),
        )


@dataclass(frozen=True)
class StepTraffic:
    """What data parallelism sends once per step: a part of its own, and one per parameter of a rank.

    The two shares say how much of one microbatch's F and backward on a rank the links may be busy beside: gradients
    leave while the last backward runs, updated weights come while the next step's first forward does.
    """

    fixed_us: float
    us_per_dense_parameter: float
    us_per_expert_parameter: float
    hidden_forward_share: float
    hidden_backward_share: float
    shown_share: float = INTERFERENCE  # of the time the links are busy, even if all of it has something to hide behind

    def busy_us(self, dense: float, experts: float) -> float:
        """Time the links are busy for a rank with these numbers of parameters."""
        return dense * self.us_per_dense_parameter + experts * self.us_per_expert_parameter

    def hidden_us(self, forward_us: float, backward_us: float) -> float:
        """The most of that which does not show, given F and backward of one microbatch on the rank."""
        return self.hidden_forward_share * forward_us + self.hidden_backward_share * backward_us

    def exposed_us(self, dense: float, experts: float, forward_us: float, backward_us: float) -> float:
        """What shows after a rank's last backward; at least fixed + busy − hidden."""
        busy_us = self.busy_us(dense, experts)
        return self.fixed_us + max(self.shown_share * busy_us, busy_us - self.hidden_us(forward_us, backward_us))


def step_overhead_us(candidate: Candidate) -> float:
    """What a step takes beside all that is priced, on as many devices as the candidate uses."""
    return STEP_US + STEP_US_PER_DOUBLING * log2(candidate.num_devices)


def step_traffic(
    candidate: Candidate,
    fabric: Fabric,
    spans: Spans,
    precision: Precision,
    *,
    overlaps: bool,
    overhead_us: float | None = None,
) -> StepTraffic:
    """What one rank sends once per step, and `overhead_us` (None: `step_overhead_us`)."""
    fixed, slopes = 0.0, []
    for shard, replicas in ((spans.shard, spans.replicas), (spans.expert_shard, spans.expert_replicas)):
        at_zero = _reduction_us(0.0, candidate, fabric, shard, replicas, precision)
        fixed = max(fixed, at_zero)
        per = 1e9
        slopes.append((_reduction_us(per, candidate, fabric, shard, replicas, precision) - at_zero) / per)
    fixed += step_overhead_us(candidate) if overhead_us is None else overhead_us
    share = 1.0 if overlaps else 0.0
    return StepTraffic(fixed, slopes[0], slopes[1], share if candidate.zero_stage in (1, 2) else 0.0, share)


def _reduction_us(
    parameters: float, candidate: Candidate, fabric: Fabric, shard: Span, replicas: Span, precision: Precision
) -> float:
    """Gradients reduced, and weights gathered where they were updated in shards."""
    gradients = parameters * BYTES_OF[precision.gradients]
    weights = parameters * BYTES_PER_ELEMENT[precision.compute]
    if candidate.zero_stage == 0:
        return 2 * (fabric.gather_us(gradients, shard) + fabric.gather_us(gradients / shard.degree, replicas))
    between = 2 * fabric.gather_us(gradients / shard.degree, replicas)
    if candidate.zero_stage == 3:
        return between
    once = fabric.gather_us(gradients, shard) if candidate.zero_stage == 1 else 0.0
    return once + fabric.gather_us(weights, shard) + between


def boundary_us(num_bytes: float, candidate: Candidate, fabric: Fabric, spans: Spans) -> float:
    """A boundary tensor from one pipeline rank to the next, in µs.

    Without sequence parallelism every tensor-parallel device holds all of it: each sends its part, and the parts are
    gathered where they arrive (arXiv 2104.04473, section 4.1).
    """
    if candidate.sequence_parallel or candidate.tp == 1:
        return fabric.pass_on_us(num_bytes, spans.pp)
    return fabric.pass_on_us(num_bytes / candidate.tp, spans.pp) + fabric.gather_us(num_bytes, spans.tp)


def sharded_layers(
    layers: Sequence[LayerProfile],
    candidate: Candidate,
    fabric: Fabric,
    spans: Spans,
    precision: Precision,
    *,
    overlaps: bool = True,
) -> tuple[LayerProfile, ...]:
    """The layers as they run with what is sent while they do: context ring, expert exchange, ZeRO 2 and 3.

    Not `overlaps`: weights are fetched when they are needed, and gradients sent before anything else runs.
    """
    if candidate.cp == candidate.ep == 1 and candidate.zero_stage < 2:
        return tuple(layers)
    made: dict[int, LayerProfile] = {}  # layers that repeat are one object
    for layer in layers:
        if id(layer) not in made:
            sending = _sending(layer, candidate, fabric, spans)
            made[id(layer)] = _gathering(sending, candidate, fabric, spans, precision, overlaps)
    return tuple(made[id(layer)] for layer in layers)


def _sending(layer: LayerProfile, candidate: Candidate, fabric: Fabric, spans: Spans) -> LayerProfile:
    """With the context ring, as far as attention does not hide it, and the exchange of tokens between experts."""
    steps = candidate.cp - 1
    ring_us = fabric.pass_on_us(layer.ring_bytes, spans.cp)
    exchange_us = 2 * fabric.all_to_all_us(layer.exchange_bytes, spans.ep)
    more = _shown(steps * ring_us, layer.ring_hidden_forward_us) + exchange_us
    more_back = _shown(2 * steps * ring_us, layer.ring_hidden_backward_us) + exchange_us
    if layer.variant.recompute == "full":
        more_back += more
    return _with_times(
        layer, layer.forward_us + more, layer.backward_input_us + more_back, layer.fused_backward_us + more_back
    )


def _shown(sending_us: float, hidden_us: float) -> float:
    """What a transfer adds beside computing that may hide this much of it."""
    return max(INTERFERENCE * sending_us, sending_us - hidden_us)


def _with_times(layer: LayerProfile, forward_us: float, backward_us: float, fused_us: float) -> LayerProfile:
    times = {"forward_us": forward_us, "backward_input_us": backward_us, "fused_backward_us": fused_us}
    return layer.model_copy(update=times)


def _gathering(
    layer: LayerProfile, candidate: Candidate, fabric: Fabric, spans: Spans, precision: Precision, overlaps: bool
) -> LayerProfile:
    """With ZeRO 2 and 3: the next layer's weights come, and the last one's gradients go, while this one computes."""
    if candidate.zero_stage < 2 or candidate.shard_degree == 1:
        return layer
    gather_us = scatter_us = 0.0
    experts = layer.expert_parameter_bytes
    for size, shard in ((layer.parameter_bytes - experts, spans.shard), (experts, spans.expert_shard)):
        if size:
            gradients = size / BYTES_PER_ELEMENT[precision.compute] * BYTES_OF[precision.gradients]
            gather_us += fabric.gather_us(size, shard) if candidate.zero_stage == 3 else 0.0
            scatter_us += fabric.gather_us(gradients, shard)
    whole = layer.parameter_bytes // BYTES_PER_ELEMENT[precision.compute] * BYTES_OF[precision.gradients]
    whole += 2 * layer.parameter_bytes if candidate.zero_stage == 3 else 0  # this layer's weights and the next one's
    with_us = _beside if overlaps else add
    slower = _with_times(
        layer,
        with_us(layer.forward_us, gather_us),
        with_us(layer.backward_input_us, gather_us),
        with_us(layer.fused_backward_us, gather_us + scatter_us),
    )
    return slower.model_copy(
        update={
            "backward_weight_us": with_us(layer.backward_weight_us, scatter_us),
            "temporary_bytes": layer.temporary_bytes + whole,
        }
    )


def _beside(computing_us: float, sending_us: float) -> float:
    """Both at the same time."""
    return max(computing_us + INTERFERENCE * sending_us, sending_us)


def optimizer_us(layer_sum_us: float, candidate: Candidate) -> float:
    """Optimizer step of one rank, in µs; sharded from ZeRO stage 1 on."""
    return layer_sum_us / candidate.shard_degree if candidate.zero_stage >= 1 else layer_sum_us
