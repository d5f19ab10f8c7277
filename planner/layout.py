"""The layout space: which degrees there are for a model, a cluster and a batch, and why the others are not.

A candidate fixes everything but the cut into stages and the order of actions. All devices of the cluster are used.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product
from math import prod
from typing import NamedTuple, get_args

from planner.errors import LayoutError
from planner.plans import RECOMPUTE_PLANS, Layout, RecomputePlan, ZeroStage
from planner.schedule.families import FAMILIES
from profiles.cluster import Cluster
from profiles.model import Dtype, ModelSpec, Recompute, Variant

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
VIRTUAL_STAGES = (1, 2, 3, 4, 6, 8)
MAX_ACTIONS = 600_000  # of one pipeline and step; beyond it nothing could be looked at in a reasonable time
MIN_CONTEXT_TOKENS = 1024  # of one context-parallel device; below it a ring has nothing left to hide behind

Degrees = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Pins:
    """What the caller has decided already: one value, several allowed ones, or None for a free dimension.

    `excluded` names (dimension, value) pairs that must not be used, like ("tp", 16) or ("recompute", "full").
    """

    tp: Degrees = None
    pp: Degrees = None
    dp: Degrees = None
    cp: Degrees = None
    ep: Degrees = None
    virtual_stages: Degrees = None
    micro_batch_size: Degrees = None
    zero_stage: Degrees = None
    shard_degree: Degrees = None
    recompute: RecomputePlan | tuple[RecomputePlan, ...] | None = None
    sequence_parallel: bool | None = None
    family: str | None = None
    excluded: tuple[tuple[str, int | str], ...] = ()

    def __post_init__(self) -> None:
        for name in COUNTED:
            for value in self.values(name) or ():
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise LayoutError(f"{name}={value}: degrees and sizes are whole numbers from 1")
        for name, known in (("zero_stage", get_args(ZeroStage)), ("recompute", RECOMPUTE_PLANS)):
            for value in self.values(name) or ():
                if value not in known:
                    raise LayoutError(f"{name}={value} is not known; choose one of {', '.join(map(str, known))}")
        for name, _ in self.excluded:
            if name not in (*COUNTED, "zero_stage", "recompute", "family"):
                raise LayoutError(
                    f"{name!r} cannot be excluded; dimensions are {', '.join(COUNTED)}, recompute, family"
                )

    def values(self, name: str) -> tuple[int | str, ...] | None:
        """The values a dimension may have, or None if any."""
        value = getattr(self, name)
        return value if value is None or isinstance(value, tuple) else (value,)

    def only(self, name: str) -> int | None:
        """The value of a dimension pinned to one number."""
        values = self.values(name)
        return values[0] if values is not None and len(values) == 1 and isinstance(values[0], int) else None

    def allows(self, name: str, value: int | str) -> bool:
        """Whether a dimension may have this value."""
        values = self.values(name)
        return (values is None or value in values) and (name, value) not in self.excluded

    @property
    def any(self) -> bool:
        """Whether anything but the schedule family is pinned or excluded."""
        return any(getattr(self, field.name) not in (None, ()) for field in fields(self) if field.name != "family")


COUNTED = ("tp", "pp", "dp", "cp", "ep", "virtual_stages", "micro_batch_size", "shard_degree")


class Candidate(NamedTuple):
    """One point of the outer layout space."""

    tp: int
    pp: int
    dp: int
    virtual_stages: int
    micro_batch_size: int
    num_microbatches: int
    zero_stage: ZeroStage
    recompute: RecomputePlan
    cp: int = 1
    ep: int = 1
    shard_degree: int = 1  # devices over which ZeRO shards; 1 without ZeRO
    sequence_parallel: bool = True

    @property
    def num_stages(self) -> int:
        """Pipeline stages, S = p · v."""
        return self.pp * self.virtual_stages

    @property
    def num_devices(self) -> int:
        """Devices the candidate runs on."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def copies(self) -> int:
        """Devices that hold the same shard of the dense layers, but for ZeRO."""
        return self.dp * self.cp

    @property
    def expert_shard_degree(self) -> int:
        """Devices over which ZeRO shards experts: as many as dense layers, or the next less that divides."""
        holders = self.copies // self.ep
        return next(n for n in range(min(holders, self.shard_degree), 0, -1) if holders % n == 0)

    @property
    def degrees(self) -> tuple[int, int, int, int, int]:
        """(tp, cp, ep, pp, dp)."""
        return self.tp, self.cp, self.ep, self.pp, self.dp

    @property
    def can_split_backward(self) -> bool:
        """Whether any stage may run B and W apart: recomputing layers keep their backward in one piece."""
        return self.recompute in ("none", "mixed")

    def recompute_choices(self) -> tuple[Recompute, ...]:
        """What each layer may do, the first being the least time."""
        return get_args(Recompute) if self.recompute == "mixed" else (self.recompute,)

    def variant(self, sequence_length: int, dtype: Dtype, recompute: Recompute) -> Variant:
        """The circumstances under which this candidate needs each layer's costs."""
        return Variant(
            tp=self.tp,
            cp=self.cp,
            ep=self.ep,
            micro_batch_size=self.micro_batch_size,
            sequence_length=sequence_length,
            dtype=dtype,
            recompute=recompute,
            sequence_parallel=self.sequence_parallel or self.tp == 1,
        )

    def variants(self, sequence_length: int, dtype: Dtype) -> tuple[Variant, ...]:
        """The variants of all `recompute_choices`."""
        return tuple(self.variant(sequence_length, dtype, choice) for choice in self.recompute_choices())


