"""The layout space: what divides is in, what does not is counted, and wrong pins are refused with their numbers."""

import re

import pytest

from planner.errors import LayoutError
from planner.layout import Dimensions, Pins, divisors, enumerate_space, tensor_parallel_obstacle
from profiles.catalog import load_cluster, model

LLAMA = model("llama-3.1-8b")


def space(cluster="2x8xh100-sxm", batch=256, sequence_length=8192, **pins):
    dims = Dimensions(LLAMA, load_cluster(cluster), batch, sequence_length, LLAMA.num_layers + 2)
    return enumerate_space(dims, Pins(**pins))


def test_every_candidate_uses_all_devices_and_the_whole_batch():
    candidates = space().candidates
    assert candidates
    for c in candidates:
        assert c.tp * c.cp * c.pp * c.dp == 16
        assert c.dp * c.micro_batch_size * c.num_microbatches == 256
        assert c.num_stages <= 34
        assert c.dp * c.cp % c.shard_degree == 0
        assert c.ep == 1
        assert 8192 % (2 * c.cp * c.tp) == 0 or c.cp == 1


def test_no_candidate_comes_twice():
    candidates = space().candidates
    assert len(set(candidates)) == len(candidates)


def test_the_space_is_what_a_plain_enumeration_finds():
    want = {
        (tp, cp, pp, dp, v, size, zero, shard)
        for tp in (1, 2, 4, 8, 16)
        for cp in (1, 2, 4, 8)
        for pp in (1, 2, 4, 8, 16)
        for dp in (1, 2, 4, 8, 16)
        if tp * cp * pp * dp == 16
        for v in (1, 2, 3, 4, 6, 8)
        if (v == 1 or pp > 1) and pp * v <= 34
        for size in (1, 2, 4, 8, 16, 32)
        if 256 // dp % size == 0
        for zero in ((0, 1, 2, 3) if dp * cp > 1 else (0,))
        for shard in ((1,) if zero == 0 else {dp * cp, 8 // tp} if 1 < 8 // tp < dp * cp else (dp * cp,))
    }
    got = {
        (c.tp, c.cp, c.pp, c.dp, c.virtual_stages, c.micro_batch_size, c.zero_stage, c.shard_degree)
        for c in space().candidates
    }
    assert got == want
    assert {c.recompute for c in space().candidates} == {"mixed"}


def test_experts_are_spread_over_the_copies_of_their_layers():
    mixtral = model("mixtral-8x7b")
    dims = Dimensions(mixtral, load_cluster("2x8xh100-sxm"), 256, 4096, mixtral.num_layers + 2)
    candidates = enumerate_space(dims, Pins()).candidates
    assert {c.ep for c in candidates} == {1, 2, 4, 8}
    assert all(c.dp * c.cp % c.ep == 0 for c in candidates)
    with pytest.raises(LayoutError, match="ep=3 does not divide the 8 experts of 'mixtral-8x7b'"):
        enumerate_space(dims, Pins(ep=3))
    with pytest.raises(LayoutError, match=r"ep=2: model .llama-3\.1-8b. has no experts"):
        space(ep=2)


def test_several_values_and_exclusions_narrow_a_dimension():
    candidates = space(tp=(2, 4), excluded=(("pp", 2), ("zero_stage", 3))).candidates
    assert {c.tp for c in candidates} == {2, 4}
    assert {c.pp for c in candidates} == {1, 4, 8}
    assert {c.zero_stage for c in candidates} == {0, 1, 2}
    assert {c.recompute for c in space(excluded=(("recompute", "full"),)).candidates} == {"none", "selective"}
    with pytest.raises(LayoutError, match="'colour' cannot be excluded"):
        Pins(excluded=(("colour", 1),))


def test_pins_hold():
    candidates = space(tp=4, pp=2, micro_batch_size=2, recompute="full", zero_stage=1, virtual_stages=1).candidates
    assert {(c.tp, c.cp, c.pp, c.dp, c.micro_batch_size, c.recompute) for c in candidates} == {
        (4, 1, 2, 2, 2, "full"),
        (4, 2, 2, 1, 2, "full"),
    }


def test_a_pinned_shard_degree_is_the_only_one():
    assert {c.shard_degree for c in space(shard_degree=4).candidates} == {4}
    alone = space(tp=8, pp=2, cp=1, zero_stage=1).candidates  # one copy: nothing to shard
    assert {(c.zero_stage, c.shard_degree) for c in alone} == {(0, 1)}


def test_dropped_points_are_counted_by_reason():
    assert space().dropped["virtual stages without a pipeline"] > 0
    assert space("3x8xh100-sxm").dropped["dp does not divide the global batch size"] > 0


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"tp": 3}, "tp=3 does not divide num_heads=32 of model 'llama-3.1-8b'; degrees that do: 1, 2, 4, 8, 16, 32"),
        ({"tp": 8, "pp": 2, "dp": 2}, "layout tp=8 pp=2 dp=2 does not divide the 16 devices of cluster"),
        (
            {"tp": 4, "cp": 1, "pp": 2, "dp": 1},
            "layout tp=4 cp=1 pp=2 dp=1 needs 8 devices, but cluster '2x8xh100-sxm'",
        ),
        ({"pp": 5}, "layout pp=5 does not divide the 16 devices"),
        ({"pp": 16, "virtual_stages": 3}, "pp=16 × virtual_stages=3 makes 48 stages, but model 'llama-3.1-8b' has 34"),
        ({"micro_batch_size": 3}, "dp=1 × micro_batch_size=3 is 3, which does not divide global batch size 256"),
        ({"pp": 1, "virtual_stages": 2}, "pp=1 with virtual_stages=2: one rank has no use for chunks"),
        ({"tp": 8, "dp": 2, "virtual_stages": 4}, "pp=1 with virtual_stages=4"),
        ({"zero_stage": 4}, "zero_stage=4 is not known; choose one of 0, 1, 2, 3"),
        ({"recompute": "some"}, "recompute=some is not known; choose one of none, selective, full, mixed"),
        ({"dp": 0}, "dp=0: degrees and sizes are whole numbers from 1"),
        ({"shard_degree": 3}, "shard_degree=3 divides no dp × cp of the 16 devices"),
        ({"shard_degree": 8, "zero_stage": 0}, "shard_degree=8 with zero_stage=0, which shards nothing"),
    ],
)
def test_pins_that_cannot_hold_are_refused_with_their_numbers(pins, message):
    with pytest.raises(LayoutError, match=re.escape(message)):
        space(**pins)


