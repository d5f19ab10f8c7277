"""How far ranks may run before validation, against brute force over all cuts."""

from itertools import product

import pytest
from executor_cases import random_schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.executor.cut import unvalidated_cut
from planner.executor.program import rank_program
from planner.schedule.actions import Schedule
from planner.schedule.families import get_family


def is_allowed_and_closed(schedule: Schedule, cut: tuple[int, ...]) -> bool:
    before = {str(a) for actions, end in zip(schedule.ranks, cut, strict=True) for a in actions[:end]}
    for text in before:
        if not text.startswith("F"):
            return False
        stage, microbatch = text[1:].split(".")
        if stage != "0" and f"F{int(stage) - 1}.{microbatch}" not in before:
            return False
    return True


def largest_by_brute_force(schedule: Schedule) -> tuple[int, ...]:
    """Of all allowed closed cuts, the one that is largest on every rank; fails if there is none such."""
    leading = [next(n for n, a in enumerate([*actions, None]) if str(a)[0] != "F") for actions in schedule.ranks]
    good = [cut for cut in product(*(range(most + 1) for most in leading)) if is_allowed_and_closed(schedule, cut)]
    best = tuple(max(cut[rank] for cut in good) for rank in range(schedule.num_ranks))
    assert best in good
    return best


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_the_cut_is_the_largest_that_is_closed(seed, num_ranks):
    schedule = random_schedule(seed, num_ranks)
    assert unvalidated_cut(schedule) == largest_by_brute_force(schedule), schedule


@pytest.mark.parametrize(
    ("name", "num_ranks", "m", "virtual", "cut"),
    [
        ("1f1b", 4, 6, 1, (4, 3, 2, 1)),
        ("zb-h1", 2, 4, 1, (2, 1)),
        ("gpipe", 2, 3, 1, (3, 3)),
        ("naive", 2, 3, 1, (1, 1)),
    ],
)
def test_families_run_their_warm_up_before_validation(name, num_ranks, m, virtual, cut):
    assert unvalidated_cut(get_family(name).generate(num_ranks, m, virtual)) == cut


def test_a_forward_that_needs_one_after_a_backward_waits_for_validation():
    # F1.1 needs F0.1, which comes after rank 0's first backward: rank 1 may not begin it, nor anything behind it.
    schedule = Schedule.from_lines(["F0.0 F2.0 BW2.0 F0.1 F2.1 BW2.1 BW0.0 BW0.1", "F1.0 F1.1 BW1.0 BW1.1"])
    assert unvalidated_cut(schedule) == (2, 1)


def test_programs_know_which_of_their_messages_are_sent_before_validation():
    # Rank 1 stops after F1.0; what rank 0 sends of microbatch 1 is then still on its way.
    schedule = Schedule.from_lines(["F0.0 F0.1 BW0.0 BW0.1", "F1.0 BW1.0 F1.1 BW1.1"])
    assert unvalidated_cut(schedule) == (2, 1)
    first, last = (rank_program(schedule, rank) for rank in range(2))
    assert (first.num_unvalidated, first.sent_unvalidated) == (2, frozenset())
    assert (last.num_unvalidated, last.sent_unvalidated) == (1, frozenset(last.incoming))


@given(st.integers(0, 10**6), st.integers(2, 4))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_on_every_channel_what_is_sent_before_the_cut_comes_first(seed, num_ranks):
    for rank in range(num_ranks):
        program = rank_program(random_schedule(seed, num_ranks), rank)
        for sender in range(num_ranks):
            early = [
                t in program.sent_unvalidated
                for t in program.sent_to_me
                if t.kind == "activation" and t.from_rank == sender
            ]
            assert early == sorted(early, reverse=True)
        received = {step.receive for step in program.steps[: program.num_unvalidated]} - {None}
        assert received <= program.sent_unvalidated
