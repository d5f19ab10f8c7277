"""A row of a file of published runs, as something that can be priced: the one place where reading turns into numbers.

A row says what its authors printed. What they did not print is filled in by the rules below, each a function with its
reason, and every filled field is named in `Run.filled`. No rule looks at a row's id or at its measured values.
"""

import re
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from planner.layout import Candidate
from planner.plans import Precision
from profiles import catalog
from profiles.analytic import AttentionKernel, Software
from profiles.cluster import Cluster, DeviceSpec, Link, NodeGroup
from profiles.errors import CatalogError
from profiles.model import Dtype, LatentAttention, MixtureOfExperts, ModelSpec, Recompute

Row = dict[str, Any]

DEVICES = {  # keys of published files: (device of the catalogue)
    "v100_16gb_sxm2": "v100-16gb",
    "v100_32gb_sxm2": "v100-32gb",
    "a100_40gb_sxm": "a100-40gb",
    "a100_80gb_sxm": "a100-80gb",
    "a100_80gb_pcie": "a100-80gb-pcie",
    "h100_80gb_sxm": "h100-sxm",
    "h100_80gb_pcie": "h100-pcie",
    "h100_96gb_500w": "h100-96gb-500w",
    "h800_80gb_sxm": "h800",
    "h200_141gb_sxm": "h200",
    "gh200_96gb": "gh200",
    "b200_sxm": "b200",
    "b300_sxm": "b300",
    "gb200": "gb200",
    "mi300x": "mi300x",
    "mi325x": "mi325x",
    "mi355x": "mi355x",
    "l40s": "l40s",
    "rtx_4090": "rtx-4090",
}
DTYPES: dict[str, Dtype] = {
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp8": "float8",
    "float8": "float8",
    "fp32": "float32",
}


class CannotPrice(Exception):
    """Why a row has no prediction."""


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


def run_of(row: Row, facts: Row, shapes: dict[str, Row]) -> Run:
    """The run that `row` of a file with these `facts` describes; CannotPrice says what is missing."""
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
        precision=precision_of(row, dtype, facts, filled),
        attention=attention_of(row, dtype, spec, device),
        software=software_of(row, facts, dtype, sequence_parallel, recompute),
        overlaps=overlaps_of(row, facts, zero, filled),
        family="interleaved-1f1b" if chunks > 1 else "1f1b",
        layers_per_stage=blocks_per_stage(spec.num_layers, pp * chunks),
        partial_recompute=share,
        filled=filled,
    )


def stated(row: Row, name: str) -> Any:
    """A field of a row, or None where it is missing or "not stated"."""
    value = row.get(name)
    return None if isinstance(value, str) and (value.startswith("not stated") or value == "unknown") else value


def text_of(row: Row, name: str) -> str:
    """A field of a row as lower-case text; empty where it is not stated."""
    value = stated(row, name)
    return str(value).lower() if value is not None else ""


