"""Prices: sums are sums, and what follows the pipeline is what a rank's parameters take."""

import pytest

from planner.cost import after_us, stage_costs
from planner.layout import Candidate
from planner.plans import Precision
from planner.traffic import STEP_US, STEP_US_PER_DOUBLING, Spans, optimizer_us, step_traffic
from profiles.catalog import load_cluster
from profiles.cluster import Link
from profiles.collectives import Fabric
from profiles.model import LayerProfile, Variant

VARIANT = Variant(micro_batch_size=1, sequence_length=8, dtype="float32")
LINK = Link(bandwidth_bytes_per_s=1e9, latency_us=3.0)


def layer(forward, backward, weight, *, parameters=400, output=1000, recompute="none"):
    return LayerProfile(
        variant=VARIANT.model_copy(update={"recompute": recompute}),
        forward_us=forward,
        backward_input_us=backward,
        backward_weight_us=weight,
        fused_backward_us=backward + weight,
        optimizer_us=1.0,
        parameter_bytes=parameters,
        activation_bytes=100,
        weight_activation_bytes=50,
        output_bytes=output,
    )


def candidate(pp, m, v=1, dp=1, zero=0):
    return Candidate(1, pp, dp, v, 1, m, zero, "none", shard_degree=dp if zero else 1)


def test_stages_are_sums_of_their_layers_and_neighbours_on_one_rank_transfer_nothing():
    layers = [layer(1, 2, 3), layer(4, 5, 6), layer(7, 8, 9), layer(1, 1, 1)]
    stages = stage_costs(layers, (1, 3), (0, 0, 1), LINK.transfer_us)
    assert [s.forward_us for s in stages] == [1, 11, 1]
    assert [s.backward_weight_us for s in stages] == [3, 15, 1]
    assert [s.parameter_bytes for s in stages] == [400, 800, 400]
    assert [s.transfer_us for s in stages] == [0, 3.0 + 1.0, 0]
    assert [s.output_bytes for s in stages] == [1000, 1000, 0]


def test_a_stage_with_a_recomputing_layer_keeps_its_backward_in_one_piece():
    layers = [layer(1, 2, 3), layer(4, 5, 6, recompute="full"), layer(7, 8, 9)]
    assert [s.splits_backward for s in stage_costs(layers, (2,), (0, 1), LINK.transfer_us)] == [False, True]


@pytest.mark.parametrize(("zero", "factor"), [(0, 1), (1, 4), (3, 4)])
def test_zero_shards_the_optimizer_step(zero, factor):
    assert optimizer_us(8.0, candidate(1, 1, dp=4, zero=zero)) == 8.0 / factor


def test_what_follows_the_pipeline_hides_behind_the_backward_only_if_it_may():
    fabric = Fabric.of(load_cluster("1x8xa100-80gb"))
    chosen, precision = candidate(1, 4, dp=8), Precision.of("bfloat16")
    stages = stage_costs([layer(1e5, 1e5, 1e5, parameters=2 * 10**9)], (), (0,), LINK.transfer_us)
    spans = Spans.packed(chosen, fabric)
    shown = [
        after_us(stages, chosen, step_traffic(chosen, fabric, spans, precision, overlaps=overlaps), "bfloat16")[0]
        for overlaps in (True, False)
    ]
    # what every step takes beside it, for eight devices
    step_us = STEP_US + 3 * STEP_US_PER_DOUBLING
    ring_us = 2 * fabric.gather_us(4e9, fabric.span(8))
    assert shown[1] == pytest.approx(step_us + ring_us, rel=1e-3)
    assert 0 < shown[0] < 0.7 * shown[1]
