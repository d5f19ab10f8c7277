"""What crosses between ranks, in which order, and that nobody waits for ever on it."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import bidirectional_schedules, valid_schedules

from planner.errors import ScheduleError
from planner.schedule.actions import Kind, Schedule
from planner.schedule.families import get_family
from planner.schedule.transfers import Transfer, transfers


def test_two_ranks_exchange_activations_and_gradients():
    found = transfers(Schedule.from_lines(["F0.0 F0.1 B0.0 W0.0 BW0.1", "F1.0 BW1.0 F1.1 B1.1 W1.1"]))
    assert found == (
        Transfer("activation", 0, 1, 0, 1, 0),
        Transfer("activation", 0, 1, 0, 1, 1),
        Transfer("gradient", 1, 0, 1, 0, 0),
        Transfer("gradient", 1, 0, 1, 0, 1),
    )
    assert str(found[2]) == "gradient of microbatch 0, stage 1 → 0, rank 1 → 0"


def test_stages_that_share_a_rank_exchange_nothing():
    assert transfers(Schedule.from_lines(["F0.0 F1.0 BW1.0 BW0.0"])) == ()
    found = transfers(Schedule.from_lines(["F0.0 F3.0 BW3.0 BW0.0", "F1.0 F2.0 BW2.0 BW1.0"]))
    assert [(t.from_stage, t.to_stage) for t in found] == [(0, 1), (2, 3), (3, 2), (1, 0)]


@pytest.mark.parametrize(
    ("name", "v"), [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("interleaved-1f1b", 3), ("dualpipe", 1)]
)
def test_every_boundary_is_crossed_twice_per_microbatch(name, v):
    found = transfers(get_family(name).generate(4, 8, v))
    assert len(found) == len(set(found)) == 2 * (4 * v - 1) * 8


def test_a_schedule_that_cannot_run_has_no_transfers():
    with pytest.raises(ScheduleError, match="deadlock"):
        transfers(Schedule.from_lines(["F0.0 BW0.0 F0.1 BW0.1", "F1.0 F1.1 BW1.0 BW1.1"]))


def produced(schedule: Schedule, rank: int) -> list[Transfer]:
    """What a rank's list sends, in the order of the list."""
    home = {action[1:]: r for r, actions in enumerate(schedule.ranks) for action in actions}
    found = []
    for kind, stage, j in schedule.ranks[rank]:
        to = stage + 1 if kind is Kind.F else stage - 1
        if kind not in (Kind.W, Kind.R) and home.get((to, j), rank) != rank:
            what = "activation" if kind is Kind.F else "gradient"
            found.append(Transfer(what, stage, to, rank, home[to, j], j))
    return found


@given(st.one_of(valid_schedules(), bidirectional_schedules()))
@settings(derandomize=True, deadline=None)
def test_every_rank_sends_in_the_order_of_its_list(schedule):
    found = transfers(schedule)
    for rank in range(schedule.num_ranks):
        assert [transfer for transfer in found if transfer.from_rank == rank] == produced(schedule, rank)


@given(st.one_of(valid_schedules(), bidirectional_schedules()), st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None)
def test_ranks_that_receive_in_that_order_all_finish(schedule, random):
    """A small runtime: first-in first-out channels without names on the tensors, ranks moved at random.

    A rank knows only the place of a tensor in its channel, so ends that disagree show as a wrong tensor.
    """
    channels: dict[tuple[int, int], deque[Transfer]] = {}
    expected: dict[tuple[int, int], deque[Transfer]] = {}
    for transfer in transfers(schedule):
        expected.setdefault((transfer.from_rank, transfer.to_rank), deque()).append(transfer)
        channels.setdefault((transfer.from_rank, transfer.to_rank), deque())
    home = {action[1:]: r for r, actions in enumerate(schedule.ranks) for action in actions}
    outbox = [deque(produced(schedule, rank)) for rank in range(schedule.num_ranks)]
    inbox: list[set[Transfer]] = [set() for _ in schedule.ranks]
    step = [0] * schedule.num_ranks

    def move(rank: int) -> bool:
        kind, stage, j = schedule.ranks[rank][step[rank]]
        source = stage - 1 if kind is Kind.F else stage + 1
        if kind not in (Kind.W, Kind.R) and home.get((source, j), rank) != rank:
            what = "activation" if kind is Kind.F else "gradient"
            needed = Transfer(what, source, stage, home[source, j], rank, j)
            channel = needed.from_rank, rank
            while needed not in inbox[rank]:
                if not channels[channel]:
                    return False
                place = expected[channel].popleft()
                assert channels[channel].popleft() == place
                inbox[rank].add(place)
        to = stage + 1 if kind is Kind.F else stage - 1
        if kind not in (Kind.W, Kind.R) and home.get((to, j), rank) != rank:
            channels[rank, home[to, j]].append(outbox[rank].popleft())
        step[rank] += 1
        return True

    while waiting := [rank for rank, actions in enumerate(schedule.ranks) if step[rank] < len(actions)]:
        random.shuffle(waiting)
        assert any(move(rank) for rank in waiting), f"ranks {waiting} stand still"
    assert not any(channels.values())
