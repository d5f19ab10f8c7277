"""The model of a published row: a published shape by its key, with what the row states in its place."""

import re

from published_fields import Row, UnpricedError, stated

from profiles.model import LatentAttention, MixtureOfExperts, ModelSpec


def spec_of(row: Row, shapes: dict[str, Row], filled: list[str]) -> ModelSpec:
    """The model: a published shape by its key, with what the row states in its place.

    Without a shape: a GPT (two matrices of 4 h in the feed-forward part, tied embeddings, LayerNorm).
    LayerNorm, dropout and biases go with models whose feed-forward part is not gated and whose heads are not grouped:
    GPT-2, GPT-3, BLOOM and the Megatron papers; MPT and Nemotron were trained without biases.
    """
    shape = dict(shapes.get(str(row.get("shape")), {}))
    if row.get("shape") and not shape and not row.get("hidden_size"):
        raise UnpricedError(f"shape {row['shape']!r} is not among the shipped shapes, and the row has no hidden_size")
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
            raise UnpricedError(f"no {name}, and no published shape to take it from")
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
        raise UnpricedError(f"num_heads is not stated, and no number of heads fits hidden_size={hidden} and tp={tp}")
    return min(choices, key=lambda heads: abs(hidden / heads - 128))
