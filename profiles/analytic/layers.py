"""The layers of a decoder-only transformer, each as the list of operations one device runs.

With tensor parallelism a block gathers the sequence before and scatters it after each of its halves, in F
and again in B: four collectives each way, which cost what two all-reduces do. W has none.
"""

from dataclasses import replace

from profiles.analytic.operations import Operation, Shard
from profiles.model import LatentAttention, MixtureOfExperts

INDEX_BYTES = 8  # a token id or a label
EAGER_ROTARY_PASSES = 4  # in fp32, as complex numbers
LOGIT_BYTES = 4  # the loss is computed in fp32

Layer = tuple[Operation, ...]


def dense_block(shard: Shard) -> Layer:
    """Attention and one feed-forward part."""
    return (
        *_attention_half(shard),
        shard.norm("mlp norm"),
        shard.gather(),
        *_feed_forward(shard, "mlp", shard.spec.ffn_size, kept_inputs=shard.part_width),
        shard.scatter(),
        shard.residual("mlp residual"),
    )


def moe_block(shard: Shard, moe: MixtureOfExperts) -> Layer:
    """Attention and experts.

    Every device holds a slice of its 1 / ep of all experts, and tokens are routed evenly. The hidden state of a token
    is copied once per chosen expert, whole: the slices of one expert need the same rows. With expert parallelism
    copies travel instead of tokens, and are gathered over the tensor-parallel devices at the experts. A copy's weight
    is applied before the expert's second matrix, so that the expert's output is not kept. Shared experts act
    as one wide dense feed-forward part on the rows that the router keeps anyway.
    """
    spec, variant, chosen = shard.spec, shard.variant, moe.experts_per_token
    rows, width = shard.num_tokens * chosen, moe.expert_ffn_size // variant.tp
    read = (2 if spec.gated_mlp else 1) * width
    copied = (1 + chosen) * shard.hidden_bytes
    sent = chosen * shard.hidden_bytes if variant.ep > 1 else shard.hidden_bytes
    dispatch = shard.elementwise("dispatch", forward=copied, backward=copied)
    shared = moe.num_shared_experts * moe.expert_ffn_size
    return (
        *_attention_half(shard),
        shard.norm("mlp norm"),
        shard.linear(
            "router",
            spec.hidden_size,
            moe.num_experts,
            rows=shard.num_tokens / shard.num_parts,
            kept_inputs=shard.part_width,
            kept_outputs=moe.num_experts / shard.num_parts,
            narrow=False,
        ),
        shard.gather(sent),
        replace(dispatch, exchange_bytes=sent / variant.tp if variant.ep > 1 else 0.0, forward_launches=8),
        shard.linear(
            "experts in",
            spec.hidden_size,
            read,
            rows=rows,
            groups=moe.num_experts // variant.ep,
            kept_inputs=chosen * spec.hidden_size,
            kept_outputs=chosen * read,
            experts=True,
        ),
        shard.activation("experts activation", width, rows),
        shard.linear(
            "experts out",
            width,
            spec.hidden_size,
            rows=rows,
            groups=moe.num_experts // variant.ep,
            kept_inputs=chosen * width,
            kept_outputs=chosen * spec.hidden_size,
            experts=True,
        ),
        shard.elementwise("combine", forward=copied, backward=copied),
        *(_feed_forward(shard, "shared experts", shared, kept_inputs=0.0) if shared else ()),
        shard.scatter(sent),
        shard.residual("mlp residual"),
    )


def _feed_forward(shard: Shard, name: str, ffn_size: int, *, kept_inputs: float) -> Layer:
    spec, tp = shard.spec, shard.variant.tp
    width = ffn_size // tp
    read = (2 if spec.gated_mlp else 1) * width
    return (
        shard.linear(
            f"{name} in",
            spec.hidden_size,
            read,
            kept_inputs=kept_inputs,
            kept_outputs=read,
            bias=spec.linear_bias,
        ),
        shard.activation(f"{name} activation", width, shard.num_tokens),
        shard.linear(
            f"{name} out",
            width,
            spec.hidden_size,
            kept_inputs=width,
            kept_outputs=shard.part_width,
            bias=spec.linear_bias,
        ),
    )


def _attention_half(shard: Shard) -> Layer:
    if shard.spec.latent_attention is not None:
        return _latent_attention_half(shard, shard.spec.latent_attention)
    spec, _tp = shard.spec, shard.variant.tp
    query, key = shard.heads * spec.head_dim, shard.kv_heads * spec.head_dim
    rotated = 2 * shard.num_tokens * (query + key) * shard.element_bytes * (1 if shard.fused else EAGER_ROTARY_PASSES)
    return (
        shard.norm("attention norm"),
        shard.gather(),
        shard.linear(
            "qkv",
            spec.hidden_size,
            query + 2 * key,
            kept_inputs=shard.part_width,
            kept_outputs=query + 2 * key,
            bias=spec.qkv_bias or spec.linear_bias,
        ),
        *(() if spec.learned_positions else (shard.elementwise("rope", forward=rotated, backward=rotated),)),
        shard.attention(spec.head_dim, spec.head_dim, shard.kv_heads),
        _attention_output(shard, query),
        shard.scatter(),
        shard.residual("attention residual"),
    )


