"""What is known about a model: its shape, and what each layer costs on a device.

A `ModelProfile` lists the layers in order. Each layer holds one `LayerProfile` per variant (degrees,
micro-batch size, sequence length, dtype, recompute) it was measured or estimated at. Measured and
analytic profiles are the same type, so nothing downstream can tell, or needs to.
"""

from functools import cached_property
from typing import Literal, Self

from pydantic import Field, model_validator

from profiles.cluster import Link
from profiles.errors import ProfileError
from profiles.facts import Bytes, Count, Depth, Facts, Microseconds, NonNegative, Width
from profiles.facts import Dtype as Dtype

BYTES_PER_ELEMENT: dict[Dtype, int] = {"float8": 2, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
"""Bytes of a weight or an activation that is kept while computing in a dtype.

float8 is the products of linear layers only: weights and activations stay in bfloat16 and are cast on the way in.
"""

Recompute = Literal["none", "selective", "full"]
LayerKind = Literal["embedding", "block", "head"]
Engine = Literal["fused", "deferred-linear"]
"""How a backward is split. "deferred-linear": products with parameters leave their weight gradients to W, all other
parameters get theirs within B (`profiles.measure.split_backward`). "fused": not at all, B is the whole backward."""


class MixtureOfExperts(Facts):
    """Experts that replace the feed-forward part of all blocks but the first `num_dense_layers`."""

    num_experts: Width
    experts_per_token: Width
    expert_ffn_size: Width
    num_shared_experts: int = Field(default=0, ge=0, le=10**4)
    num_dense_layers: int = Field(default=0, ge=0, le=10**4)

    @model_validator(mode="after")
    def _no_more_active_than_present(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}")
        return self


class LatentAttention(Facts):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): low-rank Q, K and V."""

    q_lora_rank: Width
    kv_lora_rank: Width
    qk_nope_head_dim: Width
    qk_rope_head_dim: Width
    v_head_dim: Width


class ModelSpec(Facts):
    """The shape of a decoder-only transformer, as published."""

    name: str
    num_layers: Depth
    hidden_size: Width
    num_heads: Width
    num_kv_heads: Width
    head_dim: Width
    ffn_size: Width
    gated_mlp: bool
    vocab_size: Width
    sequence_length: Count  # the length it was trained at; a plan may ask for another
    tied_embeddings: bool
    learned_positions: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    linear_bias: bool = False
    qkv_bias: bool = False
    moe: MixtureOfExperts | None = None
    latent_attention: LatentAttention | None = None
    source: str

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.moe is not None and self.moe.num_dense_layers > self.num_layers:
            raise ValueError(f"moe.num_dense_layers {self.moe.num_dense_layers} exceeds num_layers {self.num_layers}")
        return self

    @cached_property
    def attention_parameters(self) -> int:
        """Weight-matrix parameters of one attention block."""
        h, latent = self.hidden_size, self.latent_attention
        if latent is None:
            return h * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        qk = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        query = h * latent.q_lora_rank + latent.q_lora_rank * self.num_heads * qk
        key_value = h * (latent.kv_lora_rank + latent.qk_rope_head_dim)
        key_value += latent.kv_lora_rank * self.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        return query + key_value + self.num_heads * latent.v_head_dim * h

    def ffn_parameters(self, ffn_size: int) -> int:
        """Weight-matrix parameters of one feed-forward block (or one expert) of this inner width."""
        return (3 if self.gated_mlp else 2) * self.hidden_size * ffn_size

    def block_parameters(self, layer: int, *, active: bool = False) -> int:
        """Weight-matrix parameters of block `layer` (from 0); with `active`, those one token meets."""
        moe = self.moe
        if moe is None or layer < moe.num_dense_layers:
            return self.attention_parameters + self.ffn_parameters(self.ffn_size)
        experts = (moe.experts_per_token if active else moe.num_experts) + moe.num_shared_experts
        router = self.hidden_size * moe.num_experts
        return self.attention_parameters + experts * self.ffn_parameters(moe.expert_ffn_size) + router

    @cached_property
    def num_parameters(self) -> int:
        """Matrices and embeddings; norms and biases left out."""
        blocks = sum(self.block_parameters(layer) for layer in range(self.num_layers))
        return blocks + self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @cached_property
    def num_active_parameters(self) -> int:
        """Parameters one token is multiplied by: active experts and one output projection."""
        blocks = sum(self.block_parameters(layer, active=True) for layer in range(self.num_layers))
        return blocks + self.vocab_size * self.hidden_size

    def step_flops(self, num_sequences: int, sequence_length: int) -> float:
        """Model FLOPs of one optimizer step: forward and backward, attention counted in full, no recompute.

        3 s (2 P_active + L 4 s heads head_dim) per sequence (PaLM, arXiv 2204.02311, appendix B, with
        attention not halved for causality). With latent attention the 4 s head_dim becomes
        2 s (qk_nope + qk_rope + v).
        """
        latent = self.latent_attention
        per_head = (
            4 * self.head_dim
            if latent is None
            else 2 * (latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim)
        )
        attention = self.num_layers * self.num_heads * per_head * sequence_length
        return 3.0 * num_sequences * sequence_length * (2 * self.num_active_parameters + attention)


class Variant(Facts):
    """The circumstances under which a layer's costs hold.

    `recompute`: "full" keeps a block's input only, "selective" all but what the core of attention makes
    (arXiv 2205.05198, section 4.2). `sequence_parallel` splits norms, dropout and residuals over the tensor-parallel
    devices, too; without it they are repeated on each. It means nothing at tp=1 and is True there.
    """

    tp: Count = 1
    cp: Count = 1
    ep: Count = 1
    micro_batch_size: Count
    sequence_length: Count
    dtype: Dtype
    recompute: Recompute = "none"
    sequence_parallel: bool = True

    def __str__(self) -> str:
        degrees = "".join(f" {name}={getattr(self, name)}" for name in ("tp", "cp", "ep") if getattr(self, name) > 1)
        recompute = "" if self.recompute == "none" else f" recompute={self.recompute}"
        sequence = "" if self.sequence_parallel else " sequence_parallel=False"
        return (
            f"micro_batch_size={self.micro_batch_size} sequence_length={self.sequence_length} {self.dtype}"
            f"{degrees}{recompute}{sequence}"
        )


class LayerProfile(Facts):
    """One layer under one variant, on one device: times in µs, sizes in bytes.

    `activation_bytes` is taken when F starts (M_B); when B ends all but `weight_activation_bytes` (M_W)
    is given back, the rest when W ends. With recompute, B includes the repeated forward.
    `temporary_bytes` is the most that any one action allocates on top of that while it runs.

    Tensor-parallel collectives are part of the times. What context and expert parallelism send is not, as that depends
    on where those groups lie: `ring_bytes` and `exchange_bytes` say how much it is.
    """

    variant: Variant
    forward_us: Microseconds
    backward_input_us: Microseconds  # B
    backward_weight_us: Microseconds  # W
    fused_backward_us: Microseconds  # BW: both in one go
    optimizer_us: Microseconds = 0.0  # one optimizer step over this layer's parameters
    parameter_bytes: Bytes  # weights in the compute dtype, on this device
    activation_bytes: Bytes
    weight_activation_bytes: Bytes
    output_bytes: Bytes  # what goes to the next stage, and comes back as its gradient
    temporary_bytes: Bytes = 0
    deferred_parameter_bytes: Bytes | None = None  # of parameter_bytes: gradients come in W, not B; None: not told
    expert_parameter_bytes: Bytes = 0  # of parameter_bytes: experts, of which each device holds 1/ep of all
    ring_bytes: Bytes = 0  # K and V of this device's tokens: passed on cp − 1 times in F, twice as much in B
    ring_hidden_forward_us: Microseconds = 0.0  # time of attention in F, behind which that ring can hide
    ring_hidden_backward_us: Microseconds = 0.0  # likewise in B
    exchange_bytes: Bytes = 0  # what this device sends in one all-to-all of experts: two in F, two in B
    spread: NonNegative = 0.0  # (third quartile − first quartile) / median of F, as measured; 0 if estimated


class LayerGroup(Facts):
    """`count` consecutive layers with equal costs."""

    name: str
    kind: LayerKind
    count: Depth = 1
    profiles: tuple[LayerProfile, ...] = Field(min_length=1)

    @cached_property
    def _by_variant(self) -> dict[Variant, LayerProfile]:
        return {profile.variant: profile for profile in self.profiles}

    def at(self, variant: Variant) -> LayerProfile:
        """Costs under `variant`; ProfileError lists what there is."""
        try:
            return self._by_variant[variant]
        except KeyError:
            known = "; ".join(str(profile.variant) for profile in self.profiles[:8])
            raise ProfileError(
                f"layer {self.name!r} was not profiled at {variant}; profiled: {known}. Profile it at that variant"
            ) from None


class Origin(Facts):
    """Where, when and how a profile was obtained."""

    kind: Literal["analytic", "measured"]
    device: str
    device_kind: Literal["cpu", "cuda", "rocm"] | None = None  # of what it was measured on; None for an estimate
    when: str  # ISO date and time, UTC; empty for an estimate, so that equal inputs give equal files
    how: str  # "median of 20 runs after 3 warm-ups, torch 2.13.0, 1 thread"
    engine: Engine = "deferred-linear"  # how W is split from B


class MeasuredLinks(Facts):
    """Transfers measured between processes of the machine the profile was made on."""

    point_to_point: Link
    all_reduce: Link  # bandwidth = bus bandwidth: payload / time × 2 (n − 1) / n
    how: str


class ModelProfile(Facts):
    """The layers of a model, in order, each with its costs under every variant."""

    schema_version: Literal["pipewright.profile/1"] = Field(default="pipewright.profile/1", alias="schema")
    model: ModelSpec
    architecture: Literal["gpt2", "llama"] | None = None  # the bundled torch model it was measured on
    layers: tuple[LayerGroup, ...] = Field(min_length=1)
    links: MeasuredLinks | None = None
    origin: Origin

    @model_validator(mode="after")
    def _same_variants_everywhere(self) -> Self:
        for group in self.layers:
            variants = [profile.variant for profile in group.profiles]
            if len(set(variants)) != len(variants):
                raise ValueError(f"layer {group.name!r} holds one variant twice")
            if set(variants) != set(self.variants):
                raise ValueError(f"layer {group.name!r} and layer {self.layers[0].name!r} hold different variants")
        return self

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every variant the whole model was profiled at, in the order of the first layer."""
        return tuple(profile.variant for profile in self.layers[0].profiles)

    @property
    def num_layers(self) -> int:
        """Layers counted one by one, embedding and head included."""
        return sum(group.count for group in self.layers)

    def at(self, variant: Variant) -> list[LayerProfile]:
        """One `LayerProfile` per layer in model order, shape (num_layers,); ProfileError if not profiled."""
        return [profile for group in self.layers for profile in [group.at(variant)] * group.count]
