"""Where the time of a priced step goes: each part is what would be saved if its cause were gone.

The busiest rank's actions are priced again without one cause after another: without sharded weights on the way (ZeRO 2
and 3), without the exchange between experts, without the context ring, with infinitely fast links between
tensor-parallel devices, and without recomputation. What then remains is compute, so the parts add up to the step time.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from planner.plans import TimeParts
from planner.pricing import PricedLayout, Pricer
from planner.schedule.actions import Kind
from planner.traffic import sharded_layers
from profiles.analytic import profile_model
from profiles.cluster import DeviceSpec, Link
from profiles.collectives import Fabric, Span
from profiles.model import LayerProfile, ModelProfile, ModelSpec, Recompute, Variant

_NO_TIME_LINK = Link(bandwidth_bytes_per_s=1e24, latency_us=0.0)


def step_parts(pricer: Pricer, priced: PricedLayout) -> TimeParts:
    """The parts of this layout's predicted step time."""
    timeline = priced.timeline
    rank = max(range(len(timeline.busy_us)), key=lambda r: timeline.busy_us[r])
    busy_us = min(timeline.busy_us[rank], timeline.makespan_us)
    weights_us, experts_us, context_us, tensor_us, recompute_us = _work_parts(pricer, priced, rank)
    compute_us = busy_us - weights_us - experts_us - context_us - tensor_us - recompute_us
    if compute_us < 0:  # only where profiles disagree with themselves
        weights_us = experts_us = context_us = tensor_us = recompute_us = 0.0
        compute_us = busy_us
    c = priced.candidate
    overhead_us = min(pricer.overhead_us(c), max(0.0, priced.data_parallel_us))
    return TimeParts(
        compute_us=compute_us,
        recompute_us=recompute_us,
        tensor_parallel_us=tensor_us,
        context_parallel_us=context_us,
        expert_parallel_us=experts_us,
        weight_traffic_us=weights_us,
        bubble_us=timeline.makespan_us - busy_us,
        exposed_data_parallel_us=max(0.0, priced.data_parallel_us - overhead_us),
        overhead_us=overhead_us,
        optimizer_us=priced.optimizer_us,
    )


def recompute_flops(
    spec: ModelSpec, recompute_of_layer: Sequence[Recompute], tokens: int, sequence_length: int
) -> float:
    """FLOPs of one step's repeated forwards; embedding and head, first and last, are never repeated.

    "full" repeats a block's forward and "selective" the core of attention, counted as in `ModelSpec.step_flops`.
    """
    attention = (spec.step_flops(1, sequence_length) / 3 / sequence_length - 2 * spec.num_active_parameters) / (
        spec.num_layers
    )
    per_token = 0.0
    for block, choice in enumerate(recompute_of_layer[1:-1]):
        if choice == "full":
            per_token += attention + 2 * spec.block_parameters(min(block, spec.num_layers - 1), active=True)
        elif choice == "selective":
            per_token += attention
    return per_token * tokens


def _work_parts(pricer: Pricer, priced: PricedLayout, rank: int) -> tuple[float, float, float, float, float]:
    """Weight traffic, expert exchange, context ring, tensor-parallel collectives and recomputation of one rank."""
    job, candidate, cut = pricer.job, priced.candidate, priced.cut
    counts = Counter((action.kind, action.stage) for action in priced.schedule.ranks[rank])
    bounds = (0, *cut.cuts, len(cut.layers))
    profile = job.profile if len(job.profiles) == 1 else job.profiles[pricer.group_of_rank(candidate)[rank]]
    fabric, spans = pricer.fabric, pricer.spans(candidate)
    without_experts = replace(spans, ep=Span((1,) * len(spans.ep.members)))
    plain = candidate._replace(zero_stage=0, shard_degree=1)
    at: dict[Variant, tuple[list[LayerProfile], ...]] = {}
    totals = [0.0] * 5
    for stage, host in enumerate(cut.rank_of_stage):
        if host != rank:
            continue
        times = {kind: counts[kind, stage] for kind in Kind}
        for index in range(bounds[stage], bounds[stage + 1]):
            variant = cut.layers[index].variant
            if variant not in at:
                raw = profile.at(variant)
                at[variant] = (
                    list(sharded_layers(raw, plain, fabric, spans, job.precision)),
                    list(sharded_layers(raw, plain, fabric, without_experts, job.precision)),
                    raw,
                    *_without_links_and_recompute(pricer, profile, variant),
                )
            steps_us = [_busy_us(cut.layers[index], times)]
            steps_us += [_busy_us(layers[index], times) for layers in at[variant]]
            for part, (more, less) in enumerate(pairwise(steps_us)):
                totals[part] += max(0.0, more - less)
    return totals[0], totals[1], totals[2], totals[3], totals[4]


def _busy_us(layer: LayerProfile, times: dict[Kind, int]) -> float:
    return (
        times[Kind.F] * layer.forward_us
        + times[Kind.B] * layer.backward_input_us
        + times[Kind.W] * layer.backward_weight_us
        + times[Kind.BW] * layer.fused_backward_us
    )


def _without_links_and_recompute(
    pricer: Pricer, profile: ModelProfile, variant: Variant
) -> tuple[list[LayerProfile], list[LayerProfile]]:
    """The layers with infinitely fast links, and then also without recomputation."""
    raw = profile.at(variant)
    plain = variant.model_copy(update={"recompute": "none"})
    if profile.origin.kind == "analytic":
        device = next((g.device for g in pricer.job.cluster.groups if g.device.name == profile.origin.device), None)
        if device is not None and _ours(profile, device, pricer.fabric, variant):
            free = Fabric(pricer.fabric.sizes, (_NO_TIME_LINK,) * len(pricer.fabric.links))
            made = profile_model(profile.model, device, (variant, plain), fabric=free)
            return made.at(variant), made.at(plain)
    if plain in profile.variants:
        return raw, profile.at(plain)
    return raw, [raw[0], *map(_without_repeated_forward, raw[1:-1]), *raw[1:][-1:]]


def _ours(profile: ModelProfile, device: DeviceSpec, fabric: Fabric, variant: Variant) -> bool:
    """Whether the profile is what this device and fabric give, so that estimates can be set against it."""
    return profile_model(profile.model, device, (variant,), fabric=fabric).at(variant) == profile.at(variant)


def _without_repeated_forward(layer: LayerProfile) -> LayerProfile:
    """A block that recomputes everything, with a backward that is shorter by its forward."""
    if layer.variant.recompute != "full":
        return layer
    return layer.model_copy(
        update={
            "backward_input_us": max(0.0, layer.backward_input_us - layer.forward_us),
            "fused_backward_us": max(0.0, layer.fused_backward_us - layer.forward_us),
        }
    )
