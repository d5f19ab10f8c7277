"""The layout space: which degrees there are for a model, a cluster and a batch, and why the others are not.

A candidate fixes everything but the cut into stages and the order of actions. All devices of the cluster are used.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple, get_args

from planner.errors import LayoutError
from planner.plans import ZeroStage
from planner.schedule.families import FAMILIES
from profiles.cluster import Cluster
from profiles.model import Dtype, ModelSpec, Recompute, Variant

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
VIRTUAL_STAGES = (1, 2, 4)
MAX_ACTIONS = 600_000  # of one pipeline and step; beyond it nothing could be looked at in a reasonable time


@dataclass(frozen=True)
class Pins:
    """What the caller has decided already; None leaves a dimension free."""

    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    micro_batch_size: int | None = None
    virtual_stages: int | None = None
    zero_stage: ZeroStage | None = None
    recompute: Recompute | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "micro_batch_size", "virtual_stages"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise LayoutError(f"{name}={value}: degrees and sizes are whole numbers from 1")
        for name, known in (("zero_stage", get_args(ZeroStage)), ("recompute", get_args(Recompute))):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise LayoutError(f"{name}={value} is not known; choose one of {', '.join(map(str, known))}")

    @property
    def any(self) -> bool:
        """Whether anything but the schedule family is pinned."""
        return any(getattr(self, field.name) is not None for field in fields(self) if field.name != "family")


class Candidate(NamedTuple):
    """One point of the outer layout space."""

    tp: int
    pp: int
    dp: int
    virtual_stages: int
    micro_batch_size: int
    num_microbatches: int
    zero_stage: ZeroStage
    recompute: Recompute

    @property
    def num_stages(self) -> int:
        """Pipeline stages, S = p · v."""
        return self.pp * self.virtual_stages

    @property
    def can_split_backward(self) -> bool:
        """Whether B and W may run apart: recomputing layers keep their backward in one piece."""
        return self.recompute == "none"

    def variant(self, sequence_length: int, dtype: Dtype) -> Variant:
        """The circumstances under which this candidate needs each layer's costs."""
        return Variant(
            tp=self.tp,
            micro_batch_size=self.micro_batch_size,
            sequence_length=sequence_length,
            dtype=dtype,
            recompute=self.recompute,
        )


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

    def node_obstacle(self, tp: int) -> str | None:
        """Why tensor parallelism of this degree would leave a node, or None."""
        sizes = {group.devices_per_node for group in self.cluster.groups}
        wrong = [size for size in sizes if size % tp]
        return None if not wrong else f"tp={tp} does not divide the {wrong[0]} devices of a node"


def check_pins(dims: Dimensions, pins: Pins) -> None:
    """Refuse pins that no layout can satisfy; LayoutError says which numbers disagree."""
    spec, cluster, devices = dims.spec, dims.cluster, dims.cluster.num_devices
    if pins.tp is not None:
        obstacle = tensor_parallel_obstacle(spec, pins.tp, dims.sequence_length)
        if obstacle:
            fitting = [
                d for d in divisors(spec.num_heads) if tensor_parallel_obstacle(spec, d, dims.sequence_length) is None
            ]
            shown = ", ".join(map(str, fitting[:12]))
            raise LayoutError(f"{obstacle} of model {spec.name!r}; degrees that do: {shown}")
    product = (pins.tp or 1) * (pins.pp or 1) * (pins.dp or 1)
    named = " ".join(f"{n}={getattr(pins, n)}" for n in ("tp", "pp", "dp") if getattr(pins, n) is not None)
    if None not in (pins.tp, pins.pp, pins.dp) and product != devices:
        raise LayoutError(
            f"layout {named} needs {product} devices, but cluster {cluster.name!r} has {devices}; "
            f"choose degrees whose product is {devices}"
        )
    if devices % product:
        raise LayoutError(
            f"layout {named} does not divide the {devices} devices of cluster {cluster.name!r}; "
            f"choose degrees whose product divides {devices}"
        )
    if pins.tp is not None and dims.node_obstacle(pins.tp):
        raise LayoutError(
            f"{dims.node_obstacle(pins.tp)} of cluster {cluster.name!r}; tensor parallelism stays inside a node, "
            "choose a degree that divides it"
        )
    pp = pins.pp if pins.pp or None in (pins.tp, pins.dp) else devices // product
    dp = pins.dp if pins.dp or None in (pins.tp, pins.pp) else devices // product
    if pp == 1 and (pins.virtual_stages or 1) > 1:
        raise LayoutError(
            f"pp=1 with virtual_stages={pins.virtual_stages}: one rank has no use for chunks; pin one only"
        )
    _check_family(pins)
    stages = (pp or 1) * (pins.virtual_stages or 1)
    if stages > dims.num_layers:
        raise LayoutError(
            f"pp={pp or 1} × virtual_stages={pins.virtual_stages or 1} makes {stages} stages, but model "
            f"{spec.name!r} has {dims.num_layers} layers, embedding and head included; use at most {dims.num_layers}"
        )
    per_step = (dp or 1) * (pins.micro_batch_size or 1)
    if dims.global_batch_size % per_step:
        raise LayoutError(
            f"dp={dp or 1} × micro_batch_size={pins.micro_batch_size or 1} is {per_step}, which does not divide "
            f"global batch size {dims.global_batch_size}; choose a batch that is a multiple of {per_step}"
        )


