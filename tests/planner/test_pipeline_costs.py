"""Costs become problems: entries per stage, pieces cut into chunks, limits per rank; what is wrong is one error."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import LayoutError
from planner.pipeline_costs import MemoryLimits, PipelineCosts
from planner.placements import PLACEMENTS, named_placement, read_placement

ONES = {"forward_us": 1.0, "backward_us": 1.0, "weight_us": 1.0}
times = st.integers(4, 60)


def test_one_number_stands_for_every_stage_and_stages_of_one_rank_send_nothing():
    costs = PipelineCosts(3.4, (4, 5, 6, 7), 2.0, 9, activation_bytes=8, weight_activation_bytes=(1, 2, 3, 4))
    problem = costs.problem((0, 1, 1, 0), 5, objective="makespan")
    assert problem.forward_us == (3, 3, 3, 3)
    assert problem.backward_us == (4, 5, 6, 7)
    assert problem.transfer_us == (9, 0, 9)
    assert problem.activation_bytes == (8, 8, 8, 8)
    assert problem.weight_activation_bytes == (1, 2, 3, 4)
    assert problem.split == (True,) * 4
    assert problem.capacity_bytes is None


def test_optional_costs_reach_the_problem():
    costs = PipelineCosts(
        **ONES, fused_stages=(1,), max_in_flight=(3, 2), recompute_us=(5, 0), checkpoint_bytes=1, activation_bytes=4
    ).sized()
    memory = MemoryLimits(capacity_bytes=(20, 30), fixed_bytes=7)
    problem = costs.problem(
        (0, 1),
        4,
        objective="span",
        capacity_bytes=memory.capacity_per_rank(costs, 2),
        fixed_bytes=memory.fixed_per_rank(2),
    )
    assert problem.split == (True, False)
    assert problem.max_in_flight == (3, 2)
    assert problem.recompute_us == (5, 0)
    assert problem.checkpoint_bytes == (1, 1)
    assert problem.capacity_bytes == (20, 30)
    assert problem.fixed_bytes == (7, 7)


def test_limits_in_microbatches_count_the_largest_stage():
    costs = PipelineCosts(**ONES, activation_bytes=(10, 30))
    assert MemoryLimits(2.5).capacity_per_rank(costs, 2) == (75, 75)
    assert MemoryLimits((1, 2)).capacity_per_rank(costs, 2) == (30, 60)
    assert MemoryLimits().capacity_per_rank(costs, 2) is None


@given(st.lists(st.tuples(times, times, times, times, times), min_size=1, max_size=4), st.integers(1, 4), st.data())
@settings(derandomize=True, deadline=None, max_examples=100)
def test_cutting_pieces_into_chunks_keeps_every_total(pieces, chunks, data):
    forward, backward, weight, held, held_w = zip(*pieces, strict=True)
    p = len(pieces)
    costs = PipelineCosts(forward, backward, weight, 7.0, activation_bytes=held, weight_activation_bytes=held_w)
    place = named_placement(data.draw(st.sampled_from(sorted(PLACEMENTS))), p, chunks)
    cut = costs.chunked(p, place.rank_of_stage)
    for name in ("forward_us", "backward_us", "weight_us", "activation_bytes", "weight_activation_bytes"):
        parts, wholes = getattr(cut, name), getattr(costs, name)
        assert len(parts) == p * chunks
        for piece in range(p):  # stage s is part of piece s // v
            mine = parts[piece * chunks : (piece + 1) * chunks]
            assert sum(mine) == wholes[piece]
            assert max(mine) - min(mine) <= 1
    problem = cut.problem(place.rank_of_stage, 3, objective="span")
    home = place.rank_of_stage
    assert problem.transfer_us == tuple(0 if home[s] == home[s + 1] else 7 for s in range(p * chunks - 1))


def test_hops_between_neighbouring_ranks_go_where_stages_meet():
    costs = PipelineCosts(8, 8, 8, (1, 2, 3))
    vee, ring = (named_placement(name, 4, 2).rank_of_stage for name in ("vee", "interleaved"))
    assert costs.chunked(4, vee).p2p_us[:7] == (1, 2, 3, 3, 3, 2, 1)  # the fourth is inside rank 3
    assert costs.chunked(4, vee).problem(vee, 1, objective="span").transfer_us == (1, 2, 3, 0, 3, 2, 1)
    assert costs.chunked(4, ring).p2p_us == (1, 2, 3, 3, 1, 2, 3)  # from the last rank back to the first: the slowest


def test_what_is_fused_or_limited_stays_so_in_every_chunk():
    costs = PipelineCosts(8, 8, 8, fused_stages=(1,), max_in_flight=(3, 5), recompute_us=(6, 0), checkpoint_bytes=4)
    cut = costs.sized(12).chunked(2, (0, 1, 1, 0))
    assert cut.fused_stages == (2, 3)
    assert cut.max_in_flight == (3, 3, 5, 5)
    assert cut.recompute_us == (3, 3, 0, 0)
    assert cut.checkpoint_bytes == (2, 2, 2, 2)
    assert cut.activation_bytes == (12, 12, 12, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forward_us": (1.0, 0.0)}, "forward_us: 0.0 is not a time; give µs from 1 to 1e+12"),
        ({"weight_us": "3"}, "weight_us: 3 is not a time"),
        ({"backward_us": float("inf")}, "backward_us: inf is not a time"),
        ({"p2p_us": (float("nan"),)}, "p2p_us: nan is not a time"),
        ({"forward_us": ()}, "forward_us is empty; give one number, or one for each stage"),
        ({"activation_bytes": 0}, "activation_bytes: 0 is out of range; give a whole number from 1 to"),
        ({"activation_bytes": 1.5}, "activation_bytes: 1.5 is out of range"),
        ({"weight_activation_bytes": -1}, "weight_activation_bytes: -1 is out of range; give a whole number from 0"),
        ({"max_in_flight": 0}, "max_in_flight: 0 is out of range; give a whole number from 1"),
        ({"recompute_us": 5}, "recompute_us is given without checkpoint_bytes; a stage that recomputes needs both"),
        ({"checkpoint_bytes": 5}, "checkpoint_bytes is given without recompute_us"),
        ({"microbatch_scale": (1, 0)}, "microbatch_scale: 0 is no share; give a number from 0.01 to 1000"),
        ({"microbatch_scale": (float("nan"),)}, "microbatch_scale: nan is no share"),
        (
            {"microbatch_scale": (1,), "recompute_us": 5, "checkpoint_bytes": 1},
            "microbatch_scale and recompute_us do not go together",
        ),
    ],
)
def test_numbers_that_are_no_costs_are_refused(changes, message):
    with pytest.raises(LayoutError, match=re.escape(message)):
        PipelineCosts(**{**ONES, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forward_us": (1, 2)}, "forward_us has 2 entries; give one number, or one for each of the 3 stages"),
        ({"p2p_us": (1, 2, 3)}, "p2p_us has 3 entries; give one number, or one for each of the 2 transfers"),
        ({"max_in_flight": (1, 2)}, "max_in_flight has 2 entries"),
        ({"fused_stages": (3,)}, "fused_stages: there is no stage 3; the stages are 0 to 2"),
        ({"fused_stages": (-1,)}, "fused_stages: there is no stage -1"),
        ({"recompute_us": 5, "checkpoint_bytes": 3}, "checkpoint_bytes of stage 0 is 3, more than the 2 it holds"),
    ],
)
def test_costs_that_do_not_match_the_stages_are_refused(changes, message):
    with pytest.raises(LayoutError, match=re.escape(message)):
        PipelineCosts(**{**ONES, **changes}).sized().problem((0, 1, 2), 2, objective="span")


def test_pieces_too_small_for_whole_numbers_are_refused():
    with pytest.raises(LayoutError, match=r"forward_us 1 is too little to be cut into 2 stages in whole numbers"):
        PipelineCosts(**ONES).sized(12).chunked(2, (0, 1, 1, 0))
    with pytest.raises(LayoutError, match=r"activation_bytes 3 is too little .* give all sizes in a finer unit"):
        PipelineCosts(9, 9, 9, activation_bytes=3).sized().chunked(1, (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"microbatches": 0.0}, "memory limit 0.0: give a number of microbatches above 0"),
        ({"microbatches": float("nan")}, "memory limit nan"),
        ({"microbatches": (2, -1)}, "memory limit -1"),
        ({"microbatches": 2, "capacity_bytes": 3}, "memory_limit and capacity_bytes both limit memory; give one"),
        ({"fixed_bytes": 3}, "fixed_bytes counts against capacity_bytes; give that, too"),
        ({"microbatches": 2, "fixed_bytes": 3}, "fixed_bytes counts against capacity_bytes"),
        ({"capacity_bytes": -1}, "capacity_bytes: -1 is no size"),
        ({"capacity_bytes": 1.5}, "capacity_bytes: 1.5 is no size"),
        ({"capacity_bytes": 9, "fixed_bytes": -1}, "fixed_bytes: -1 is no size"),
    ],
)
def test_limits_that_are_none_are_refused(changes, message):
    with pytest.raises(LayoutError, match=re.escape(message)):
        MemoryLimits(**changes)


def test_limits_for_the_wrong_number_of_ranks_are_refused():
    costs = PipelineCosts(**ONES).sized()
    with pytest.raises(
        LayoutError, match="memory_limit has 2 entries; give one number, or one for each of the 3 ranks"
    ):
        MemoryLimits((1, 2)).capacity_per_rank(costs, 3)
    with pytest.raises(LayoutError, match="fixed_bytes has 2 entries"):
        MemoryLimits(capacity_bytes=9, fixed_bytes=(1, 2)).fixed_per_rank(3)


def test_placements_are_read_by_name_and_rank_by_rank():
    assert read_placement("vee", 3, 2).rank_of_stage == (0, 1, 2, 2, 1, 0)
    assert read_placement("interleaved", 2, 3).rank_of_stage == (0, 1, 0, 1, 0, 1)
    assert read_placement("linear", 2, None).rank_of_stage == (0, 1)
    given_one = read_placement("0,1,0", 2, None)
    assert (given_one.name, given_one.rank_of_stage, given_one.virtual_stages) == ("given", (0, 1, 0), 2)


@pytest.mark.parametrize(
    ("text", "chunks", "message"),
    [
        ("zigzag", None, "placement 'zigzag' is not known; choose linear, interleaved, vee or auto, or list the rank"),
        ("0,2", None, "the placement puts stage 1 on rank 2; the ranks are 0 to 1"),
        ("0,-1", None, "the placement puts stage 1 on rank -1"),
        ("0,0", None, "the placement leaves rank 1 of 2 without a stage"),
        ("0,1,1", 2, "the placement lists 3 stages, but 2 ranks with 2 stages each make 4"),
    ],
)
def test_placements_that_are_none_are_refused(text, chunks, message):
    with pytest.raises(LayoutError, match=re.escape(message)):
        read_placement(text, 2, chunks)
