"""Where a priced layout lies on the machines, and its price there.

The search takes devices in order. Once a layout is found, the placement program (`planner.topology`) looks for a
cheaper way to lay its groups, with what each group's traffic takes per step under the price model as its cost; the
layout is priced again there, and kept where that is faster.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from planner.candidate_costs import span_key
from planner.pricing import PricedLayout, Pricer
from planner.topology import place
from planner.traffic import INTERFERENCE, boundary_us, step_traffic
from profiles.collectives import Span
from profiles.model import BYTES_PER_ELEMENT

_TIME_LIMIT_S = 2.0
_NUM_PLACED = 4


@dataclass(frozen=True)
class PlacedLayout:
    """A layout on devices."""

    priced: PricedLayout
    pricer: Pricer  # whose spans it was priced with
    devices: tuple[int, ...]  # device index of every global rank, shape (num_devices,)
    notes: tuple[str, ...]  # how the groups lie, and why


def place_layout(pricer: Pricer, priced: PricedLayout, *, seed: int = 0) -> PlacedLayout:
    """The layout where its traffic costs least, priced there; in the usual order where nothing is faster."""
    job, c = pricer.job, priced.candidate
    devices = tuple(range(job.cluster.num_devices))
    if job.profile.links is not None and job.cluster.num_nodes == 1:
        return PlacedLayout(priced, pricer, devices, ("one node with measured links: devices in order",))
    placed = place(c, job.cluster, group_costs(pricer, priced), time_limit_s=_TIME_LIMIT_S, seed=seed)
    if len(job.profiles) > 1 and placed.devices != devices:  # stages were sized for devices in order
        return PlacedLayout(priced, pricer, devices, ("devices in order, as stages were sized to their speeds",))
    if placed.spans == pricer.spans(c):
        return PlacedLayout(priced, pricer, placed.devices, placed.explanation)
    there = Pricer(job, {span_key(c): placed.spans})
    again = reprice(there, priced)
    if again.step_us < priced.step_us and again.fits:
        return PlacedLayout(again, there, placed.devices, placed.explanation)
    return PlacedLayout(priced, pricer, devices, ("devices in order: no other way is faster by the whole price",))


def place_best(pricer: Pricer, ranked: list[PricedLayout], *, seed: int = 0) -> PlacedLayout:
    """The layout that is fastest where it lies, of the first few, which becomes the first of `ranked`."""
    placed = [place_layout(pricer, priced, seed=seed) for priced in ranked[:_NUM_PLACED]]
    best = min(range(len(placed)), key=lambda index: placed[index].priced.step_us)
    ranked.insert(0, ranked.pop(best))
    return placed[best]


def reprice(pricer: Pricer, priced: PricedLayout) -> PricedLayout:
    """The same cut and order with this pricer's spans."""
    cut, names = priced.cut, pricer.options(priced.candidate).choices
    choices = [names.index(recompute) for recompute in cut.recompute_of_layer]
    return pricer.price(
        pricer.cut(cut.candidate, cut.cuts, cut.rank_of_stage, choices), priced.schedule, priced.family, priced.solver
    )


def group_costs(pricer: Pricer, priced: PricedLayout) -> dict[str, Callable[[Span], float]]:
    """µs per step that each group of `Spans` costs, by how it lies.

    Traffic of the busiest rank: m microbatches of ring and exchange, one reduction, 2 (m + p − 1) boundary tensors.
    Tensor-parallel groups lie as their collectives were priced: side by side.
    """
    job, c, fabric = pricer.job, priced.candidate, pricer.fabric
    usual, m, p = pricer.spans(c), c.num_microbatches, c.pp
    size = BYTES_PER_ELEMENT[job.dtype]
    layers = priced.cut.layers
    per_rank = 1 / p
    dense = sum(layer.parameter_bytes - layer.expert_parameter_bytes for layer in layers) / size * per_rank
    experts = sum(layer.expert_parameter_bytes for layer in layers) / size * per_rank
    ring = sum(layer.ring_bytes for layer in layers) * per_rank
    hidden = sum(layer.ring_hidden_forward_us + layer.ring_hidden_backward_us for layer in layers) * per_rank
    exchange = sum(layer.exchange_bytes for layer in layers) * per_rank
    boundary = max((stage.output_bytes for stage in priced.cut.stages), default=0)

    def reduction(name: str) -> Callable[[Span], float]:
        def cost_us(span: Span) -> float:
            there = replace(usual, **{name: span})
            traffic = step_traffic(c, fabric, there, job.precision, overlaps=False, overhead_us=0.0)
            of_experts = name.startswith("expert")
            mine = experts if of_experts else dense
            again = 3 * m * fabric.gather_us(mine * size, span) if c.zero_stage >= 2 and name.endswith("shard") else 0.0
            return again + (traffic.busy_us(0.0, experts) if of_experts else traffic.busy_us(dense, 0.0))

        return cost_us

    def shown(span: Span) -> float:
        sent = 3 * (c.cp - 1) * fabric.pass_on_us(ring, span)
        return m * max(INTERFERENCE * sent, sent - hidden)

    return {
        "tp": lambda span: 0.0 if span == usual.tp else inf,
        "cp": shown,
        "ep": lambda span: m * 4 * fabric.all_to_all_us(exchange, span) if exchange else 0.0,
        "shard": reduction("shard"),
        "replicas": reduction("replicas"),
        "expert_shard": reduction("expert_shard"),
        "expert_replicas": reduction("expert_replicas"),
        "pp": lambda span: 2 * (m + p - 1) * boundary_us(boundary, c, fabric, replace(usual, pp=span)),
    }
