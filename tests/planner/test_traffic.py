"""What data, context and expert parallelism send: by hand, and what hides behind computing."""

from typing import Any

import pytest

from planner.layout import Candidate
from planner.plans import Precision
from planner.traffic import (
    INTERFERENCE,
    STEP_US,
    STEP_US_PER_DOUBLING,
    Spans,
    StepTraffic,
    boundary_us,
    optimizer_us,
    sharded_layers,
    step_traffic,
)
from profiles.cluster import Link
from profiles.collectives import Fabric
from profiles.model import LayerProfile, Variant

FABRIC = Fabric(
    (8, 8), (Link(bandwidth_bytes_per_s=2e11, latency_us=2), Link(bandwidth_bytes_per_s=2e10, latency_us=10))
)
BF16 = Precision.of("bfloat16")


def candidate(**changes: Any) -> Candidate:
    base = Candidate(
        tp=8,
        pp=1,
        dp=8,
        virtual_stages=1,
        micro_batch_size=1,
        num_microbatches=4,
        zero_stage=0,
        recompute="none",
    )
    return base._replace(**changes)


def layer(**changes: float) -> LayerProfile:
    variant = Variant(tp=8, micro_batch_size=1, sequence_length=4096, dtype="bfloat16")
    base = LayerProfile(
        variant=variant,
        forward_us=1000,
        backward_input_us=1000,
        backward_weight_us=1000,
        fused_backward_us=2000,
        parameter_bytes=10**8,
        activation_bytes=10**6,
        weight_activation_bytes=10**5,
        output_bytes=10**5,
    )
    return base.model_copy(update=changes)


def traffic(c: Candidate, *, overlaps: bool = False) -> StepTraffic:
    return step_traffic(c, FABRIC, Spans.packed(c, FABRIC), BF16, overlaps=overlaps)


def test_gradients_are_all_reduced_in_fp32_over_the_network_card_of_every_device() -> None:
    # one of eight members per node: 4 bytes, twice, 7/8 of them, at 2e4 bytes/us
    assert traffic(candidate()).busy_us(1e9, 0) == pytest.approx(2 * 4e9 * 7 / 8 / 2e4)


def test_every_step_takes_something_that_grows_with_the_number_of_devices() -> None:
    alone = candidate(tp=1, dp=1)
    assert traffic(alone).fixed_us == STEP_US
    assert traffic(candidate()).fixed_us > STEP_US + 6 * STEP_US_PER_DOUBLING


def test_zero_1_reduces_once_and_gathers_16_bit_weights() -> None:
    plain = traffic(candidate()).busy_us(1e9, 0)
    sharded = traffic(candidate(zero_stage=1, shard_degree=8)).busy_us(1e9, 0)
    assert sharded == pytest.approx(plain * (4 + 2) / 8)


def test_traffic_beside_the_backward_still_costs_its_interference() -> None:
    whole, hidden = traffic(candidate()), traffic(candidate(), overlaps=True)
    busy = whole.busy_us(1e9, 0)
    assert whole.exposed_us(1e9, 0, 1e9, 1e9) == pytest.approx(whole.fixed_us + busy)
    assert hidden.exposed_us(1e9, 0, 0, 1e9) == pytest.approx(hidden.fixed_us + INTERFERENCE * busy)
    assert hidden.exposed_us(1e9, 0, 0, busy / 2) == pytest.approx(hidden.fixed_us + busy / 2)


def test_fsdp_runs_at_the_pace_of_the_slower_of_computing_and_gathering() -> None:
    c = candidate(tp=1, dp=64, zero_stage=3, shard_degree=64)
    spans = Spans.packed(c, FABRIC)
    gather_us = FABRIC.gather_us(10**8, spans.shard)
    fast, slow = (sharded_layers([layer(forward_us=us)], c, FABRIC, spans, BF16)[0].forward_us for us in (1.0, 1e6))
    assert fast == pytest.approx(gather_us)
    assert slow == pytest.approx(1e6 + INTERFERENCE * gather_us)


def test_weights_that_are_fetched_on_demand_delay_computing() -> None:
    c = candidate(tp=1, dp=64, zero_stage=3, shard_degree=64)
    spans = Spans.packed(c, FABRIC)
    gather_us = FABRIC.gather_us(10**8, spans.shard)
    waiting = sharded_layers([layer(forward_us=1e6)], c, FABRIC, spans, BF16, overlaps=False)[0]
    assert waiting.forward_us == pytest.approx(1e6 + gather_us)


def test_the_context_ring_shows_as_far_as_attention_is_shorter() -> None:
    c = candidate(cp=2, dp=4)
    spans = Spans.packed(c, FABRIC)
    ring = {"ring_bytes": 2 * 10**7, "ring_hidden_backward_us": 1e9}
    step_us = FABRIC.pass_on_us(2e7, spans.cp)
    shown, hidden = (
        sharded_layers([layer(**ring, ring_hidden_forward_us=us)], c, FABRIC, spans, BF16)[0] for us in (0.0, 1e9)
    )
    assert shown.forward_us == pytest.approx(1000 + step_us)
    assert hidden.forward_us == pytest.approx(1000 + INTERFERENCE * step_us)
    assert hidden.fused_backward_us == pytest.approx(2000 + 2 * INTERFERENCE * step_us)


def test_experts_exchange_tokens_twice_each_way() -> None:
    c = candidate(ep=8)
    spans = Spans.packed(c, FABRIC)
    got = sharded_layers([layer(exchange_bytes=10**7)], c, FABRIC, spans, BF16)[0]
    exchange_us = FABRIC.all_to_all_us(1e7, spans.ep)
    assert got.forward_us == pytest.approx(1000 + 2 * exchange_us)
    assert got.fused_backward_us == pytest.approx(2000 + 2 * exchange_us)


def test_without_sequence_parallelism_a_boundary_is_sent_in_parts_and_gathered() -> None:
    whole = candidate(pp=8, dp=1, sequence_parallel=False)
    spans = Spans.packed(whole, FABRIC)
    assert boundary_us(8e6, whole, FABRIC, spans) == pytest.approx(10 + 1e6 / 2e4 + FABRIC.gather_us(8e6, spans.tp))
    split = whole._replace(sequence_parallel=True)
    assert boundary_us(1e6, split, FABRIC, spans) == pytest.approx(10 + 1e6 / 2e4)


def test_the_optimizer_is_shared_from_zero_1_on() -> None:
    assert optimizer_us(800.0, candidate()) == 800
    assert optimizer_us(800.0, candidate(zero_stage=1, shard_degree=8)) == 100
