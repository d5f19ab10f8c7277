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
    replicas = family.num_replicas
    assert can_run(schedule, p * v, m, mirrored=replicas == 2)
    check(schedule, num_stages=p * v, num_microbatches=m, rank_of_stage=placement, num_replicas=replicas)
    assert schedule.num_replicas == replicas
    assert schedule.rank_of_stage == dict(enumerate(placement))
    kinds = {action.kind for actions in schedule.ranks for action in actions}
    if name in ("dualpipev", "dualpipe"):
        assert kinds == {Kind.F, Kind.B, Kind.W, Kind.BW}
    else:
        assert kinds == ({Kind.F, Kind.B, Kind.W} if family.splits_backward else {Kind.F, Kind.BW})
    held_at_the_end = [
        {Kind.F: 2, Kind.B: -1, Kind.W: -1, Kind.BW: -2}[action.kind]
        for actions in schedule.ranks
        for action in actions
    ]
    assert sum(held_at_the_end) == 0


@pytest.mark.parametrize("name", ["naive", "gpipe", "1f1b", "afp", "zb-h1", "zb-h2"])
def test_families_without_chunks_take_any_number_of_microbatches(name):
    family = get_family(name)
    assert all(family.supports(p, m) is None for p in range(1, 9) for m in range(1, 20))
    assert "choose 1, or an interleaved family" in family.supports(4, 8, 2)


@pytest.mark.parametrize("name", ["zb-v", "v-half", "v-min"])
def test_families_drawn_in_a_v_take_any_number_of_microbatches_and_two_chunks(name):
    family = get_family(name)
    assert all(family.supports(p, m, 2) is None for p in range(1, 9) for m in range(1, 20))
    assert all("two stages per rank, in a V, not" in family.supports(4, 8, v) for v in (1, 3, 4))
    assert family.placement(4, 2) == (0, 1, 2, 3, 3, 2, 1, 0)


def test_dualpipev_needs_two_microbatches_per_rank():
    family = get_family("dualpipev")
    assert [m for m in range(1, 14) if family.supports(4, m, 2) is None] == [8, 9, 10, 11, 12, 13]
    assert "at least 8 microbatches for 4 ranks, not 7; use more, or the family zb-v" in family.supports(4, 7, 2)


def test_waves_take_an_even_number_of_chunks():
    family = get_family("hanayo")
    assert [v for v in range(1, 7) if family.supports(4, 8, v) is None] == [2, 4, 6]
    assert family.placement(3, 4) == (0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0)


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
    with pytest.raises(
        ScheduleError, match=r"no schedule family is called '1F1b'; did you mean '1f1b'\? Known: naive, gpipe"
    ):
        get_family("1F1b")
    with pytest.raises(ScheduleError, match=r"called 'zb_h3'; did you mean 'zb-h\d'\?"):
        get_family("zb_h3")
    with pytest.raises(ScheduleError, match=r"called 'qqqq'\. Known: naive, gpipe, 1f1b, .*, dualpipev, .*$"):
        get_family("qqqq")


def test_every_row_of_the_registry_is_keyed_by_its_name_and_names_its_paper():
    assert all(family.name == name for name, family in FAMILIES.items())
    assert all("arXiv" in family.source or "doi" in family.source for family in FAMILIES.values())


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


# Closed forms of the docstrings. T_F, T_B, T_W are for one microbatch through a whole rank, a chunk takes 1/v of them.
TIMES = [(1, 1, 1), (4, 5, 3), (10, 11, 9), (4, 9, 3), (5, 4, 3), (3, 4, 8), (7, 3, 2), (2, 9, 1), (3, 3, 1)]


def bubbles(name: str, p: int, m: int, v: int, times: tuple[int, int, int]) -> tuple[float, float]:
    """What makespan and span are above the work of a rank."""
    f, b, w = times
    stage = StageTimes(f / v, b / v, w / v, (b + w) / v)
    timeline = simulate(get_family(name).generate(p, m, v), [stage] * (p * v))
    work = m * (f + b + w)
    return pytest.approx(timeline.makespan_us - work), pytest.approx(timeline.span_us - work)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("p", "m"), [(4, 8), (6, 18), (8, 16)])
