"""Each thing that can be wrong with a schedule, and what is said about it."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import bidirectional_schedules, can_run, numbers_for, valid_schedules

from planner.errors import ScheduleError
from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families import FAMILIES, get_family
from planner.schedule.validation import check, run_order

WRONG = {  # name: (lines, arguments of check, start of the message)
    "no ranks": ([], {}, "the schedule has no ranks; write one line of actions per rank"),
    "empty rank": (
        ["F0.0 BW0.0", ""],
        {},
        "rank 1: the rank has no actions; give every rank a stage, or use fewer ranks",
    ),
    "stage out of range": (
        ["F0.0 BW0.0", "F1.0 BW1.0"],
        {"num_stages": 1},
        "rank 1, step 0: F1.0: stage 1 is out of range, there are 1 stages: 0..0",
    ),
    "microbatch out of range": (
        ["F0.0 F0.1 BW0.0 BW0.1"],
        {"num_microbatches": 1},
        "rank 0, step 1: F0.1: microbatch 1 is out of range, there are 1 microbatches: 0..0",
    ),
    "no microbatches": (
        ["F0.0 BW0.0"],
        {"num_microbatches": 0},
        "rank 0, step 0: F0.0: microbatch 0 is out of range, there are 0 microbatches: none",
    ),
    "stage missing": (
        ["F0.0 BW0.0", "F2.0 BW2.0"],
        {},
        "no rank runs stage 1; the schedule must run all 3 stages 0..2",
    ),
    "forward missing": (
        ["F0.0 F0.1 BW0.0 BW0.1", "F1.0 BW1.0"],
        {},
        "rank 1: F1.1 is missing; stage 1 must run all 2 microbatches 0..1",
    ),
    "first forward missing": (
        ["F0.1 BW0.1"],
        {},
        "rank 0: F0.0 is missing; stage 0 must run all 2 microbatches 0..1",
    ),
    "microbatches missing": (
        ["F0.0 BW0.0"],
        {"num_microbatches": 3},
        "rank 0: F0.1 is missing; stage 0 must run all 3 microbatches 0..2",
    ),
    "backward missing": (
        ["F0.0 F0.1 BW0.0"],
        {},
        "rank 0, step 1: F0.1 is never followed by its backward; add BW0.1, or B0.1 and W0.1",
    ),
    "weight gradient missing": (
        ["F0.0 B0.0"],
        {},
        "rank 0, step 1: W0.0 is missing; add it after B0.0, or write BW0.0 instead",
    ),
    "doubled": (
        ["F0.0 F0.0 BW0.0"],
        {},
        "rank 0, step 1: F0.0 has already run at step 0; remove one of them",
    ),
    "doubled weight gradient": (
        ["F0.0 B0.0 W0.0 W0.0"],
        {},
        "rank 0, step 3: W0.0 has already run at step 2; remove one of them",
    ),
    "stage on two ranks": (
        ["F0.0 BW0.0 F1.0", "BW1.0"],
        {},
        "rank 1, step 0: BW1.0: stage 1 is on rank 0 already (F1.0 at step 2); a stage lives on one rank",
    ),
    "wrong placement": (
        ["F0.0 BW0.0", "F1.0 BW1.0"],
        {"rank_of_stage": (1, 0)},
        "rank 0, step 0: F0.0: the placement puts stage 0 on rank 1; move it, or change the placement",
    ),
    "placement on a rank that is not there": (
        ["F0.0 BW0.0"],
        {"rank_of_stage": (0, 5)},
        "the placement puts stage 1 on rank 5, but the schedule has 1 ranks: 0..0",
    ),
    "backward first": (
        ["B0.0 F0.0 W0.0"],
        {},
        "rank 0, step 0: B0.0 runs before F0.0, which is at step 1; put F0.0 first",
    ),
    "backward without forward": (
        ["BW0.0"],
        {},
        "rank 0, step 0: BW0.0 runs before F0.0, which is missing; put F0.0 before it",
    ),
    "weight gradient first": (
        ["F0.0 W0.0 B0.0"],
        {},
        "rank 0, step 1: W0.0 runs before B0.0, which is at step 2; put B0.0 first",
    ),
    "fused after split": (
        ["F0.0 B0.0 BW0.0"],
        {},
        "rank 0, step 2: BW0.0 after B0.0 at step 1: BW is B and W in one, write either BW, or B and W",
    ),
    "split after fused": (
        ["F0.0 BW0.0 W0.0"],
        {},
        "rank 0, step 2: W0.0 after BW0.0 at step 1: BW is B and W in one, write either BW, or B and W",
    ),
    "circle of two ranks": (
        ["F0.0 BW0.0 F0.1 BW0.1", "F1.0 F1.1 BW1.0 BW1.1"],
        {},
        "deadlock: these actions wait for each other in a circle; reorder one of these ranks\n"
        "rank 0, step 1: BW0.0 waits for BW1.0 (rank 1, step 2)\n"
        "rank 1, step 1: F1.1 waits for F0.1 (rank 0, step 2)\n",
    ),
    "circle within a rank": (
        ["F1.0 F0.0 B1.0 B0.0 W1.0 W0.0"],
        {},
        "deadlock: these actions wait for each other in a circle; reorder one of these ranks\n"
        "rank 0, step 0: F1.0 waits for F0.0 (rank 0, step 1)\n",
    ),
    "circle that rank 0 is not in": (
        ["F0.0 F0.1 B0.0 B0.1 W0.0 W0.1", "F1.0 B1.0 F1.1 B1.1 W1.0 W1.1", "F2.0 F2.1 B2.0 B2.1 W2.0 W2.1"],
        {},
        "deadlock: these actions wait for each other in a circle; reorder one of these ranks\n"
        "rank 1, step 1: B1.0 waits for B2.0 (rank 2, step 2)\n"
        "rank 2, step 1: F2.1 waits for F1.1 (rank 1, step 2)\n",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_schedule_is_refused_with_its_reason(name):
    lines, arguments, message = WRONG[name]
    with pytest.raises(ScheduleError, match="^" + re.escape(message)):
        check(Schedule.from_lines(lines), **arguments)


def test_the_message_shows_the_steps_around_the_wrong_one():
    lines = list(get_family("1f1b").generate(3, 4).to_lines())
    lines[1] = "F1.0 F1.1 BW1.0 BW1.2 F1.2 BW1.1 F1.3 BW1.3"
    with pytest.raises(ScheduleError) as caught:
        check(Schedule.from_lines(lines))
    assert str(caught.value).splitlines() == [
        "rank 1, step 3: BW1.2 runs before F1.2, which is at step 4; put F1.2 first",
        "          Rank 0   Rank 1   Rank 2",
        "Step 1:   F0.1     F1.1     BW2.0",
        "Step 2:   F0.2     BW1.0    F2.1",
        "Step 3:   BW0.0    BW1.2    BW2.1    <-- rank 1",
        "Step 4:   F0.3     F1.2     F2.2",
        "Step 5:   BW0.1    BW1.1    BW2.2",
    ]


def test_the_excerpt_of_a_wide_schedule_stays_narrow():
    ranks = list(get_family("gpipe").generate(40, 2).ranks)
    ranks[30] = ranks[30][:-1]
    with pytest.raises(ScheduleError, match=r"rank 30, step 1: F30\.1 is never followed") as caught:
        check(Schedule(tuple(ranks)))
    header = str(caught.value).splitlines()[1]
    assert re.findall(r"Rank (\d+)", header) == [str(rank) for rank in range(26, 34)]


def test_negative_indices_are_out_of_range():
    for action in (("F", -1, 0), ("F", 0, -1)):
        with pytest.raises(ScheduleError, match=r"-1 is out of range"):
            check(Schedule.from_orders([[("F", 0, 0), action, ("BW", 0, 0)]]))


def test_a_huge_index_costs_no_memory():
    with pytest.raises(ScheduleError, match=r"rank 0: F0\.0 is missing"):
        check(Schedule.from_lines(["F0.999999999 BW0.999999999"]))
    with pytest.raises(ScheduleError, match="no rank runs stage 0"):
        check(Schedule.from_lines(["F999999999.999999999 BW999999999.999999999"]))


def test_stages_and_placement_that_disagree_are_the_callers_mistake():
    with pytest.raises(ValueError, match="rank_of_stage has 1 entries for 2 stages"):
        check(Schedule.from_lines(["F0.0 BW0.0"]), num_stages=2, rank_of_stage=(0,))


def test_one_stage_may_split_some_backwards_and_fuse_others():
    check(Schedule.from_lines(["F0.0 F0.1 BW0.0 B0.1 W0.1"]))


@given(st.one_of(valid_schedules(), bidirectional_schedules()))
@settings(derandomize=True, deadline=None)
def test_any_order_that_has_run_is_accepted(schedule):
    placement = [schedule.rank_of_stage[stage] for stage in range(schedule.num_stages)]
    check(schedule)
    check(
        schedule,
        num_microbatches=schedule.num_microbatches,
        rank_of_stage=placement,
        num_replicas=schedule.num_replicas,
    )


@given(valid_schedules())
@settings(derandomize=True, deadline=None)
def test_the_run_order_has_every_action_once_after_what_it_needs(schedule):
    order = run_order(schedule)
    assert sorted(order) == [(r, n) for r, actions in enumerate(schedule.ranks) for n in range(len(actions))]
    flat = [schedule.ranks[rank][step] for rank, step in order]
    assert can_run(Schedule((tuple(flat),)), schedule.num_stages, schedule.num_microbatches)
    for rank in range(schedule.num_ranks):
        steps = [step for other, step in order if other == rank]
        assert steps == sorted(steps)


TWO_WAYS = ["F0.0 BW0.0 F1.1 BW1.1", "F1.0 BW1.0 F0.1 BW0.1"]
"""Microbatch 0 goes down two ranks, microbatch 1 goes up."""


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["F0.0 BW0.0 F1.1 BW1.1 F0.2 BW0.2", "F1.0 BW1.0 F0.1 BW0.1"],
            r"rank 1: F1\.2 is missing; stage 1 must run all 3",
        ),
        (
            ["F0.0 BW0.0 F1.1 BW1.1 F0.2 BW1.2", "F1.0 BW1.0 F0.1 BW0.1 F1.2 BW0.2"],
            r"rank 0, step 5: BW1\.2: microbatch 2 takes replica 0, by the rank of its stage 0, and that has stage 1 "
            r"on rank 1; move it, or the whole microbatch",
        ),
        (
            ["F0.0 BW0.0 F1.1 BW1.1", "F1.0 BW1.0 F0.1 F0.0 BW0.1"],
            r"rank 1, step 3: F0\.0: microbatch 0 takes replica 0",
        ),
        (
            ["F1.1 BW1.1 F0.0 BW0.0", "F1.0 BW1.0 F0.1 BW0.1"],
            r"rank 0, step 0: F1\.1 waits for F0\.1 \(rank 1, step 2\)\n"
            r"rank 1, step 0: F1\.0 waits for F0\.0 \(rank 0, step 2\)",
        ),
    ],
)
def test_what_is_wrong_with_a_bidirectional_schedule_is_said_in_its_terms(lines, message):
    check(Schedule.from_lines(TWO_WAYS))
    with pytest.raises(ScheduleError, match=message):
        check(Schedule.from_lines(lines))


def test_one_replica_is_not_two_and_two_are_not_one():
    two, one = Schedule.from_lines(TWO_WAYS), Schedule.from_lines(["F0.0 BW0.0", "F1.0 BW1.0"])
    assert (two.num_replicas, two.replica_of_microbatch, two.placements) == (2, (0, 1), ((0, 1), (1, 0)))
    assert (one.num_replicas, one.replica_of_microbatch, one.placements) == (1, (0,), ((0, 1),))
    assert [two.holders(stage) for stage in (0, 1)] == [(0, 1), (0, 1)]
    assert [one.holders(stage) for stage in (0, 1)] == [(0,), (1,)]
    with pytest.raises(ScheduleError, match="was to run two replicas, but it runs one"):
        check(one, num_replicas=2)
    with pytest.raises(
        ScheduleError, match=r"rank 1, step 0: F1\.0: stage 1 is on rank 0 already .* lives on one rank"
    ):
        check(two, num_replicas=1)
    with pytest.raises(ScheduleError, match=r"takes replica 0, .* and that has stage 0 on rank 1"):
        check(two, rank_of_stage=(1, 0))


@st.composite
def mutated(draw, schedule: Schedule) -> Schedule:
    ranks = [list(actions) for actions in schedule.ranks]
    for _ in range(draw(st.integers(1, 2))):
        rank = draw(st.sampled_from([n for n, actions in enumerate(ranks) if actions] or [0]))
        actions = ranks[rank]
        if not actions:
            break
        here, there = (draw(st.integers(0, len(actions) - 1)) for _ in range(2))
        match draw(st.sampled_from(["drop", "duplicate", "swap", "move", "kind", "stage", "other rank"])):
            case "drop":
                del actions[here]
            case "duplicate":
                actions.insert(there, actions[here])
            case "swap":
                actions[here], actions[there] = actions[there], actions[here]
            case "move":
                actions.insert(there, actions.pop(here))
            case "kind":
                actions[here] = actions[here]._replace(kind=draw(st.sampled_from(Kind)))
            case "stage":
                actions[here] = actions[here]._replace(stage=draw(st.integers(0, schedule.num_stages)))
            case "other rank":
                ranks[draw(st.integers(0, len(ranks) - 1))].append(actions.pop(here))
    return Schedule(tuple(map(tuple, ranks)))


FROM_FAMILIES = st.builds(
    lambda family, p, m: family.generate(p, *numbers_for(family, p, m)),
    st.sampled_from([family for family in FAMILIES.values() if family.num_replicas == 1]),
    st.integers(1, 3),
    st.integers(1, 4),
)


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=400)
def test_a_changed_schedule_is_refused_exactly_when_it_cannot_run(data):
    schedule = data.draw(st.one_of(valid_schedules(), bidirectional_schedules(), FROM_FAMILIES))
    num_stages, num_microbatches = schedule.num_stages, schedule.num_microbatches
    broken = data.draw(mutated(schedule))
    if can_run(broken, num_stages, num_microbatches, mirrored=schedule.num_replicas == 2):
        check(broken, num_stages=num_stages, num_microbatches=num_microbatches)
    else:
        with pytest.raises(ScheduleError, match=r"^(rank \d+|deadlock|no rank)"):
            check(broken, num_stages=num_stages, num_microbatches=num_microbatches)


def test_the_oracle_knows_a_circle_and_a_gap_when_it_sees_one():
    for lines, good in (
        (["F0.0 BW0.0", "F1.0 BW1.0"], True),
        (["F0.0 F0.1 BW0.0 BW0.1", "F1.0 F1.1 BW1.1 BW1.0"], True),
        (["F0.0 BW0.0 F0.1 BW0.1", "F1.0 F1.1 BW1.0 BW1.1"], False),
        (["F0.0 F0.1 BW0.0", "F1.0 F1.1 BW1.0 BW1.1"], False),
        (["F0.0 F0.1 B0.0 BW0.1", "F1.0 F1.1 BW1.0 BW1.1"], False),
    ):
        schedule = Schedule.from_lines(lines)
        assert can_run(schedule, 2, schedule.num_microbatches) == good


def test_actions_compare_as_their_text_says():
    assert Action.parse("BW3.1") == Action(Kind.BW, 3, 1) != Action(Kind.B, 3, 1)
