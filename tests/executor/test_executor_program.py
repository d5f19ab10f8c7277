"""What a rank's program holds, without torch or processes."""

import pytest
from executor_cases import random_schedule

from planner.errors import ScheduleError
from planner.executor.program import RankProgram, rank_program
from planner.schedule.actions import Schedule
from planner.schedule.families import get_family
from planner.schedule.transfers import Transfer, transfers


def programs(schedule: Schedule) -> list[RankProgram]:
    return [rank_program(schedule, rank) for rank in range(schedule.num_ranks)]


def test_two_ranks_one_microbatch_by_hand():
    first, last = programs(Schedule.from_lines(["F0.0 BW0.0", "F1.0 B1.0 W1.0"]))
    there = Transfer("activation", 0, 1, 0, 1, 0)
    back = Transfer("gradient", 1, 0, 1, 0, 0)
    assert [(str(s.action), s.receive, s.send, s.delivered) for s in first.steps] == [
        ("F0.0", None, there, ()),
        ("BW0.0", back, None, (there,)),
    ]
    assert [(str(s.action), s.receive, s.send, s.delivered) for s in last.steps] == [
        ("F1.0", there, None, ()),
        ("B1.0", None, back, ()),
        ("W1.0", None, None, ()),
    ]
    assert (first.split, last.split) == (frozenset(), frozenset({(1, 0)}))
    assert first.channels == last.channels == ((0, 1, "activation"), (1, 0, "gradient"))


@pytest.mark.parametrize("seed", range(30))
def test_every_transfer_is_sent_once_and_received_once(seed):
    schedule = random_schedule(seed, 2 + seed % 3)
    every = transfers(schedule)
    ranks = programs(schedule)
    assert sorted(t for p in ranks for t in p.incoming) == sorted(every)
    assert sorted(s.send for p in ranks for s in p.steps if s.send is not None) == sorted(every)
    assert all(sorted(p.incoming) == sorted(p.sent_to_me) for p in ranks)


@pytest.mark.parametrize("seed", range(30))
def test_a_delivered_send_was_received_before_what_proves_it_was_made(seed):
    ranks = programs(random_schedule(seed, 2 + seed % 3))
    for program in ranks:
        sent: set[Transfer] = set()
        for step in program.steps:
            for delivered in step.delivered:
                sent.remove(delivered)  # sent earlier, and let go of once
                assert step.receive is not None
                other = ranks[step.receive.from_rank].steps
                received_at = next(n for n, s in enumerate(other) if s.receive == delivered)
                proof_made_at = next(n for n, s in enumerate(other) if s.send == step.receive)
                assert received_at <= proof_made_at
            if step.send is not None:
                sent.add(step.send)


@pytest.mark.parametrize("family", ["1f1b", "zb-h1"])
def test_sends_not_known_to_be_delivered_do_not_grow_with_the_microbatches(family):
    def most_outstanding(m: int) -> list[int]:
        peaks = []
        for program in programs(get_family(family).generate(4, m, 1)):
            held = peak = 0
            for step in program.steps:
                held += (step.send is not None) - len(step.delivered)
                peak = max(peak, held)
            peaks.append(peak)
        return peaks

    assert most_outstanding(16) == most_outstanding(64)


def test_a_schedule_that_cannot_run_is_refused():
    with pytest.raises(ScheduleError, match=r"rank 0, step 0: BW0\.0 runs before F0\.0"):
        rank_program(Schedule.from_lines(["BW0.0 F0.0"]), 0)
