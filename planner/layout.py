"""The layout space: which degrees there are for a model, a cluster and a batch, and why the others are not.

A candidate fixes everything but the cut into stages and the order of actions. All devices of the cluster are used.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

from planner.errors import LayoutError
from planner.plans import ZeroStage
from profiles.cluster import Cluster
from profiles.model import Dtype, ModelSpec, Recompute, Variant

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
VIRTUAL_STAGES = (1, 2, 4)


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
            if value is not None and value < 1:
                raise LayoutError(f"{name}={value}: degrees and sizes are whole numbers from 1")

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


def tensor_parallel_obstacle(spec: ModelSpec, tp: int) -> str | None:
    """Why `tp` cannot divide this model, or None if it can."""
    if spec.num_heads % tp:
        return f"tp={tp} does not divide num_heads={spec.num_heads}"
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        return f"tp={tp} and num_kv_heads={spec.num_kv_heads}: neither divides the other"
    width = spec.ffn_size if spec.moe is None else spec.moe.expert_ffn_size
    if width % tp:
        return f"tp={tp} does not divide the feed-forward width {width}"
    return None


def check_pins(spec: ModelSpec, cluster: Cluster, global_batch_size: int, pins: Pins, num_layers: int) -> None:
    """Refuse pins that no layout can satisfy; LayoutError says which numbers disagree."""
    devices = cluster.num_devices
    if pins.tp is not None:
        obstacle = tensor_parallel_obstacle(spec, pins.tp)
        if obstacle:
            fitting = [d for d in divisors(spec.num_heads) if tensor_parallel_obstacle(spec, d) is None]
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
    stages = (pins.pp or 1) * (pins.virtual_stages or 1)
    if stages > num_layers:
        raise LayoutError(
            f"pp={pins.pp or 1} × virtual_stages={pins.virtual_stages or 1} makes {stages} stages, but model "
            f"{spec.name!r} has {num_layers} layers, embedding and head included; use at most {num_layers}"
        )
    if pins.dp is not None and global_batch_size % pins.dp:
        raise LayoutError(
            f"dp={pins.dp} does not divide global batch size {global_batch_size}; "
            f"choose a batch that is a multiple of {pins.dp}"
        )
    per_step = (pins.dp or 1) * (pins.micro_batch_size or 1)
    if global_batch_size % per_step:
        raise LayoutError(
            f"dp={pins.dp or 1} × micro_batch_size={pins.micro_batch_size or 1} is {per_step}, which does not divide "
            f"global batch size {global_batch_size}"
        )


def enumerate_space(
    spec: ModelSpec,
    cluster: Cluster,
    *,
    global_batch_size: int,
    num_layers: int,
    pins: Pins,
    micro_batch_sizes: tuple[int, ...] = MICRO_BATCH_SIZES,
) -> Space:
    """Every candidate that divides; LayoutError if the pins alone rule all of them out.

    `num_layers` counts embedding and head. Tensor parallelism stays inside a node unless it is pinned wider.
    """
    check_pins(spec, cluster, global_batch_size, pins, num_layers)
    dropped: Counter[str] = Counter()
    candidates = tuple(_candidates(spec, cluster, global_batch_size, num_layers, pins, micro_batch_sizes, dropped))
    return Space(candidates, dict(dropped))


def _candidates(
    spec: ModelSpec,
    cluster: Cluster,
    global_batch_size: int,
    num_layers: int,
    pins: Pins,
    micro_batch_sizes: tuple[int, ...],
    dropped: Counter[str],
) -> Iterator[Candidate]:
    node_size = min(group.devices_per_node for group in cluster.groups)
    for tp in [pins.tp] if pins.tp else divisors(cluster.num_devices):
        if tp > node_size and not pins.tp:
            dropped["tensor parallelism would leave the node"] += 1
            continue
        if tensor_parallel_obstacle(spec, tp):
            dropped["tp does not divide heads or feed-forward width"] += 1
            continue
        for pp in [pins.pp] if pins.pp else divisors(cluster.num_devices // tp):
            if cluster.num_devices % (tp * pp):
                continue
            dp = cluster.num_devices // (tp * pp)
            if pins.dp not in (None, dp):
                continue
            if pp > num_layers:
                dropped["more pipeline ranks than layers"] += 1
                continue
            if global_batch_size % dp:
                dropped["dp does not divide the global batch size"] += 1
                continue
            yield from _inner(tp, pp, dp, global_batch_size, num_layers, pins, micro_batch_sizes, dropped)


def _inner(
    tp: int,
    pp: int,
    dp: int,
    global_batch_size: int,
    num_layers: int,
    pins: Pins,
    micro_batch_sizes: tuple[int, ...],
    dropped: Counter[str],
) -> Iterator[Candidate]:
    per_replica = global_batch_size // dp
    sizes = (pins.micro_batch_size,) if pins.micro_batch_size else micro_batch_sizes
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
            if pp * chunks > num_layers:
                dropped["more stages than layers"] += 1
                continue
            for zero in zero_stages if pins.zero_stage is None else (pins.zero_stage,):
                for recompute in recomputes if pins.recompute is None else (pins.recompute,):
                    yield Candidate(tp, pp, dp, chunks, size, per_replica // size, zero, recompute)
