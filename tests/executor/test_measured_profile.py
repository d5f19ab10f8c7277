"""What a run measured, put back on layers: sums, shares, and what is refused."""

from itertools import accumulate, pairwise

import pytest
from executor_cases import make_plan
from typer.testing import CliRunner

import planner
from planner.cli import app
from planner.errors import ExecutionError
from planner.executor.launch import run_plan
from planner.executor.measured_profile import base_profile, corrected_profile
from planner.executor.run_report import ActionTime, RunReport
from planner.schedule.families import get_family
from profiles.measure.models import model_spec_for
from profiles.model import LayerGroup, LayerProfile, ModelProfile, Origin, Variant

SPEC = model_spec_for("gpt2", num_layers=4, hidden_size=16, num_heads=2, vocab_size=31, sequence_length=8)


def layer(recompute: str = "none", **times: float) -> LayerProfile:
    defaults = {
        "forward_us": 10.0,
        "backward_input_us": 12.0,
        "backward_weight_us": 8.0,
        "fused_backward_us": 19.0,
        "optimizer_us": 2.0,
    }
    return LayerProfile(
        variant=Variant(micro_batch_size=2, sequence_length=8, dtype="float64", recompute=recompute),
        **(defaults | times),
        parameter_bytes=100,
        activation_bytes=50,
        weight_activation_bytes=30,
        output_bytes=20,
    )


def profile(spec=SPEC, recompute: str = "none", blocks: tuple[int, ...] = (4,)) -> ModelProfile:
    """Embedding, blocks, head: the embedding has no B, as nobody asks for the gradient of tokens."""
    first = layer(recompute, forward_us=3.0, backward_input_us=0.0, backward_weight_us=4.0, fused_backward_us=4.0)
    last = layer(recompute, forward_us=30.0)
    return ModelProfile(
        model=spec,
        architecture="gpt2",
        layers=(
            LayerGroup(name="embedding", kind="embedding", profiles=(first,)),
            *(LayerGroup(name="block", kind="block", count=n, profiles=(layer(recompute),)) for n in blocks),
            LayerGroup(name="head", kind="head", profiles=(last,)),
        ),
        origin=Origin(kind="measured", device="this", device_kind="cpu", when="then", how="by hand"),
    )


def plan_for(family: str = "zb-h1", **options: object):
    defaults = {"layers_per_stage": [3, 3], "model": SPEC, "architecture": "gpt2", "sequence_length": 8}
    return make_plan(get_family(family).generate(2, 4, 1), family=family, **(defaults | options))


def timed(**times: float) -> list[ActionTime]:
    """F0=30 says that F of stage 0 took 28 µs, and handing over 2."""
    return [
        ActionTime(
            kind=name[:-1],
            stage=int(name[-1]),
            count=8,
            measured_us=us - 2,
            waited_us=7.0,
            handed_over_us=2.0,
            predicted_us=1.0,
        )
        for name, us in times.items()
    ]


def corrected(actions: list[ActionTime], plan=None, base=None) -> ModelProfile:
    plan = plan or plan_for()
    return corrected_profile(
        base or profile(), plan, actions, {0: 12.0, 1: 3.0}, device_name="this", how="a run of the test"
    )


def sums(found: ModelProfile, field: str, layers_per_stage: tuple[int, ...] = (3, 3)) -> list[float]:
    (variant,) = found.variants
    layers = found.at(variant)
    return [
        sum(getattr(one, field) for one in layers[first:end])
        for first, end in pairwise((0, *accumulate(layers_per_stage)))
    ]


def test_layers_of_every_stage_add_up_to_what_was_measured_with_handing_over():
    found = corrected(timed(F0=46, B0=36, W0=40, F1=100, B1=72, W1=12))
    assert sums(found, "forward_us") == pytest.approx([46, 100])
    assert sums(found, "backward_input_us") == pytest.approx([36, 72])
    assert sums(found, "backward_weight_us") == pytest.approx([40, 12])
    assert sums(found, "optimizer_us") == pytest.approx([12, 3])


def test_layers_of_a_stage_keep_their_shares_and_repeat_with_counts():
    found = corrected(timed(F0=46, B0=36, W0=40, F1=100, B1=72, W1=12))
    assert [(g.name, g.count) for g in found.layers] == [("embedding", 1), ("block", 2), ("block", 2), ("head", 1)]
    forward = [g.profiles[0].forward_us for g in found.layers]
    assert forward == pytest.approx([6, 20, 20, 60])  # 3, 10, 10, 30 twice
    assert [g.profiles[0].activation_bytes for g in found.layers] == [50] * 4


def test_a_backward_that_was_run_apart_tells_how_long_one_in_one_piece_would_take_and_the_other_way_round():
    apart = corrected(timed(F0=23, B0=48, W0=40, F1=50, B1=36, W1=24))
    assert sums(apart, "fused_backward_us")[0] == pytest.approx(42 * 2)
    together = corrected(timed(F0=23, BW0=84, F1=50, BW1=57), plan_for("1f1b"))
    assert sums(together, "fused_backward_us") == pytest.approx([84, 57])
    assert sums(together, "backward_input_us") == pytest.approx([48, 36])
    assert sums(together, "backward_weight_us") == pytest.approx([40, 24])


