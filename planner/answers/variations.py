"""What if: the same question under a change of machines, batch or sequence length, planned again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

from pydantic import ValidationError

from planner.answers.readings import difference_words, part_differences
from planner.api import DEFAULT_TIME_LIMIT_S, plan, solve
from planner.errors import LayoutError
from planner.plans import Layout, Plan, TimeParts
from planner.questions import PlanArguments, ask, check_time_limit, load_model, within
from profiles.catalog import load_cluster
from profiles.cluster import Cluster, Link, NodeGroup
from profiles.errors import PipewrightError
from profiles.facts import Bytes, Count, Facts, Microseconds, NonNegative
from profiles.model import ModelProfile, ModelSpec

RATES = ("link", "intra-link", "latency", "memory", "memory-bandwidth", "flops")
COUNTS = ("batch", "seq-len", "nodes", "devices")
_EXAMPLES = "link=2x, intra-link=0.5x, memory=0.9x, flops=1.2x, batch=2048, seq-len=16384, nodes=32"
_DIMENSIONS = (
    *("tp", "pp", "dp", "cp", "ep", "virtual_stages", "micro_batch_size", "zero_stage"),
    *("sequence_parallel", "recompute"),
)
AS_ASKED = "as asked"
FactsT = TypeVar("FactsT", bound=Facts)


@dataclass(frozen=True)
class Change:
    """One thing that is different: a factor, or for counts a new value."""

    key: str
    factor: float | None = None
    value: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """KEY=FACTORx, or for counts KEY=VALUE; LayoutError names the keys there are."""
        key, _, amount = text.partition("=")
        try:
            if key in (*RATES, *COUNTS) and amount.endswith("x") and 0 < float(amount[:-1]) < 1e9:
                return cls(key, factor=float(amount[:-1]))
            if key in COUNTS and 0 < int(amount) <= 10**9:
                return cls(key, value=int(amount))
        except ValueError:
            pass
        raise LayoutError(
            f"what if {text!r}: write KEY=FACTORx with KEY one of {', '.join((*RATES, *COUNTS))}, or KEY=COUNT with "
            f"one of {', '.join(COUNTS)}, like {_EXAMPLES}"
        )

    def __str__(self) -> str:
        return f"{self.key}={self.value}" if self.factor is None else f"{self.key}={self.factor:g}x"

    def of(self, count: int) -> int:
        """The changed count; LayoutError if the factor does not make it a whole number."""
        if self.factor is None:
            return self.value or count
        changed = count * self.factor
        if changed < 1 or changed != int(changed):
            raise LayoutError(f"what if {self}: {self.factor:g} times {count} is no whole number; give the new value")
        return int(changed)


class Outcome(Facts):
    """The best layout found under one change, or why there is none."""

    change: str
    cluster: str
    num_devices: Count
    problem: str | None = None
    layout: str = ""
    family: str = ""
    step_time_us: Microseconds = 0.0
    tokens_per_s: NonNegative = 0.0
    mfu: NonNegative = 0.0
    peak_memory_bytes: Bytes = 0
    gap: NonNegative = 0.0
    parts: TimeParts | None = None
    changed: str = ""  # against the answer as asked: the layout, then the parts of the step time


class WhatIf(Facts):
    """The answer as asked, and under each change."""

    base: Outcome
    changes: tuple[Outcome, ...]
    interrupted: bool = False  # some changes may be missing


def what_if(
    model: str | Path | ModelSpec | ModelProfile,
    cluster: str | Path | Cluster,
    changes: Sequence[str | Change],
    *,
    base: Plan | None = None,
    **arguments: Unpack[PlanArguments],
) -> WhatIf:
    """Plan again under each change alone, in an equal share of the time limit; `base` is the plan as asked, if made.

    Arguments are those of `planner.plan`. A change under which nothing fits, or that contradicts the pins, is an
    outcome with a `problem`. Ctrl-C gives the outcomes so far. LayoutError for a change that means nothing.
    """
    parsed = [change if isinstance(change, Change) else Change.parse(change) for change in changes]
    machines = cluster if isinstance(cluster, Cluster) else load_cluster(str(cluster))
    known = model if isinstance(model, ModelSpec | ModelProfile) else load_model(str(model))
    questions = [changed_question(change, known, machines, arguments) for change in parsed]
    limit_s = arguments.get("time_limit_s", DEFAULT_TIME_LIMIT_S)
    check_time_limit(limit_s)
    limit_s /= len(parsed) + (base is None)
    if base is None:
        base = plan(known, machines, **within(arguments, limit_s))
    outcomes: list[Outcome] = []
    interrupted = base.certificate.interrupted
    for change, (their_machines, their_arguments) in zip(parsed, questions, strict=True):
        if interrupted:
            break
        try:
            found = solve(
                ask(known, their_machines, their_arguments),
                top=0,
                time_limit_s=limit_s,
                seed=arguments.get("seed", 0),
                command=arguments.get("command", ""),
                on_progress=arguments.get("on_progress"),
            )
        except KeyboardInterrupt:
            interrupted = True
        except PipewrightError as error:
            outcomes.append(
                Outcome(
                    change=str(change),
                    cluster=their_machines.name,
                    num_devices=their_machines.num_devices,
                    problem=str(error),
                )
            )
        else:
            outcomes.append(_outcome(str(change), found, base))
            interrupted = found.certificate.interrupted
    return WhatIf(base=_outcome(AS_ASKED, base, base), changes=tuple(outcomes), interrupted=interrupted)


def changed_question(
    change: Change, known: ModelSpec | ModelProfile, machines: Cluster, arguments: PlanArguments
) -> tuple[Cluster, PlanArguments]:
    """Cluster and arguments under a change; LayoutError if it changes nothing that counts, or leaves what there is."""
    _check_profile(change, known, machines)
    changed = arguments.copy()
    if change.key == "batch":
        changed["global_batch_size"] = change.of(arguments["global_batch_size"])
        return machines, changed
    if change.key == "seq-len":
        longest = known.sequence_length if isinstance(known, ModelSpec) else profiled_length(known)
        changed["sequence_length"] = change.of(arguments.get("sequence_length") or longest)
        return machines, changed
    try:
        return _changed_cluster(change, machines), changed
    except ValidationError as error:
        raise LayoutError(f"what if {change}: {error.errors()[0]['msg']}; choose a smaller change") from None


def with_nodes(machines: Cluster, num_nodes: int) -> Cluster:
    """The same kind of node, so many of them; LayoutError for a cluster of several kinds."""
    if len(machines.groups) != 1:
        raise LayoutError(
            f"cluster {machines.name!r} has {len(machines.groups)} kinds of nodes; name one kind to change their number"
        )
    group = machines.groups[0]
    name = f"{num_nodes}x{group.devices_per_node}x{group.device.name}"
    if machines.name != f"{group.num_nodes}x{group.devices_per_node}x{group.device.name}":
        name = f"{machines.name} with {num_nodes} nodes"
    return _with(machines, name=name, groups=(_with(group, num_nodes=num_nodes),))


def _changed_cluster(change: Change, machines: Cluster) -> Cluster:
    if change.key == "devices":
        wanted, per_node = change.of(machines.num_devices), machines.groups[0].devices_per_node
        if wanted % per_node:
            raise LayoutError(f"what if {change}: nodes have {per_node} devices; give a multiple of {per_node}")
        return with_nodes(machines, wanted // per_node)
    if change.key == "nodes":
        return with_nodes(machines, change.of(machines.num_nodes))
    factor = change.factor or 1.0
    name = f"{machines.name} with {change}"
    groups = tuple(_changed_group(change.key, factor, group) for group in machines.groups)
    inter_node, inter_pod = machines.inter_node, machines.inter_pod
    if change.key in ("link", "latency"):
        inter_node = _changed_link(change.key, factor, inter_node)
        inter_pod = None if inter_pod is None else _changed_link(change.key, factor, inter_pod)
    return _with(machines, name=name, groups=groups, inter_node=inter_node, inter_pod=inter_pod)


def _changed_group(key: str, factor: float, group: NodeGroup) -> NodeGroup:
    device, intra_node, uplink = group.device, group.intra_node, group.uplink
    if key in ("intra-link", "latency"):
        intra_node = _changed_link(key, factor, intra_node)
    if key in ("link", "latency") and uplink is not None:
        uplink = _changed_link(key, factor, uplink)
    if key == "memory":
        device = _with(device, memory_bytes=int(device.memory_bytes * factor))
    elif key == "memory-bandwidth":
        device = _with(device, memory_bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s * factor)
    elif key == "flops":
        device = _with(device, peak_flops={dtype: rate * factor for dtype, rate in device.peak_flops.items()})
    return _with(group, device=device, intra_node=intra_node, uplink=uplink)


def _changed_link(key: str, factor: float, link: Link) -> Link:
    if key == "latency":
        return _with(link, latency_us=link.latency_us * factor)
    return _with(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * factor)


def _check_profile(change: Change, known: ModelSpec | ModelProfile, machines: Cluster) -> None:
    """What a profile fixes cannot be changed beside it."""
    if not isinstance(known, ModelProfile):
        return
    measured_links = known.links is not None and machines.num_nodes == 1
    if change.key in ("flops", "memory-bandwidth") or (measured_links and change.key in ("intra-link", "latency")):
        raise LayoutError(
            f"what if {change}: the profile of {known.model.name!r} holds times that this does not change; plan the "
            "model by name"
        )


def profiled_length(profile: ModelProfile) -> int:
    """The sequence length that a profile is planned at where none is named."""
    return max(variant.sequence_length for variant in profile.variants)


def _with(facts: FactsT, **changes: Any) -> FactsT:
    """A copy with these fields, checked."""
    fields = {name: getattr(facts, name) for name in type(facts).model_fields}
    return type(facts).model_validate({**fields, **changes})


def _outcome(change: str, found: Plan, base: Plan) -> Outcome:
    guess = found.prediction
    return Outcome(
        change=change,
        cluster=found.provenance.cluster,
        num_devices=found.layout.num_devices,
        layout=found.layout.degrees,
        family=found.family,
        step_time_us=guess.step_time_us,
        tokens_per_s=guess.tokens_per_s,
        mfu=guess.mfu,
        peak_memory_bytes=max(memory.total_bytes for memory in guess.memory),
        gap=found.certificate.gap,
        parts=guess.parts,
        changed="" if found is base else _changed(found, base),
    )


def _changed(found: Plan, base: Plan) -> str:
    layout = _changed_layout(found.layout, base.layout)
    if found.family != base.family:
        layout += [f"schedule {base.family} → {found.family}"]
    words = ", ".join(layout) or "same layout"
    parts, reference = found.prediction.parts, base.prediction.parts
    if parts is None or reference is None:
        return words
    return f"{words}; {difference_words(part_differences(parts, reference), base.prediction.step_time_us)}"


def _changed_layout(layout: Layout, base: Layout) -> list[str]:
    pairs: list[tuple[str, object, object]] = [
        (name.replace("_", " "), getattr(base, name), getattr(layout, name)) for name in _DIMENSIONS
    ]
    pairs.append(("sharded over", _sharded_over(base), _sharded_over(layout)))
    return [f"{name} {old} → {new}" for name, old, new in pairs if old != new]


def _sharded_over(layout: Layout) -> str:
    is_hybrid = layout.zero_stage > 0 and layout.shard_degree < layout.dp * layout.cp
    return str(layout.shard_degree) if is_hybrid else "all"
