"""Estimated profiles: against published measurements, against formulas, and as laws over drawn shapes."""

from typing import get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from profiles import catalog
from profiles.analytic import Software, TensorOverlap, profile_model
from profiles.analytic.kernels import CACHE_SPEED, CACHED_BYTES, Machine
from profiles.analytic.layers import Layer, dense_block, embedding, head, moe_block
from profiles.analytic.operations import FLASH_1_PASSES, AttentionKernel, Shard
from profiles.cluster import DeviceSpec, Link
from profiles.collectives import Fabric
from profiles.errors import ProfileError
from profiles.model import (
    BYTES_PER_ELEMENT,
    Dtype,
    LatentAttention,
    LayerProfile,
    MixtureOfExperts,
    ModelProfile,
    ModelSpec,
    Recompute,
    Variant,
)

A100 = catalog.device("a100-80gb")
H100 = catalog.device("h100-sxm")
GPT_22B = ModelSpec(  # Korthikanti et al., arXiv 2205.05198, table 3
    name="gpt-22b",
    num_layers=48,
    hidden_size=6144,
    num_heads=64,
    num_kv_heads=64,
    head_dim=96,
    ffn_size=24576,
    gated_mlp=False,
    vocab_size=51200,
    sequence_length=2048,
    tied_embeddings=True,
    learned_positions=True,
    norm="layernorm",
    linear_bias=True,
    qkv_bias=True,
    source="arXiv 2205.05198",
)


def make_variant(
    micro_batch_size: int,
    sequence_length: int,
    *,
    tp: int = 1,
    dtype: Dtype = "bfloat16",
    recompute: Recompute = "none",
    sequence_parallel: bool = True,
    cp: int = 1,
    ep: int = 1,
) -> Variant:
    return Variant(
        tp=tp,
        cp=cp,
        ep=ep,
        sequence_parallel=sequence_parallel,
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        dtype=dtype,
        recompute=recompute,
    )


def fabric_of(device: DeviceSpec) -> Fabric:
    return Fabric((8, 1), (device.scale_up, device.scale_out))


def machine_of(device: DeviceSpec, dtype: Dtype, tp: int = 1) -> Machine:
    return Machine(device, dtype, fabric_of(device), fabric_of(device).span(tp))


def profile_one(
    spec: ModelSpec,
    device: DeviceSpec,
    variant: Variant,
    *,
    attention: AttentionKernel = "flash",
    software: Software | None = None,
) -> ModelProfile:
    software = Software() if software is None else software
    return profile_model(spec, device, [variant], fabric=fabric_of(device), attention=attention, software=software)


def first_block(profile: ModelProfile) -> LayerProfile:
    return profile.layers[1].profiles[0]


def layers_of(spec: ModelSpec, variant: Variant, attention: AttentionKernel = "flash") -> list[Layer]:
    shard = Shard(spec, variant, machine_of(H100, variant.dtype, variant.tp), attention)
    num_dense = spec.num_layers if spec.moe is None else spec.moe.num_dense_layers
    blocks = [dense_block(shard)] * num_dense
    if spec.moe is not None:
        blocks += [moe_block(shard, spec.moe)] * (spec.num_layers - num_dense)
    return [embedding(shard), *blocks, head(shard)]


# -- published measurements ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence_parallel", "recompute", "forward_us", "backward_us"),
    [
        (False, "none", 7700, 11900),
        (True, "none", 7200, 11800),
        (False, "full", 7700, 19500),
        (False, "selective", 7700, 13200),
        (True, "selective", 7200, 13100),
    ],
)
def test_one_layer_of_the_22b_model_takes_what_korthikanti_table_4_measured_on_8_a100(
    sequence_parallel: bool, recompute: Recompute, forward_us: float, backward_us: float
) -> None:
    variant = make_variant(4, 2048, tp=8, dtype="float16", recompute=recompute, sequence_parallel=sequence_parallel)
    block = first_block(profile_one(GPT_22B, A100, variant, attention="unfused"))
    assert block.forward_us == pytest.approx(forward_us, rel=0.055)
    assert block.fused_backward_us == pytest.approx(backward_us, rel=0.05)


