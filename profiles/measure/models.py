"""The bundled models: GPT-2-like and Llama-like decoders in plain torch, as lists of layers.

A model is [embedding, block, ..., block, head]. Layer i draws its weights from a generator seeded by (seed,
i) on the CPU in float32, whatever the device and dtype: a process that builds only some layers gets the
weights that a process building all of them gets. The head ends in logits; `loss_fn` is apart.

Sources: GPT-2 as in Radford et al. 2019 (learned positions, biases, GELU, N(0, 0.02) with residual
projections scaled by 1/sqrt(2 L)), but no dropout, and embeddings tied only where asked; Llama as in arXiv 2302.13971
(RMSNorm, rotary positions, SwiGLU) with grouped-query attention (arXiv 2305.13245).
"""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone gives it)
from torch import Tensor, nn

from profiles.errors import ProfileError
from profiles.model import ModelSpec

Architecture = Literal["gpt2", "llama"]
ROTARY_BASE = 10000.0
INITIAL_STD = 0.02


def model_spec_for(
    architecture: Architecture,
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    vocab_size: int,
    sequence_length: int,
    num_kv_heads: int | None = None,
    ffn_size: int | None = None,
) -> ModelSpec:
    """The shape of a bundled model; `num_layers` counts its blocks.

    `ffn_size` defaults to 4 hidden_size for gpt2, and to 8/3 hidden_size rounded up to a multiple of 256 for
    llama. ProfileError if hidden_size is not a multiple of num_heads, or gpt2 is given fewer key-value heads.
    """
    if hidden_size % num_heads:
        raise ProfileError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}; change either")
    is_llama = architecture == "llama"
    default_ffn_size = -(-8 * hidden_size // (3 * 256)) * 256 if is_llama else 4 * hidden_size
    spec = ModelSpec(
        name=f"{architecture}-{num_layers}x{hidden_size}",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=ffn_size or default_ffn_size,
        gated_mlp=is_llama,
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        tied_embeddings=False,
        learned_positions=not is_llama,
        norm="rmsnorm" if is_llama else "layernorm",
        linear_bias=not is_llama,
        qkv_bias=not is_llama,
        source=f"bundled {architecture} model of pipewright",
    )
    _check(architecture, spec)
    return spec


def build_layers(
    architecture: Architecture,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    only: range | None = None,
) -> list[nn.Module]:
    """Layers `only` (default: all num_layers + 2) of the model, on `device`.

    Layer 0 maps token ids (n, s) to (n, s, hidden), blocks keep that, the head gives logits (n, s, vocab).
    ProfileError if the spec asks for what the bundled models do not have (experts, latent attention, ...). Tied
    embeddings are one parameter where both layers are chosen; else see `tied_parameters`.
    """
    _check(architecture, spec)
    chosen = range(spec.num_layers + 2) if only is None else only
    if any(not 0 <= index < spec.num_layers + 2 for index in chosen):
        raise ValueError(f"only={only} reaches outside of the {spec.num_layers + 2} layers of {spec.name!r}")
    layers = {index: _build_layer(architecture, spec, index, dtype, device, seed) for index in chosen}
    if spec.tied_embeddings and {0, spec.num_layers + 1} <= layers.keys():
        layers[spec.num_layers + 1].projection.weight = layers[0].tokens.weight  # type: ignore[union-attr]
    return list(layers.values())


def tied_parameters(spec: ModelSpec) -> tuple[tuple[tuple[int, str], tuple[int, str]], ...]:
    """Pairs of (layer, parameter) that are one in this model: the token embedding and the head, or none."""
    if not spec.tied_embeddings:
        return ()
    return (((0, "tokens.weight"), (spec.num_layers + 1, "projection.weight")),)


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits (n, s, vocab) at target ids (n, s), in float32 or better, a scalar."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten())


def synthetic_batch(spec: ModelSpec, num_sequences: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Token ids and the ids that follow them, both (num_sequences, sequence_length), int64, on the CPU.

    Equal for equal arguments everywhere. Small ids are more frequent, so a model has something to learn.
    """
    draw = np.random.default_rng((seed, step)).random((num_sequences, spec.sequence_length + 1))
    tokens = torch.from_numpy((spec.vocab_size * draw**3).astype(np.int64))
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()


_TRAITS: dict[Architecture, dict[str, object]] = {
    "gpt2": {
        "gated_mlp": False,
        "learned_positions": True,
        "norm": "layernorm",
        "linear_bias": True,
        "qkv_bias": True,
        "moe": None,
        "latent_attention": None,
    },
    "llama": {
        "gated_mlp": True,
        "learned_positions": False,
        "norm": "rmsnorm",
        "linear_bias": False,
        "moe": None,
        "latent_attention": None,
    },
}


def _check(architecture: Architecture, spec: ModelSpec) -> None:
    traits = _TRAITS[architecture]
    wrong = [f"{name} is not {wanted}" for name, wanted in traits.items() if getattr(spec, name) != wanted]
    if architecture == "gpt2" and spec.num_kv_heads != spec.num_heads:
        wrong.append(f"num_kv_heads {spec.num_kv_heads} is not num_heads {spec.num_heads}")
    if architecture == "llama" and spec.head_dim % 2:
        wrong.append(f"head_dim {spec.head_dim} is odd")
    if wrong:
        raise ProfileError(
            f"model {spec.name!r} is not a bundled {architecture} model: {'; '.join(wrong)}; "
            "profile it from your own layers with profiles.measure.profile_layers"
        )


def _build_layer(
    architecture: Architecture,
    spec: ModelSpec,
    index: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> nn.Module:
    with torch.device("meta"):  # shapes only: default initialisation would draw from the global generator
        if index == 0:
            layer: nn.Module = Embedding(spec)
        elif index <= spec.num_layers:
            layer = LlamaBlock(spec) if architecture == "llama" else GPT2Block(spec)
        else:
            layer = Head(spec)
    layer = layer.to(dtype).to_empty(device=device)
    layer_seed = int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])
    _initialise(layer, spec, torch.Generator("cpu").manual_seed(layer_seed))
    return layer


@torch.no_grad()
def _initialise(layer: nn.Module, spec: ModelSpec, generator: torch.Generator) -> None:
    for name, parameter in layer.named_parameters():
        if parameter.ndim >= 2:
            std = INITIAL_STD / math.sqrt(2 * spec.num_layers) if name in RESIDUAL_PROJECTIONS else INITIAL_STD
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0)
    for module in layer.modules():
        if isinstance(module, Rotary):
            module.fill()


RESIDUAL_PROJECTIONS = ("attention_out.weight", "mlp_out.weight")


class Embedding(nn.Module):
    """Token embedding, plus learned positions where the spec has them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.positions = nn.Embedding(spec.sequence_length, spec.hidden_size) if spec.learned_positions else None

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, s) ids to (n, s, hidden)."""
        embedded: Tensor = self.tokens(tokens)
        if self.positions is None:
            return embedded
        positions: Tensor = self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return embedded + positions


class GPT2Block(nn.Module):
    """Pre-norm attention and GELU feed-forward, with biases."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        inner = spec.num_heads * spec.head_dim
        self.num_heads, self.head_dim = spec.num_heads, spec.head_dim
        self.attention_norm = nn.LayerNorm(spec.hidden_size)
        self.qkv = nn.Linear(spec.hidden_size, 3 * inner)
        self.attention_out = nn.Linear(inner, spec.hidden_size)
        self.mlp_norm = nn.LayerNorm(spec.hidden_size)
        self.mlp_in = nn.Linear(spec.hidden_size, spec.ffn_size)
        self.mlp_out = nn.Linear(spec.ffn_size, spec.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(n, s, hidden) to (n, s, hidden)."""
        n, s, _ = x.shape
        qkv: Tensor = self.qkv(self.attention_norm(x))
        q, k, v = qkv.view(n, s, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(n, s, -1))
        hidden: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))
        return x + hidden


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864), halves paired as in Llama's published weights."""

    def __init__(self, head_dim: int, sequence_length: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        for name in ("cosine", "sine"):
            self.register_buffer(name, torch.empty(sequence_length, head_dim), persistent=False)
        self.cosine: Tensor
        self.sine: Tensor

    def fill(self) -> None:
        """Compute the tables, shape (sequence_length, head_dim), in float32."""
        positions = torch.arange(self.cosine.shape[0], dtype=torch.float32)
        frequencies = ROTARY_BASE ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        angles = torch.outer(positions, frequencies).repeat(1, 2)
        self.cosine.copy_(angles.cos())
        self.sine.copy_(angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """(n, heads, s, head_dim), turned by position."""
        s = x.shape[-2]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x * self.cosine[:s] + turned * self.sine[:s]


class LlamaBlock(nn.Module):
    """Pre-norm grouped-query attention with rotary positions (biases on Q, K, V where the spec says so), and SwiGLU."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.is_grouped = spec.num_kv_heads != spec.num_heads
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.attention_norm = nn.RMSNorm(spec.hidden_size, eps=1e-5)
        self.query = nn.Linear(spec.hidden_size, q_size, bias=spec.qkv_bias)
        self.key = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.value = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.rotary = Rotary(spec.head_dim, spec.sequence_length)
        self.attention_out = nn.Linear(q_size, spec.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(spec.hidden_size, eps=1e-5)
        self.mlp_gate = nn.Linear(spec.hidden_size, spec.ffn_size, bias=False)
        self.mlp_in = nn.Linear(spec.hidden_size, spec.ffn_size, bias=False)
        self.mlp_out = nn.Linear(spec.ffn_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, s, hidden) to (n, s, hidden)."""
        n, s, _ = x.shape
        normed = self.attention_norm(x)
        q, k, v = (
            projection(normed).view(n, s, -1, self.head_dim).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(
            self.rotary(q), self.rotary(k), v, is_causal=True, enable_gqa=self.is_grouped
        )
        x = x + self.attention_out(attended.transpose(1, 2).reshape(n, s, -1))
        normed = self.mlp_norm(x)
        hidden: Tensor = self.mlp_out(F.silu(self.mlp_gate(normed)) * self.mlp_in(normed))
        return x + hidden


class Head(nn.Module):
    """Final norm and output projection."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        is_layer_norm = spec.norm == "layernorm"
        self.norm = nn.LayerNorm(spec.hidden_size) if is_layer_norm else nn.RMSNorm(spec.hidden_size, eps=1e-5)
        self.projection = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, s, hidden) to logits (n, s, vocab)."""
        logits: Tensor = self.projection(self.norm(x))
        return logits
