"""Plans for real models and clusters: they fit, add up, say how sure they are, and survive the file."""

import json
import math
import re

import pytest

import planner
from planner.api import load_plan, plan, verify
from planner.errors import InfeasibleError, LayoutError, PlanError, ScheduleError
from profiles.analytic import profile_model
from profiles.catalog import load_cluster, model
from profiles.errors import FileError, ProfileError
from profiles.model import Variant


@pytest.fixture(scope="module")
def llama():
    return plan("llama-3.1-8b", "2x8xh100-sxm", global_batch_size=256, sequence_length=8192, time_limit_s=8)


def test_the_plan_adds_up(llama):
    guess, layout = llama.prediction, llama.layout
    assert guess.step_time_us == pytest.approx(guess.pipeline_us + guess.exposed_data_parallel_us + guess.optimizer_us)
    assert sum(layout.layers_per_stage) == 34
    assert layout.tp * layout.pp * layout.dp == 16
    assert 0.2 < guess.mfu < 0.8
    assert all(m.total_bytes <= m.capacity_bytes for m in guess.memory)


def test_the_certificate_bounds_the_plan_from_below(llama):
    proof = llama.certificate
    assert proof.lower_bound_us <= proof.objective_us == llama.prediction.step_time_us
    assert proof.gap == pytest.approx(1 - proof.lower_bound_us / proof.objective_us)
    assert proof.gap < 0.15


def test_a_saved_plan_loads_as_itself_and_validates(llama, tmp_path):
    llama.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == llama
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_its_table_names_what_people_look_for(llama):
    text = str(llama)
    for word in ("layout", "schedule", "step time", "MFU", "gap", "usable", "Assumed"):
        assert word in text


def test_the_schema_describes_the_saved_file(llama):
    schema = planner.json_schema()
    assert set(json.loads(llama.model_dump_json())) == set(schema["properties"])


def test_equal_input_gives_an_equal_plan():
    def made():
        found = plan("gpt2-xl", "1x4xa100-40gb", global_batch_size=32, family="1f1b", time_limit_s=60)
        return found.model_copy(update={"certificate": found.certificate.model_copy(update={"seconds": 0.0})})

    assert made() == made()


def test_a_pinned_layout_is_priced_beside_the_best_without_pins():
    found = plan(
        "llama-2-13b", "2x8xa100-80gb", global_batch_size=128, tp=8, pp=2, dp=1, family="1f1b", time_limit_s=20
    )
    assert (found.layout.tp, found.layout.pp, found.layout.dp) == (8, 2, 1)
    beside = {a.label: a for a in found.alternatives}
    assert beside["best without pins"].step_time_us <= found.prediction.step_time_us


def test_recomputation_is_chosen_where_nothing_else_fits():
    found = plan(
        "llama-3.1-8b",
        "1x8xa100-40gb",
        global_batch_size=8,
        sequence_length=32768,
        tp=4,
        family="1f1b",
        time_limit_s=20,
    )
    assert found.layout.recompute == "full"
    assert found.certificate.infeasible_reasons["does not fit in memory"] > 0


def test_a_model_that_fits_nowhere_says_what_it_needs():
    with pytest.raises(InfeasibleError, match=r"llama-3.1-405b.*1x1xrtx-4090.*usable.*Closest: .*needs") as caught:
        plan("llama-3.1-405b", "1x1xrtx-4090", global_batch_size=1)
    assert caught.value.exit_code == 1


