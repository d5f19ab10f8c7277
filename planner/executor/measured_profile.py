"""What a run measured, as a profile that plans are made from: action times of stages, put back on their layers.

A run times whole stages in the order and company in which training runs them; a profile holds layers. The layers
of a base profile are stretched, stage by stage and kind by kind, until those of each stage add up to what was
measured. What a run cannot tell stays as in the base: how the layers of a stage compare, how a backward that ran in
one piece would split (and the other way round), memory and links.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from math import fsum

from planner.errors import ExecutionError
from planner.executor.run_report import ActionTime
from planner.plans import Plan
from profiles.analytic import profile_model
from profiles.catalog import device, device_names
from profiles.cluster import Link
from profiles.collectives import Fabric
from profiles.model import Dtype, LayerGroup, LayerProfile, ModelProfile, Variant

_FIELDS = {
    "F": "forward_us",
    "B": "backward_input_us",
    "W": "backward_weight_us",
    "BW": "fused_backward_us",
}


def plan_variants(plan: Plan) -> tuple[Variant, ...]:
    """The variant of every layer of a plan, shape (num_layers,)."""
    layout = plan.layout
    every = layout.recompute_of_layer
    if layout.recompute != "mixed":
        every = (layout.recompute,) * sum(layout.layers_per_stage)
    return tuple(
        Variant(
            tp=layout.tp,
            cp=layout.cp,
            ep=layout.ep,
            micro_batch_size=layout.micro_batch_size,
            sequence_length=plan.sequence_length,
            dtype=plan.dtype,
            recompute=choice,
            sequence_parallel=layout.sequence_parallel or layout.tp == 1,
        )
        for choice in every
    )


def base_profile(plan: Plan, given: ModelProfile | None, dtype: Dtype) -> ModelProfile:
    """The profile whose layers a run of `plan` in `dtype` is to correct: `given`, or the estimate the plan came from.

    ExecutionError where it is of another model, lacks the plan's variant, or was not given and cannot be made again.
    """
    if dtype != plan.dtype:
        raise ExecutionError(
            f"the run is in {dtype}, the plan in {plan.dtype}, and times of one say nothing of the other; measure "
            f"without --dtype, or plan in {dtype}"
        )
    variants = tuple(dict.fromkeys(plan_variants(plan)))
    if given is None:
        name = plan.provenance.device
        if not plan.provenance.profile_origin.startswith("analytic") or name not in device_names():
            raise ExecutionError(
                f"the plan was made from a profile ({plan.provenance.profile_origin}), whose layers the measured times "
                "are put on; give that profile, too: --profile FILE"
            )
        return profile_model(plan.model, device(name), variants, fabric=_NO_FABRIC)
    if given.model != plan.model:
        differing = [n for n in type(plan.model).model_fields if getattr(given.model, n) != getattr(plan.model, n)]
        first = differing[0]
        raise ExecutionError(
            f"the profile is of model {given.model.name!r}, the plan of {plan.model.name!r}; their {first} are "
            f"{getattr(given.model, first)!r} and {getattr(plan.model, first)!r}: give the profile that the "
            "plan was made from"
        )
    if given.num_layers != sum(plan.layout.layers_per_stage):
        raise ExecutionError(
            f"the profile has {given.num_layers} layers, the plan's layers_per_stage "
            f"{list(plan.layout.layers_per_stage)} add up to {sum(plan.layout.layers_per_stage)}: give the profile the "
            "plan was made from"
        )
    for variant in variants:
        if variant not in given.variants:
            known = "; ".join(map(str, given.variants))
            raise ExecutionError(
                f"the profile holds {known}, the plan runs {variant}: give the profile the plan was made from"
            )
    return given


# One process of a bundled model sends nothing from within a layer.
_NO_FABRIC = Fabric((1, 1), (Link(bandwidth_bytes_per_s=1e24, latency_us=0.0),) * 2)


def corrected_profile(
    base: ModelProfile,
    plan: Plan,
    actions: Sequence[ActionTime],
    optimizer_us: Mapping[int, float],
    *,
    device_name: str,
    how: str,
) -> ModelProfile:
    """`base` with times as `actions` say: of every stage and kind, the layers add up to its `occupied_us`.

    Only the plan's variants are kept. A stage's BW is stretched like its B and W together where it was not run, and B
    and W each like BW where they were not. `optimizer_us`: of each pipeline rank, its whole optimizer step. `how`: what
    was run, for the origin.
    """
    layout = plan.layout
    variants = plan_variants(plan)
    kept = tuple(dict.fromkeys(variants))
    home = [group for group in base.layers for _ in range(group.count)]
    layers = [group.at(variant) for group, variant in zip(home, variants, strict=True)]
    shards = layout.shard_degree if layout.zero_stage >= 1 else 1
    factor_of_rank = {
        rank: _ratio(
            optimizer_us[rank] * shards,
            fsum(layers[n].optimizer_us for s, n in _layers_of_stages(plan) if layout.rank_of_stage[s] == rank),
        )
        for rank in range(layout.pp)
    }
    groups: list[LayerGroup] = []
    for stage, (first, end) in enumerate(pairwise((0, *accumulate(layout.layers_per_stage)))):
        measured: dict[str, float] = {a.kind: a.occupied_us for a in actions if a.stage == stage}
        add, stretch = _corrections(layers[first:end], measured)
        for index in range(first, end):
            update = factor_of_rank[layout.rank_of_stage[stage]]
            made = tuple(_stretched(home[index].at(v), stretch, add, update) for v in kept)
            same = groups and index > first and home[index] is home[index - 1] and groups[-1].profiles == made
            if same:
                groups[-1] = groups[-1].model_copy(update={"count": groups[-1].count + 1})
            else:
                groups.append(LayerGroup(name=home[index].name, kind=home[index].kind, profiles=made))
    return ModelProfile(
        model=base.model,
        architecture=base.architecture or plan.architecture,
        layers=tuple(groups),
        links=base.links,
        origin=base.origin.model_copy(
            update={
                "kind": "measured",
                "device": device_name,
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "how": f"measured in {how}; shares within a stage, memory and links: {base.origin.how}",
            }
        ),
    )


def _layers_of_stages(plan: Plan) -> list[tuple[int, int]]:
    """(stage, layer) of every layer."""
    bounds = (0, *accumulate(plan.layout.layers_per_stage))
    return [(s, n) for s, (first, end) in enumerate(pairwise(bounds)) for n in range(first, end)]


def _corrections(
    layers: Sequence[LayerProfile], measured: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """By field: µs to add to each layer where the base has none to stretch, and the factor otherwise."""
    before = {kind: fsum(getattr(layer, field) for layer in layers) for kind, field in _FIELDS.items()}
    after = dict(measured)
    apart = before["B"] + before["W"]
    if "BW" in after and "B" not in after:
        ratio = _ratio(after["BW"], before["BW"])
        after["B"], after["W"] = before["B"] * ratio, before["W"] * ratio
    elif "B" in after and "BW" not in after:
        after["BW"] = before["BW"] * _ratio(after["B"] + after["W"], apart)
    add, stretch = {}, {}
    for kind, field in _FIELDS.items():
        wanted = after.get(kind, before[kind])
        add[field] = wanted / len(layers) if before[kind] == 0 else 0.0
        stretch[field] = _ratio(wanted, before[kind])
    return add, stretch


def _ratio(after: float, before: float) -> float:
    return after / before if before > 0 else 1.0


def _stretched(
    layer: LayerProfile, stretch: Mapping[str, float], add: Mapping[str, float], update: float
) -> LayerProfile:
    times = {field: getattr(layer, field) * stretch[field] + add[field] for field in stretch}
    return layer.model_copy(update={**times, "optimizer_us": layer.optimizer_us * update})