def test_both_kinds_of_backward_keep_their_own_times_where_both_were_run():
    both = corrected(timed(F0=23, B0=30, W0=20, BW0=90, F1=50, BW1=57))
    assert sums(both, "backward_input_us")[0] == pytest.approx(30)
    assert sums(both, "backward_weight_us")[0] == pytest.approx(20)
    assert sums(both, "fused_backward_us")[0] == pytest.approx(90)


def test_what_the_base_has_as_zero_is_shared_evenly():
    found = corrected(timed(F0=3, B0=5, W0=4, F1=80, B1=60, W1=40), plan_for(layers_per_stage=[1, 5]))
    assert sums(found, "backward_input_us", (1, 5)) == pytest.approx([5, 60])


def test_stages_of_one_group_of_blocks_get_times_of_their_own_and_recomputed_ones_their_variant():
    plan = plan_for("1f1b", recompute="full")
    found = corrected(timed(F0=46, BW0=42, F1=50, BW1=114), plan, profile(recompute="full"))
    assert [v.recompute for v in found.variants] == ["full"]
    assert sums(found, "fused_backward_us") == pytest.approx([42, 114])


def test_where_it_comes_from_says_that_it_was_measured_in_a_run():
    found = corrected(timed(F0=46, B0=36, W0=40, F1=100, B1=72, W1=12))
    assert found.origin.kind == "measured"
    assert found.origin.how == ("measured in a run of the test; shares within a stage, memory and links: by hand")
    assert found.origin.when > "2020"


@pytest.mark.parametrize(
    ("base", "dtype", "message"),
    [
        (
            None,
            "float64",
            r"the plan was made from a profile \(none\), whose layers .* give that profile, too: --profile",
        ),
        (profile(), "float32", "the run is in float32, the plan in float64"),
        (
            profile(SPEC.model_copy(update={"name": "other"})),
            "float64",
            "the profile is of model 'other', the plan of 'gpt2-4x16'",
        ),
        (
            profile(SPEC.model_copy(update={"hidden_size": 32})),
            "float64",
            "their hidden_size are 32 and 16",
        ),
        (profile(recompute="full"), "float64", "the profile holds .* recompute=full, the plan runs .*float64: give"),
        (
            profile(blocks=(2, 3)),
            "float64",
            r"the profile has 7 layers, the plan's layers_per_stage \[3, 3\] add up to 6",
        ),
    ],
)
def test_profiles_the_plan_was_not_made_from_are_refused(base, dtype, message):
    with pytest.raises(ExecutionError, match=message):
        base_profile(plan_for(), base, dtype)


def test_a_plan_from_an_estimate_needs_no_profile():
    plan = plan_for()
    provenance = plan.provenance.model_copy(update={"profile_origin": "analytic, cpu: ...", "device": "cpu"})
    base = base_profile(plan.model_copy(update={"provenance": provenance}), None, "float64")
    assert base.num_layers == 6
    assert base.origin.kind == "analytic"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("measure")


def cli(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_plan_run_measure_plan_run_goes_round_and_the_second_plan_predicts_what_the_first_run_measured(files):
    measured = planner.profile(SPEC, micro_batch_sizes=(1,), repeats=3, warmups=1, with_links=False)
    measured.save(files / "profile.json")
    options = ("--cluster", "1x2xcpu", "--global-batch-size", 6, "--pp", 2, "--time-limit", 5, "--family", "zb-h1")
    cli("plan", files / "profile.json", *options, "-o", files / "plan.json")
    report = RunReport.model_validate_json(
        cli(
            "run",
            files / "plan.json",
            "--steps",
            3,
            "--measure",
            files / "again.json",
            "--profile",
            files / "profile.json",
            "--json",
        )
    )
    again = ModelProfile.load(files / "again.json")
    assert again.num_layers == measured.num_layers
    first = planner.Plan.load(files / "plan.json")
    for action in report.actions:
        field = {"F": "forward_us", "B": "backward_input_us", "W": "backward_weight_us"}[action.kind]
        assert sums(again, field, first.layout.layers_per_stage)[action.stage] == pytest.approx(action.occupied_us)
    cli("plan", files / "again.json", *options, "-o", files / "plan2.json")
    second = planner.Plan.load(files / "plan2.json")
    assert "measured in a run of" in second.provenance.profile_origin
    if second.layout.layers_per_stage == first.layout.layers_per_stage:
        for action in report.actions:
            field = {"F": "forward_us", "B": "backward_input_us", "W": "backward_weight_us"}[action.kind]
            assert getattr(second.stages[action.stage], field) == pytest.approx(action.occupied_us)
    report = run_plan(
        files / "plan2.json", steps=1, measure_path=files / "third.json", profile_path=files / "again.json"
    )
    assert ModelProfile.load(files / "third.json").num_layers == 6


def test_a_profile_without_measure_is_a_wrong_use(files):
    plan_for().save(files / "plain.json")
    done = CliRunner().invoke(app, ["run", str(files / "plain.json"), "--profile", "profile.json"])
    assert done.exit_code == 2
    assert "--profile goes with --measure" in done.stderr