def candidate_of(layout: Layout) -> Candidate:
    """The point of the space that a layout is a cut of."""
    names = set(Candidate._fields)
    return Candidate(**{name: value for name, value in layout if name in names})


@dataclass(frozen=True)
class Space:
    """All candidates, and how many points were dropped for which reason."""

    candidates: tuple[Candidate, ...]
    dropped: dict[str, int]


def divisors(number: int) -> list[int]:
    """All divisors in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def tensor_parallel_obstacle(spec: ModelSpec, tp: int, sequence_length: int) -> str | None:
    """Why `tp` cannot divide this model at this sequence length, or None if it can."""
    if spec.num_heads % tp:
        return f"tp={tp} does not divide num_heads={spec.num_heads}"
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        return f"tp={tp} and num_kv_heads={spec.num_kv_heads}: neither divides the other"
    widths = [] if spec.moe is not None and spec.moe.num_dense_layers == 0 else [spec.ffn_size]
    if spec.moe is not None:
        widths.append(spec.moe.expert_ffn_size)
    for width in widths:
        if width % tp:
            return f"tp={tp} does not divide the feed-forward width {width}"
    if sequence_length % tp:
        return f"tp={tp} does not divide the sequence length {sequence_length} (sequence parallelism cuts it)"
    return None


@dataclass(frozen=True)
class Dimensions:
    """What a layout has to divide."""

    spec: ModelSpec
    cluster: Cluster
    global_batch_size: int
    sequence_length: int
    num_layers: int  # embedding and head included
    micro_batch_sizes: tuple[int, ...] = MICRO_BATCH_SIZES
    recompute_plans: tuple[RecomputePlan, ...] = ("mixed",)  # where nothing is pinned; "mixed" includes the others

    def node_obstacle(self, tp: int) -> str | None:
        """Why tensor parallelism of this degree would lie across nodes unevenly, or None."""
        sizes = {group.devices_per_node for group in self.cluster.groups}
        wrong = [size for size in sizes if size % tp and tp % size]
        return None if not wrong else f"tp={tp} neither divides nor is a multiple of the {wrong[0]} devices of a node"

    def context_obstacle(self, tp: int, cp: int) -> str | None:
        """Why context parallelism of this degree cannot cut the sequence, or None."""
        if cp == 1:
            return None
        if self.spec.latent_attention is not None:
            return f"cp={cp}: context parallelism with latent attention is not priced"
        if self.sequence_length % (2 * cp * tp):
            return f"2 × cp={cp} × tp={tp} does not divide the sequence length {self.sequence_length}"
        return None

    def expert_obstacle(self, ep: int, copies: int) -> str | None:
        """Why expert parallelism of this degree cannot spread the experts over `copies` = dp × cp devices, or None."""
        if ep == 1:
            return None
        if self.spec.moe is None:
            return f"ep={ep}: model {self.spec.name!r} has no experts"
        if self.spec.moe.num_experts % ep:
            return f"ep={ep} does not divide the {self.spec.moe.num_experts} experts of {self.spec.name!r}"
        if copies % ep:
            return f"ep={ep} does not divide dp × cp = {copies}"
        return None


def check_pins(dims: Dimensions, pins: Pins) -> None:
    """Refuse pins that no layout can satisfy; LayoutError says which numbers disagree."""
    spec, cluster, devices = dims.spec, dims.cluster, dims.cluster.num_devices
    degrees = {name: pins.only(name) for name in ("tp", "cp", "pp", "dp")}
    tp, cp = degrees["tp"], degrees["cp"]
    if tp is not None:
        obstacle = tensor_parallel_obstacle(spec, tp, dims.sequence_length)
        if obstacle:
            fitting = [
                d for d in divisors(spec.num_heads) if tensor_parallel_obstacle(spec, d, dims.sequence_length) is None
            ]
            shown = ", ".join(map(str, fitting[:12]))
            raise LayoutError(f"{obstacle} of model {spec.name!r}; degrees that do: {shown}")
    product = prod(value or 1 for value in degrees.values())
    named = " ".join(f"{name}={value}" for name, value in degrees.items() if value is not None)
    left = [name for name, value in degrees.items() if value is None and name != "cp"]
    if not left and cp is None and devices % product:
        left.append("cp")
    if not left and cp is not None and product != devices:
        raise LayoutError(
            f"layout {named} needs {product} devices, but cluster {cluster.name!r} has {devices}; "
            f"choose degrees whose product is {devices}"
        )
    if devices % product:
        raise LayoutError(
            f"layout {named} does not divide the {devices} devices of cluster {cluster.name!r}; "
            f"choose degrees whose product divides {devices}"
        )
    missing = [name for name, value in degrees.items() if value is None]
    if product == devices or len(missing) == 1:
        degrees = {name: value or devices // product for name, value in degrees.items()}
    obstacles = [
        None if tp is None else dims.node_obstacle(tp),
        None if cp is None else dims.context_obstacle(tp or 1, cp),
        None
        if (ep := pins.only("ep")) is None
        else dims.expert_obstacle(ep, devices // ((tp or 1) * (degrees["pp"] or 1))),
    ]
    for obstacle in obstacles:
        if obstacle is not None:
            raise LayoutError(f"{obstacle}; choose another degree for cluster {cluster.name!r}")
    shard = pins.only("shard_degree")
    if shard is not None and devices // ((tp or 1) * (degrees["pp"] or 1)) % shard:
        raise LayoutError(
            f"shard_degree={shard} divides no dp × cp of the {devices} devices of cluster {cluster.name!r}; choose one "
            "that does"
        )
    if shard is not None and shard > 1 and pins.values("zero_stage") == (0,):
        raise LayoutError(f"shard_degree={shard} with zero_stage=0, which shards nothing; pin one of them")
    _check_family(pins)
    pp, dp = degrees["pp"] or 1, degrees["dp"] or 1
    chunks, size = pins.only("virtual_stages") or 1, pins.only("micro_batch_size") or 1
    if degrees["pp"] == 1 and chunks > 1:
        raise LayoutError(f"pp=1 with virtual_stages={chunks}: one rank has no use for chunks; pin one only")
    if pp * chunks > dims.num_layers:
        raise LayoutError(
            f"pp={pp} × virtual_stages={chunks} makes {pp * chunks} stages, but model "
            f"{spec.name!r} has {dims.num_layers} layers, embedding and head included; use at most {dims.num_layers}"
        )
    if dims.global_batch_size % (dp * size):
        raise LayoutError(
            f"dp={dp} × micro_batch_size={size} is {dp * size}, which does not divide "
            f"global batch size {dims.global_batch_size}; choose a batch that is a multiple of {dp * size}"
        )


def _check_family(pins: Pins) -> None:
    family = FAMILIES.get(pins.family or "auto")
    if family is None:
        return
    if family.num_replicas > 1:
        raise LayoutError(
            f"family {family.name!r} holds every stage on two ranks, which the layout search does not price; pin "
            f"another, like dualpipev, or order it by itself: pipewright schedule --family {family.name}"
        )
    if family.splits_backward and pins.recompute not in (None, "none"):
        raise LayoutError(
            f"family {family.name!r} splits the backward, and recompute={pins.recompute} keeps it in one piece; "
            "pin one of them"
        )
    chunks = pins.only("virtual_stages")
    reason = None if chunks is None else family.supports(2, 4, chunks)
    if reason is not None:
        raise LayoutError(f"family {family.name!r} with virtual_stages={chunks}: {reason}")


def enumerate_space(dims: Dimensions, pins: Pins) -> Space:
    """Every candidate that divides; LayoutError if the pins alone rule all of them out.

    Left out as they are dominated under the cost model: sequence_parallel=False (pin it to price it) and uniform
    recomputation, which "mixed" contains.
    """
    check_pins(dims, pins)
    dropped: Counter[str] = Counter()
    candidates = tuple(
        candidate
        for degrees in _degrees(dims, pins, dropped)
        for candidate in _with_these_degrees(dims, pins, dropped, *degrees)
    )
    return Space(candidates, dict(dropped))


def _degrees(dims: Dimensions, pins: Pins, dropped: Counter[str]) -> Iterator[tuple[int, int, int, int]]:
    devices = dims.cluster.num_devices
    for tp in divisors(devices):
        if not pins.allows("tp", tp):
            continue
        if dims.node_obstacle(tp):
            dropped["tp neither divides nor is a multiple of a node"] += 1
            continue
        if tensor_parallel_obstacle(dims.spec, tp, dims.sequence_length):
            dropped["tp does not divide heads, widths or sequence"] += 1
            continue
        for cp in divisors(devices // tp):
            if not pins.allows("cp", cp):
                continue
            if dims.context_obstacle(tp, cp):
                dropped["cp does not cut the sequence"] += 1
                continue
            if cp > 1 and dims.sequence_length // cp < MIN_CONTEXT_TOKENS and pins.values("cp") is None:
                dropped[f"cp leaves less than {MIN_CONTEXT_TOKENS} tokens per device"] += 1
                continue
            for pp in divisors(devices // (tp * cp)):
                dp = devices // (tp * cp * pp)
                if not (pins.allows("pp", pp) and pins.allows("dp", dp)):
                    continue
                if pp > dims.num_layers:
                    dropped["more pipeline ranks than layers"] += 1
                elif dims.global_batch_size % dp:
                    dropped["dp does not divide the global batch size"] += 1
                else:
                    yield tp, cp, pp, dp


def _with_these_degrees(
    dims: Dimensions, pins: Pins, dropped: Counter[str], tp: int, cp: int, pp: int, dp: int
) -> Iterator[Candidate]:
    per_replica = dims.global_batch_size // dp
    sizes = [size for size in _offered(pins, "micro_batch_size", dims.micro_batch_sizes) if per_replica % size == 0]
    dropped["micro-batch size does not divide a replica's batch"] += len(dims.micro_batch_sizes) - len(sizes)
    chunk_counts = _offered(pins, "virtual_stages", VIRTUAL_STAGES)
    experts = [ep for ep in divisors(dp * cp) if pins.allows("ep", ep) and dims.expert_obstacle(ep, dp * cp) is None]
    recomputes = _recomputes(dims, pins)
    sequence_parallel = pins.sequence_parallel is not False
    for size, chunks in product(sizes, chunk_counts):
        if chunks > 1 and pp == 1:
            dropped["virtual stages without a pipeline"] += 1
        elif pp * chunks > dims.num_layers:
            dropped["more stages than layers"] += 1
        elif 3 * pp * chunks * (per_replica // size) > MAX_ACTIONS:
            dropped[f"more than {MAX_ACTIONS} actions to schedule"] += 1
        else:
            for (zero, shard), ep, recompute in product(_sharding(dims, pins, tp, dp * cp), experts, recomputes):
                yield Candidate(
                    tp=tp,
                    pp=pp,
                    dp=dp,
                    virtual_stages=chunks,
                    micro_batch_size=size,
                    num_microbatches=per_replica // size,
                    zero_stage=zero,
                    recompute=recompute,
                    cp=cp,
                    ep=ep,
                    shard_degree=shard,
                    sequence_parallel=sequence_parallel,
                )


def _recomputes(dims: Dimensions, pins: Pins) -> list[RecomputePlan]:
    """Pinned plans; else the usual, or with exclusions every uniform one that is left: a mixture could hold any."""
    excluded = any(name == "recompute" for name, _ in pins.excluded)
    offered = pins.values("recompute") or (RECOMPUTE_PLANS[:-1] if excluded else dims.recompute_plans)
    return [plan for plan in RECOMPUTE_PLANS if plan in offered and pins.allows("recompute", plan)]


def _offered(pins: Pins, name: str, usual: tuple[int, ...]) -> list[int]:
    """Pinned values, else the usual ones, less what is excluded."""
    values = pins.values(name) or usual
    return [value for value in values if isinstance(value, int) and pins.allows(name, value)]


def _sharding(dims: Dimensions, pins: Pins, tp: int, copies: int) -> list[tuple[ZeroStage, int]]:
    """ZeRO stages with the degrees they may shard over: all copies, or those inside one node.

    With one copy there is nothing to shard: every ZeRO stage is stage 0 there.
    """
    pinned = pins.values("shard_degree")
    if copies == 1:
        return [(0, 1)] if pinned is None or 1 in pinned else []
    in_node = max(1, min(group.devices_per_node for group in dims.cluster.groups) // tp)
    usual = {copies} | ({in_node} if 1 < in_node < copies and copies % in_node == 0 else set())
    degrees = sorted(int(d) for d in pinned or usual if copies % int(d) == 0 and pins.allows("shard_degree", d))
    made: list[tuple[ZeroStage, int]] = []
    for stage in get_args(ZeroStage):
        if not pins.allows("zero_stage", stage):
            continue
        if stage == 0:
            made += [(0, 1)] if pinned is None or 1 in pinned else []
        else:
            made += [(stage, degree) for degree in degrees if degree > 1]
    return made