def _check_family(pins: Pins) -> None:
    family = FAMILIES.get(pins.family or "auto")
    if family is None:
        return
    if family.splits_backward and pins.recompute == "full":
        raise LayoutError(
            f"family {family.name!r} splits the backward, and recompute=full keeps it in one piece; pin one of them"
        )
    chunks = pins.virtual_stages
    reason = None if chunks is None else family.supports(2, 4, chunks)
    if reason is not None:
        raise LayoutError(f"family {family.name!r} with virtual_stages={chunks}: {reason}")


def enumerate_space(dims: Dimensions, pins: Pins) -> Space:
    """Every candidate that divides; LayoutError if the pins alone rule all of them out."""
    check_pins(dims, pins)
    dropped: Counter[str] = Counter()
    candidates = tuple(
        candidate
        for tp, pp, dp in _degrees(dims, pins, dropped)
        for candidate in _with_these_degrees(dims, pins, dropped, tp, pp, dp)
    )
    return Space(candidates, dict(dropped))


def _degrees(dims: Dimensions, pins: Pins, dropped: Counter[str]) -> Iterator[tuple[int, int, int]]:
    devices = dims.cluster.num_devices
    for tp in [pins.tp] if pins.tp else divisors(devices):
        if dims.node_obstacle(tp):
            dropped["tensor parallelism would leave the node"] += 1
            continue
        if tensor_parallel_obstacle(dims.spec, tp, dims.sequence_length):
            dropped["tp does not divide heads, widths or sequence"] += 1
            continue
        for pp in [pins.pp] if pins.pp else divisors(devices // tp):
            if devices % (tp * pp):
                continue
            dp = devices // (tp * pp)
            if pins.dp not in (None, dp):
                continue
            if pp > dims.num_layers:
                dropped["more pipeline ranks than layers"] += 1
            elif dims.global_batch_size % dp:
                dropped["dp does not divide the global batch size"] += 1
            else:
                yield tp, pp, dp


def _with_these_degrees(
    dims: Dimensions, pins: Pins, dropped: Counter[str], tp: int, pp: int, dp: int
) -> Iterator[Candidate]:
    per_replica = dims.global_batch_size // dp
    sizes = (pins.micro_batch_size,) if pins.micro_batch_size else dims.micro_batch_sizes
    chunk_counts = (pins.virtual_stages,) if pins.virtual_stages else VIRTUAL_STAGES
    zero_stages: tuple[ZeroStage, ...] = (0, 1) if dp > 1 else (0,)
    recomputes: tuple[Recompute, ...] = ("none", "full")
    for size in sizes:
        if per_replica % size:
            dropped["micro-batch size does not divide a replica's batch"] += 1
            continue
        for chunks in chunk_counts:
            if chunks > 1 and pp == 1:
                dropped["virtual stages without a pipeline"] += 1
                continue
            if pp * chunks > dims.num_layers:
                dropped["more stages than layers"] += 1
                continue
            if 3 * pp * chunks * (per_replica // size) > MAX_ACTIONS:
                dropped[f"more than {MAX_ACTIONS} actions to schedule"] += 1
                continue
            for zero in zero_stages if pins.zero_stage is None else (pins.zero_stage,):
                for recompute in recomputes if pins.recompute is None else (pins.recompute,):
                    yield Candidate(tp, pp, dp, chunks, size, per_replica // size, zero, recompute)
