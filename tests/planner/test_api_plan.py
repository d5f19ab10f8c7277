"""Plans for real models and clusters: they fit, add up, say how sure they are, and survive the file."""

import json
import math
import re

import pytest

import planner
from planner.api import plan, validate
from planner.errors import InfeasibleError, LayoutError, PlanError, ScheduleError
from planner.verify import verify
from profiles.analytic import profile_model
from profiles.catalog import load_cluster, model
from profiles.collectives import Fabric
from profiles.errors import CatalogError, FileError, ProfileError
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


def test_its_parts_agree_and_its_gap_is_small(llama):
    verify(llama)
    assert llama.certificate.gap < 0.15


def test_a_saved_plan_loads_as_itself_and_validates(llama, tmp_path):
    llama.save(tmp_path / "plan.json")
    assert validate(tmp_path / "plan.json") == llama
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_its_table_names_what_people_look_for(llama):
    text = str(llama)
    for word in (
        "layout",
        "recompute",
        "schedule",
        "step time",
        "MFU",
        "HFU",
        "gap",
        "usable",
        "bubble",
        "Certificate",
    ):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_parts_of_the_step_add_up(llama):
    guess, parts = llama.prediction, llama.prediction.parts
    assert parts.total_us == pytest.approx(guess.step_time_us, rel=1e-12)
    assert parts.bubble_us == pytest.approx(guess.bubble_rate_makespan * guess.pipeline_us)
    assert parts.optimizer_us == guess.optimizer_us
    for other in llama.alternatives:
        assert other.parts.total_us == pytest.approx(other.step_time_us, rel=1e-12)


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
    assert beside["without pins"].step_time_us <= found.prediction.step_time_us


def test_a_pinned_layout_that_is_the_best_is_shown_to_be():
    free = plan("gpt2-xl", "1x4xa100-40gb", global_batch_size=32, family="1f1b", time_limit_s=60)
    degrees = {name: getattr(free.layout, name) for name in ("tp", "pp", "dp")}
    pinned = plan("gpt2-xl", "1x4xa100-40gb", global_batch_size=32, family="1f1b", time_limit_s=60, **degrees)
    assert pinned.layout == free.layout
    assert (pinned.alternatives[0].label, pinned.alternatives[0].layout) == ("without pins", free.layout.degrees)


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
    assert found.layout.recompute == "mixed"
    assert set(found.layout.recompute_of_layer) > {"none"}
    assert found.prediction.parts.recompute_us > 0
    assert found.prediction.hfu > found.prediction.mfu
    assert re.search(r"recompute +(stages? [0-9–]+|every stage|one stage): [0-9]+ (in full|selectively)", str(found))
    assert found.certificate.refused["does not fit in memory"] + found.certificate.num_overflowing > 0


def test_a_model_that_fits_nowhere_says_what_it_needs():
    with pytest.raises(InfeasibleError, match=r"llama-3.1-405b.*1x1xrtx-4090.*usable.*Closest: .*needs") as caught:
        plan("llama-3.1-405b", "1x1xrtx-4090", global_batch_size=1)
    assert caught.value.exit_code == 1


def test_a_pinned_layout_that_does_not_fit_says_which():
    with pytest.raises(InfeasibleError, match=r"tp=1 pp=1 dp=8 .*needs .* GiB"):
        plan("llama-3.1-70b", "1x8xh100-sxm", global_batch_size=8, tp=1, pp=1, dp=8)


