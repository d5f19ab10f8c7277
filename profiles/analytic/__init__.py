"""A `ModelProfile` from shapes and data sheets, for hardware nobody has at hand.

A layer is a list of operations (`layers`); an operation moves and multiplies what its shape says
(`operations`); a device does that at the speed its `DeviceSpec` says (`kernels`). A profile holds the sums.
There is no factor per model. Nothing reads a file or a clock, so equal arguments give equal profiles.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from profiles.analytic.kernels import Machine
from profiles.analytic.layers import Layer, dense_block, embedding, head, moe_block
from profiles.analytic.operations import AttentionKernel, Shard
from profiles.cluster import DeviceSpec
from profiles.collectives import Fabric
from profiles.model import LayerGroup, LayerKind, LayerProfile, ModelProfile, ModelSpec, Origin, Variant

__all__ = ["Accumulation", "AttentionKernel", "Software", "TensorOverlap", "profile_model"]

MASTER_BYTES = 4  # AdamW's own copy of a 16-bit weight, and each of its two moments, are fp32

PIPELINED_SHOWN = 0.5
"""Share of a tensor-parallel collective that shows where it is pipelined with products.

The first or last piece has nothing to hide behind, products in pieces fill the device less, and both want memory.
Assumed: no measurement that isolates it is at hand.
"""

LOCKSTEP_EXPONENT = 2.0
"""How host and device add up where tensor-parallel collectives are waited for: (host^k + device^k)^(1/k).

