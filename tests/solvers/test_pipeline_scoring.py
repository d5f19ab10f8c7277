"""Scoring an order: times, memory, refusals, against hand-made cases and a naive oracle."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_cases import ZOO, even, one_f_one_b, problems, zero_bubble_profile
from pipeline_oracle import optimum_us, order_cost_us

from solvers.list_scheduling import quick_order
from solvers.pipeline import Op, PipelineProblem, PipelineScore


def order_of(*lines):
    """Read `F0.0 B0.0 ...`, one string per rank."""
    ranks = []
    for line in lines:
        ops = []
        for token in line.split():
            kind = token.rstrip("0123456789.")
            stage, microbatch = token[len(kind) :].split(".")
            ops.append(Op(kind, int(stage), int(microbatch)))
        ranks.append(tuple(ops))
    return tuple(ranks)


TWO_BY_TWO = order_of("F0.0 F0.1 B0.0 W0.0 B0.1 W0.1", "F1.0 B1.0 F1.1 B1.1 W1.0 W1.1")


def test_a_hand_made_schedule_is_timed_and_weighed():
    score = even(2, 2).evaluate(TWO_BY_TWO)
    assert score == PipelineScore(
        objective_us=7,
        span_us=7,
        makespan_us=7,
        bubble_rate_span=1 / 7,
        bubble_rate_makespan=1 / 7,
        peak_bytes=(4, 3),
        fits=True,
        starts_us=((0, 1, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6)),
    )


def test_the_span_lets_a_rank_start_late_and_the_makespan_does_not():
    problem, optimum = ZOO["a_late_first_forward_saves_time"]
    order = order_of("F0.0 F0.1 B0.0 W0.0 B0.1 W0.1", "F1.0 F1.1 B1.0 B1.1 W1.0 W1.1")
    score = problem.evaluate(order)
    assert score.span_us == optimum == 44  # F1.0 at 9 instead of 5
    assert score.makespan_us == 53
    assert score.starts_us[1][:2] == (9, 10)
    assert replace(problem, objective="makespan").evaluate(order).starts_us[1][:2] == (5, 10)


def test_1f1b_has_the_published_bubble_rate():
    problem = zero_bubble_profile(split=False)
    score = problem.evaluate(one_f_one_b(8, 24))
    assert round(score.bubble_rate_span, 4) == 0.2431
    assert score.peak_bytes == tuple(2 * (8 - rank) for rank in range(8))
    assert score.fits


@pytest.mark.parametrize(("p", "m"), [(1, 3), (4, 8), (8, 12), (6, 4)])
def test_1f1b_has_the_bubble_of_the_formula(p, m):
    score = even(p, m, 2, 2, 2, split=False).evaluate(one_f_one_b(p, m))
    assert score.makespan_us == (m + p - 1) * 6
    assert score.bubble_rate_makespan == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize(
    ("held", "kept", "peak"),
    [
        (2, 1, 4),  # two microbatches
        (2, 2, 4),
        (2, 0, 4),
        (2, 5, 7),  # F F take 4, the first B takes 3 more when it starts
    ],
)
def test_memory_follows_the_order(held, kept, peak):
    problem = even(1, 2, held=held, kept=kept)
    score = problem.evaluate(order_of("F0.0 F0.1 B0.0 W0.0 B0.1 W0.1"))
    assert score.peak_bytes == (peak,)
    assert (
        not even(1, 2, held=held, kept=kept, memory=peak - 1).evaluate(order_of("F0.0 F0.1 B0.0 W0.0 B0.1 W0.1")).fits
    )


def test_a_fused_backward_gives_everything_back_at_its_end():
    problem = even(1, 2, split=False, held=3, kept=100)
    assert problem.evaluate(order_of("F0.0 BW0.0 F0.1 BW0.1")).peak_bytes == (3,)


def test_recomputing_takes_the_rest_of_the_activations_when_it_starts():
    problem = even(1, 2, held=7, kept=1, recompute=2, checkpoint=3)
    apart = problem.evaluate(order_of("F0.0 F0.1 R0.0 B0.0 W0.0 R0.1 B0.1 W0.1"))
    assert apart.peak_bytes == (3 + 7,)
    assert apart.starts_us == ((0, 1, 2, 4, 5, 6, 8, 9),)
    assert problem.evaluate(order_of("F0.0 F0.1 R0.0 R0.1 B0.0 W0.0 B0.1 W0.1")).peak_bytes == (7 + 7,)
    assert problem.evaluate(order_of("F0.0 F0.1 R0.0 B0.0 R0.1 B0.1 W0.0 W0.1")).peak_bytes == (3 + 7,)
    fused = even(1, 2, held=7, kept=100, recompute=2, checkpoint=3, split=False)
    assert fused.evaluate(order_of("F0.0 F0.1 R0.0 BW0.0 R0.1 BW0.1")).peak_bytes == (3 + 7,)
    more = even(1, 1, held=2, kept=9, recompute=2, checkpoint=1)  # B takes 7 when it starts
    assert more.evaluate(order_of("F0.0 R0.0 B0.0 W0.0")).peak_bytes == (9,)


def test_recomputing_needs_no_gradient():
    problem = even(2, 1, recompute=3, objective="makespan")
    score = problem.evaluate(order_of("F0.0 R0.0 B0.0 W0.0", "F1.0 R1.0 B1.0 W1.0"))
    assert score.starts_us == ((0, 1, 6, 7), (1, 2, 5, 6))


def test_what_is_fixed_is_part_of_the_peak():
    order = order_of("F0.0 F0.1 B0.0 W0.0 B0.1 W0.1")
    assert even(1, 2, fixed=10).evaluate(order).peak_bytes == (14,)
    assert even(1, 2, fixed=10, memory=14).evaluate(order).fits
    assert not even(1, 2, fixed=10, memory=13).evaluate(order).fits


def test_too_many_in_flight_do_not_fit():
    two = order_of("F0.0 F0.1 B0.0 W0.0 B0.1 W0.1")
    assert not even(1, 2, in_flight=1).evaluate(two).fits
    assert even(1, 2, in_flight=2).evaluate(two).fits
    assert even(1, 2, in_flight=1).evaluate(order_of("F0.0 B0.0 F0.1 B0.1 W0.0 W0.1")).fits  # a W pending is not
    chunks = even(1, 1, in_flight=1, rank_of_stage=(0, 0))
    assert chunks.evaluate(order_of("F0.0 F1.0 B1.0 W1.0 B0.0 W0.0")).fits  # each stage by itself


def test_bubble_rates_compare_with_the_busiest_rank():
    problem = PipelineProblem((1, 3), (1, 3), (1, 3), (True, True), (0,), (0, 1), 1, (1, 1), (1, 1))
    score = problem.evaluate(order_of("F0.0 B0.0 W0.0", "F1.0 B1.0 W1.0"))
    assert score.span_us == 9
    assert score.makespan_us == 10
    assert score.bubble_rate_span == 0
    assert score.bubble_rate_makespan == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("F0.0 B0.0 W0.0",), "the order has 1 ranks, the problem 2"),
        (("F0.0 B0.0 W0.0", "F1.0 B1.0"), "rank 1 never runs W1.0"),
        (("F0.0 B0.0 W0.0 W0.0", "F1.0 B1.0 W1.0"), r"rank 0, step 3: W0.0 runs a second time"),
        (("F0.0 B0.0 W0.0", "F1.0 B1.0 W1.1"), "rank 1, step 2: W1.1 does not exist, there are 2 stages and 1 micro"),
        (("F0.0 B0.0 W0.0", "F1.0 BW1.0"), "rank 1, step 1: stage 1 runs F, B, W, not BW"),
        (("F0.0 F1.0 B0.0 W0.0", "B1.0 W1.0"), "rank 0, step 1: F1.0 belongs to rank 1, which hosts stage 1"),
        (
            ("B0.0 F0.0 W0.0", "F1.0 B1.0 W1.0"),
            "deadlocks: rank 0, step 0: B0.0 waits for F0.0, which is step 1 of rank 0",
        ),
        (
            ("F0.0 W0.0 B0.0", "F1.0 B1.0 W1.0"),
            "deadlocks: rank 0, step 1: W0.0 waits for B0.0, which is step 2 of rank 0",
        ),
    ],
)
def test_an_order_that_is_none_is_refused_with_rank_and_op(lines, message):
    with pytest.raises(ValueError, match=message):
        even(2, 1).evaluate(order_of(*lines))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("F0.0 B0.0 W0.0", "rank 0 never runs R0.0"),
        ("F0.0 B0.0 R0.0 W0.0", "rank 0, step 1: B0.0 waits for R0.0, which is step 2 of rank 0 and never runs"),
        ("R0.0 F0.0 B0.0 W0.0", "rank 0, step 0: R0.0 waits for F0.0, which is step 1 of rank 0 and never runs"),
        ("F0.0 R0.0 R0.0 B0.0 W0.0", "rank 0, step 2: R0.0 runs a second time"),
        ("F0.0 R0.0 BW0.0", "rank 0, step 2: stage 0 runs F, R, B, W, not BW"),
    ],
)
def test_an_order_with_its_recomputation_out_of_place_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        even(1, 1, recompute=1).evaluate(order_of(line))


def test_recomputation_on_a_stage_without_is_refused():
    problem = replace(even(2, 1), recompute_us=(0, 1), checkpoint_bytes=(0, 0))
    with pytest.raises(ValueError, match="rank 0, step 1: stage 0 runs F, B, W, not R"):
        problem.evaluate(order_of("F0.0 R0.0 B0.0 W0.0", "F1.0 R1.0 B1.0 W1.0"))
    assert problem.num_ops == 7


def test_ranks_that_wait_for_each_other_deadlock():
    order = order_of("F0.0 B0.0 F0.1 B0.1 W0.0 W0.1", "F1.0 F1.1 B1.0 B1.1 W1.0 W1.1")
    with pytest.raises(ValueError, match=r"rank 0, step 1: B0.0 waits for B1.0, which is step 2 of rank 1 and never"):
        even(2, 2).evaluate(order)


def test_renaming_microbatches_changes_no_time_and_no_memory():
    swapped = order_of("F0.1 F0.0 B0.1 W0.1 B0.0 W0.0", "F1.1 B1.1 F1.0 B1.0 W1.1 W1.0")
    problem = even(2, 2)
    assert problem.canonical(swapped) == TWO_BY_TWO
    assert problem.evaluate(swapped) == problem.evaluate(TWO_BY_TWO)


@given(st.integers(0, 10**6), st.sampled_from([(0, 1), (0, 0)]), st.sampled_from(["span", "makespan"]))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_microbatch_order_loses_nothing(seed, placement, objective):
    rng = Random(seed)

    def pair(low, high):
        return rng.randint(low, high), rng.randint(low, high)

    m = 2 if placement == (0, 1) else 1
    problem = PipelineProblem(
        pair(1, 4), pair(1, 4), pair(1, 4), (True, rng.random() < 0.5), (rng.randint(0, 2),), placement, m, pair(1, 3),
        pair(0, 3), None, objective,
    )  # fmt: skip
    if rng.random() < 0.5:
        problem = replace(problem, recompute_us=pair(0, 2), checkpoint_bytes=(0, 1))
    if rng.random() < 0.3:
        problem = replace(problem, max_in_flight=pair(1, 2))
    room = tuple(need + rng.randint(0, 2) for need in problem.single_microbatch_bytes())
    problem = replace(problem, capacity_bytes=room)
    assert optimum_us(problem) == optimum_us(problem, any_microbatch_order=True)


@given(problems(max_time=9, general=True), st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_scores_agree_with_a_naive_timing_of_shuffled_orders(problem, rng):
    if not problem.is_feasible():
        return
    order = [list(ops) for ops in quick_order(problem, None)]
    for _ in range(rng.randrange(6)):  # shuffle a little, so that the order may or may not deadlock
        ops = rng.choice(order)
        if len(ops) > 1:
            at = rng.randrange(len(ops) - 1)
            ops[at], ops[at + 1] = ops[at + 1], ops[at]
    want = order_cost_us(problem, order)
    if want is None:
        with pytest.raises(ValueError, match="deadlocks"):
            problem.evaluate(tuple(map(tuple, order)))
    else:
        score = problem.evaluate(tuple(map(tuple, order)))
        assert score.objective_us == want
        assert score.objective_us == (score.span_us if problem.objective == "span" else score.makespan_us)
        _check_timing(problem, order, score)


def _check_timing(problem, order, score):
    """The starts that come with a score keep every precedence and attain the objective."""
    start, end = {}, {}
    for ops, row in zip(order, score.starts_us, strict=True):
        for op, at in zip(ops, row, strict=True):
            start[op], end[op] = at, at + problem.duration_us(op.kind, op.stage)
        assert all(end[a] <= start[b] for a, b in pairwise(ops))
    for op, at in start.items():
        if op.kind == "F" and op.stage:
            assert at >= end["F", op.stage - 1, op.microbatch] + problem.transfer_us[op.stage - 1]
        if op.kind in ("B", "BW") and op.stage + 1 < problem.num_stages:
            above = "B" if problem.split[op.stage + 1] else "BW"
            assert at >= end[above, op.stage + 1, op.microbatch] + problem.transfer_us[op.stage]
    spans = [end[ops[-1]] - start[ops[0]] for ops in order]
    cost = max(spans) if problem.objective == "span" else max(end.values()) - min(start.values())
    assert cost == score.objective_us


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward_us": ()}, "at least one stage"),
        ({"backward_us": (1,)}, "backward_us has 1 entries, 2 stages need 2"),
        ({"transfer_us": (1, 1)}, "transfer_us has 2 entries, 2 stages need 1"),
        ({"forward_us": (1, 0)}, r"forward_us\[1\] is 0, it must be between 1"),
        ({"weight_us": (1, -1)}, r"weight_us\[1\] is -1, it must be between 0"),
        ({"weight_us": (1, 1.5)}, r"weight_us\[1\] is 1.5, a whole number is needed"),
        ({"weight_us": (1, True)}, r"weight_us\[1\] is True, a whole number is needed"),
        ({"rank_of_stage": (0, 0, 1)}, "rank_of_stage has 3 entries"),
        ({"rank_of_stage": (1, 1)}, r"rank_of_stage \(1, 1\) leaves rank 0 without a stage"),
        ({"num_microbatches": 0}, "num_microbatches is 0"),
        ({"capacity_bytes": (1,)}, "capacity_bytes has 1 entries, there are 2 ranks"),
        ({"capacity_bytes": (1, -1)}, r"capacity_bytes\[1\] is -1"),
        ({"fixed_bytes": (1,)}, "fixed_bytes has 1 entries, there are 2 ranks"),
        ({"fixed_bytes": (1, -1)}, r"fixed_bytes\[1\] is -1"),
        ({"max_in_flight": (1,)}, "max_in_flight has 1 entries, 2 stages need 2"),
        ({"max_in_flight": (1, 0)}, r"max_in_flight\[1\] is 0, it must be between 1"),
        (
            {"recompute_us": (1, 1)},
            "recompute_us is given without checkpoint_bytes: a stage that recomputes needs both",
        ),
        ({"checkpoint_bytes": (1, 1)}, "checkpoint_bytes is given without recompute_us"),
        (
            {"recompute_us": (1, 1), "checkpoint_bytes": (1, 3)},
            r"checkpoint_bytes\[1\] is 3, more than the .*, 2, which",
        ),
        ({"recompute_us": (1, -1), "checkpoint_bytes": (1, 1)}, r"recompute_us\[1\] is -1, it must be between 0"),
        ({"recompute_us": (1,), "checkpoint_bytes": (1, 1)}, "recompute_us has 1 entries, 2 stages need 2"),
        ({"recompute_us": (), "checkpoint_bytes": ()}, "recompute_us has 0 entries, 2 stages need 2"),
        ({"objective": "speed"}, "objective is 'speed', choose 'span' or 'makespan'"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(even(2, 2), **change)