def test_a_batch_that_a_pinned_data_degree_does_not_divide_is_refused():
    with pytest.raises(
        LayoutError, match="dp=16 × micro_batch_size=1 is 16, which does not divide global batch size 24"
    ):
        space(batch=24, dp=16)
    with pytest.raises(
        LayoutError, match="dp=16 × micro_batch_size=1 is 16, which does not divide global batch size 24"
    ):
        space(batch=24, tp=1, cp=1, pp=1)


def test_a_tensor_group_may_leave_a_node_whole_but_not_in_part():
    assert space(tp=16).candidates
    with pytest.raises(LayoutError, match="tp=4 neither divides nor is a multiple of the 6 devices of a node"):
        space("2x6xh100-sxm", batch=12, tp=4)


def test_key_value_heads_are_replicated_only_evenly():
    assert tensor_parallel_obstacle(LLAMA, 16, 8192) is None  # 8 key/value heads, each on two devices
    assert tensor_parallel_obstacle(LLAMA, 5, 8192) is not None


def test_a_sequence_that_tensor_parallelism_cannot_cut_is_planned_without_it():
    assert {c.tp for c in space(sequence_length=1001).candidates} == {1}
    with pytest.raises(LayoutError, match="tp=2 does not divide the sequence length 1001"):
        space(sequence_length=1001, tp=2)


def test_dense_layers_before_the_experts_are_divided_too():
    spec = model("deepseek-v3")
    odd = spec.model_copy(update={"ffn_size": spec.ffn_size + 1})
    assert tensor_parallel_obstacle(spec, 8, 4096) is None
    assert "feed-forward width" in tensor_parallel_obstacle(odd, 8, 4096)


def test_divisors_of_a_square():
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