@pytest.mark.parametrize(
    ("model_name", "cluster", "arguments", "change"),
    [
        ("llama-3.1-8b", "1x8xh100-sxm", {"zero_stage": 0, "dp": 8}, r"without the pin zero_stage=0, dp=8 .* takes"),
        ("llama-3.1-8b", "1x8xa100-40gb", {"dp": 8, "zero_stage": 0, "tp": 1}, r"without the pins? .* takes"),
        ("llama-3.1-70b", "1x8xh100-sxm", {}, r"on [2-8] nodes, .* takes [0-9.]+ of 7[0-9.]+ GiB"),
    ],
)
def test_a_request_that_nothing_fits_names_the_nearest_change_that_does(model_name, cluster, arguments, change):
    asked = {"global_batch_size": 8, "sequence_length": 4096, "time_limit_s": 5}
    with pytest.raises(InfeasibleError, match=f"Nearest change that fits: {change}"):
        plan(model_name, cluster, **asked, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 0}, "global batch size 0: give 1 to 100000000 sequences"),
        ({"global_batch_size": 8, "sequence_length": 0}, "sequence length 0: give 1 to 100000000 tokens"),
        ({"global_batch_size": 8, "time_limit_s": 0}, "time limit 0: give a finite number of seconds above 0"),
        ({"global_batch_size": 8, "tp": 3}, "tp=3 does not divide num_heads=32"),
        ({"global_batch_size": 8, "dtype": "int8"}, "dtype 'int8' is not known; choose one of float8, bfloat16"),
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
    return profile_model(model(name), group.device, variants, fabric=Fabric.of(cluster))


def test_a_profile_file_is_planned_like_a_model_and_only_at_what_it_holds(tmp_path):
    profile_of("gpt2").save(tmp_path / "profile.json")
    found = plan(tmp_path / "profile.json", "1x2xa100-80gb", global_batch_size=8, pp=2, family="1f1b")
    assert found.family == "1f1b"
    assert found.layout.micro_batch_size in (1, 2)
    anywhere = plan(tmp_path / "profile.json", "1x2xa100-80gb", global_batch_size=8, family="1f1b")
    assert anywhere.certificate.refused["not profiled"] > 0
    with pytest.raises(ProfileError, match=r"holds sequence lengths \[1024\] in bfloat16, not 512"):
        plan(tmp_path / "profile.json", "1x2xa100-80gb", global_batch_size=8, sequence_length=512)


def test_a_profile_is_only_planned_on_what_it_was_measured_on(tmp_path):
    measured = profile_of("gpt2")
    origin = measured.origin.model_copy(update={"kind": "measured", "device": "AMD EPYC", "device_kind": "cpu"})
    profile = measured.model_copy(update={"origin": origin})
    with pytest.raises(ProfileError, match=r"measured on AMD EPYC \(cpu\), cluster '1x2xa100-80gb' is made of cuda"):
        plan(profile, "1x2xa100-80gb", global_batch_size=8)
    assert plan(profile, "1x2xcpu", global_batch_size=8, dtype="bfloat16", family="1f1b").layout.num_devices == 2


def test_pins_that_the_profile_lacks_are_refused():
    with pytest.raises(ProfileError, match="holds micro_batch_size 1, 2, not 4"):
        plan(profile_of("gpt2"), "1x2xa100-80gb", global_batch_size=8, micro_batch_size=4)
    with pytest.raises(ProfileError, match="holds tp 1, not 2"):
        plan(profile_of("gpt2"), "1x2xa100-80gb", global_batch_size=8, tp=2)


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"family": "zb-h1", "recompute": "full"}, "splits the backward, and recompute=full keeps it in one piece"),
        ({"family": "1f1b", "virtual_stages": 2}, "family '1f1b' with virtual_stages=2"),
        ({"family": "interleaved-1f1b", "virtual_stages": 1}, "family 'interleaved-1f1b' with virtual_stages=1"),
    ],
)
def test_pins_that_contradict_each_other_are_bad_input(pins, message):
    with pytest.raises(LayoutError, match=re.escape(message)) as caught:
        plan("gpt2", "1x4xa100-40gb", global_batch_size=8, **pins)
    assert caught.value.exit_code == 2


