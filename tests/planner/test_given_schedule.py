"""A schedule put into a plan: predicted anew, verified, and refused where it does not fit."""

import json

import pytest

from planner import Plan, with_schedule
from planner.api import plan
from planner.errors import InfeasibleError, LayoutError, PlanError, ScheduleError
from planner.schedule.actions import Schedule
from planner.schedule.families import get_family
from planner.schedule.simulation import simulate
from planner.verify import verify


@pytest.fixture(scope="module")
def gpipe():
    return plan(
        "gpt2-xl",
        "1x2xa100-40gb",
        global_batch_size=4,
        pp=2,
        dp=1,
        tp=1,
        micro_batch_size=1,
        family="gpipe",
        recompute="none",
        time_limit_s=20,
    )


def recomputing(gpipe: Plan, *, stage: int) -> Schedule:
    """The plan's own order with an R before every backward of one stage."""
    lines = []
    for line in gpipe.schedule:
        tokens = []
        for token in line.split():
            kind, _, rest = token.partition(str(stage) + ".")
            if kind == "BW":
                tokens.append(f"R{stage}.{rest}")
            tokens.append(token)
        lines.append(" ".join(tokens))
    return Schedule.from_lines(lines)


def test_recompute_costs_a_forward_and_saves_all_but_the_inputs(gpipe):
    given = with_schedule(gpipe, recomputing(gpipe, stage=0))
    verify(given)
    before, after, first = gpipe.prediction, given.prediction, gpipe.stages[0]
    m = gpipe.layout.num_microbatches
    assert before.memory[0].activation_bytes == m * first.activation_bytes
    assert after.memory[0].activation_bytes == first.activation_bytes + (m - 1) * first.checkpoint_bytes
    assert after.memory[1] == before.memory[1]
    assert first.checkpoint_bytes < first.activation_bytes / 10
    # Rank 0 waits for the first gradient anyway: only the other m − 1 show.
    assert 0 < after.pipeline_us - before.pipeline_us <= m * first.recompute_us * (1 + 1e-9)
    assert after.pipeline_us == simulate(recomputing(gpipe, stage=0), gpipe.stages).makespan_us


def test_a_later_stage_keeps_what_the_stage_before_it_sends(gpipe):
    assert gpipe.stages[1].checkpoint_bytes == gpipe.stages[0].output_bytes
    assert gpipe.stages[1].recompute_us == gpipe.stages[1].forward_us


def test_nothing_that_was_proven_of_the_old_schedule_is_claimed_of_the_new_one(gpipe, tmp_path):
    given = with_schedule(gpipe, recomputing(gpipe, stage=1))
    assert given.certificate.schedule_solver == "given"
    assert given.certificate.lower_bound_kind.startswith("work of the busiest rank")
    assert given.certificate.lower_bound_us < given.prediction.step_time_us
    assert (given.alternatives, given.prediction.parts, given.family) == ((), None, "auto")
    given.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == given


def test_the_plans_own_schedule_gives_its_own_prediction_back(gpipe):
    again = with_schedule(gpipe, gpipe.parsed_schedule).prediction
    assert again.step_time_us == pytest.approx(gpipe.prediction.step_time_us)
    assert again.memory == gpipe.prediction.memory


def test_a_schedule_for_other_microbatches_is_refused(gpipe):
    with pytest.raises(ScheduleError, match="stage 0 must run all 4 microbatches"):
        with_schedule(gpipe, Schedule.from_lines(["F0.0 BW0.0", "F1.0 BW1.0"]))


def test_a_schedule_that_does_not_fit_is_refused_with_the_rank_and_the_bytes(gpipe):
    small = gpipe.prediction.memory[0].model_copy(update={"capacity_bytes": 10**9})
    memory = (small, *gpipe.prediction.memory[1:])
    tight = gpipe.model_copy(update={"prediction": gpipe.prediction.model_copy(update={"memory": memory})})
    with pytest.raises(PlanError, match=r"pipeline rank 0 needs \d+ bytes and may use 1000000000"):
        with_schedule(tight, recomputing(gpipe, stage=1))


def test_recompute_of_a_stage_without_its_costs_is_refused(gpipe):
    data = json.loads(gpipe.model_dump_json(by_alias=True))
    del data["stages"][1]["recompute_us"]
    older = Plan.model_validate_json(json.dumps(data))
    with pytest.raises(PlanError, match=r"recomputes stage 1, but plan\.stages\[1\] has no recompute_us"):
        with_schedule(older, recomputing(gpipe, stage=1))
    by_hand = older.model_copy(update={"family": "auto", "schedule": recomputing(gpipe, stage=1).to_lines()})
    with pytest.raises(PlanError, match=r"rank 1, step 4: R1\.0 recomputes stage 1, but plan\.stages\[1\]"):
        verify(by_hand)