A process alone keeps its device busy while its host is ahead: the longer of both. Processes that wait for each other
at every collective pay for the slowest host of them, even where each is ahead on average.
Fitted between 1 (one after the other) and infinity (the longer of both), on one-node runs of Megatron-DeepSpeed.
"""

TensorOverlap = Literal["none", "gradients", "all"]
Accumulation = Literal["separate", "fused", "sharded"]
ACCUMULATED_BYTES: dict[Accumulation, float] = {"separate": 6.0, "fused": 3.0, "sharded": 0.0}
"""Memory traffic per parameter in W beside the product: 16-bit gradients read twice and written once; fp32 sums read
and written, half of it beside multiplying; nothing."""


@dataclass(frozen=True)
class Software:
    """What a training framework does beside computing, as far as times depend on it.

    `tensor_overlap`: which tensor-parallel collectives run beside matrix products: "none" (Megatron-LM up to 2021),
    "gradients" (those of B that W does not wait for: Megatron-LM from 2022), or "all" (pipelined with the
    products before and behind them, as Transformer Engine's user buffers).
    `accumulation`: how a weight gradient joins those of earlier microbatches: by a pass over memory of its own
    ("separate"), in fp32 by the product that makes it ("fused", Megatron-LM from 2022), or not where it is made
    ("sharded", FSDP reduces first).
    `recompute_stops_early`: PyTorch's own checkpointing repeats a block only up to the last tensor that its backward
    needs, which leaves out the block's last product; Megatron-LM's repeats all.
    `host_us` is what the host takes to dispatch one operation of this model: a layer of many small kernels cannot
    run faster, and it waits with its peers at collectives that nothing overlaps (`LOCKSTEP_EXPONENT`).
    `fused_loss`: cross entropy in one kernel, which keeps 16-bit logits where others keep fp32.
    Not `fused`: norms, rotary positions and gated activations run one elementary kernel after the other,
    as PyTorch does without a compiler. With `blocking_launches` (CUDA_LAUNCH_BLOCKING=1) the device idles meanwhile.
    Unless it `pads_vocabulary`, a device that holds all of the vocabulary multiplies with as many columns as it has.
    """

    tensor_overlap: TensorOverlap = "gradients"
    accumulation: Accumulation = "fused"
    recompute_stops_early: bool = False
    host_us: float = 60.0
    fused: bool = True
    fused_loss: bool = False
    blocking_launches: bool = False
    pads_vocabulary: bool = True


def profile_model(
    spec: ModelSpec,
    device: DeviceSpec,
    variants: Iterable[Variant],
    *,
    fabric: Fabric,
    attention: AttentionKernel = "flash",
    software: Software = Software(),
) -> ModelProfile:
    """Estimate every layer of `spec` on `device` under each of `variants`; duplicates count once.

    Tensor-parallel groups lie contiguous in `fabric`. Groups are the embedding, the dense blocks, the blocks with
    experts, and the head (final norm, projection, loss). The embedding matrix is counted in the embedding
    and, tied or not, in the head: on different stages a tied matrix exists twice. With recompute "full" a
    block keeps its input only, and B repeats F; with "selective" it keeps all but what attention makes between its
    inputs and its output, and B repeats attention. Embedding and head are never recomputed.

    `attention="unfused"` prices the score matrices that frameworks kept in memory before flash attention,
    as published numbers up to 2022 contain them.

    Memory follows Korthikanti et al., arXiv 2205.05198, extended to grouped heads, gated feed-forward parts,
    experts and split backward. ProfileError if the device lacks the dtype, or if a degree does not divide
    what it splits; ValueError if there are no variants.
    """
    if attention not in get_args(AttentionKernel):
        raise ValueError(f"attention {attention!r} is not one of {', '.join(get_args(AttentionKernel))}")
    shards = [
        Shard(
            spec,
            variant,
            Machine(device, variant.dtype, fabric, fabric.span(variant.tp)),
            attention,
            software.fused,
            software.fused_loss,
            ACCUMULATED_BYTES[software.accumulation],
            software.pads_vocabulary,
        )
        for variant in dict.fromkeys(variants)
    ]
    if not shards:
        raise ValueError(f"no variants to profile model {spec.name!r} at; give at least one")
    moe = spec.moe
    num_dense = spec.num_layers if moe is None else moe.num_dense_layers

    def group(name: str, kind: LayerKind, count: int, layers: Sequence[Layer]) -> LayerGroup:
        profiles = tuple(
            _layer_profile(kind, shard, layer, software) for shard, layer in zip(shards, layers, strict=True)
        )
        return LayerGroup(name=name, kind=kind, count=count, profiles=profiles)

    groups = [group("embedding", "embedding", 1, [embedding(shard) for shard in shards])]
    if num_dense:
        groups.append(group("block", "block", num_dense, [dense_block(shard) for shard in shards]))
    if moe is not None and spec.num_layers > num_dense:
        layers = [moe_block(shard, moe) for shard in shards]
        groups.append(group("moe-block", "block", spec.num_layers - num_dense, layers))
    groups.append(group("head", "head", 1, [head(shard) for shard in shards]))
    origin = Origin(kind="analytic", device=device.name, when="", how=_assumptions(device, attention, software))
    return ModelProfile(model=spec, layers=tuple(groups), origin=origin)


def _assumptions(device: DeviceSpec, attention: AttentionKernel, software: Software) -> str:
    kernel = "causal flash attention" if attention == "flash" else "unfused attention with scores in memory"
    overlap = {
        "none": "no tensor-parallel collective overlapped",
        "gradients": "tensor-parallel collectives of gradients beside weight gradients",
        "all": "tensor-parallel collectives pipelined with matrix products",
    }[software.tensor_overlap]
    return (
        f"estimated from shapes: large matrix products reach {device.matmul_efficiency:.0%} of peak when run alone, "
        f"other kernels {device.memory_efficiency:.0%} of memory bandwidth; {kernel}, fused norms and activations, "
        f"{overlap}, {software.host_us:g} µs of host time per operation, AdamW with fp32 state"
    )


def _layer_profile(kind: LayerKind, shard: Shard, layer: Layer, software: Software) -> LayerProfile:
    forward_us, backward_us, weight_us, fused_us = _times(layer, software)
    saved = sum(operation.saved_bytes for operation in layer)
    num_parameters = sum(operation.num_parameters for operation in layer)
    # the gradient that comes in, and what the neediest operation allocates
    transient = shard.shard_bytes + max(operation.transient_bytes for operation in layer)
    recompute = shard.variant.recompute if kind == "block" else "none"
    if recompute == "full":
        again_us = forward_us - (_after_last_need_us(layer) if software.recompute_stops_early else 0.0)
        backward_us += again_us
        fused_us += again_us
        transient += saved - shard.shard_bytes  # all that F saves, except the input that never left
        saved = shard.shard_bytes
    elif recompute == "selective":
        core = [operation for operation in layer if operation.core_bytes]
        again_us = sum(operation.forward_us for operation in core)
        backward_us += again_us
        fused_us += again_us
        made = sum(operation.core_bytes for operation in core)
        transient += made
        saved -= made
    cp = shard.variant.cp
    return LayerProfile(
        variant=shard.variant,
        forward_us=forward_us,
        backward_input_us=backward_us,
        backward_weight_us=weight_us,
        fused_backward_us=fused_us,
        optimizer_us=_optimizer_us(shard, num_parameters),
        parameter_bytes=ceil(num_parameters * shard.element_bytes),
        expert_parameter_bytes=ceil(sum(operation.num_expert_parameters for operation in layer) * shard.element_bytes),
        deferred_parameter_bytes=ceil(sum(o.num_parameters for o in layer if o.weight_us) * shard.element_bytes),
        activation_bytes=ceil(saved),
        weight_activation_bytes=ceil(sum(operation.weight_saved_bytes for operation in layer)),
        output_bytes=0 if kind == "head" else ceil(shard.shard_bytes),
        temporary_bytes=ceil(transient),
        ring_bytes=ceil(sum(operation.ring_bytes for operation in layer)),
        ring_hidden_forward_us=sum(o.forward_us for o in layer if o.ring_bytes) * (cp - 1) / cp,
        ring_hidden_backward_us=sum(o.backward_us for o in layer if o.ring_bytes) * (cp - 1) / cp,
        exchange_bytes=ceil(sum(operation.exchange_bytes for operation in layer)),
    )


def _times(layer: Layer, software: Software) -> tuple[float, float, float, float]:
    """F, B, W and fused BW of a layer: the device's time, or the host's where that is longer."""
    sent_us = sum(operation.forward_sent_us for operation in layer)
    sent_back_us = sum(operation.backward_sent_us for operation in layer)
    forward_us = sum(operation.forward_us for operation in layer)
    backward_us = sum(operation.backward_us for operation in layer)
    weight_us = sum(operation.weight_us for operation in layer)
    hidden_us = 0.0
    if software.tensor_overlap == "all":
        shown_us = max(PIPELINED_SHOWN * sent_us, sent_us - (forward_us - sent_us))
        shown_back_us = max(PIPELINED_SHOWN * sent_back_us, sent_back_us - (backward_us - sent_back_us))
        forward_us += shown_us - sent_us
        backward_us += shown_back_us - sent_back_us
    elif software.tensor_overlap == "gradients":
        hidden_us = min(sum(operation.hideable_us for operation in layer), weight_us)
    hosts = [
        software.host_us * sum(getattr(operation, f"{action}_launches") for operation in layer)
        for action in ("forward", "backward", "weight")
    ]
    fused_us = backward_us + weight_us - hidden_us
    device = (forward_us, backward_us, weight_us, fused_us)
    host = (*hosts, hosts[1] + hosts[2])
    if software.blocking_launches:
        return _pairwise_sum(device, host)
    waits = software.tensor_overlap == "none" and sent_us + sent_back_us > 0
    f, b, w, fused = (_beside(*times, waits=waits) for times in zip(device, host, strict=True))
    return f, b, w, fused


def _beside(device_us: float, host_us: float, *, waits: bool) -> float:
    """An action of a device and its host; `waits`: in lockstep with tensor-parallel peers."""
    if not waits:
        return max(device_us, host_us)
    return float((device_us**LOCKSTEP_EXPONENT + host_us**LOCKSTEP_EXPONENT) ** (1 / LOCKSTEP_EXPONENT))


def _after_last_need_us(layer: Layer) -> float:
    """F from the last product on, whose result no backward needs."""
    last = max(index for index, operation in enumerate(layer) if operation.weight_flops)
    return sum(operation.forward_us for operation in layer[last:])


def _pairwise_sum(
    a: tuple[float, float, float, float], b: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


def _optimizer_us(shard: Shard, num_parameters: float) -> float:
    """One fused AdamW step: master weight and both moments read and written, the gradient read.

    In 16 bits the weight is written too; in 32 and 64 bits it is its own master.
    """
    size = shard.element_bytes
    state = max(size, MASTER_BYTES)
    traffic = 3 * 2 * state + size + (size if size < state else 0)
    return shard.machine.memory_us(num_parameters * traffic)
