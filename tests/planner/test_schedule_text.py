"""Schedules written and read again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import valid_schedules

from planner.errors import ScheduleError
from planner.schedule.actions import Action, Kind, Schedule

INDICES = st.integers(0, 999_999_999)
ACTIONS = st.builds(Action, st.sampled_from(Kind), INDICES, INDICES)


@given(ACTIONS)
@settings(derandomize=True, deadline=None)
def test_every_action_reads_back_from_its_text(action):
    assert Action.parse(str(action)) == action


@given(st.lists(st.lists(ACTIONS, max_size=5).map(tuple), max_size=5).map(tuple).map(Schedule))
@settings(derandomize=True, deadline=None)
def test_every_schedule_reads_back_from_its_text(schedule):
    assert Schedule.from_lines(schedule.to_lines()) == schedule


@given(valid_schedules())
@settings(derandomize=True, deadline=None, max_examples=30)
def test_the_written_schedule_is_one_line_per_rank(schedule):
    lines = str(schedule).splitlines()
    assert len(lines) == schedule.num_ranks
    assert Schedule.from_lines(lines) == schedule
    assert Schedule.from_orders(schedule.ranks) == schedule


@given(st.text(max_size=12))
@settings(derandomize=True, deadline=None)
def test_any_other_text_is_refused_or_written_back_as_it_was(text):
    try:
        action = Action.parse(text)
    except ScheduleError:
        return
    assert str(action) == text


@pytest.mark.parametrize("text", ["0F3", "F0", "F0.1.2", "f0.1", "F-1.0", "F00.1", "F0.١", "BWW0.0", "F0,1"])
def test_a_wrong_action_is_named_with_rank_and_step(text):
    with pytest.raises(ScheduleError, match=r"rank 1, step 2: '.*' is not an action; write kind, stage, microbatch"):
        Schedule.from_lines(["F0.0 BW0.0", f"F1.0 BW1.0 {text}"])
