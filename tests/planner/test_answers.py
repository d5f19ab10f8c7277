"""Answers beside the plan: they add up, agree with planning again, and say what they cannot know."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.answers import (
    Change,
    budget,
    compare_layouts,
    parse_tokens,
    smallest_cluster,
    top_layouts,
    what_if,
)
from planner.answers.readings import difference_words, part_differences
from planner.api import plan
from planner.errors import LayoutError, PlanError
from planner.plans import TimeParts
from profiles.analytic import profile_model
from profiles.catalog import load_cluster, model
from profiles.collectives import Fabric
from profiles.errors import PipewrightError
from profiles.model import Variant

JOB = ("llama-3.2-1b", "1x8xa100-80gb")
SIZES = {"global_batch_size": 64, "sequence_length": 2048}
FIXED = {**SIZES, "family": "1f1b"}  # proven quickly, so that equal questions get equal answers
PART_NAMES = tuple(TimeParts.model_fields)


def made(**arguments):
    return plan(*JOB, **{**FIXED, "time_limit_s": 20, **arguments})


@pytest.fixture(scope="module")
def pinned():
    return made(tp=4, pp=2, recompute="full")


@pytest.fixture(scope="module")
def best_five():
    return made(top=5)


drawn_parts = st.lists(
    st.floats(0, 1e9, allow_subnormal=False), min_size=len(PART_NAMES), max_size=len(PART_NAMES)
).map(lambda values: TimeParts(**dict(zip(PART_NAMES, values, strict=True))))


@given(drawn_parts, drawn_parts)
@settings(derandomize=True, deadline=None)
def test_differences_of_parts_add_up_to_the_difference_of_steps(parts, other):
    differences = part_differences(parts, other)
    total = math.fsum(difference.difference_us for difference in differences)
    assert total == pytest.approx(parts.total_us - other.total_us, abs=1e-6 * (1 + parts.total_us + other.total_us))
    named = {difference.part for difference in differences}
    for name in PART_NAMES:
        if getattr(parts, name) != getattr(other, name):
            assert name.removesuffix("_us").replace("_", " ") in named


def test_words_name_the_largest_differences_first():
    nothing = dict.fromkeys(PART_NAMES, 0.0)
    parts = TimeParts(**{**nothing, "compute_us": 104.0, "bubble_us": 20.0, "optimizer_us": 0.01})
    other = TimeParts(**{**nothing, "compute_us": 100.0, "recompute_us": 7.0})
    words = difference_words(part_differences(parts, other), 100.0)
    assert words == "bubble +20.0%, recompute -7.0%, compute +4.0%"
    assert difference_words(part_differences(other, other), 100.0) == "nothing over 0.1%"


def test_why_not_a_pinned_layout_is_said_in_parts_that_add_up(pinned):
    comparison = compare_layouts(pinned)
    free = made()
    assert comparison.other.step_time_us == pytest.approx(free.prediction.step_time_us)
    assert comparison.layout.layout == pinned.layout.degrees
    assert comparison.difference_us == pytest.approx(pinned.prediction.step_time_us - free.prediction.step_time_us)
    by_part = {part.part: part.difference_us for part in comparison.parts}
    assert sum(by_part.values()) == pytest.approx(comparison.difference_us)
    assert by_part["recompute"] == pytest.approx(pinned.prediction.parts.recompute_us)
    assert by_part["recompute"] > 0
    assert by_part["tensor parallel"] > 0
    assert by_part["bubble"] > 0
    assert re.search(r"slower: .*recompute \+", comparison.words)


def test_a_pin_that_changes_nothing_is_said_to_change_nothing(best_five):
    layout = best_five.layout
    same = made(dp=layout.dp, pp=layout.pp, top=3)
    comparison = compare_layouts(same)
    assert comparison.is_same
    assert comparison.difference_us == 0
    assert comparison.words == "as fast"
    rows = top_layouts(same, 3).rows
    assert rows[0].label == "this plan, also without pins"
    assert len({row.layout for row in rows}) == 3


@pytest.mark.parametrize(
    ("pins", "sent", "not_sent"),
    [
        ({"ep": 8, "cp": 1}, "expert_parallel_us", "context_parallel_us"),
        ({"cp": 2, "ep": 1, "tp": 1}, "context_parallel_us", "expert_parallel_us"),
        ({"tp": 8, "ep": 1}, "tensor_parallel_us", "expert_parallel_us"),
    ],
)
def test_traffic_is_told_apart_by_what_sends_it(pins, sent, not_sent):
    alone = pins.get("cp", 1) == 1
    cluster = "4x8xh100-sxm" if alone else "4x1xh100-sxm"
    name = "mixtral-8x7b" if alone else "llama-3.2-1b"
    found = plan(name, cluster, family="1f1b", global_batch_size=64, sequence_length=2048, time_limit_s=3, **pins)
    parts = found.prediction.parts
    assert getattr(parts, sent) > 0
    assert getattr(parts, not_sent) == 0
    assert parts.total_us == pytest.approx(found.prediction.step_time_us, rel=1e-12)


def test_ranks_of_different_devices_have_parts_that_add_up():
    found = plan("llama-3.2-1b", "mixed-h100-a100", family="1f1b", pp=2, tp=8, **SIZES, time_limit_s=4)
    assert found.prediction.parts.total_us == pytest.approx(found.prediction.step_time_us, rel=1e-12)
    assert found.prediction.parts.tensor_parallel_us > 0
    assert found.prediction.parts.compute_us > 0


def test_a_plan_without_pins_has_nothing_to_compare_with(best_five):
    with pytest.raises(PlanError, match="no alternative labelled 'without pins'"):
        compare_layouts(best_five)


def test_recomputation_costs_what_the_forward_costs():
    def best(recompute):
        return plan(
            "llama-2-7b", "1x8xa100-80gb", tp=1, pp=2, micro_batch_size=1, recompute=recompute, **FIXED, time_limit_s=5
        )

    repeated, free = best("full"), best("none")
    forwards = repeated.layout.num_microbatches * max(stage.forward_us for stage in repeated.stages)
    assert 0.9 * forwards < repeated.prediction.parts.recompute_us < forwards  # embedding and head are not repeated
    assert repeated.prediction.hfu == pytest.approx(repeated.prediction.mfu * 4 / 3, rel=0.02)
    assert free.prediction.parts.recompute_us == 0
    assert free.prediction.hfu == pytest.approx(free.prediction.mfu)


def test_tensor_parallel_time_is_what_faster_links_would_save():
    here = made(tp=8, micro_batch_size=4, zero_stage=0)
    fast = what_if(*JOB, ["intra-link=100000x", "latency=0.00001x"], base=here, tp=8, micro_batch_size=4, **FIXED)
    saved = [here.prediction.step_time_us - outcome.step_time_us for outcome in fast.changes]
    assert 0 < max(saved) <= here.prediction.parts.tensor_parallel_us * 1.001
    assert here.prediction.parts.tensor_parallel_us <= sum(saved) * 1.05


def test_the_top_layouts_differ_and_are_the_best_there_are(best_five):
    top = top_layouts(best_five, 5)
    assert [row.label for row in top.rows] == ["this plan", "", "", "", ""]
    times = [row.step_time_us for row in top.rows]
    assert times == sorted(times)
    assert len({row.layout.split(" zero")[0] for row in top.rows}) == 5
    assert top.rows[0].gap_to_best == 0
    for row in top.rows[1:]:
        total = math.fsum(part.difference_us for part in row.differences)
        assert total == pytest.approx(row.step_time_us - times[0], abs=1e-3)
    # the next best is the best once the best degrees are left out
    degrees = best_five.layout
    other = next(row for row in top.rows if f"dp{degrees.dp} " not in row.layout)
    again = made(excluded=(("dp", degrees.dp),))
    assert again.prediction.step_time_us == pytest.approx(other.step_time_us)


def test_top_counts_are_checked():
    with pytest.raises(LayoutError, match="top 5000: give 0 to 1000"):
        made(top=5000)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("15T", 15 * 10**12), ("300B", 300 * 10**9), ("1.5e12", 15 * 10**11), ("2k", 2000), ("7", 7), ("0.5M", 500_000)],
)
def test_tokens_are_read_as_people_write_them(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "T", "-1B", "0", "1Q", "nan", "1e99", "1.2.3", "0.1", "٣B"])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(LayoutError, match="token budget"):
        parse_tokens(text)


def test_a_budget_is_steps_times_step_time(best_five):
    spent = budget(best_five, 10**9)
    assert spent.tokens_per_step == 64 * 2048
    assert spent.num_steps == 7630  # 10^9 / 131072 is 7629.4
    assert spent.days == pytest.approx(7630 * best_five.prediction.step_time_us / 86400e6)
    assert spent.gpu_hours == pytest.approx(spent.days * 24 * 8)


def test_what_if_plans_again_under_each_change(best_five):
    answer = what_if(*JOB, ["flops=2x", "nodes=2", "batch=128", "memory=0.1x"], base=best_five, **FIXED)
    assert not answer.interrupted
    assert [outcome.change for outcome in answer.changes] == ["flops=2x", "nodes=2", "batch=128", "memory=0.1x"]
    flops, nodes, batch, memory = answer.changes
    assert flops.step_time_us < answer.base.step_time_us
    assert (nodes.num_devices, nodes.cluster) == (16, "2x8xa100-80gb")
    assert "dp 8 → 16" in nodes.changed
    assert batch.tokens_per_s == pytest.approx(128 * 2048 / (batch.step_time_us / 1e6))
    assert memory.peak_memory_bytes < 8e9
    assert memory.step_time_us >= answer.base.step_time_us
    again = plan("llama-3.2-1b", "2x8xa100-80gb", **FIXED, time_limit_s=20)
    assert nodes.step_time_us == pytest.approx(again.prediction.step_time_us)


def test_a_change_under_which_nothing_fits_is_an_outcome(best_five):
    answer = what_if(*JOB, ["memory=0.001x"], base=best_five, **FIXED)
    assert "no layout of 'llama-3.2-1b' found that fits" in answer.changes[0].problem


def test_what_if_keeps_pins_and_says_where_they_contradict(best_five):
    answer = what_if(*JOB, ["nodes=3"], base=best_five, dp=8, **FIXED)
    outcome = answer.changes[0]
    assert outcome.problem is not None or " dp8 " in outcome.layout


@pytest.mark.parametrize(
    "text",
    ["link", "link=", "link=2", "links=2x", "batch=0", "batch=1.5", "memory=-1x", "flops=nanx", "nodes=x", "=2x"],
)
def test_changes_that_mean_nothing_are_refused(text):
    with pytest.raises(LayoutError, match=r"write KEY=FACTORx with KEY one of link, intra-link"):
        Change.parse(text)


@pytest.mark.parametrize(
    ("change", "cluster", "message"),
    [
        ("nodes=1.5x", "1x8xa100-80gb", "1.5 times 1 is no whole number"),
        ("devices=12", "1x8xa100-80gb", "nodes have 8 devices; give a multiple of 8"),
        ("nodes=4", "mixed-h100-a100", "2 kinds of nodes"),
        ("link=900000000x", "1x8xa100-80gb", ""),
    ],
)
def test_changes_that_cannot_be_made_are_refused_before_planning(change, cluster, message):
    if not message:
        what_if("llama-3.2-1b", cluster, [change], **FIXED, time_limit_s=5)
        return
    with pytest.raises(LayoutError, match=message):
        what_if("llama-3.2-1b", cluster, [change], **SIZES)


def test_a_measured_profile_does_not_get_faster_with_other_devices():
    machines = load_cluster("1x2xa100-80gb")
    variants = [Variant(micro_batch_size=1, sequence_length=1024, dtype="bfloat16")]
    profile = profile_model(model("gpt2"), machines.groups[0].device, variants, fabric=Fabric.of(machines))
    with pytest.raises(LayoutError, match="holds times that this does not change; plan the model by name"):
        what_if(profile, machines, ["flops=2x"], global_batch_size=8)


def interrupting(after):
    """A progress callback that presses Ctrl-C in the `after`-th search's pricing."""
    seen = {"searches": 0, "last": "", "done": False}

    def on_progress(state):
        if state.phase == "bounding layouts" and seen["last"] != state.phase:
            seen["searches"] += 1
        seen["last"] = state.phase
        if seen["searches"] == after and math.isfinite(state.best_us) and not seen["done"]:
            seen["done"] = True
            raise KeyboardInterrupt

    return on_progress