@pytest.mark.parametrize(
    ("name", "micro_batch_size", "forward_ms", "backward_ms", "weight_ms"),
    [  # arXiv 2401.10241, table 5 (m = 24), mean of 8 stages on A100
        ("zero-bubble-1.5b", 6, 18.522, 18.086, 9.337),
        ("zero-bubble-6.2b", 3, 29.718, 29.444, 19.927),
    ],
)
def test_a_microbatch_takes_what_the_zero_bubble_paper_measured_and_w_is_the_shortest_part(
    name: str, micro_batch_size: int, forward_ms: float, backward_ms: float, weight_ms: float
) -> None:
    variant = make_variant(micro_batch_size, 1024, dtype="float16")
    layers = profile_one(catalog.model(name), A100, variant, attention="unfused").at(variant)
    got_forward = sum(layer.forward_us for layer in layers) / 8e3
    got_backward = sum(layer.backward_input_us for layer in layers) / 8e3
    got_weight = sum(layer.backward_weight_us for layer in layers) / 8e3
    assert got_forward + got_backward + got_weight == pytest.approx(forward_ms + backward_ms + weight_ms, rel=0.10)
    assert got_forward == pytest.approx(forward_ms, rel=0.20)
    assert got_backward == pytest.approx(backward_ms, rel=0.20)
    assert got_weight == pytest.approx(weight_ms, rel=0.25)
    assert got_weight < min(got_forward, got_backward)


@pytest.mark.parametrize(
    ("name", "tp", "micro_batch_size", "num_microbatches", "measured_s"),
    [  # arXiv 2104.04473, table 1, the rows without pipeline: full recompute, step time from TFLOP/s
        ("megatron-1.7b", 1, 16, 1, 3.528),
        ("megatron-3.6b", 2, 16, 1, 3.697),
        ("megatron-7.5b", 4, 16, 1, 3.696),
        ("megatron-18.4b", 8, 8, 4, 9.399),
    ],
)
def test_compute_is_80_to_100_percent_of_the_steps_measured_on_a100_by_megatron_lm(
    name: str, tp: int, micro_batch_size: int, num_microbatches: int, measured_s: float
) -> None:
    # the rest of a step is the gradient all-reduce, and norms that were not yet split over the sequence
    variant = make_variant(micro_batch_size, 2048, tp=tp, dtype="float16", recompute="full")
    layers = profile_one(catalog.model(name), A100, variant, attention="unfused").at(variant)
    microbatch_us = sum(layer.forward_us + layer.fused_backward_us for layer in layers)
    step_s = (num_microbatches * microbatch_us + sum(layer.optimizer_us for layer in layers)) / 1e6
    assert 0.80 < step_s / measured_s < 1.0


@pytest.mark.parametrize(
    (
        "name",
        "tp",
        "micro_batch_size",
        "sequence_length",
        "share_of_sequence",
        "num_microbatches",
        "measured_s",
    ),
    [  # DGX Cloud benchmarking recipes, H100, BF16, no recompute: release 25.04 (8B), 25.03 (15B)
        ("llama-3.1-8b", 1, 1, 8192, 0.5, 32, 12.27),  # context parallel 2: each device has half a sequence
        ("nemotron-4-15b", 4, 4, 4096, 1.0, 4, 2.812),
    ],
)
def test_compute_is_90_to_105_percent_of_the_steps_measured_on_h100(
    name: str,
    tp: int,
    micro_batch_size: int,
    sequence_length: int,
    share_of_sequence: float,
    num_microbatches: int,
    measured_s: float,
) -> None:
    variant = make_variant(micro_batch_size, sequence_length, tp=tp)
    layers = profile_one(catalog.model(name), H100, variant).at(variant)
    microbatch_us = share_of_sequence * sum(layer.forward_us + layer.fused_backward_us for layer in layers)
    assert 0.90 < num_microbatches * microbatch_us / 1e6 / measured_s < 1.05


@pytest.mark.parametrize(
    ("groups", "rows", "depth", "columns", "measured_tflops"),
    [  # EleutherAI cookbook, benchmarks/sizing/sample_results (the rates say A100; FP16)
        (1, 8192, 4096, 12288, 241.6),
        (1, 8192, 4096, 4096, 234.9),
        (1, 8192, 4096, 16384, 241.1),
        (1, 8192, 16384, 4096, 252.8),
        (64, 2048, 256, 2048, 130.2),
        (64, 2048, 2048, 256, 219.0),
        (128, 1024, 1024, 1024, 227.3),
        (128, 1024, 2048, 1024, 243.3),
    ],
)
def test_matrix_products_run_within_15_percent_of_measured_ones(
    groups: int, rows: int, depth: int, columns: int, measured_tflops: float
) -> None:
    machine = machine_of(A100, "float16")
    flops = 2.0 * groups * rows * depth * columns
    assert flops / machine.matmul_us(rows, columns, depth, groups=groups) / 1e6 == pytest.approx(
        measured_tflops, rel=0.15
    )


