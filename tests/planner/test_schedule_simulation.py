"""The simulation against closed formulas, published numbers, cases done by hand, and a slow oracle."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import (
    bidirectional_schedules,
    earliest_starts,
    peak_bytes,
    stages_for,
    uniform_stages,
    valid_schedules,
)

from planner.errors import ScheduleError
from planner.plans import StageCosts
from planner.schedule.actions import Schedule
from planner.schedule.families import get_family
from planner.schedule.simulation import StageTimes, Timeline, simulate

RANKS, MICROBATCHES, TIMES = st.integers(1, 6), st.integers(1, 14), st.integers(1, 50)

ZB_H2 = """\
F0.0 F0.1 F0.2 F0.3 F0.4 F0.5 F0.6 B0.0 W0.0 F0.7 B0.1 W0.1 B0.2 W0.2 B0.3 W0.3 B0.4 W0.4 B0.5 W0.5 B0.6 W0.6 B0.7 W0.7
F1.0 F1.1 F1.2 F1.3 F1.4 B1.0 F1.5 B1.1 F1.6 B1.2 W1.0 F1.7 B1.3 W1.1 B1.4 W1.2 B1.5 W1.3 B1.6 W1.4 B1.7 W1.5 W1.6 W1.7
F2.0 F2.1 F2.2 B2.0 F2.3 B2.1 F2.4 B2.2 F2.5 B2.3 F2.6 B2.4 W2.0 F2.7 B2.5 W2.1 B2.6 W2.2 B2.7 W2.3 W2.4 W2.5 W2.6 W2.7
F3.0 B3.0 F3.1 B3.1 F3.2 B3.2 F3.3 B3.3 F3.4 B3.4 F3.5 B3.5 F3.6 B3.6 W3.0 F3.7 B3.7 W3.1 W3.2 W3.3 W3.4 W3.5 W3.6 W3.7
"""


def run(name: str, p: int, m: int, v: int = 1, *, f=1.0, b=1.0, w=1.0, transfer=0.0) -> Timeline:
    """A family on equal stages; f, b, w are times through a whole rank."""
    stages = uniform_stages(p * v, f=f / v, b=b / v, w=w / v, transfer=transfer)
    return simulate(get_family(name).generate(p, m, v), stages)


@given(st.sampled_from(["gpipe", "1f1b"]), RANKS, MICROBATCHES, TIMES, TIMES, TIMES)
@settings(derandomize=True, deadline=None)
def test_gpipe_and_1f1b_idle_for_p_minus_1_microbatches(name, p, m, f, b, w):
    timeline = run(name, p, m, f=f, b=b, w=w)
    assert timeline.makespan_us - timeline.work_us == (p - 1) * (f + b + w)
    assert timeline.span_us == timeline.makespan_us
    assert timeline.work_us == m * (f + b + w)
    assert timeline.bubble_rate_makespan == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert timeline.bubble_rate_span == timeline.bubble_rate_makespan


@given(RANKS, st.integers(1, 3), st.integers(2, 4), TIMES, TIMES, TIMES)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_interleaving_divides_the_bubble_by_the_chunks(p, groups, v, f, b, w):
    timeline = run("interleaved-1f1b", p, groups * p, v, f=f * v, b=b * v, w=w * v)
    assert timeline.makespan_us - timeline.work_us == (p - 1) * (f + b + w)
    assert timeline.span_us == timeline.makespan_us


@given(st.integers(2, 6), st.integers(1, 5), st.integers(2, 4), TIMES, TIMES)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_interleaving_fewer_microbatches_than_ranks_idles_longer(p, m, v, f, bw):
    m = min(m, p - 1)
    timeline = run("interleaved-1f1b", p, m, v, f=f * v, b=bw * v, w=0)
    assert timeline.makespan_us - timeline.work_us == (p - 1 + (p - m) * (v - 1)) * (f + bw)
    assert timeline.span_us == timeline.makespan_us


@given(RANKS, st.integers(0, 12), TIMES, TIMES, TIMES)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_zb_h1_idles_as_its_docstring_says(p, more, f, b, w):
    timeline = run("zb-h1", p, p + more, f=f, b=b, w=w)
    assert timeline.makespan_us - timeline.work_us == (p - 1) * max(f, b, f + b - w)
    assert timeline.span_us - timeline.work_us == (p - 1) * max(b, f + b - w)


@pytest.mark.parametrize(("f", "b", "w"), [(1, 1, 1), (4, 5, 3), (10, 11, 9), (4, 9, 3), (5, 4, 3)])
def test_zb_h2_has_another_span_than_makespan(f, b, w):
    timeline = simulate(Schedule.from_lines(ZB_H2.splitlines()), uniform_stages(4, f=f, b=b, w=w))
    assert timeline.span_us - timeline.work_us == 3 * (f + b - 2 * w)
    assert timeline.makespan_us - timeline.work_us == 3 * max(f, f + b - 2 * w)
    assert timeline.peak_activation_bytes == tuple((2 * (4 - r) - 1) * 2 + 2 * r for r in range(4))


# Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024 (arXiv 2401.10241). p = 8; m; F, B, W, hop in µs; v;
# span bubble rates of 1F1B, interleaved 1F1B, ZB-H1. v is not given: the rates fit 3 at 1.5B, 4 at 6.2B.
PUBLISHED = {
    "1.5B m=24": (24, 18522, 18086, 9337, 601, 3, 0.2431, 0.1055, 0.1585),
    "1.5B m=32": (32, 18513, 18086, 9331, 626, 3, 0.1985, 0.0818, 0.1242),
    "1.5B m=64": (64, 18546, 18097, 9321, 762, 3, 0.124, 0.0443, 0.0674),
    "6.2B m=24": (24, 29718, 29444, 19927, 527, 4, 0.2347, 0.0808, 0.1323),
    "6.2B m=32": (32, 29802, 29428, 19530, 577, 4, 0.1898, 0.0628, 0.1045),
    "6.2B m=64": (64, 29935, 29621, 19388, 535, 4, 0.1091, 0.032, 0.0554),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_bubble_rates_come_out(name):
    m, f, b, w, transfer, v, rate_1f1b, rate_interleaved, rate_h1 = PUBLISHED[name]
    for family, published in (("1f1b", rate_1f1b), ("zb-h1", rate_h1)):
        timeline = run(family, 8, m, f=f, b=b, w=w, transfer=transfer)
        assert round(timeline.bubble_rate_span, 4) == published
        assert max(timeline.peak_activation_bytes) == 8 * 2
    # our critical path crosses 2(pv − 1) boundaries; the published rate is that of p fewer, order unknown
    interleaved = run("interleaved-1f1b", 8, m, v, f=f, b=b, w=w, transfer=transfer)
    hops = 2 * (8 * v - 1)
    assert interleaved.span_us == pytest.approx((m + 7 / v) * (f + b + w) + hops * transfer)
    nearer_us = interleaved.span_us - 8 * transfer
    assert round(1 - interleaved.work_us / nearer_us, 4) == pytest.approx(rate_interleaved, abs=1.01e-4)


@pytest.mark.parametrize(
    ("name", "transfer", "makespan"),
    [
        ("1f1b", 0, 24.75),
        ("1f1b", 0.5, 32.75),
        ("1f1b", 1, 40.75),
        ("gpipe", 0.5, 27.75),
        ("gpipe", 1, 30.75),
    ],
)
def test_1f1b_suffers_more_from_transfers_than_gpipe(name, transfer, makespan):
    assert run(name, 4, 8, f=1, b=1, w=0.25, transfer=transfer).makespan_us == makespan


def test_a_small_case_by_hand():
    # r0: F 0-3, F 3-6, BW 13-18, BW 21-26
    # r1: F 4-8, BW 8-12, F 12-16, BW 16-20; one µs on the way each time
    stages = [StageTimes(3, 2, 3, 5, 1), StageTimes(4, 2, 2, 4, 9)]
    timeline = simulate(Schedule.from_lines(["F0.0 F0.1 BW0.0 BW0.1", "F1.0 BW1.0 F1.1 BW1.1"]), stages)
    assert [[(str(t.action), t.start_us, t.end_us) for t in rank] for rank in timeline.ranks] == [
        [("F0.0", 0, 3), ("F0.1", 3, 6), ("BW0.0", 13, 18), ("BW0.1", 21, 26)],
        [("F1.0", 4, 8), ("BW1.0", 8, 12), ("F1.1", 12, 16), ("BW1.1", 16, 20)],
    ]
    assert timeline.makespan_us == timeline.span_us == 26
    assert timeline.busy_us == (16, 16)
    assert timeline.bubble_rate_makespan == pytest.approx(10 / 26)


def test_a_rank_that_waits_before_its_first_action_shortens_the_span():
    # r1 as soon as possible: F 10-11, F 20-21, B B 21-23, W W 23-43, span 33; with its first F at 19 it is 24
    # r0: F F 0-20, B 22-23, W 23-24, B 24-25, W 25-26
    stages = [StageTimes(10, 1, 1, 2), StageTimes(1, 1, 10, 11)]
    lines = ["F0.0 F0.1 B0.0 W0.0 B0.1 W0.1", "F1.0 F1.1 B1.0 B1.1 W1.0 W1.1"]
    timeline = simulate(Schedule.from_lines(lines), stages)
    assert (timeline.makespan_us, timeline.span_us) == (43, 26)
    assert timeline.bubble_rate_span == pytest.approx(2 / 26)


def test_two_ranks_that_gain_at_each_others_cost_share_the_span():
    # as soon as possible: r0 F F 0-12, B B 14-26; r1 F B 8-12, F B 14-18, W W 18-36: spans 26 and 28.
    # r1 may start later, but each µs delays r0's first B too: 27 and 27 is the best.
    stages = [StageTimes(6, 6, 0, 6, 2), StageTimes(2, 2, 9, 11)]
    lines = ["F0.0 F0.1 B0.0 B0.1 W0.0 W0.1", "F1.0 B1.0 F1.1 B1.1 W1.0 W1.1"]
    timeline = simulate(Schedule.from_lines(lines), stages)
    assert (timeline.makespan_us, timeline.span_us) == (36, 27)


def test_transfers_within_a_rank_take_no_time():
    stages = uniform_stages(2, transfer=100)
    assert simulate(Schedule.from_lines(["F0.0 F1.0 BW1.0 BW0.0"]), stages).makespan_us == 6
    assert simulate(Schedule.from_lines(["F0.0 BW0.0", "F1.0 BW1.0"]), stages).makespan_us == 206


def test_an_action_of_each_kind_takes_the_time_of_its_kind():
    stages = [StageTimes(1, 10, 100, 1000)]
    assert simulate(Schedule.from_lines(["F0.0 F0.1 B0.0 W0.0 BW0.1"]), stages).busy_us == (1112,)


@pytest.mark.parametrize(
    ("lines", "held", "held_w", "peak"),
    [
        (["F0.0 F0.1 BW0.0 BW0.1"], 5, 2, 10),
        (["F0.0 B0.0 F0.1 B0.1 W0.0 W0.1"], 5, 2, 7),  # W0 still holds 2 when F1 takes 5
        (["F0.0 B0.0 F0.1 B0.1 W0.0 W0.1"], 5, 8, 16),  # B grows what is held: 8 + 8
        (["F0.0 B0.0 W0.0 F0.1 BW0.1"], 5, 8, 8),
        (["F0.0 BW0.0"], 0, 9, 0),
    ],
)
def test_memory_follows_every_start_and_end(lines, held, held_w, peak):
    timeline = simulate(Schedule.from_lines(lines), [StageTimes(1, 1, 1, 2, 0, held, held_w)])
    assert timeline.peak_activation_bytes == (peak,)


def test_stages_of_a_plan_can_be_simulated():
    stage = StageCosts(
        forward_us=2,
        backward_input_us=1,
        backward_weight_us=1,
        fused_backward_us=2,
        optimizer_us=9,
        parameter_bytes=9,
        activation_bytes=4,
        weight_activation_bytes=1,
        output_bytes=9,
        temporary_bytes=9,
        transfer_us=0.5,
    )
    timeline = simulate(get_family("1f1b").generate(2, 2), [stage, stage])
    assert timeline.makespan_us == 13
    assert timeline.peak_activation_bytes == (8, 4)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["forward_us", "transfer_us"])
def test_a_time_that_is_no_time_is_refused(name, value):
    stage = replace(StageTimes(1, 1, 1, 2), **{name: value})
    with pytest.raises(ValueError, match=rf"stage 0: {name} is .*, not a finite time of at least 0"):
        simulate(Schedule.from_lines(["F0.0 BW0.0"]), [stage])


def test_stages_and_schedule_must_agree():
    schedule = get_family("1f1b").generate(2, 2)
    with pytest.raises(ScheduleError, match=r"stage 1 is out of range, there are 1 stages"):
        simulate(schedule, uniform_stages(1))
    with pytest.raises(ScheduleError, match=r"no rank runs stage 2; the schedule must run all 3 stages"):
        simulate(schedule, uniform_stages(3))


def test_work_that_takes_no_time_has_no_bubble():
    timeline = simulate(get_family("zb-h1").generate(2, 2), [StageTimes(0, 0, 0, 0)] * 2)
    assert (timeline.span_us, timeline.bubble_rate_span, timeline.bubble_rate_makespan) == (0, 0, 0)


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=150)
def test_times_and_memory_agree_with_the_oracle(data):
    schedule = data.draw(st.one_of(valid_schedules(), bidirectional_schedules()))
    stages = data.draw(stages_for(schedule))
    timeline = simulate(schedule, stages)
    starts = earliest_starts(schedule, stages)
    for actions, timed in zip(schedule.ranks, timeline.ranks, strict=True):
        assert [t.action for t in timed] == list(actions)
        assert [t.start_us for t in timed] == [starts[action] for action in actions]
    peaks = tuple(peak_bytes(actions, stages) for actions in schedule.ranks)
    assert timeline.peak_activation_bytes == peaks


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=100)
def test_no_timing_has_a_smaller_span_and_one_has_it(data):
    schedule = data.draw(
        st.one_of(valid_schedules(max_stages=5, max_microbatches=3), bidirectional_schedules(max_microbatches=3))
    )
    stages = data.draw(stages_for(schedule))
    timeline = simulate(schedule, stages)
    span = Fraction(timeline.span_us).limit_denominator(schedule.num_ranks)  # a mean over at most p ranks
    assert timeline.span_us == pytest.approx(float(span), rel=1e-12)
    assert earliest_starts(schedule, stages, span) is not None
    assert earliest_starts(schedule, stages, span - Fraction(1, 1000)) is None
    assert timeline.work_us <= timeline.span_us <= timeline.makespan_us


def test_a_hundred_thousand_actions_are_simulated():
    timeline = run("zb-h1", 64, 512)
    assert sum(map(len, timeline.ranks)) == 64 * 512 * 3
    assert timeline.makespan_us - timeline.work_us == 63
