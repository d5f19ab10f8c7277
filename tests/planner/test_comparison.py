"""Choosing the placement and comparing families: small cases whose answers can be worked out, and what must hold."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import numbers_for

import planner
from planner.comparison import compare
from planner.errors import InfeasibleError, LayoutError
from planner.pipeline_costs import PipelineCosts
from planner.placements import PLACEMENTS
from planner.schedule.actions import Schedule
from planner.schedule.families import FAMILIES
from planner.schedule.validation import check
from planner.scheduling import AUTO_PLACEMENTS, schedule_costs

EVEN = PipelineCosts(12, 12, 12)


def test_with_f_b_and_w_alike_a_v_needs_no_bubble_in_half_the_memory_of_zb_h2():
    """m · (T_F + T_B + T_W) is the work of a rank; linear needs 2p − 1 microbatches of memory to reach it, a V p."""
    answer = schedule_costs(EVEN, num_ranks=3, num_microbatches=6, placement="auto", memory_limit=3, time_limit_s=10)
    assert answer.span_us == 6 * 36
    assert answer.status == "optimal"
    assert answer.virtual_stages > 1
    linear = next(row for row in answer.comparison if row.placement == "linear")
    assert linear.objective_us == 6 * 36 + 2 * 12  # ZB-H1's (p − 1)(T_F + T_B − T_W), the best in this memory
    assert linear.gap == 0


def test_the_answer_is_the_best_row_and_fits_the_same_bytes():
    answer = schedule_costs(
        PipelineCosts((20, 31, 26), (22, 30, 24), (15, 12, 18), 3.0),
        num_ranks=3,
        num_microbatches=5,
        placement="auto",
        memory_limit=2,
        time_limit_s=4,
    )
    rows = answer.comparison
    assert sorted((row.placement, row.virtual_stages) for row in rows) == sorted(AUTO_PLACEMENTS)
    costs = [row.objective_us for row in rows if row.objective_us is not None]
    assert costs == sorted(costs)
    assert answer.objective_us == costs[0]
    assert (answer.placement, answer.virtual_stages) == (rows[0].placement, rows[0].virtual_stages)
    assert answer.memory_capacity == (48,) * 3  # two microbatches of 2 · 12 units
    assert max(answer.peak_memory) <= 48
    assert answer.lower_bound_us == min(row.lower_bound_us for row in rows if row.lower_bound_us is not None)
    assert all(row.lower_bound_us <= row.objective_us for row in rows if row.objective_us is not None)
    check(Schedule.from_lines(answer.schedule), rank_of_stage=answer.rank_of_stage, num_microbatches=5)


def test_one_rank_has_one_placement():
    answer = schedule_costs(EVEN, num_ranks=1, num_microbatches=3, placement="auto")
    assert answer.span_us == 3 * 36
    assert [row.placement for row in answer.comparison] == ["linear"]


def test_placements_that_cannot_be_cut_say_so_and_the_others_go_on():
    answer = schedule_costs(PipelineCosts(2, 2, 2), num_ranks=2, num_microbatches=2, placement="auto", time_limit_s=4)
    notes = {(row.placement, row.virtual_stages): row.note for row in answer.comparison}
    assert "too little to be cut into 3 stages" in notes["vee", 3]
    assert notes["vee", 2] == ""


def test_nothing_that_fits_is_not_an_answer():
    arguments = {"num_ranks": 2, "num_microbatches": 4, "time_limit_s": 2}
    with pytest.raises(
        InfeasibleError, match=r"rank 0 holds 24 with a single microbatch, and the memory limit of 0\.5"
    ):
        schedule_costs(EVEN, placement="auto", memory_limit=0.5, **arguments)
    with pytest.raises(InfeasibleError, match="with a single microbatch"):
        compare(EVEN, memory_limit=0.5, **arguments)
    with pytest.raises(LayoutError, match="placement auto chooses chunks and order by itself"):
        schedule_costs(EVEN, placement="auto", virtual_stages=2, **arguments)
    with pytest.raises(LayoutError, match="family 'zb-v' has a placement of its own, vee; leave out 'interleaved'"):
        schedule_costs(EVEN, family="zb-v", virtual_stages=2, placement="interleaved", **arguments)


def test_a_named_familys_own_placement_may_be_named_too():
    answer = schedule_costs(EVEN, num_ranks=2, num_microbatches=4, family="zb-v", virtual_stages=2, placement="0,1,1,0")
    assert answer.rank_of_stage == (0, 1, 1, 0)


def test_comparing_lists_every_family_with_the_costs_that_its_closed_form_gives():
    p, m = 4, 8
    found = compare(EVEN, num_ranks=p, num_microbatches=m, time_limit_s=3)
    work = 36 * m
    spans = {(row.family, row.virtual_stages): row.span_us - work for row in found.rows}
    assert {family for family, _ in spans} | set(found.refused) == {*FAMILIES, "auto"}
    assert spans["naive", 1] == 3 * 8 * 36
    assert spans["gpipe", 1] == spans["1f1b", 1] == spans["afp", 1] == 3 * 36
    assert {v: spans["interleaved-1f1b", v] for v in (2, 3, 4)} == {2: 54, 3: 36, 4: 27}
    assert {v: spans["breadth-first", v] for v in (2, 3, 4)} == {2: 54, 3: 36, 4: 27}
    assert spans["zb-h1", 1] == 3 * 12
    assert spans["zb-h2", 1] == spans["zb-v", 2] == 0
    assert spans["dualpipev", 2] == 3 * 12 / 2
    assert spans["dualpipe", 1] <= 12
    assert spans["chimera", 1] == 2 * 24 + 2 * 12  # (p − 2) T_BW + (m / p − 1)(p − 2)(T_BW − T_F)
    assert spans["gems", 1] == 4 * 12 + 8 * 4 * 24 + 7 * 12 - 3 * 12 - work
    assert {row.family for row in found.rows if row.num_replicas == 2} == {
        "dualpipe",
        "chimera",
        "chimera-doubling",
        "gems",
    }
    best = min(row.objective_us for row in found.rows)
    assert [row.objective_us for row in found.rows] == sorted(row.objective_us for row in found.rows)
    assert best == work
    assert found.gap == 0
    assert all(row.gap_to_best == (row.objective_us - best) / row.objective_us for row in found.rows)
    transfers = {(row.family, row.virtual_stages): row.transfers for row in found.rows if row.family != "auto"}
    assert transfers["1f1b", 1] == 2 * m * 3
    assert transfers["dualpipe", 1] == transfers["gems", 1] == 2 * m * 3
    assert transfers["zb-v", 2] == 2 * m * 6
    assert transfers["interleaved-1f1b", 2] == 2 * m * 7


def test_bidirectional_families_hold_what_is_fixed_of_two_ranks_and_a_rank_works_on_two_stages():
    costs = PipelineCosts((10, 30), (10, 30), (10, 30), activation_bytes=4, weight_activation_bytes=2)
    arguments = {"num_ranks": 2, "num_microbatches": 4}
    found = compare(costs, capacity_bytes=100, fixed_bytes=(40, 50), time_limit_s=1, **arguments)
    rows = {row.family: row for row in found.rows}
    assert rows["gpipe"].peak_memory == (40 + 16, 50 + 16)
    assert rows["gems"].peak_memory == (94, 94)
    assert rows["gems"].fits
    tight = compare(costs, capacity_bytes=90, fixed_bytes=(40, 50), time_limit_s=1, **arguments)
    assert {row.family: row.memory_over for row in tight.rows}["gems"] == 4
    # each rank has half of the microbatches of either stage: 2 · 30 + 2 · 90 where one alone has 4 · 90
    answer = schedule_costs(costs, family="dualpipe", **arguments)
    assert (answer.num_replicas, answer.rank_of_stage) == (2, (0, 1))
    assert (answer.lower_bound_us, answer.lower_bound_kind) == (240, "work of two replicas")
    assert 240 <= answer.span_us <= 300
    assert answer.bubble_rate_span == (answer.span_us - 240) / answer.span_us
    assert rows["dualpipe"].span_us == answer.span_us < rows["1f1b"].span_us
    assert found.gap == (rows["auto"].span_us - found.lower_bound_us) / rows["auto"].span_us
    two = schedule_costs(costs, num_ranks=2, num_microbatches=2, family="gems")
    assert (two.lower_bound_us, two.lower_bound_kind) == (120, "work of two replicas")
    far = schedule_costs(replace(costs, p2p_us=100), num_ranks=2, num_microbatches=2, family="gems")
    assert (far.lower_bound_us, far.lower_bound_kind) == (10 + 30 + 100 + 30 + 100 + 10 + 10, "chain of one microbatch")


@pytest.mark.parametrize("family", ["chimera", "dualpipe", "gems"])
def test_bidirectional_families_are_refused_where_microbatches_differ_or_a_layout_is_searched(family):
    costs = PipelineCosts(10, 10, 10, microbatch_scale=(1, 2, 1, 2))
    with pytest.raises(
        LayoutError, match=f"family '{family}' holds every stage on two ranks.*leave out microbatch_scale"
    ):
        schedule_costs(costs, num_ranks=2, num_microbatches=4, family=family)
    found = compare(costs, num_ranks=2, num_microbatches=4, time_limit_s=1)
    assert "microbatches that are all alike" in found.refused[family]


def test_comparing_says_what_does_not_fit_and_by_how_much():
    found = compare(EVEN, num_ranks=4, num_microbatches=8, memory_limit=4, time_limit_s=3)
    rows = {(row.family, row.virtual_stages): row for row in found.rows}
    assert found.memory_capacity == (96,) * 4
    assert found.microbatch_memory == 24
    gpipe, one, ahead = rows["gpipe", 1], rows["1f1b", 1], rows["afp", 1]
    assert (gpipe.fits, gpipe.memory_over, max(gpipe.peak_memory)) == (False, 4 * 24, 8 * 24)
    assert (ahead.fits, ahead.memory_over) == (False, 3 * 24)
    assert (one.fits, one.memory_over) == (True, 0)
    assert rows["zb-v", 2].fits
    assert found.rows[0].fits or found.rows[0].gap_to_best <= 0
    assert "rank 0 holds 192 at its peak" in gpipe.note


def test_families_that_have_no_schedule_say_why():
    found = compare(EVEN, num_ranks=4, num_microbatches=7, time_limit_s=1)
    assert "at least 8 microbatches for 4 ranks, not 7" in found.refused["dualpipev"]
    limited = compare(PipelineCosts(12, 12, 12, max_in_flight=1), num_ranks=2, num_microbatches=3, time_limit_s=1)
    notes = {row.family: row.note for row in limited.rows}
    assert notes["gpipe"] == "rank 0 has more than 1 microbatches of stage 0 in flight"
    assert notes["naive"] == ""


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.tuples(*[st.integers(4, 20)] * 3), min_size=3, max_size=3),
    st.sampled_from([None, 1.0, 1.5, 2.0]),
    st.sampled_from(["span", "makespan"]),
)
@settings(derandomize=True, deadline=None, max_examples=12)
def test_no_family_that_fits_is_under_the_bound_or_better_than_auto(p, m, pieces, limit, objective):
    forward, backward, weight = zip(*pieces[:p], strict=True)
    found = compare(
        PipelineCosts(forward, backward, weight, 1.0),
        num_ranks=p,
        num_microbatches=m,
        memory_limit=limit,
        objective=objective,
        time_limit_s=0.7,
    )
    auto = next(row for row in found.rows if row.family == "auto")
    assert auto.fits
    for row in found.rows:
        assert row.fits == (limit is None or max(row.peak_memory) <= int(limit * 24))
        if row.fits and row.num_replicas == 1:
            assert found.lower_bound_us <= row.objective_us
            assert auto.objective_us <= row.objective_us, row


def test_the_package_hands_out_what_the_commands_call():
    assert planner.compare is compare
    assert planner.schedule_costs is schedule_costs
    assert planner.PipelineCosts is PipelineCosts
    assert set(PLACEMENTS) == {name for name, _ in AUTO_PLACEMENTS}


@pytest.mark.parametrize(
    "name", [*(name for name, one in FAMILIES.items() if name != "dualpipev" and one.num_replicas == 1), "auto"]
)
def test_microbatches_that_all_take_the_same_are_the_plain_problem(name):
    costs = PipelineCosts(11, 12, 13, 2.0)
    m, v = (4, 1) if name == "auto" else numbers_for(FAMILIES[name], 2, 4)
    arguments = {"num_ranks": 2, "num_microbatches": m, "virtual_stages": v, "family": name, "time_limit_s": 2}
    plain = schedule_costs(costs, **arguments)
    same = schedule_costs(replace(costs, microbatch_scale=(1.0,) * m), **arguments)
    for field in ("span_us", "makespan_us", "bubble_rate_span", "peak_memory"):
        assert getattr(same, field) == getattr(plain, field)
    if name != "auto":
        assert same.schedule == plain.schedule


def test_a_microbatch_of_twice_the_length_takes_twice_the_time_and_memory():
    costs = PipelineCosts(10, 10, 10, activation_bytes=4, weight_activation_bytes=2, microbatch_scale=(1, 2, 0.5))
    alone = schedule_costs(costs, num_ranks=1, num_microbatches=3, family="1f1b")
    assert alone.span_us == 30 + 60 + 15
    assert alone.peak_memory == (8,)
    # one microbatch at a time through two ranks: each waits for the whole way of the one before
    naive = schedule_costs(costs, num_ranks=2, num_microbatches=3, family="naive")
    assert naive.makespan_us == 2 * (30 + 60 + 15)
    found = compare(costs, num_ranks=2, num_microbatches=3, time_limit_s=2)
    spans = {(row.family, row.virtual_stages): row.span_us for row in found.rows}
    assert spans["naive", 1] == 2 * (30 + 60 + 15)
    assert spans["1f1b", 1] > spans["zb-h1", 1]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"microbatch_scale": (1, 2)}, {}, "microbatch_scale has 2 entries; give one for each of the 3 microbatches"),
        ({"microbatch_scale": (1, 2, 3)}, {"solver": "cp-sat"}, "microbatch_scale goes with the solver auto"),
        ({"microbatch_scale": (1, 2, 3)}, {"work_limit": 5}, "microbatch_scale goes with the solver auto"),
        (
            {"microbatch_scale": (1, 2, 3)},
            {"memory_limit": 2},
            "rank 0 holds 6 with microbatch 2 alone, and the memory",
        ),
    ],
)
def test_microbatches_that_differ_have_their_own_refusals(changes, arguments, message):
    costs = replace(PipelineCosts(10, 10, 10), **changes)
    with pytest.raises(LayoutError, match=re.escape(message)):
        schedule_costs(costs, num_ranks=2, num_microbatches=3, **arguments)
