"""What a framework of a row's time did: kernels, overlap, sharding, precision, recomputation.

Frameworks are told apart by what a row or its file says: precision, year, FSDP, names. No rule looks at a row's id
or at a measured time.
"""

import re
from math import gcd
from typing import Any

from published_fields import Row, UnpricedError, stated, text_of

from planner.plans import Precision
from profiles.analytic import AttentionKernel, Software
from profiles.cluster import DeviceSpec
from profiles.model import Dtype, ModelSpec, Recompute

DTYPES: dict[str, Dtype] = {
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp8": "float8",
    "float8": "float8",
    "fp32": "float32",
}


def dtype_of(row: Row, filled: list[str]) -> Dtype:
    """What linear layers compute in; bf16 where it is not stated, fp16 on V100, which has no bf16."""
    text = text_of(row, "precision").replace("-", " ").split(" ")[0].strip(",;")
    if text in DTYPES:
        return DTYPES[text]
    if text:
        raise UnpricedError(f"precision {row.get('precision')!r} is not known; known: {', '.join(DTYPES)}")
    dtype: Dtype = "float16" if "v100" in str(row.get("hardware")) else "bfloat16"
    filled.append(f"precision={dtype}")
    return dtype


def is_old_megatron(row: Row, dtype: Dtype) -> bool:
    """fp16 runs are Megatron-LM and its forks of 2020-22, before flash attention."""
    return dtype == "float16" and "flash" not in text_of(row, "attention")


def is_sharded(row: Row) -> bool:
    """FSDP of any framework."""
    return "fsdp" in text_of(row, "optimizer_sharding")


def is_torch_fsdp(row: Row) -> bool:
    """PyTorch with FSDP; MaxText shards alike but is JAX."""
    return "fsdp" in text_of(row, "optimizer_sharding") + text_of(row, "framework") and "maxtext" not in text_of(
        row, "framework"
    )


def attention_of(row: Row, dtype: Dtype, spec: ModelSpec, device: DeviceSpec) -> AttentionKernel:
    """What the framework called: scores in memory up to 2022; the kernels of PyTorch are FlashAttention-2, and MPT was
    measured on A100 with the first FlashAttention; Megatron-LM, NeMo and MaxText call cuDNN's."""
    if is_old_megatron(row, dtype):
        return "unfused"
    if is_torch_fsdp(row):
        return "flash-1" if spec.name.startswith("mpt") and device.name.startswith("a100") else "flash-2"
    return "flash"


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
    modern = ((row.get("tensor_parallel") or 1) > 1 and sequence_parallel) or recompute == "selective"
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
        pads_vocabulary=row.get("padded_vocabulary") is not False,
    )


def recompute_of(row: Row, tp: int, filled: list[str]) -> tuple[Recompute | None, float]:
    """What is recomputed, and in which share of blocks.

    Under FSDP "selective" means a share of whole blocks: stated ("every second layer"), or from printed HFU / MFU,
    which is 4/3 where all are recomputed. None where it is not stated: the least that fits (`published_pricing`).
    """
    text = text_of(row, "recompute")
    if not text:
        return None, 1.0
    if "second layer" in text or "every other" in text:
        return "full", 0.5
    hfu, mfu = stated(row, "hfu_percent"), stated(row, "mfu_percent")
    if text.startswith("selective") and is_torch_fsdp(row) and tp == 1 and hfu and mfu:
        share = min(1.0, max(0.0, 3 * (hfu / mfu - 1)))
        filled.append(f"recompute=full in {share:.0%} of blocks (from HFU / MFU)")
        return "full", share
    for choice in ("selective", "full", "none"):
        if text.startswith(choice):
            return choice, 1.0
    raise UnpricedError(f"recompute {row['recompute']!r} is not known")


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


def overlaps_of(row: Row, facts: Row, zero: int) -> bool:
    """Whether weights and gradients are sent while others compute: FSDP always does; else what the text says.

    DeepSpeed's ZeRO 3 of 2021 (fp16) fetched a tensor when it was needed: its runs in arXiv 2104.04473, table 2, take
    longer with more work per device and the same traffic.
    """
    text = text_of(row, "optimizer_sharding") + " " + " ".join(map(str, facts.get("facts", []))).lower()
    if zero == 3:
        return str(row.get("precision")) != "fp16"
    if "no overlap" in text:
        return False
    return "overlap" in text_of(row, "optimizer_sharding")


def precision_of(row: Row, dtype: Dtype) -> Precision:
    """fp16 runs of that time reduced 16-bit gradients; bf16 runs accumulate and reduce in fp32, but for FSDP and
    NeMo's distributed optimizer (the one that overlaps both ways), which reduce in 16 bits."""
    if dtype == "float32":
        return Precision.of(dtype)
    sharding = text_of(row, "optimizer_sharding")
    if dtype == "float16":
        return Precision(compute=dtype, gradients="float16")
    if any(word in sharding for word in ("fsdp", "zero3", "hsdp", "communication overlapped")):
        return Precision(compute=dtype, gradients="bfloat16")
    return Precision(compute=dtype)
