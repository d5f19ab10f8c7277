"""What stages hold, counted from orders that fit in the head."""

from planner.schedule.actions import Schedule
from planner.schedule.families import FAMILIES
from planner.schedule.residency import peak_in_flight, peak_per_rank


def test_1f1b_holds_one_microbatch_less_on_every_next_rank():
    assert peak_in_flight(FAMILIES["1f1b"].generate(4, 8), 0.5) == ((4, 0), (3, 0), (2, 0), (1, 0))


def test_zb_h1_holds_weights_in_place_of_forwards():
    assert peak_in_flight(FAMILIES["zb-h1"].generate(4, 8), 0.5) == ((4, 0), (3, 1), (2, 2), (1, 3))


def test_the_fullest_moment_depends_on_what_a_waiting_weight_gradient_weighs():
    schedule = Schedule.from_lines(["F0.0 F0.1 B0.0 B0.1 W0.0 W0.1"])
    assert peak_in_flight(schedule, 0.5) == ((2, 0),)
    assert peak_in_flight(schedule, 2.0) == ((0, 2),)


def test_chunks_of_a_rank_are_counted_together_and_at_one_moment():
    schedule = Schedule.from_lines(["F0.0 F0.1 F2.0 BW2.0 F2.1 BW2.1 BW0.0 BW0.1", "F1.0 F1.1 BW1.0 BW1.1"])
    assert peak_per_rank(schedule) == ((3, 1), (2, 2))