def test_pins_may_be_several_values_or_exclusions():
    def best(**pins):
        return plan(
            "llama-3.2-1b",
            "1x4xa100-40gb",
            global_batch_size=32,
            sequence_length=2048,
            time_limit_s=5,
            family="1f1b",
            **pins,
        )

    either = best(tp=(2, 4), zero_stage=(2, 3))
    assert either.layout.tp in (2, 4)
    assert either.layout.zero_stage in (2, 3) or either.layout.dp * either.layout.cp == 1
    alone = [best(tp=tp, zero_stage=(2, 3)).prediction.step_time_us for tp in (2, 4)]
    assert either.prediction.step_time_us == pytest.approx(min(alone))
    without = best(excluded=(("tp", either.layout.tp), ("pp", 1)))
    assert without.layout.tp != either.layout.tp
    assert without.layout.pp > 1
    assert without.alternatives[0].label == "without pins"


@pytest.mark.parametrize(
    ("pins", "holds"),
    [
        ({"cp": 2}, lambda layout: layout.cp == 2),
        ({"tp": 2, "dp": 2, "zero_stage": 3, "shard_degree": 2}, lambda layout: layout.zero_stage == 3),
        ({"tp": 2, "sequence_parallel": False}, lambda layout: not layout.sequence_parallel),
        ({"recompute": "selective"}, lambda layout: layout.recompute == "selective"),
        ({"recompute": ("full", "selective")}, lambda layout: layout.recompute in ("full", "selective")),
        ({"excluded": (("recompute", "none"),)}, lambda layout: layout.recompute in ("full", "selective")),
    ],
)
def test_every_pin_holds_and_the_plan_verifies(pins, holds):
    found = plan(
        "llama-3.2-1b",
        "1x4xa100-40gb",
        global_batch_size=32,
        sequence_length=4096,
        time_limit_s=2,
        family="1f1b",
        **pins,
    )
    assert holds(found.layout)
    verify(found)
    assert found.prediction.parts.total_us == pytest.approx(found.prediction.step_time_us, rel=1e-12)


def test_what_is_kept_in_which_dtype_shows_in_memory():
    pins = {"tp": 4, "micro_batch_size": 1, "family": "1f1b", "sequence_length": 2048}

    def made(**dtypes):
        return plan("llama-3.2-1b", "1x4xa100-40gb", global_batch_size=32, **pins, **dtypes)

    usual = made()
    lean = made(gradient_dtype="bfloat16", master_weight_dtype="none", optimizer_dtype="bfloat16")
    assert usual.precision.master_weights == "float32"
    assert lean.precision.model_dump() == {
        "compute": "bfloat16",
        "gradients": "bfloat16",
        "master_weights": None,
        "optimizer": "bfloat16",
    }
    weights = usual.prediction.memory[0].weight_bytes
    assert lean.prediction.memory[0].weight_bytes == weights
    assert lean.prediction.memory[0].gradient_bytes == usual.prediction.memory[0].gradient_bytes // 2 == weights
    assert lean.prediction.memory[0].optimizer_bytes == usual.prediction.memory[0].optimizer_bytes // 3 == 2 * weights


def test_a_tiny_time_limit_still_finds_a_plan():
    found = plan("gpt2-xl", "1x4xa100-40gb", global_batch_size=32, time_limit_s=1e-3)
    assert found.certificate.limited_by_time
    assert found.certificate.num_unreached > 0


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", ""])
def test_names_that_are_neither_catalogue_entries_nor_paths_are_refused(name):
    with pytest.raises((CatalogError, FileError)):
        plan(name, "1x1xa100-40gb", global_batch_size=1)


def test_deeply_nested_json_is_refused(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    with pytest.raises((CatalogError, FileError)):
        plan(path, "1x1xa100-40gb", global_batch_size=1)


def test_alternatives_are_the_best_of_their_degrees():
    found = plan("gpt2-xl", "1x4xa100-40gb", global_batch_size=32, family="1f1b", time_limit_s=60)
    assert found.alternatives
    for beside in found.alternatives:
        named = dict(re.findall(r"\b(tp|pp|dp|cp|ep)([0-9]+)", beside.layout))
        degrees = {name: int(named.get(name, 1)) for name in ("tp", "pp", "dp", "cp", "ep")}
        alone = plan("gpt2-xl", "1x4xa100-40gb", global_batch_size=32, family="1f1b", time_limit_s=60, **degrees)
        assert beside.step_time_us == pytest.approx(alone.prediction.step_time_us)


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
        (
            lambda p: p["prediction"]["parts"].update(bubble_us=1e9),
            r"prediction: parts add up to .*but step_time_us is",
        ),
        (lambda p: p.update(global_batch_size=255), r"is 256, not global_batch_size 255"),
        (lambda p: p["layout"].update(dp="8"), r"\$\.layout\.dp.*valid integer"),
    ],
)
def test_a_broken_plan_file_is_refused_with_the_place(llama, tmp_path, change, message):
    with pytest.raises(FileError, match=message):
        validate(broken(llama, tmp_path / "plan.json", change))