def test_ctrl_c_in_a_what_if_gives_what_there_is(best_five):
    changes = ["link=2x", "flops=2x", "nodes=2"]
    answer = what_if(*JOB, changes, base=best_five, on_progress=interrupting(2), **FIXED)
    assert answer.interrupted
    assert 1 <= len(answer.changes) < 3
    assert answer.changes[0].change == "link=2x"


def test_the_smallest_cluster_is_the_smallest():
    found = smallest_cluster("llama-2-7b", "8x2xa100-40gb", **FIXED, time_limit_s=10)
    assert found.proven
    assert found.num_nodes == found.plan.layout.num_devices // 2
    assert found.plan.provenance.cluster == f"{found.num_nodes}x2xa100-40gb"
    verdicts = {count.num_nodes: count.verdict for count in found.tried}
    assert verdicts.pop(found.num_nodes) == "fits"
    assert set(verdicts.values()) <= {"does not fit", "no layout divides"}
    for num_nodes in range(1, found.num_nodes):  # planning there fails, too
        with pytest.raises(PipewrightError):
            plan("llama-2-7b", f"{num_nodes}x2xa100-40gb", **FIXED, time_limit_s=5)


def test_the_smallest_cluster_meets_a_deadline_that_one_node_less_misses():
    found = smallest_cluster(
        "llama-3.2-1b", "1x2xa100-80gb", tokens=10**10, deadline_days=0.5, **FIXED, time_limit_s=20
    )
    assert found.num_nodes > 1
    assert found.budget.days <= 0.5
    slower = {count.num_nodes: count for count in found.tried if count.num_nodes < found.num_nodes}
    assert slower
    for count in slower.values():
        assert count.verdict in ("too slow", "no layout divides")
        if count.verdict == "too slow":
            steps = -(-(10**10) // (64 * 2048))
            assert steps * count.lower_bound_us / 86400e6 > 0.5


def test_a_limit_on_nodes_may_leave_nothing():
    found = smallest_cluster("llama-3.1-70b", "1x2xa100-40gb", max_nodes=1, **FIXED, time_limit_s=5)
    assert (found.num_nodes, found.plan) == (None, None)
    assert found.least_nodes > 1
    assert "model states take" in found.least_reason


@pytest.mark.parametrize(
    ("cluster", "arguments", "message"),
    [
        ("mixed-h100-a100", {}, "2 kinds of nodes"),
        ("1x8xa100-80gb", {"deadline_days": 3.0}, "needs a token budget"),
        ("1x8xa100-80gb", {"deadline_days": -1.0, "tokens": 10}, "give a finite number above 0"),
    ],
)
def test_questions_of_size_that_make_no_sense_are_refused(cluster, arguments, message):
    with pytest.raises(LayoutError, match=message):
        smallest_cluster("llama-3.2-1b", cluster, **arguments, **SIZES)