@pytest.mark.parametrize(("head_dim", "measured_tflops"), [(128, 648), (256, 756)])
def test_attention_runs_within_20_percent_of_flash_attention_3(head_dim: int, measured_tflops: float) -> None:
    # arXiv 2407.08608, figure 5: forward, no mask, 16k tokens, hidden 2048
    machine = machine_of(H100, "float16")
    tokens = 16384
    flops = 4.0 * tokens * tokens * 2048
    time_us = machine.flash_attention_us(flops, head_dim, 4 * tokens * 2048 * 2)
    assert flops / time_us / 1e6 == pytest.approx(measured_tflops, rel=0.20)


# -- formulas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_gpt_block_holds_what_korthikanti_counts(tp: int) -> None:
    s, b, h, a = 2048, 4, 6144, 64
    variant = make_variant(b, s, tp=tp, dtype="float16")
    unfused = first_block(profile_one(GPT_22B, A100, variant, attention="unfused"))
    assert unfused.activation_bytes == s * b * h * 34 // tp + 5 * a * s * s * b // tp
    flash = first_block(profile_one(GPT_22B, A100, variant))
    row_statistics = 4 * a * s * b // tp
    assert flash.activation_bytes == s * b * h * 34 // tp + row_statistics
    recomputed = first_block(profile_one(GPT_22B, A100, make_variant(b, s, tp=tp, dtype="float16", recompute="full")))
    assert recomputed.activation_bytes == 2 * s * b * h // tp


@pytest.mark.parametrize("tp", [1, 8])
def test_w_of_a_gpt_block_needs_the_32_s_b_h_bytes_of_the_zero_bubble_paper(tp: int) -> None:
    variant = make_variant(4, 2048, tp=tp, dtype="float16")
    block = first_block(profile_one(GPT_22B, A100, variant))
    assert block.weight_activation_bytes == 32 * 2048 * 4 * 6144 // tp


def test_the_neediest_moment_of_a_gpt_block_is_the_backward_of_its_activation() -> None:
    # gradients of what GeLU read and wrote, 4 h each, and the gradient that came in, h; 2 bytes each
    block = first_block(profile_one(GPT_22B, A100, make_variant(4, 2048, dtype="float16")))
    assert block.temporary_bytes == 18 * 2048 * 4 * 6144


def test_a_llama_block_holds_no_masks_and_its_parts_add_up_by_hand() -> None:
    elements = sum(
        (
            4096,  # attention norm: its input
            4096,  # qkv: its input
            4096 + 1024 + 1024,  # attention: 32 query heads and 8 key and value heads of 128
            4096,  # attention output: its input
            4096,  # mlp norm: its input
            4096,  # gate and up: their input
            2 * 14336,  # activation: gate and up
            14336,  # down: its input
        )
    )
    gradients = (4096 + 2 * 1024) + 4096 + 2 * 14336 + 4096
    linear_inputs = 4096 + 4096 + 4096 + 14336
    block = first_block(profile_one(catalog.model("llama-3.1-8b"), H100, make_variant(1, 8192)))
    assert block.activation_bytes == 8192 * (2 * elements + 32 * 4)
    assert block.weight_activation_bytes == 8192 * 2 * (linear_inputs + gradients)
    assert block.output_bytes == 8192 * 4096 * 2


def test_the_head_holds_fp32_logits_over_the_padded_vocabulary() -> None:
    spec = catalog.model("gpt2")
    layers = layers_of(spec, make_variant(2, 1024))
    profile = profile_one(spec, A100, make_variant(2, 1024)).layers[-1].profiles[0]
    padded = 50304  # 50257 up to a multiple of 128
    tokens = 2 * 1024
    assert profile.activation_bytes == tokens * (2 * 768 + 2 * 768 + 4 * padded + 8)
    assert profile.output_bytes == 0
    assert sum(operation.forward_flops for operation in layers[-1]) == 2 * tokens * 768 * padded


