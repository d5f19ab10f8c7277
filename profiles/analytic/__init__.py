"""A `ModelProfile` from shapes and data sheets, for hardware nobody has at hand.

A layer is a list of operations (`layers`); an operation moves and multiplies what its shape says
(`operations`); a device does that at the speed its `DeviceSpec` says (`kernels`). A profile holds the sums.
There is no factor per model. Nothing reads a file or a clock, so equal arguments give equal profiles.
"""

from collections.abc import Iterable, Sequence
from math import ceil
from typing import get_args

from profiles.analytic.kernels import Machine
from profiles.analytic.layers import Layer, dense_block, embedding, head, moe_block
from profiles.analytic.operations import AttentionKernel, Shard
from profiles.cluster import DeviceSpec, Link
from profiles.model import LayerGroup, LayerKind, LayerProfile, ModelProfile, ModelSpec, Origin, Variant

__all__ = ["AttentionKernel", "profile_model"]

MASTER_BYTES = 4  # AdamW's own copy of a 16-bit weight, and each of its two moments, are fp32


def profile_model(
    spec: ModelSpec,
    device: DeviceSpec,
    variants: Iterable[Variant],
    *,
    tp_link: Link,
    attention: AttentionKernel = "flash",
) -> ModelProfile:
    """Estimate every layer of `spec` on `device` under each of `variants`; duplicates count once.

    `tp_link` joins the tensor-parallel devices. Groups are the embedding, the dense blocks, the blocks with
    experts, and the head (final norm, projection, loss). The embedding matrix is counted in the embedding
    and, tied or not, in the head: on different stages a tied matrix exists twice. With recompute "full" a
    block keeps its input only, and B repeats F; embedding and head are never recomputed.

    `attention="unfused"` prices the score matrices that frameworks kept in memory before flash attention,
    as published numbers up to 2022 contain them.

    Memory follows Korthikanti et al., arXiv 2205.05198, extended to grouped heads, gated feed-forward parts,
    experts and split backward. ProfileError if the device lacks the dtype, if tp divides the heads, the
    feed-forward width or the sequence not, or if cp or ep exceeds 1; ValueError if there are no variants.
    """
    if attention not in get_args(AttentionKernel):
        raise ValueError(f"attention {attention!r} is not one of {', '.join(get_args(AttentionKernel))}")
    shards = [
        Shard(spec, variant, Machine(device, variant.dtype, variant.tp, tp_link), attention)
        for variant in dict.fromkeys(variants)
    ]
    if not shards:
        raise ValueError(f"no variants to profile model {spec.name!r} at; give at least one")
    moe = spec.moe
    num_dense = spec.num_layers if moe is None else moe.num_dense_layers
    groups = [_group("embedding", "embedding", 1, shards, [embedding(shard) for shard in shards])]
    if num_dense:
        groups.append(_group("block", "block", num_dense, shards, [dense_block(shard) for shard in shards]))
    if moe is not None and spec.num_layers > num_dense:
        layers = [moe_block(shard, moe) for shard in shards]
        groups.append(_group("moe-block", "block", spec.num_layers - num_dense, shards, layers))
    groups.append(_group("head", "head", 1, shards, [head(shard) for shard in shards]))
    origin = Origin(kind="analytic", device=device.name, when="", how=_assumptions(device, attention))
    return ModelProfile(model=spec, layers=tuple(groups), origin=origin)


def _assumptions(device: DeviceSpec, attention: AttentionKernel) -> str:
    kernel = "causal flash attention" if attention == "flash" else "unfused attention with scores in memory"
    return (
        f"estimated from shapes: large matrix products reach {device.matmul_efficiency:.0%} of peak, other "
        f"kernels {device.memory_efficiency:.0%} of memory bandwidth; {kernel}, fused norms and activations, "
        "sequence parallelism with tensor parallelism, nothing overlapped, AdamW with fp32 state"
    )


def _group(name: str, kind: LayerKind, count: int, shards: Sequence[Shard], layers: Sequence[Layer]) -> LayerGroup:
    profiles = tuple(_layer_profile(kind, shard, layer) for shard, layer in zip(shards, layers, strict=True))
    return LayerGroup(name=name, kind=kind, count=count, profiles=profiles)


def _layer_profile(kind: LayerKind, shard: Shard, layer: Layer) -> LayerProfile:
    forward_us = sum(operation.forward_us for operation in layer)
    backward_us = sum(operation.backward_us for operation in layer)
    weight_us = sum(operation.weight_us for operation in layer)
    saved = sum(operation.saved_bytes for operation in layer)
    num_parameters = sum(operation.num_parameters for operation in layer)
    # the gradient that comes in, and what the neediest operation allocates
    transient = shard.shard_bytes + max(operation.transient_bytes for operation in layer)
    if kind == "block" and shard.variant.recompute == "full":
        backward_us += forward_us
        transient += saved - shard.shard_bytes  # all that F saves, except the input that never left
        saved = shard.shard_bytes
    return LayerProfile(
        variant=shard.variant,
        forward_us=forward_us,
        backward_input_us=backward_us,
        backward_weight_us=weight_us,
        fused_backward_us=backward_us + weight_us,
        optimizer_us=_optimizer_us(shard, num_parameters),
        parameter_bytes=ceil(num_parameters * shard.element_bytes),
        activation_bytes=ceil(saved),
        weight_activation_bytes=ceil(sum(operation.weight_saved_bytes for operation in layer)),
        output_bytes=0 if kind == "head" else ceil(shard.shard_bytes),
        temporary_bytes=ceil(transient),
    )


def _optimizer_us(shard: Shard, num_parameters: float) -> float:
    """One fused AdamW step: master weight and both moments read and written, the gradient read.

    In 16 bits the weight is written too; in 32 and 64 bits it is its own master.
    """
    size = shard.element_bytes
    state = max(size, MASTER_BYTES)
    traffic = 3 * 2 * state + size + (size if size < state else 0)
    return shard.machine.memory_us(num_parameters * traffic)