def test_bubbles_are_those_of_the_docstrings(p, m, times):
    f, b, w = times
    total = f + b + w
    assert bubbles("naive", p, m, 1, times) == ((p - 1) * m * total,) * 2
    for name in ("gpipe", "1f1b", "afp"):
        assert bubbles(name, p, m, 1, times) == ((p - 1) * total,) * 2
    for v in (2, 3, 4):
        assert bubbles("breadth-first", p, m, v, times) == ((p - 1) * total / v,) * 2
        if m % p == 0:
            assert bubbles("interleaved-1f1b", p, m, v, times) == ((p - 1) * total / v,) * 2
    assert bubbles("zb-h1", p, m, 1, times) == ((p - 1) * max(f, b, f + b - w), (p - 1) * max(b, f + b - w))
    makespan, span = bubbles("zb-h2", p, m, 1, times)
    assert makespan == (p - 1) * max(f, f + b - 2 * w)
    if 2 * w <= f + b:
        assert span == (p - 1) * (f + b - 2 * w)
    if f <= b and w <= b:
        assert bubbles("zb-v", p, m, 2, times) == ((p - 1) * max(b / 2, b - w), (p - 1) * (b - w))


@pytest.mark.parametrize("times", [(1, 1, 1), (10, 11, 9)])
@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_dualpipev_idles_as_its_docstring_says(p, times):
    f, b, w = times
    assert bubbles("dualpipev", p, 3 * p, 2, times)[0] == (p - 1) * (f + b - w) / 2
    assert max(peaks("dualpipev", p, 3 * p, 2)) == 2 * (2 * p + 1)  # two per chunk-microbatch: p + 1/2 microbatches


@pytest.mark.parametrize("times", [(1, 1, 1), (4, 5, 3), (5, 4, 3), (10, 11, 9), (3, 3, 1)])
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 12), (6, 12), (6, 18), (8, 16), (8, 24)])
def test_dualpipe_idles_and_holds_as_its_docstring_says(p, m, times):
    f, b, w = times
    assert bubbles("dualpipe", p, m, 1, times)[0] == (p // 2 - 1) * (f + b - w)
    assert max(peaks("dualpipe", p, m)) == 2 * (p + 1)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("p", "units"), [(2, 1), (4, 1), (4, 2), (4, 3), (6, 2), (6, 3), (8, 2), (8, 3)])