def test_padding_follows_the_tensor_parallel_degree() -> None:
    spec = catalog.model("gpt2").model_copy(update={"num_heads": 16, "num_kv_heads": 16})
    variant = make_variant(1, 1024, tp=8)
    table = profile_one(spec, A100, variant).layers[0].profiles[0].parameter_bytes
    assert table == 2 * (51200 // 8 * 768 + 1024 * 768)  # 50257 up to a multiple of 1024; positions whole


@pytest.mark.parametrize("name", catalog.model_names())
def test_parameters_and_flops_agree_with_the_spec_for_every_published_model(name: str) -> None:
    spec = catalog.model(name)
    layers = layers_of(spec, make_variant(1, spec.sequence_length), "unfused")
    h, vocabulary = spec.hidden_size, -(-spec.vocab_size // 128) * 128
    padding = vocabulary - spec.vocab_size
    positions = spec.sequence_length * h if spec.learned_positions else 0
    tied_copy = vocabulary * h if spec.tied_embeddings else 0
    want = spec.num_parameters + padding * h * (1 if spec.tied_embeddings else 2) + positions + tied_copy
    got = sum(operation.num_parameters for layer in layers for operation in layer)
    assert want <= got <= 1.005 * want  # norms and biases

    want_flops = spec.step_flops(1, spec.sequence_length) / 3
    want_flops += 2 * spec.sequence_length * padding * h
    got_flops = sum(operation.forward_flops for layer in layers for operation in layer)
    assert got_flops == pytest.approx(want_flops, rel=1e-9)


def test_one_optimizer_step_moves_28_bytes_per_parameter_in_16_and_in_32_bits() -> None:
    # 16 bits: master weight and moments 24, gradient 2, weight 2; 32 bits: weight and moments 24, gradient 4
    spec = catalog.model("llama-2-7b")
    for dtype in ("bfloat16", "float32"):
        block = first_block(profile_one(spec, A100, make_variant(1, 4096, dtype=dtype)))
        num_parameters = block.parameter_bytes / BYTES_PER_ELEMENT[dtype]
        bandwidth = A100.memory_bandwidth_bytes_per_s * A100.memory_efficiency
        cached = CACHED_BYTES * (1 - 1 / CACHE_SPEED)
        want_us = A100.kernel_launch_us + (28 * num_parameters - cached) / bandwidth * 1e6
        assert block.optimizer_us == pytest.approx(want_us)


FREE = Fabric((8, 1), (Link(bandwidth_bytes_per_s=1e30, latency_us=0.0),) * 2)
PLAIN = Software(tensor_overlap="none", host_us=0.0)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_parallel_collectives_cost_two_all_reduces_in_f_two_in_b_and_none_in_w(sequence_parallel: bool) -> None:
    spec = catalog.model("llama-3.1-8b")
    variant = make_variant(1, 8192, tp=8, sequence_parallel=sequence_parallel)
    with_link = first_block(profile_one(spec, H100, variant, software=PLAIN))
    without = first_block(profile_model(spec, H100, [variant], fabric=FREE, software=PLAIN))
    size = 8192 * 4096 * 2
    all_reduces_us = 2 * sum(
        fabric.all_reduce_us(size, fabric.span(8)) * sign for fabric, sign in ((fabric_of(H100), 1), (FREE, -1))
    )
    assert with_link.forward_us - without.forward_us == pytest.approx(all_reduces_us)
    assert with_link.backward_input_us - without.backward_input_us == pytest.approx(all_reduces_us)
    assert with_link.backward_weight_us == without.backward_weight_us


def test_overlap_hides_the_two_collectives_of_gradients_or_half_of_all_of_them() -> None:
    spec, variant = catalog.model("llama-3.1-70b"), make_variant(1, 8192, tp=8)
    none, gradients, everything = (
        first_block(profile_one(spec, H100, variant, software=Software(tensor_overlap=overlap, host_us=0.0)))
        for overlap in ("none", "gradients", "all")
    )
    sent_us = 4 * fabric_of(H100).gather_us(8192 * 8192 * 2, fabric_of(H100).span(8))
    assert none.fused_backward_us - gradients.fused_backward_us == pytest.approx(sent_us / 2)
    assert none.forward_us == gradients.forward_us
    assert none.forward_us - everything.forward_us == pytest.approx(sent_us / 2)


def test_a_layer_of_small_kernels_takes_as_long_as_the_host_needs_to_dispatch_it() -> None:
    spec, variant = catalog.model("gpt2"), make_variant(1, 128)
    slow, twice, blocking = (
        first_block(profile_one(spec, A100, variant, software=software))
        for software in (Software(host_us=100), Software(host_us=200), Software(host_us=200, blocking_launches=True))
    )
    assert twice.forward_us == 2 * slow.forward_us
    assert blocking.forward_us > twice.forward_us


def test_hosts_that_wait_for_each_other_delay_a_device_that_is_slower_than_each_of_them() -> None:
    spec = catalog.model("gpt2-medium")

    def forward_us(tp: int, host_us: float, overlap: TensorOverlap) -> float:
        software = Software(tensor_overlap=overlap, host_us=host_us)
        return first_block(profile_one(spec, A100, make_variant(4, 1024, tp=tp), software=software)).forward_us

    device_us = forward_us(2, 0.0, "none")
    host_us = forward_us(2, 1e6, "gradients") / 1e6  # of one µs per operation
    assert forward_us(2, 30.0, "none") == pytest.approx((device_us**2 + (30 * host_us) ** 2) ** 0.5)
    assert forward_us(2, 30.0, "gradients") == max(forward_us(2, 0.0, "gradients"), 30 * host_us)
    assert forward_us(1, 1.0, "none") == forward_us(1, 0.0, "none")


def test_a_vocabulary_that_nobody_pads_slows_the_head_of_a_device_that_holds_all_of_it() -> None:
    spec = catalog.model("gpt2")  # 50257 tokens

    def head(tp: int, pads: bool) -> LayerProfile:
        software = Software(host_us=0.0, pads_vocabulary=pads)
        return profile_one(spec, A100, make_variant(8, 1024, tp=tp), software=software).layers[-1].profiles[0]

    assert head(1, False).parameter_bytes < head(1, True).parameter_bytes
    assert head(1, False).backward_weight_us > 2 * head(1, True).backward_weight_us
    assert head(2, False) == head(2, True)


def test_tensors_are_copied_around_the_first_flash_attention_only() -> None:
    spec = catalog.model("llama-3.1-8b")
    variant = make_variant(1, 64)  # too short for attention itself to matter
    first, second = (
        first_block(profile_one(spec, A100, variant, attention=kernel, software=Software(host_us=0.0)))
        for kernel in ("flash-1", "flash-2")
    )
    hidden_bytes, speed = 64 * spec.hidden_size * 2, A100.memory_bandwidth_bytes_per_s * A100.memory_efficiency / 1e6
    forward_us, backward_us = (passes * hidden_bytes / CACHE_SPEED / speed for passes in FLASH_1_PASSES)
    launch_us = A100.kernel_launch_us
    assert first.forward_us - second.forward_us == pytest.approx(forward_us + launch_us, abs=0.2)
    assert first.fused_backward_us - second.fused_backward_us == pytest.approx(backward_us + launch_us, abs=0.2)


def test_without_sequence_parallelism_a_block_keeps_what_korthikanti_counts() -> None:
    s, b, h, a, t = 2048, 4, 6144, 64, 8
    plain = first_block(
        profile_one(
            GPT_22B, A100, make_variant(b, s, tp=t, dtype="float16", sequence_parallel=False), attention="unfused"
        )
    )
    assert plain.activation_bytes == s * b * h * (10 + 24 // t) + 5 * a * s * s * b // t
    selective = make_variant(b, s, tp=t, dtype="float16", sequence_parallel=False, recompute="selective")
    kept = first_block(profile_one(GPT_22B, A100, selective, attention="unfused"))
    assert kept.activation_bytes == s * b * h * (10 + 24 // t)
    assert kept.forward_us == plain.forward_us
    assert plain.backward_input_us < kept.backward_input_us < plain.backward_input_us + plain.forward_us


def test_context_parallelism_halves_a_block_and_passes_keys_and_values_on() -> None:
    spec = catalog.model("llama-3.1-8b")
    whole, half = (first_block(profile_one(spec, H100, make_variant(1, 8192, cp=cp))) for cp in (1, 2))
    assert half.activation_bytes * 2 == whole.activation_bytes
    assert half.parameter_bytes == whole.parameter_bytes
    assert half.forward_us == pytest.approx(whole.forward_us / 2, rel=0.1)
    assert half.ring_bytes == 4096 * 2 * 1024 * 2  # tokens, K and V, 8 heads of 128, 2 bytes
    assert 0 < half.ring_hidden_forward_us < half.forward_us / 2
    assert whole.ring_bytes == whole.ring_hidden_forward_us == 0


def test_expert_parallelism_divides_experts_and_sends_a_copy_of_every_token_to_each_expert_it_chose() -> None:
    spec = catalog.model("mixtral-8x7b")
    one, eight = (profile_one(spec, H100, make_variant(1, 4096, ep=ep)).layers[1].profiles[0] for ep in (1, 8))
    experts = 8 * 3 * 4096 * 14336 * 2
    assert one.expert_parameter_bytes == experts
    assert eight.expert_parameter_bytes * 8 == experts
    assert one.parameter_bytes - eight.parameter_bytes == experts - experts // 8
    assert (one.exchange_bytes, eight.exchange_bytes) == (0, 2 * 4096 * 4096 * 2)


def test_8_bits_speed_up_linear_layers_of_blocks_only() -> None:
    spec = catalog.model("llama-3.1-70b")
    wide, narrow = (
        profile_one(spec, H100, make_variant(1, 8192, tp=8, dtype=dtype), software=PLAIN)
        for dtype in ("bfloat16", "float8")
    )
    assert 0.5 < first_block(narrow).forward_us / first_block(wide).forward_us < 0.9
    assert narrow.layers[-1].profiles[0].forward_us == wide.layers[-1].profiles[0].forward_us
    assert first_block(narrow).parameter_bytes == first_block(wide).parameter_bytes


def test_checkpointing_that_stops_early_leaves_out_the_last_product() -> None:
    spec, variant = catalog.model("llama-3.1-8b"), make_variant(1, 8192, recompute="full")
    all_of_it, early = (
        first_block(profile_one(spec, H100, variant, software=Software(recompute_stops_early=stops)))
        for stops in (False, True)
    )
    down_us = machine_of(H100, "bfloat16").matmul_us(8192, 4096, 14336)
    assert all_of_it.backward_input_us - early.backward_input_us == pytest.approx(down_us, rel=0.1)
    assert all_of_it.activation_bytes == early.activation_bytes


def test_heads_whose_size_is_no_multiple_of_8_are_not_multiplied_by_tensor_cores() -> None:
    spec = GPT_22B.model_copy(update={"hidden_size": 13824, "num_heads": 128, "num_kv_heads": 128})
    aligned, odd = (
        first_block(
            profile_one(
                spec.model_copy(update={"head_dim": head_dim}),
                A100,
                make_variant(4, 2048, tp=8, dtype="float16"),
                attention="unfused",
            )
        )
        for head_dim in (112, 108)
    )
    assert odd.forward_us > 1.2 * aligned.forward_us


def test_products_are_cut_into_whole_rounds_of_tiles() -> None:
    machine = machine_of(A100, "float16")
    one_round = machine.matmul_us(256 * 9, 128 * 12, 8192)  # 108 tiles for 108 multiprocessors
    assert machine.matmul_us(256 * 9 + 8, 128 * 12, 8192) > 1.1 * one_round


def test_one_expert_for_every_token_is_a_dense_block_with_a_router_and_copies() -> None:
    dense = catalog.model("llama-2-7b")
    moe = MixtureOfExperts(num_experts=1, experts_per_token=1, expert_ffn_size=dense.ffn_size)
    variant = make_variant(1, 4096)
    dense_layer = layers_of(dense, variant)[1]
    expert_layer = layers_of(dense.model_copy(update={"moe": moe}), variant)[1]
    rest = [operation for operation in expert_layer if operation.name != "router"]
    assert sum(o.forward_flops for o in rest) == sum(o.forward_flops for o in dense_layer)
    assert sum(o.num_parameters for o in rest) == sum(o.num_parameters for o in dense_layer)
    copies = 4096 * 4096 * 2  # the dispatched hidden states
    assert sum(o.saved_bytes for o in expert_layer) - sum(o.saved_bytes for o in dense_layer) == copies


def test_dense_blocks_and_blocks_with_experts_are_groups_of_their_own() -> None:
    spec = catalog.model("deepseek-v3")
    profile = profile_one(spec, H100, make_variant(1, 4096, tp=8))
    groups = [(group.name, group.kind, group.count) for group in profile.layers]
    assert groups == [
        ("embedding", "embedding", 1),
        ("block", "block", 3),
        ("moe-block", "block", 58),
        ("head", "head", 1),
    ]
    assert profile.num_layers == 63


def test_fewer_key_value_heads_than_devices_are_held_more_than_once() -> None:
    spec = catalog.model("llama-3.1-8b")  # 32 heads, 8 of keys and values
    qkv = {
        tp: next(o for o in layers_of(spec, make_variant(1, 8192, tp=tp))[1] if o.name == "qkv").num_parameters
        for tp in (8, 16)
    }
    assert qkv == {8: 4096 * 128 * (4 + 2), 16: 4096 * 128 * (2 + 2)}


def test_equal_arguments_give_equal_files_and_variants_given_twice_count_once() -> None:
    spec, variant = catalog.model("gpt2"), make_variant(1, 1024)
    one = profile_model(spec, A100, [variant, variant], fabric=fabric_of(A100))
    two = profile_model(spec, A100, iter([variant]), fabric=fabric_of(A100))
    assert one.model_dump_json() == two.model_dump_json()
    assert one.variants == (variant,)
    assert one.origin.kind == "analytic"
    assert one.origin.when == ""
    assert "flash attention" in one.origin.how
    assert ModelProfile.model_validate_json(one.model_dump_json()) == one


# -- refusals -----------------------------------------------------------------------------------------


def test_a_dtype_that_the_device_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(ProfileError, match=r"'v100-32gb' has no peak FLOP/s for dtype 'bfloat16', only for .*float16"):
        profile_one(catalog.model("gpt2"), catalog.device("v100-32gb"), make_variant(1, 1024))


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({}, 3, "num_heads 32, which tp=3 does not divide; choose a tp that divides 32"),
        (
            {"num_heads": 24, "num_kv_heads": 8, "ffn_size": 12288},
            12,
            "num_kv_heads 8: tp=12 neither divides it nor is a multiple",
        ),
        ({"ffn_size": 14330}, 4, "ffn_size 14330, which tp=4 does not divide"),
    ],
)
def test_a_tensor_parallel_degree_that_does_not_divide_is_refused_with_the_numbers(
    changes: dict[str, int], tp: int, message: str
) -> None:
    spec = catalog.model("llama-3.1-8b").model_copy(update=changes)
    with pytest.raises(ProfileError, match=message):
        profile_one(spec, H100, make_variant(1, 12288, tp=tp))


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ProfileError, match="sequence_length 1001, which tp=2 does not divide"):
        profile_one(catalog.model("llama-3.1-8b"), H100, make_variant(1, 1001, tp=2))


def test_expert_parallelism_without_experts_is_refused() -> None:
    with pytest.raises(ProfileError, match="has no experts: ep=2 means nothing"):
        profile_one(catalog.model("llama-3.1-8b"), H100, make_variant(1, 4096, ep=2))


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ProfileError, match=r"moe\.num_experts 8, which ep=3 does not divide; choose an ep"):
        profile_one(catalog.model("mixtral-8x7b"), H100, make_variant(1, 4096, ep=3))


