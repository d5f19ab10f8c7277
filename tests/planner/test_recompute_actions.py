"""R, the forward of a stage run again: read, checked, timed, counted."""

import pytest

from planner.errors import ScheduleError
from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.residency import peak_in_flight, peak_per_rank
from planner.schedule.simulation import StageTimes, simulate
from planner.schedule.validation import check

TWO_RANKS = Schedule.from_lines(["F0.0 F0.1 R0.0 B0.0 W0.0 R0.1 BW0.1", "F1.0 B1.0 F1.1 BW1.1 W1.0"])


def test_r_has_a_text_form():
    assert Action.parse("R0.3") == Action(Kind.R, 0, 3)
    assert Schedule.from_lines(TWO_RANKS.to_lines()) == TWO_RANKS
    check(TWO_RANKS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("F0.0 R0.0 R0.0 BW0.0", "rank 0, step 2: R0.0 has already run at step 1; remove one of them"),
        ("R0.0 F0.0 BW0.0", "rank 0, step 0: R0.0 runs before F0.0, which is at step 1; put F0.0 first"),
        ("F0.0 BW0.0 R0.0", "rank 0, step 2: R0.0 runs after BW0.0, which is at step 1 and needs it; put R0.0 first"),
        ("F0.0 B0.0 R0.0 W0.0", "rank 0, step 2: R0.0 runs after B0.0, which is at step 1"),
    ],
)
def test_r_runs_once_after_its_forward_and_before_its_backward(line, message):
    with pytest.raises(ScheduleError) as caught:
        check(Schedule.from_lines([line]))
    assert message in str(caught.value)


def test_r_takes_time_and_holds_what_the_forward_did_not():
    """Rank 0: F 0-1, F 1-2, R 2-5, B (gradient at 6) 6-8, W 8-9, R 9-12, BW 12-15. Rank 1: F 1-2, B 2-6, F 6-7 .."""
    stages = [StageTimes(1, 2, 1, 3, 0, 10, 4, 3, 2), StageTimes(1, 4, 1, 4, 0, 10, 4)]
    timeline = simulate(TWO_RANKS, stages)
    assert [(str(t.action), t.start_us, t.end_us) for t in timeline.ranks[0]] == [
        ("F0.0", 0, 1),
        ("F0.1", 1, 2),
        ("R0.0", 2, 5),
        ("B0.0", 6, 8),
        ("W0.0", 8, 9),
        ("R0.1", 9, 12),
        ("BW0.1", 12, 15),
    ]
    assert timeline.peak_activation_bytes[0] == 10 + 2  # microbatch 0 whole, the checkpoint of microbatch 1
    assert timeline.busy_us[0] == 1 + 1 + 3 + 2 + 1 + 3 + 3


def test_r_counts_as_no_backward():
    assert peak_in_flight(TWO_RANKS, 0.5)[0] == (2, 0)
    assert peak_per_rank(TWO_RANKS)[0] == (2, 2)
