"""The schedule families against the orders written down for them, and against their own promises."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import can_run

from planner.errors import ScheduleError
from planner.schedule.actions import Kind, Schedule
from planner.schedule.families import FAMILIES, get_family
from planner.schedule.simulation import StageTimes, simulate
from planner.schedule.validation import check

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))
RANKS, MICROBATCHES, CHUNKS = st.integers(1, 6), st.integers(1, 14), st.integers(1, 4)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_family_gives_the_order_written_down(path):
    name, p, m, v = re.fullmatch(r"(.+)-p(\d+)-m(\d+)(?:-v(\d+))?", path.stem).groups(default="1")
    schedule = get_family(name).generate(int(p), int(m), int(v))
    assert schedule == Schedule.from_lines(path.read_text().splitlines())


def test_every_family_has_a_golden_order():
    assert {path.stem.split("-p")[0] for path in GOLDEN} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
@given(RANKS, MICROBATCHES, CHUNKS)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_what_a_family_supports_it_generates_and_it_can_run(name, p, m, v):
    family = get_family(name)
    if (reason := family.supports(p, m, v)) is not None:
        with pytest.raises(ScheduleError, match=re.escape(f"{name} has no schedule for p={p} m={m} v={v}: {reason}")):
            family.generate(p, m, v)
        return
    schedule = family.generate(p, m, v)
    placement = family.placement(p, v)
    assert can_run(schedule, p * v, m)
    check(schedule, num_stages=p * v, num_microbatches=m, rank_of_stage=placement)
    assert schedule.rank_of_stage == dict(enumerate(placement))
    kinds = {action.kind for actions in schedule.ranks for action in actions}
    assert kinds == ({Kind.F, Kind.B, Kind.W} if family.splits_backward else {Kind.F, Kind.BW})


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
def test_families_without_chunks_take_any_number_of_microbatches(name):
    family = get_family(name)
    assert all(family.supports(p, m) is None for p in range(1, 9) for m in range(1, 20))
    assert "choose 1, or an interleaved family" in family.supports(4, 8, 2)


def test_interleaving_takes_microbatches_that_make_equal_groups():
    family = get_family("interleaved-1f1b")
    taken = [m for m in range(1, 25) if family.supports(4, m, 2) is None]
    assert taken == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 16, 20, 24]
    assert "11 microbatches do not go into 2 equal groups of at least 4" in family.supports(4, 11, 2)
    assert "such as 8 or 12" in family.supports(4, 11, 2)
    assert "choose virtual_stages=2 or more, or the family 1f1b" in family.supports(4, 8, 1)


@pytest.mark.parametrize("numbers", [(0, 4, 1), (4, 0, 1), (4, 4, 0), (-1, 4, 1)])
def test_numbers_below_one_are_a_reason(numbers):
    for family in FAMILIES.values():
        assert "it must be at least 1" in family.supports(*numbers)


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ScheduleError, match=r"no schedule family is called '1F1b'; did you mean '1f1b'\? Known: gpipe"):
        get_family("1F1b")
    with pytest.raises(ScheduleError, match=r"called 'zb_h2'; did you mean 'zb-h1'\?"):
        get_family("zb_h2")
    with pytest.raises(ScheduleError, match=r"called 'qqqq'\. Known: gpipe, 1f1b, interleaved-1f1b, zb-h1"):
        get_family("qqqq")


def test_every_row_of_the_registry_is_keyed_by_its_name_and_names_its_paper():
    assert all(family.name == name for name, family in FAMILIES.items())
    assert all("arXiv" in family.source for family in FAMILIES.values())


def peaks(name: str, p: int, m: int, v: int = 1, *, held: int = 2, held_w: int = 1) -> tuple[int, ...]:
    """Peak of every rank, in bytes; a chunk holds `held`."""
    stage = StageTimes(1, 1, 1, 2, 0, held, held_w)
    return simulate(get_family(name).generate(p, m, v), [stage] * (p * v)).peak_activation_bytes


@given(RANKS, MICROBATCHES, st.integers(1, 9), st.integers(0, 9))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_peaks_are_those_of_the_docstrings(p, m, held, held_w):
    assert peaks("gpipe", p, m, held=held) == (m * held,) * p
    assert peaks("1f1b", p, m, held=held) == tuple(min(m, p - r) * held for r in range(p))
    held_w = min(held, held_w)
    h1 = peaks("zb-h1", p, m, held=held, held_w=held_w)
    promised = tuple((p - r) * held + r * held_w for r in range(p))
    assert h1 == promised if m >= p else all(have <= most for have, most in zip(h1, promised, strict=True))


@given(st.integers(1, 5), st.integers(1, 12), st.integers(2, 4))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_peaks_of_interleaving_count_chunks(p, m, v):
    if get_family("interleaved-1f1b").supports(p, m, v) is None:
        group = m // max(1, m // p)
        want = tuple(min(m * v, 2 * (p - 1 - r) + (v - 1) * group + 1) for r in range(p))
        assert peaks("interleaved-1f1b", p, m, v, held=1) == want


def test_peaks_on_eight_ranks_are_the_published_ones():
    assert peaks("1f1b", 8, 24)[0] == 8 * 2
    assert max(peaks("zb-h1", 8, 24)) == 8 * 2