def test_no_variants_and_an_unknown_attention_are_wrong_arguments() -> None:
    spec = catalog.model("gpt2")
    with pytest.raises(ValueError, match="no variants to profile model 'gpt2' at"):
        profile_model(spec, A100, [], fabric=fabric_of(A100))
    with pytest.raises(ValueError, match="attention 'linear' is not one of flash, flash-2, flash-1, unfused"):
        profile_one(spec, A100, make_variant(1, 1024), attention="linear")  # type: ignore[arg-type]  # the point


# -- laws ---------------------------------------------------------------------------------------------


@st.composite
def specs(draw: st.DrawFn, *, plain: bool = False) -> ModelSpec:
    num_kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    num_heads = num_kv_heads * draw(st.sampled_from([8, 16]))
    head_dim = draw(st.sampled_from([64, 128]))
    moe = st.builds(
        MixtureOfExperts,
        num_experts=st.sampled_from([4, 16]),
        experts_per_token=st.integers(1, 4),
        expert_ffn_size=st.sampled_from([512, 2048]),
        num_shared_experts=st.integers(0, 2),
        num_dense_layers=st.integers(0, 2),
    )
    latent = st.builds(
        LatentAttention,
        q_lora_rank=st.sampled_from([256, 1536]),
        kv_lora_rank=st.sampled_from([128, 512]),
        qk_nope_head_dim=st.just(128),
        qk_rope_head_dim=st.just(64),
        v_head_dim=st.sampled_from([64, 128]),
    )
    return ModelSpec(
        name="drawn",
        num_layers=draw(st.integers(2, 4)),
        hidden_size=num_heads * head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=draw(st.sampled_from([1024, 8192, 24576])),
        gated_mlp=draw(st.booleans()),
        vocab_size=draw(st.integers(1000, 200_000)),
        sequence_length=2048,
        tied_embeddings=draw(st.booleans()),
        learned_positions=draw(st.booleans()),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        linear_bias=draw(st.booleans()),
        moe=None if plain else draw(st.none() | moe),
        latent_attention=None if plain else draw(st.none() | latent),
        source="drawn",
    )