def test_a_truncated_plan_file_is_refused(llama, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(llama.model_dump_json()[:500])
    with pytest.raises(FileError, match="not valid JSON"):
        validate(path)


def test_a_schedule_that_misses_an_action_is_refused(llama):
    lines = list(llama.schedule)
    lines[0] = lines[0].rsplit(" ", 1)[0]
    with pytest.raises(ScheduleError):
        verify(llama.model_copy(update={"schedule": tuple(lines)}))


def tampered(llama, part, **changes):
    holder = getattr(llama, part)
    return llama.model_copy(update={part: holder.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("prediction", {"pipeline_us": 1.0}, r"pipeline_us is 1.0, but its schedule and stage costs take"),
        ("prediction", {"optimizer_us": 0.5}, r"optimizer_us is 0.5, which is no rank's optimizer step"),
        ("prediction", {"exposed_data_parallel_us": 0.0}, r"step_time_us is .*, but its parts add up to"),
        ("prediction", {"tokens_per_s": 1.0}, r"tokens_per_s is 1.0, but the step time gives"),
        ("prediction", {"bubble_rate_span": 0.9}, r"bubble_rate_span is 0.9, but they give"),
        ("prediction", {"model_flops": 1.0}, r"model_flops is 1.0, but the model takes"),
        ("certificate", {"objective_us": 1.0}, r"objective_us is 1.0, but the step time is"),
        ("certificate", {"lower_bound_us": 1e12}, r"lower_bound_us 1000000000000.0 is over its objective_us"),
        ("certificate", {"gap": 0.5}, r"gap is 0.5, but bound and objective give"),
        ("certificate", {"status": "optimal"}, r"status is optimal, but the gap is"),
        ("certificate", {"schedule_lower_bound_us": 1e12}, r"schedule_lower_bound_us .* is over the pipeline's"),
    ],
)
def test_a_number_that_does_not_follow_from_the_rest_is_refused(llama, part, changes, message):
    with pytest.raises(PlanError, match=message):
        verify(tampered(llama, part, **changes))


@pytest.mark.parametrize("name", ["weight_bytes", "optimizer_bytes", "activation_bytes", "buffer_bytes"])
def test_memory_that_stages_and_schedule_do_not_give_is_refused(llama, name):
    memory = [m.model_copy(update={name: 1}) for m in llama.prediction.memory]
    with pytest.raises(PlanError, match=rf"memory\[0\]\.{name} is 1, but stages and schedule give"):
        verify(tampered(llama, "prediction", memory=tuple(memory)))


def test_a_rank_over_its_memory_is_refused(llama):
    memory = [m.model_copy(update={"capacity_bytes": 1}) for m in llama.prediction.memory]
    with pytest.raises(PlanError, match="pipeline rank 0 needs"):
        verify(tampered(llama, "prediction", memory=tuple(memory)))


def test_a_schedule_that_is_not_its_familys_is_refused(llama):
    plain = plan("gpt2-xl", "1x4xa100-40gb", global_batch_size=32, pp=4, family="1f1b", virtual_stages=1)
    with pytest.raises(PlanError, match="is not what family 'gpipe' generates for this layout"):
        verify(plain.model_copy(update={"family": "gpipe"}))
    with pytest.raises(PlanError, match=r"plan\.family 'nonsense' is none of naive, gpipe, 1f1b"):
        verify(llama.model_copy(update={"family": "nonsense"}))