def _attention_output(shard: Shard, width: int) -> Operation:
    hidden = shard.spec.hidden_size
    return shard.linear(
        "attention output",
        width,
        hidden,
        kept_inputs=width,
        kept_outputs=shard.part_width,
        bias=shard.spec.linear_bias,
    )


def _latent_attention_half(shard: Shard, latent: LatentAttention) -> Layer:
    """Low-rank Q, K and V, trained without absorbing one projection into another.

    The down-projections run on this device's part of the sequence, with weights that every device holds;
    so the narrow latents are gathered, not the hidden states, and only the up-projections are split.
    """
    spec, tokens = shard.spec, shard.num_tokens
    down = latent.q_lora_rank + latent.kv_lora_rank + latent.qk_rope_head_dim
    qk_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    query, value = shard.heads * qk_dim, shard.heads * latent.v_head_dim
    key_value = shard.heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    # the rotary part of Q in place; the one rotary key written beside the rest of every head's key
    rotated = tokens * (2 * shard.heads * latent.qk_rope_head_dim + 2 * query) * shard.element_bytes
    return (
        shard.norm("attention norm"),
        shard.linear(
            "latent down",
            spec.hidden_size,
            down,
            rows=tokens / shard.num_parts,
            kept_inputs=shard.part_width,
            kept_outputs=down / shard.num_parts,
        ),
        shard.norm("query latent norm", latent.q_lora_rank),
        shard.norm("key-value latent norm", latent.kv_lora_rank),
        shard.gather(tokens * down * shard.element_bytes),
        shard.linear(
            "query up", latent.q_lora_rank, query, kept_inputs=latent.q_lora_rank / shard.num_parts, kept_outputs=query
        ),
        shard.linear(
            "key-value up",
            latent.kv_lora_rank,
            key_value,
            kept_inputs=latent.kv_lora_rank / shard.num_parts,
            kept_outputs=key_value,
        ),
        shard.elementwise("rope", forward=rotated, backward=rotated),
        shard.attention(qk_dim, latent.v_head_dim, shard.heads),
        _attention_output(shard, value),
        shard.scatter(),
        shard.residual("attention residual"),
    )


def embedding(shard: Shard) -> Layer:
    """Vocabulary-parallel look-up and positions, scattered along the sequence; then dropout if any.

    No gradient flows further back: B only passes it to the table, and adding it into the rows is W.
    """
    spec, machine = shard.spec, shard.machine
    table = shard.vocabulary * spec.hidden_size
    positions = max(spec.sequence_length, shard.variant.sequence_length) * spec.hidden_size
    indices = shard.num_tokens * INDEX_BYTES
    rows_us = machine.memory_us(2 * shard.hidden_bytes)
    look_up = Operation(
        "look-up",
        forward_us=rows_us,
        backward_us=machine.device.kernel_launch_us,
        weight_us=rows_us + shard.accumulate_us(table),
        saved_bytes=indices,
        weight_saved_bytes=indices + shard.shard_bytes,
        transient_bytes=max(shard.hidden_bytes, table * shard.element_bytes),
        num_parameters=table + (positions if spec.learned_positions else 0),
    )
    scatter = shard.scatter()
    if not shard.has_dropout:
        return look_up, scatter
    mask = shard.shard_bytes / shard.element_bytes
    moved = 2 * shard.shard_bytes + mask
    return look_up, scatter, shard.elementwise("dropout", forward=moved, backward=moved, saved=mask)


def head(shard: Shard) -> Layer:
    """Final norm, projection to this device's part of the vocabulary, and mean cross entropy in fp32.

    The fp32 logits of the whole microbatch are kept from F to B: no chunked loss is assumed. The matrix is
    counted here also where it is tied to the embedding: the two are on different stages, and Megatron-LM
    keeps a copy on each.
    """
    spec, size = shard.spec, shard.element_bytes
    logits = float(shard.num_tokens * shard.vocabulary)
    # F: cast to fp32, read that and write the log-softmax. B: softmax − one-hot from that, cast back
    moved = logits * (size + 3 * LOGIT_BYTES)
    kept = size if shard.fused_loss else LOGIT_BYTES
    loss = shard.elementwise(
        "loss",
        forward=logits * size if shard.fused_loss else moved,
        backward=2 * logits * size if shard.fused_loss else moved,
        saved=logits * kept + shard.num_tokens * INDEX_BYTES,
        transient=logits * (size if shard.fused_loss else size + LOGIT_BYTES) + shard.hidden_bytes,
    )
    # over the parts of the vocabulary: maximum, sum of exponentials and the label's logit of every token
    reductions_us = 3 * shard.machine.all_reduce_us(shard.num_tokens * LOGIT_BYTES)
    return (
        shard.norm("final norm"),
        shard.gather(),
        shard.linear(
            "logits",
            spec.hidden_size,
            shard.vocabulary,
            narrow=False,
            kept_inputs=shard.part_width,
            kept_outputs=shard.vocabulary,
        ),
        replace(loss, forward_us=loss.forward_us + reductions_us),
    )