def test_the_plan_says_which_engine_its_times_are_of_and_what_w_computes(gpipe):
    assert gpipe.engine == "deferred-linear"
    for stage in gpipe.stages:
        assert 0.99 * stage.parameter_bytes < stage.deferred_parameter_bytes < stage.parameter_bytes  # all but norms


def test_two_replicas_hold_two_stages_per_rank_and_the_plan_is_saved_loaded_and_verified(gpipe, tmp_path):
    given = with_schedule(gpipe, get_family("dualpipe").generate(2, 4))
    assert given.layout.num_replicas == 2
    assert "x2" in given.layout.degrees
    for rank, before in enumerate(gpipe.prediction.memory):
        after = given.prediction.memory[rank]
        both = before.weight_bytes + gpipe.prediction.memory[1 - rank].weight_bytes
        assert (after.weight_bytes, after.gradient_bytes) == (both, 2 * both)  # bfloat16, and float32
    updates_us = [stage.optimizer_us for stage in gpipe.stages]
    assert given.prediction.optimizer_us == pytest.approx(sum(updates_us))
    gradients = 2 * sum(stage.parameter_bytes for stage in gpipe.stages)
    hop_us = gpipe.stages[0].transfer_us / gpipe.stages[0].output_bytes
    after_us = gpipe.prediction.exposed_data_parallel_us + gradients * hop_us
    assert given.prediction.exposed_data_parallel_us == pytest.approx(after_us)
    given.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    verify(loaded)
    assert loaded == given


def test_a_plan_does_not_claim_other_replicas_than_its_schedule_runs(gpipe):
    given = with_schedule(gpipe, get_family("gems").generate(2, 4))
    alone = given.model_copy(update={"layout": given.layout.model_copy(update={"num_replicas": 1})})
    with pytest.raises(ScheduleError, match=r"F1\.1: the placement puts stage 1 on rank 1"):
        verify(alone)
    twice = gpipe.model_copy(update={"layout": gpipe.layout.model_copy(update={"num_replicas": 2})})
    with pytest.raises(ScheduleError, match="was to run two replicas, but it runs one"):
        verify(twice)
    with pytest.raises(PlanError, match=r"runs 1 replicas of the model, the plan 2 with stages on ranks \[0, 1\]"):
        with_schedule(given, gpipe.parsed_schedule)
    data = json.loads(given.model_dump_json(by_alias=True))
    data["layout"]["rank_of_stage"] = [1, 0]
    with pytest.raises(ValueError, match="num_replicas=2 needs pp of at least 2 and stage s on rank s"):
        Plan.model_validate_json(json.dumps(data))


PINS = {"dp": 1, "tp": 1, "micro_batch_size": 1, "recompute": "none", "time_limit_s": 10}


def test_a_bidirectional_family_is_planned_in_the_layout_of_1f1b():
    given = plan("gpt2-xl", "1x2xa100-80gb", global_batch_size=8, pp=2, family="dualpipe", **PINS)
    assert (given.family, given.layout.num_replicas) == ("dualpipe", 2)
    assert given.parsed_schedule == get_family("dualpipe").generate(2, 8)
    verify(given)
    assert given.certificate.lower_bound_us <= given.prediction.step_time_us
    assert "dualpipe" in str(given)


def test_a_bidirectional_family_that_cannot_be_planned_says_why():
    with pytest.raises(LayoutError, match="pin pp to one number of at least 2, and the layout of 1f1b is taken"):
        plan("gpt2-xl", "1x2xa100-80gb", global_batch_size=8, family="gems", **PINS)
    with pytest.raises(LayoutError, match="one stage per rank, not 2; choose 1"):
        plan("gpt2-xl", "1x2xa100-80gb", global_batch_size=8, pp=2, virtual_stages=2, family="gems", **PINS)
    with pytest.raises(LayoutError, match="even number of ranks and of microbatches, not 2 and 3"):
        plan("gpt2-xl", "1x2xa100-80gb", global_batch_size=3, pp=2, family="dualpipe", **PINS)
    with pytest.raises(LayoutError, match="top 3: dualpipe takes the best layout of 1f1b, there is no list"):
        plan("gpt2-xl", "1x2xa100-80gb", global_batch_size=8, pp=2, family="dualpipe", top=3, **PINS)
    with pytest.raises(InfeasibleError, match=r"in the best layout of 1f1b.* needs .* bytes and may use"):
        plan("gpt2-xl", "1x2xv100-32gb", global_batch_size=4, pp=2, family="gems", dtype="float16", **PINS)