def spec_of(row: Row, shapes: dict[str, Row], filled: list[str]) -> ModelSpec:
    """The model: a published shape by its key, with what the row states in its place.

    Without a shape: a GPT (two matrices of 4 h in the feed-forward part, tied embeddings, learned positions, LayerNorm).
    LayerNorm, dropout and biases go with models whose feed-forward part is not gated and whose heads are not grouped:
    GPT-2, GPT-3, BLOOM and the Megatron papers; MPT and Nemotron were trained without biases.
    """
    shape = dict(shapes.get(str(row.get("shape")), {}))
    if row.get("shape") and not shape and not row.get("hidden_size"):
        raise CannotPrice(f"shape {row['shape']!r} is not among the shipped shapes, and the row has no hidden_size")
    for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "vocab_size", "ffn_size", "head_dim", "moe"):
        value = stated(row, name)
        if value is not None and value != shape.get(name):
            if name == "hidden_size":
                shape.pop("ffn_size", None)
            if name in ("hidden_size", "num_heads"):
                shape.pop("head_dim", None)
                shape.pop("num_kv_heads", None)
            shape[name] = value
    for name in ("num_layers", "hidden_size"):
        if not shape.get(name):
            raise CannotPrice(f"no {name}, and no published shape to take it from")
    hidden = int(shape["hidden_size"])
    heads = shape.get("num_heads")
    if not heads:
        noted = re.search(r"\((\d+) in the logs", str(row.get("note", "")))
        heads = int(noted[1]) if noted else default_heads(hidden, int(row.get("tensor_parallel") or 1))
        filled.append(f"num_heads={heads} ({'from the note' if noted else 'head size nearest 128'})")
    heads = int(heads)
    head_dim = int(shape.get("head_dim") or hidden // heads)
    gated = bool(shape.get("gated_mlp", False))
    kv_heads = int(shape.get("num_kv_heads") or heads)
    name = str(row.get("shape") or row.get("model") or "gpt")
    gpt = not gated and kv_heads == heads and not name.startswith("mpt")
    moe, mla = shape.get("moe"), shape.get("mla")
    if not shape.get("vocab_size"):
        shape["vocab_size"] = 51200
        filled.append("vocab_size=51200 (that of GPT-2, padded)")
    return ModelSpec(
        name=name,
        num_layers=int(shape["num_layers"]),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=int(shape.get("ffn_size") or 4 * hidden),
        gated_mlp=gated,
        vocab_size=int(shape["vocab_size"]),
        sequence_length=int(row.get("sequence_length") or shape.get("sequence_length") or 2048),
        tied_embeddings=bool(shape.get("tied_embeddings", gpt)),
        learned_positions=gpt,
        norm="layernorm" if gpt else "rmsnorm",
        linear_bias=gpt,
        qkv_bias=gpt,
        moe=None
        if not moe
        else MixtureOfExperts(
            num_experts=moe["num_experts"],
            experts_per_token=moe.get("top_k") or moe["experts_per_token"],
            expert_ffn_size=moe["expert_ffn_size"],
            num_shared_experts=moe.get("num_shared_experts", 0),
            num_dense_layers=moe.get("num_dense_layers", 0),
        ),
        latent_attention=LatentAttention(**mla) if mla else None,
        source=str(shape.get("where") or "the row"),
    )


def default_heads(hidden: int, tp: int) -> int:
    """Heads of size nearest 128 that divide the hidden size and are divided by tp."""
    choices = [heads for heads in range(tp, hidden // 32 + 1, tp) if hidden % heads == 0]
    if not choices:
        raise CannotPrice(f"num_heads is not stated, and no number of heads fits hidden_size={hidden} and tp={tp}")
    return min(choices, key=lambda heads: abs(hidden / heads - 128))


def dtype_of(row: Row, filled: list[str]) -> Dtype:
    """What linear layers compute in; bf16 where it is not stated, fp16 on V100, which has no bf16."""
    text = text_of(row, "precision").replace("-", " ").split(" ")[0].strip(",;")
    if text in DTYPES:
        return DTYPES[text]
    if text:
        raise CannotPrice(f"precision {row.get('precision')!r} is not known; known: {', '.join(DTYPES)}")
    dtype: Dtype = "float16" if "v100" in str(row.get("hardware")) else "bfloat16"
    filled.append(f"precision={dtype}")
    return dtype


def device_of(row: Row) -> DeviceSpec:
    """The device of the catalogue."""
    key = str(row.get("hardware") or "")
    name = DEVICES.get(key, key.replace("_", "-"))
    try:
        return catalog.device(name)
    except CatalogError as error:
        raise CannotPrice(f"hardware {key!r} is not in the catalogue of devices") from error


def degrees_of(row: Row, filled: list[str]) -> dict[str, int]:
    """Degrees; what is missing is 1, and data parallelism takes the devices that are left."""
    names = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "cp": "context_parallel", "ep": "expert_parallel"}
    degrees = {short: int(stated(row, name) or 1) for short, name in names.items()}
    filled += [f"{name}=1" for short, name in names.items() if stated(row, name) is None and short in ("tp", "pp")]
    model = degrees["tp"] * degrees["pp"] * degrees["cp"]
    data, devices = stated(row, "data_parallel"), stated(row, "num_devices")
    if data is None:
        if devices is None:
            raise CannotPrice("neither data_parallel nor num_devices is stated")
        if devices % model:
            raise CannotPrice(f"tp × pp × cp = {model} does not divide num_devices {devices}")
        data = devices // model
        filled.append(f"data_parallel={data}")
    elif devices is not None and model * data != devices:
        raise CannotPrice(f"tp × pp × cp × dp = {model * data}, but num_devices is {devices}")
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


def batch_of(row: Row, dp: int, filled: list[str]) -> tuple[int, int, int]:
    """(micro-batch size, microbatches per replica, global batch); any two give the third."""
    micro, number, batch = (stated(row, name) for name in ("micro_batch", "num_microbatches", "global_batch"))
    if batch is None and micro and number:
        batch = micro * number * dp
        filled.append(f"global_batch={batch}")
    if batch is None:
        raise CannotPrice("global_batch is not stated, and micro_batch and num_microbatches do not give it")
    if micro is None:
        micro = batch // dp // number if number else 1
        filled.append(f"micro_batch={micro}")
    if batch % (micro * dp):
        raise CannotPrice(f"micro_batch {micro} × data_parallel {dp} does not divide global_batch {batch}")
    return int(micro), int(batch // (micro * dp)), int(batch)


def recompute_of(row: Row, tp: int, filled: list[str]) -> tuple[Recompute, float]:
    """What is recomputed, and in which share of blocks.

    Under FSDP "selective" means a share of whole blocks: stated ("every second layer"), or from printed HFU / MFU,
    which is 4/3 where all are recomputed.
    """
    text = text_of(row, "recompute")
    if not text:
        filled.append("recompute=full" if is_sharded(row) else "recompute=none")
        return "full" if is_sharded(row) else "none", 1.0
    if "second layer" in text or "every other" in text:
        return "full", 0.5
    hfu, mfu = stated(row, "hfu_percent"), stated(row, "mfu_percent")
    if text.startswith("selective") and is_torch_fsdp(row) and tp == 1 and hfu and mfu:
        share = min(1.0, max(0.0, 3 * (hfu / mfu - 1)))
        filled.append(f"recompute=full in {share:.0%} of blocks (from HFU / MFU)")
        return "full", share
    for choice in ("selective", "full", "none"):
        if text.startswith(choice):
            return choice, 1.0  # type: ignore[return-value]
    raise CannotPrice(f"recompute {row['recompute']!r} is not known")


def sharding_of(row: Row, copies: int, filled: list[str]) -> tuple[Any, int]:
    """(ZeRO stage, devices that share a copy of the states)."""
    text = text_of(row, "optimizer_sharding")
    if not text:
        filled.append("optimizer_sharding=none")
        return 0, 1
    if text.startswith("none"):
        return 0, 1
    if "zero3" in text or "zero-3" in text or "fsdp" in text or "hsdp" in text:
        stage = 3
    elif "zero2" in text or "zero-2" in text or "grad_op" in text:
        stage = 2
    else:
        stage = 1
    stated_degree = re.search(r"over (\d+) devices", text)
    degree = int(stated(row, "fsdp_degree") or (stated_degree[1] if stated_degree else 0) or copies)
    if "hsdp" in text or "hybrid" in text:
        degree = min(degree, int(row.get("devices_per_node") or 8))
    degree = gcd(degree, copies)
    return (stage, degree) if degree > 1 else (0, 1)


def sequence_parallel_of(row: Row, tp: int, dtype: Dtype, filled: list[str]) -> bool:
    """As stated; else off in fp16 (Megatron-LM up to 2022) and on in bf16."""
    if tp == 1:
        return True
    value = stated(row, "sequence_parallel")
    if value is None:
        value = dtype != "float16"
        filled.append(f"sequence_parallel={value}")
    return bool(value)


def is_old_megatron(row: Row, dtype: Dtype) -> bool:
    """fp16 runs are Megatron-LM and its forks of 2020-22, before flash attention."""
    return dtype == "float16" and "flash" not in text_of(row, "attention")


def attention_of(row: Row, dtype: Dtype, spec: ModelSpec, device: DeviceSpec) -> AttentionKernel:
    """What the framework called: scores in memory up to 2022; the kernels of PyTorch are FlashAttention-2, and MPT was
    measured on A100 with the first FlashAttention; Megatron-LM, NeMo and MaxText call cuDNN's."""
    if is_old_megatron(row, dtype):
        return "unfused"
    if is_torch_fsdp(row):
        return "flash-1" if spec.name.startswith("mpt") and device.name.startswith("a100") else "flash-2"
    return "flash"


def is_sharded(row: Row) -> bool:
    """FSDP of any framework."""
    return "fsdp" in text_of(row, "optimizer_sharding")


def is_torch_fsdp(row: Row) -> bool:
    """PyTorch with FSDP; MaxText shards alike but is JAX."""
    return "fsdp" in text_of(row, "optimizer_sharding") + text_of(row, "framework") and "maxtext" not in text_of(
        row, "framework"
    )


def software_of(row: Row, facts: Row, dtype: Dtype, sequence_parallel: bool, recompute: Recompute) -> Software:
    """What the framework overlaps and fuses, by its time.

    fp16 without sequence parallelism or selective recompute is Megatron-LM of 2020-21, or its DeepSpeed fork: nothing
    overlapped, gradients added up by a pass of their own. What came with these two in 2022 hides gradient collectives
    behind weight gradients, and lets the product add up; so does all later Megatron-LM and NeMo. Collectives are
    pipelined with products (user buffers) for the models of which a file says so.
    """
    everything = " ".join([*map(str, facts.get("facts", [])), str(facts.get("source")), str(row.get("framework"))])
    years = [int(year) for year in re.findall(r"\b20[12]\d\b", str(facts.get("source")))]
    fork = any(word in everything.lower() for word in ("deepspeed", "bigscience"))
    modern = (row.get("tensor_parallel") or 1) > 1 and sequence_parallel or recompute == "selective"
    modern = modern or (bool(years) and min(years) >= 2022 and not fork)
    old = is_old_megatron(row, dtype) and not modern
    pipelined = not old and any(
        "tensor-parallel communication overlap" in part and str(row.get("model", "")).split(" ")[0].lower() in part
        for fact in facts.get("facts", [])
        for part in str(fact).lower().split(";")
    )
    return Software(
        tensor_overlap="none" if old else "all" if pipelined else "gradients",
        accumulation="sharded" if is_sharded(row) else "separate" if old else "fused",
        recompute_stops_early=is_torch_fsdp(row),
        fused_loss=str(row.get("shape")).startswith("mpt"),  # llm-foundry's default loss
        fused=row.get("torch_compile") is not False,
        blocking_launches="cuda_launch_blocking=1" in everything.lower(),
    )


def overlaps_of(row: Row, facts: Row, zero: int, filled: list[str]) -> bool:
    """Whether gradients are reduced while the backward runs: FSDP always does; else what the text says."""
    text = text_of(row, "optimizer_sharding") + " " + " ".join(map(str, facts.get("facts", []))).lower()
    if zero == 3:
        return True
    if "no overlap" in text:
        return False
    return "overlap" in text_of(row, "optimizer_sharding")


def precision_of(row: Row, dtype: Dtype, facts: Row, filled: list[str]) -> Precision:
    """fp16 runs of that time reduced 16-bit gradients; bf16 runs accumulate in fp32; FSDP reduces in 16 bits."""
    if dtype == "float32":
        return Precision.of(dtype)
    sharding = text_of(row, "optimizer_sharding")
    if dtype == "float16":
        return Precision(compute=dtype, gradients="float16")
    if any(word in sharding for word in ("fsdp", "zero3", "hsdp", "communication overlapped")):
        return Precision(compute=dtype, gradients="bfloat16")
    return Precision(compute=dtype)


OMNI_PATH_EFFICIENCY = 0.27  # all-reduce over Omni-Path at Jean Zay: 23 to 55 Gb/s of 400 by algorithm bandwidth
ISLAND_LINK = 31e9

NETWORK = (
    (r"(\d+) x (?:[a-z-]+ )?(\d+) gb/s", lambda m, per_node: float(m[1]) * float(m[2]) / per_node),
    (r"(\d+) gb/s(?: \w+)? per node", lambda m, per_node: float(m[1]) / per_node),
    (r"(\d+) gb/s (?:\w+ )?per gpu", lambda m, per_node: float(m[1])),
)


def cluster_of(row: Row, facts: Row, device: DeviceSpec, num_devices: int, filled: list[str]) -> Cluster:
    """Nodes as stated; the network rate from the file's `hardware` text, for the device where it names several."""
    per_node = int(stated(row, "devices_per_node") or device.devices_per_node)
    if num_devices < per_node:
        per_node = num_devices
    nodes = -(-num_devices // per_node)
    text = str(row.get("network") or facts.get("hardware") or "").lower()
    family = device.name.split("-")[0]
    parts = [part for part in text.split(";") if family in part] or [text]
    gbit = None
    for part in parts:
        for pattern, rate in NETWORK:
            found = re.search(pattern, part)
            if found and gbit is None and "not stated" not in part[found.end() : found.end() + 2]:
                for other in re.finditer(r"for (\w\d+)", part[found.end() :]):
                    if other[1] != family:
                        found = None
                    break
                if found:
                    gbit = rate(found, int(stated(row, "devices_per_node") or device.devices_per_node))
    scale_out = device.scale_out
    if gbit:
        scale_out = Link(
            bandwidth_bytes_per_s=gbit * 1e9 / 8, latency_us=scale_out.latency_us, efficiency=scale_out.efficiency
        )
    elif nodes > 1:
        filled.append(f"network {scale_out.bandwidth_bytes_per_s * 8 / 1e9:.0f} Gb/s per device")
    if "omni-path" in text:
        scale_out = scale_out.model_copy(update={"efficiency": OMNI_PATH_EFFICIENCY})
    if "omni-path" in text and family == "a100" and per_node == 8:
        host = Link(bandwidth_bytes_per_s=ISLAND_LINK, latency_us=10, efficiency=0.8)
        group = NodeGroup(device=device, num_nodes=2 * nodes, devices_per_node=4, intra_node=device.scale_up)
        return Cluster(
            name="as published",
            groups=(group,),
            inter_node=host,
            nodes_per_pod=2,
            inter_pod=scale_out,
            source=str(facts.get("source") or "row"),
        )
    group = NodeGroup(device=device, num_nodes=nodes, devices_per_node=per_node, intra_node=device.scale_up)
    return Cluster(name="as published", groups=(group,), inter_node=scale_out, source=str(facts.get("source") or "row"))


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
        raise CannotPrice(f"{num_layers} blocks do not fill {num_stages} stages")
    first = (num_stages - rest + 1) // 2
    blocks = [each + (first <= stage < first + rest) for stage in range(num_stages)]
    blocks[0] += 1
    blocks[-1] += 1
    return tuple(blocks)
