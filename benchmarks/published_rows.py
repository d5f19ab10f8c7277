"""A row of a file of published runs, as something that can be priced: the one place where reading turns into numbers.

A row says what its authors printed. What they did not print is filled in by rules, each a function with its
reason (here, `published_model`, `published_cluster`, `published_software`), and every filled field is named in
`Run.filled`. No rule looks at a row's id or at its measured times.
"""

from dataclasses import dataclass, field

from published_cluster import cluster_of, device_of
from published_fields import Row, UnpricedError, stated, text_of
from published_model import spec_of
from published_software import (
    attention_of,
    dtype_of,
    overlaps_of,
    precision_of,
    recompute_of,
    sequence_parallel_of,
    sharding_of,
    software_of,
)

from planner.layout import Candidate
from planner.plans import Precision
from planner.schedule.families import FAMILIES
from profiles.analytic import AttentionKernel, Software
from profiles.cluster import Cluster
from profiles.model import ModelSpec, Recompute


@dataclass(frozen=True)
class Run:
    """One published run, completed."""

    row: Row
    spec: ModelSpec
    cluster: Cluster
    candidate: Candidate
    global_batch: int
    sequence_length: int
    precision: Precision
    attention: AttentionKernel
    software: Software
    overlaps: bool  # data-parallel traffic with computing
    family: str
    layers_per_stage: tuple[int, ...]
    partial_recompute: float = 1.0  # share of blocks that are recomputed
    filled: list[str] = field(default_factory=list)

    @property
    def num_devices(self) -> int:
        """Devices of the run."""
        c = self.candidate
        return c.tp * c.pp * c.dp * c.cp


def run_of(row: Row, facts: Row, shapes: dict[str, Row], unstated: Recompute = "none") -> Run:
    """The run that `row` of a file with these `facts` describes; `unstated` is what it recomputes if it does not say.

    UnpricedError says what is missing.
    """
    filled: list[str] = []
    spec = spec_of(row, shapes, filled)
    dtype = dtype_of(row, filled)
    sequence = int(row.get("sequence_length") or spec.sequence_length)
    device = device_of(row)
    degrees = degrees_of(row, filled)
    tp, pp, cp, ep, dp = (degrees[name] for name in ("tp", "pp", "cp", "ep", "dp"))
    chunks = chunks_of(row, filled)
    micro, num_microbatches, batch = batch_of(row, dp, filled)
    cluster = cluster_of(row, facts, device, tp * pp * dp * cp, filled)
    recompute, share = recompute_of(row, tp, filled)
    if recompute is None:
        recompute = unstated
        filled.append(f"recompute={unstated}")
    zero, shard = sharding_of(row, dp * cp, filled)
    sequence_parallel = sequence_parallel_of(row, tp, dtype, filled)
    candidate = Candidate(
        tp=tp,
        pp=pp,
        dp=dp,
        virtual_stages=chunks,
        micro_batch_size=micro,
        num_microbatches=num_microbatches,
        zero_stage=zero,
        recompute=recompute,
        cp=cp,
        ep=ep,
        shard_degree=shard,
        sequence_parallel=sequence_parallel,
    )
    return Run(
        row=row,
        spec=spec,
        cluster=cluster,
        candidate=candidate,
        global_batch=batch,
        sequence_length=sequence,
        precision=precision_of(row, dtype),
        attention=attention_of(row, dtype, spec, device),
        software=software_of(row, facts, dtype, sequence_parallel, recompute),
        overlaps=overlaps_of(row, facts, zero),
        family=family_of(row, chunks),
        layers_per_stage=blocks_per_stage(spec.num_layers, pp * chunks),
        partial_recompute=share,
        filled=filled,
    )


def degrees_of(row: Row, filled: list[str]) -> dict[str, int]:
    """Degrees; what is missing is 1, and data parallelism takes the devices that are left."""
    names = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "cp": "context_parallel", "ep": "expert_parallel"}
    degrees = {short: int(stated(row, name) or 1) for short, name in names.items()}
    filled += [f"{name}=1" for short, name in names.items() if stated(row, name) is None and short in ("tp", "pp")]
    model = degrees["tp"] * degrees["pp"] * degrees["cp"]
    data, devices = stated(row, "data_parallel"), stated(row, "num_devices")
    if data is None:
        if devices is None:
            raise UnpricedError("neither data_parallel nor num_devices is stated")
        if devices % model:
            raise UnpricedError(f"tp × pp × cp = {model} does not divide num_devices {devices}")
        data = devices // model
        filled.append(f"data_parallel={data}")
    elif devices is not None and model * data != devices:
        raise UnpricedError(f"tp × pp × cp × dp = {model * data}, but num_devices is {devices}")
    return {**degrees, "dp": int(data)}


def chunks_of(row: Row, filled: list[str]) -> int:
    """Stages per pipeline rank: as stated, else one (plain 1F1B)."""
    chunks = stated(row, "virtual_stages")
    if int(row.get("pipeline_parallel") or 1) == 1:
        return 1
    if chunks is None:
        filled.append("virtual_stages=1")
        return 1
    return int(chunks)


def family_of(row: Row, chunks: int) -> str:
    """The schedule, where its name is that of a family; else 1F1B, interleaved with several chunks per rank."""
    name = text_of(row, "schedule").replace("_", "-").split(",")[0]
    if name in FAMILIES and name not in ("1f1b", "interleaved-1f1b"):
        return name
    return "interleaved-1f1b" if chunks > 1 else "1f1b"


def batch_of(row: Row, dp: int, filled: list[str]) -> tuple[int, int, int]:
    """(micro-batch size, microbatches per replica, global batch); any two give the third."""
    micro, number, batch = (stated(row, name) for name in ("micro_batch", "num_microbatches", "global_batch"))
    if batch is None and micro and number:
        batch = micro * number * dp
        filled.append(f"global_batch={batch}")
    if batch is None:
        raise UnpricedError("global_batch is not stated, and micro_batch and num_microbatches do not give it")
    if micro is None:
        micro = batch // dp // number if number else 1
        filled.append(f"micro_batch={micro}")
    if batch % (micro * dp):
        raise UnpricedError(f"micro_batch {micro} × data_parallel {dp} does not divide global_batch {batch}")
    return int(micro), int(batch // (micro * dp)), int(batch)


def blocks_per_stage(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of every stage, embedding and head counted with the first and the last.

    Blocks lie evenly. Where they do not divide, embedding and head count as a layer each (Llama 3's 126 = 128 − 2);
    where that does not divide either, as evenly as possible, more blocks in the middle.
    """
    if num_stages == 1:
        return (num_layers + 2,)
    if num_layers % num_stages == 0:
        each = num_layers // num_stages
        return (each + 1, *[each] * (num_stages - 2), each + 1)
    if (num_layers + 2) % num_stages == 0:
        return ((num_layers + 2) // num_stages,) * num_stages
    each, rest = divmod(num_layers, num_stages)
    if each == 0:
        raise UnpricedError(f"{num_layers} blocks do not fill {num_stages} stages")
    first = (num_stages - rest + 1) // 2
    blocks = [each + (first <= stage < first + rest) for stage in range(num_stages)]
    blocks[0] += 1
    blocks[-1] += 1
    return tuple(blocks)