def test_chimera_idles_and_holds_as_its_docstring_says(p, units, times):
    f, back = times[0], times[1] + times[2]
    want = (p - 2) * max(f, back) + (units - 1) * (p - 2) * abs(back - f)
    assert bubbles("chimera", p, units * p, 1, times) == (want, want)
    assert peaks("chimera", p, units * p) == tuple(2 * (p // 2 + 1 + min(r, p - 1 - r)) for r in range(p))


@pytest.mark.parametrize("times", [(1, 1, 1), (4, 5, 3), (10, 11, 9), (1, 0.5, 0.5), (3, 2, 2), (2, 2, 1)])
@pytest.mark.parametrize(("p", "units"), [(4, 1), (4, 2), (4, 3), (6, 1), (6, 3), (8, 2)])
def test_chimera_with_forward_doubling_idles_and_holds_as_its_docstring_says(p, units, times):
    f, back = times[0], times[1] + times[2]
    want = (p // 2 - 1) * (f + back)
    assert bubbles("chimera-doubling", p, 2 * p * units, 1, times) == (want, want)
    held = peaks("chimera-doubling", p, 2 * p * units)
    assert held == tuple(2 * (3 * p // 2 + 1 + min(r, p - 1 - r)) for r in range(p))


@pytest.mark.parametrize("times", [*TIMES, (5, 1, 1), (3, 1, 2)])
@pytest.mark.parametrize("p", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("m", [2, 3, 8, 13])
def test_gems_idles_and_holds_as_its_docstring_says(p, m, times):
    f, back = times[0], times[1] + times[2]
    stage = StageTimes(f, times[1], times[2], back, 0, 1)
    timeline = simulate(get_family("gems").generate(p, m), [stage] * p)
    if back >= f:
        assert timeline.makespan_us == p * f + m * p * back + (m - 1) * f
        assert timeline.span_us == pytest.approx(timeline.makespan_us - (0 if m % 2 else (p - 1) * f))
    else:
        assert timeline.makespan_us == m * p * f + (m - 1) * back + p * back
    assert timeline.peak_activation_bytes == (1,) * p


def test_bidirectional_families_say_what_they_need():
    assert all(get_family("gems").supports(p, m) is None for p in range(2, 9) for m in range(2, 20))
    assert "needs at least 2 ranks, not 1" in get_family("gems").supports(1, 4)
    assert "need a microbatch each, so at least 2, not 1" in get_family("gems").supports(4, 1)
    assert all(get_family("chimera").supports(p, m) is None for p in (2, 4, 6) for m in range(2, 20))
    assert "even number of ranks only, not 3; use gems" in get_family("chimera").supports(3, 4)
    assert [m for m in range(1, 30) if get_family("chimera-doubling").supports(4, m) is None] == [8, 16, 24]
    assert [m for m in range(1, 14) if get_family("dualpipe").supports(4, m) is None] == [8, 10, 12]
    assert "at least 8 microbatches for 4 ranks, not 6; use more" in get_family("dualpipe").supports(4, 6)
    assert "even number of ranks and of microbatches, not 3 and 8" in get_family("dualpipe").supports(3, 8)
    for family in FAMILIES.values():
        if family.num_replicas == 2:
            assert "one stage per rank, not 2; choose 1" in family.supports(4, 8, 2)


@pytest.mark.parametrize("p", range(2, 14))
def test_building_blocks_idle_and_hold_as_their_docstrings_say(p):
    for m in (2 * p + 2, 3 * p + 2):
        half = (7 * p - 4) / 4 if p % 2 == 0 else 7 * (p - 1) / 4
        assert bubbles("v-half", p, m, 2, (1, 1, 1))[1] == half
        assert bubbles("v-min", p, m, 2, (1, 1, 1))[1] == 2 * p - (1.5 if p % 3 == 0 else 2.5)
        assert max(peaks("v-half", p, m, 2)) == 4 * (p // 2 + 1)
        assert max(peaks("v-min", p, m, 2)) <= 4 * ((p + 4) // 3)
        assert max(peaks("zb-v", p, m, 2)) == 4 * p


@pytest.mark.parametrize("p", [4, 8])
@pytest.mark.parametrize("times", [t for t in TIMES if t[0] <= t[1] + t[2]])
def test_waves_idle_and_hold_as_their_docstring_says(p, times):
    f, back = times[0], times[1] + times[2]
    for waves in (1, 2):
        for units in (1, 2):
            want = (p - 1) / waves * (back + (units - 1) * (back - f))
            assert bubbles("hanayo", p, units * p, 2 * waves, times) == (want, want)
        held = peaks("hanayo", p, p, 2 * waves)
        assert held == tuple(2 * (2 * waves * p - (p - 1 - r)) for r in range(p))


def test_running_ahead_hides_slow_transfers():
    """Four ranks, eight microbatches, T_F = 1, T_BW = 5/4, hops of 0, 1/2 and 1."""
    made = {
        name: [
            simulate(get_family(name).generate(4, 8), [StageTimes(1, 0.5, 0.75, 1.25, hop)] * 4).makespan_us
            for hop in (0, 0.5, 1)
        ]
        for name in ("1f1b", "afp", "gpipe")
    }
    assert made == {"1f1b": [24.75, 32.75, 40.75], "afp": [24.75, 27.75, 30.75], "gpipe": [24.75, 27.75, 30.75]}


@given(RANKS, MICROBATCHES, st.integers(1, 9), st.integers(0, 9))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_peaks_of_forwards_run_ahead_are_those_of_the_docstrings(p, m, held, held_w):
    assert peaks("naive", p, m, held=held) == (held,) * p
    assert peaks("afp", p, m, held=held) == tuple(min(m, 2 * (p - r) - 1) * held for r in range(p))
    held_w = min(held, held_w)
    h2 = peaks("zb-h2", p, m, held=held, held_w=held_w)
    promised = tuple((2 * (p - r) - 1) * held + 2 * r * held_w for r in range(p))
    assert h2 == promised if m >= 2 * p - 1 else all(have <= most for have, most in zip(h2, promised, strict=True))