variants = st.builds(
    Variant,
    tp=st.sampled_from([1, 2, 4, 8]),
    micro_batch_size=st.sampled_from([1, 2, 4, 16]),
    sequence_length=st.sampled_from([128, 1024, 8192]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    recompute=st.sampled_from(get_args(Recompute)),
)
devices = st.sampled_from([A100, H100, catalog.device("mi300x"), catalog.device("cpu")])
attention_kernels = st.sampled_from(get_args(AttentionKernel))
laws = settings(derandomize=True, deadline=None, max_examples=60)


@given(specs(), devices, variants, attention_kernels)
@laws
def test_times_are_positive_and_fused_backward_is_at_most_the_sum_of_its_parts(
    spec: ModelSpec, device: DeviceSpec, variant: Variant, attention: AttentionKernel
) -> None:
    for layer in profile_one(spec, device, variant, attention=attention).at(variant):
        parts = (layer.forward_us, layer.backward_input_us, layer.backward_weight_us, layer.optimizer_us)
        assert min(parts) > 0
        parts_us = layer.backward_input_us + layer.backward_weight_us
        assert max(layer.backward_input_us, layer.backward_weight_us) <= layer.fused_backward_us * (1 + 1e-9)
        assert layer.fused_backward_us <= parts_us * (1 + 1e-9)


@given(specs(), variants)
@laws
def test_b_and_w_of_linear_layers_do_twice_the_flops_of_f(spec: ModelSpec, variant: Variant) -> None:
    for layer in layers_of(spec, variant):
        linear = [operation for operation in layer if operation.weight_flops]
        assert sum(o.backward_flops + o.weight_flops for o in linear) == 2 * sum(o.forward_flops for o in linear)


@given(specs(), devices, variants)
@laws
def test_more_samples_take_no_less_time_and_more_memory(spec: ModelSpec, device: DeviceSpec, variant: Variant) -> None:
    more = variant.model_copy(update={"micro_batch_size": variant.micro_batch_size + 1})
    profile = profile_model(spec, device, [variant, more], fabric=fabric_of(device))
    for small, large in zip(profile.at(variant), profile.at(more), strict=True):
        assert small.forward_us <= large.forward_us
        assert small.backward_weight_us <= large.backward_weight_us
        assert small.fused_backward_us <= large.fused_backward_us
        assert small.activation_bytes < large.activation_bytes
        assert small.weight_activation_bytes < large.weight_activation_bytes
        assert small.parameter_bytes == large.parameter_bytes


@given(specs(plain=True), variants, attention_kernels)
@laws
def test_memory_of_dense_blocks_is_divided_by_tp_but_for_repeated_key_value_heads(
    spec: ModelSpec, variant: Variant, attention: AttentionKernel
) -> None:
    assume(spec.num_kv_heads >= variant.tp)
    alone = variant.model_copy(update={"tp": 1})
    profile = profile_model(spec, H100, [variant, alone], fabric=fabric_of(H100), attention=attention)
    group = profile.layers[1]
    split, whole = group.at(variant), group.at(alone)
    assert split.activation_bytes * variant.tp == pytest.approx(whole.activation_bytes, rel=1e-6)
    assert split.weight_activation_bytes * variant.tp == pytest.approx(whole.weight_activation_bytes, rel=1e-6)
    assert split.parameter_bytes * variant.tp == pytest.approx(whole.parameter_bytes, rel=0.01)
    assert split.output_bytes * variant.tp == whole.output_bytes


@given(specs(), devices, variants)
@laws
def test_recompute_keeps_only_the_input_of_a_block_and_adds_f_to_b(
    spec: ModelSpec, device: DeviceSpec, variant: Variant
) -> None:
    none = variant.model_copy(update={"recompute": "none"})
    full = variant.model_copy(update={"recompute": "full"})
    profile = profile_model(spec, device, [none, full], fabric=fabric_of(device))
    for group in profile.layers:
        plain, again = group.at(none), group.at(full)
        assert again.forward_us == plain.forward_us
        assert again.backward_weight_us == plain.backward_weight_us
        assert again.weight_activation_bytes == plain.weight_activation_bytes
        if group.kind == "block":
            assert again.activation_bytes == plain.output_bytes < plain.activation_bytes
            assert again.backward_input_us == pytest.approx(plain.backward_input_us + plain.forward_us)
            assert again.temporary_bytes > plain.temporary_bytes
        else:
            assert again.model_dump(exclude={"variant"}) == plain.model_dump(exclude={"variant"})