def test_a_pinned_layout_that_does_not_fit_says_which():
    with pytest.raises(InfeasibleError, match=r"tp=1 pp=1 dp=8.*needs .* GiB"):
        plan("llama-3.1-70b", "1x8xh100-sxm", global_batch_size=8, tp=1, pp=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 0}, "global batch size 0: give at least 1 sequence"),
        ({"global_batch_size": 8, "sequence_length": 0}, "sequence length 0: give at least 1 token"),
        ({"global_batch_size": 8, "time_limit_s": 0}, "time limit 0: give a finite number of seconds above 0"),
        ({"global_batch_size": 8, "tp": 3}, "tp=3 does not divide num_heads=32"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(LayoutError, match=re.escape(message)):
        plan("llama-3.1-8b", "1x8xh100-sxm", **arguments)


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(ScheduleError, match=r"no schedule family is called 'zbh1'.*1f1b"):
        plan("llama-3.1-8b", "1x8xh100-sxm", global_batch_size=8, family="zbh1")


def profile_of(name, sizes=(1, 2)):
    cluster = load_cluster("1x2xa100-80gb")
    group = cluster.groups[0]
    variants = [Variant(micro_batch_size=b, sequence_length=1024, dtype="bfloat16") for b in sizes]
    return profile_model(model(name), group.device, variants, tp_link=group.intra_node)


def test_a_profile_file_is_planned_like_a_model_and_only_at_what_it_holds(tmp_path):
    profile_of("gpt2").save(tmp_path / "profile.json")
    found = plan(tmp_path / "profile.json", "1x2xa100-80gb", global_batch_size=8, pp=2, family="1f1b")
    assert found.family == "1f1b"
    assert found.layout.micro_batch_size in (1, 2)
    assert found.certificate.infeasible_reasons["not profiled"] > 0
    with pytest.raises(ProfileError, match=r"holds sequence lengths \[1024\] in bfloat16, not 512"):
        plan(tmp_path / "profile.json", "1x2xa100-80gb", global_batch_size=8, sequence_length=512)


def broken(llama, path, change):
    raw = json.loads(llama.model_dump_json())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(schema="pipewright.plan/2"), r"\$\.schema"),
        (lambda p: p.update(surprise=1), r"\$\.surprise: Extra inputs are not permitted"),
        (lambda p: p["stages"][0].update(forward_us=math.nan), r"\$\.stages\[0\]\.forward_us.*finite"),
        (lambda p: p["stages"][0].update(forward_us=-1.0), r"\$\.stages\[0\]\.forward_us.*greater than or equal to 0"),
        (lambda p: p["stages"][0].update(parameter_bytes=-5), r"\$\.stages\[0\]\.parameter_bytes"),
        (lambda p: p.pop("layout"), r"\$\.layout: Field required"),
        (lambda p: p.update(global_batch_size=255), r"is 256, not global_batch_size 255"),
        (lambda p: p["layout"].update(dp="8"), r"\$\.layout\.dp.*valid integer"),
    ],
)
def test_a_broken_plan_file_is_refused_with_the_place(llama, tmp_path, change, message):
    with pytest.raises(FileError, match=message):
        load_plan(broken(llama, tmp_path / "plan.json", change))


def test_a_truncated_plan_file_is_refused(llama, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(llama.model_dump_json()[:500])
    with pytest.raises(FileError, match="not valid JSON"):
        load_plan(path)


def test_a_schedule_that_misses_an_action_is_refused(llama):
    lines = list(llama.schedule)
    lines[0] = lines[0].rsplit(" ", 1)[0]
    with pytest.raises(ScheduleError):
        verify(llama.model_copy(update={"schedule": tuple(lines)}))


def test_a_prediction_that_its_own_schedule_does_not_give_is_refused(llama):
    guess = llama.prediction.model_copy(update={"pipeline_us": llama.prediction.pipeline_us * 0.9})
    with pytest.raises(PlanError, match=r"pipeline_us is .* but its schedule and stage costs take"):
        verify(llama.model_copy(update={"prediction": guess}))


def test_a_rank_over_its_memory_is_refused(llama):
    memory = [m.model_copy(update={"capacity_bytes": 1}) for m in llama.prediction.memory]
    guess = llama.prediction.model_copy(update={"memory": tuple(memory)})
    with pytest.raises(PlanError, match="pipeline rank 0 needs"):
        verify(llama.model_copy(update={"prediction": guess}))
