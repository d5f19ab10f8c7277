"""`schedule` and `compare` as a user meets them, called in this process: every option, right and wrong."""

import json
import sys

import pytest

from planner.cli import main
from planner.schedule.answer import Comparison, ScheduleAnswer

COSTS = ("-p", "2", "-m", "4", "--forward-us", "12", "--backward-us", "12", "--weight-us", "12", "--time-limit", "2")


@pytest.fixture
def pipewright(monkeypatch, capsys):
    """Run the command line; what comes back is (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pipewright", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--placement", "vee", "-v", "2"), {"placement": "vee", "rank_of_stage": [0, 1, 1, 0], "span_us": 288}),
        (("--placement", "0,1,1,0"), {"placement": "given", "virtual_stages": 2, "span_us": 288}),
        (("--family", "zb-v", "-v", "2"), {"family": "zb-v", "placement": "vee", "span_us": 288}),
        (("--memory-limit", "1"), {"memory_capacity": [2, 2], "gap": 0}),
        (("--capacity-bytes", "5,9", "--fixed-bytes", "3,1"), {"memory_capacity": [5, 9]}),
        (("--activation-bytes", "6,8", "--weight-activation-bytes", "3", "--memory-limit", "2,1"), {"num_ranks": 2}),
        (("--fused-stages", "all", "--family", "zb-h1"), {"span_us": 180, "family": "zb-h1"}),
        (("--max-in-flight", "1"), {"gap": 0}),
        (("--recompute-us", "12", "--checkpoint-bytes", "1", "--family", "1f1b"), {"span_us": 12 + 4 * 48 + 24}),
        (("--p2p-us", "1"), {"num_microbatches": 4}),
        (("--microbatch-scale", "1,2,1,0.5", "--family", "naive"), {"makespan_us": round(2 * 36 * 4.5)}),
    ],
)
def test_every_option_of_schedule_reaches_the_answer(pipewright, options, wanted):
    code, out, err = pipewright("schedule", *COSTS, *options, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert {name: answer[name] for name in wanted} == wanted
    peak, capacity = answer["peak_memory"], answer["memory_capacity"]
    assert capacity is None or all(map(int.__le__, peak, capacity))


def test_the_placement_can_be_chosen(pipewright):
    code, out, err = pipewright("schedule", *COSTS, "--placement", "auto", "--memory-limit", "2", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["span_us"] == 4 * 36
    assert {row["placement"] for row in answer["comparison"]} == {"linear", "interleaved", "vee"}
    code, out, _ = pipewright("schedule", *COSTS, "--placement", "auto", "--memory-limit", "2")
    assert "Placements" in out
    assert "of all placements below" in out
    short = (*COSTS[:4], "--forward-us", "2", "--backward-us", "2", "--weight-us", "2", "--placement", "auto")
    code, out, _ = pipewright("schedule", *short)
    assert "interleaved v3  forward_us 2 is too little to be cut into 3 stages" in out


def test_compare_shows_every_family(pipewright):
    code, out, err = pipewright("compare", *COSTS, "--memory-limit", "2")
    assert code == 0, err
    for words in ("zb-v", "interleaved-1f1b", "v-half", "auto (", "no: 2.00 over", "to best", "by span"):
        assert words.lower() in out.lower()
    code, out, err = pipewright("compare", *COSTS, "--json", "--objective", "makespan")
    found = Comparison.model_validate_json(out)
    assert found.objective == "makespan"
    assert [row.makespan_us for row in found.rows] == sorted(row.makespan_us for row in found.rows)


def test_answers_are_saved_whole(pipewright, tmp_path):
    for command, kind in (("schedule", ScheduleAnswer), ("compare", Comparison)):
        path = tmp_path / f"{command}.json"
        code, out, err = pipewright(command, *COSTS, "-o", path, "--json")
        assert code == 0
        assert f"saved {path}" in err.replace("\n", "")
        assert kind.load(path) == kind.model_validate_json(out)


def test_a_long_schedule_is_shown_in_part(pipewright, tmp_path):
    path = tmp_path / "all.json"
    sizes = ("-p", "40", "-m", "80", "--forward-us", "3", "--backward-us", "3", "--weight-us", "3")
    code, out, _ = pipewright("schedule", *sizes, "--family", "zb-h1", "-o", path)
    assert code == 0
    assert len(out.splitlines()) < 40
    assert max(map(len, out.splitlines())) <= 120
    assert "and 24 more ranks" in out
    assert "the whole schedule: --json, or -o FILE for a file" in out
    assert "41 to 80, most on rank 0" in out
    assert len(ScheduleAnswer.load(path).schedule) == 40


@pytest.mark.parametrize("command", ["schedule", "compare"])
@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--forward-us", "1,x"), 2, "--forward-us '1,x': give one number, or a comma list of numbers"),
        (("--weight-us", ""), 2, "--weight-us '': give one number"),
        (("--backward-us", "0"), 2, "backward_us: 0.0 is not a time; give µs from 1"),
        (("--p2p-us", "-1"), 2, "p2p_us: -1.0 is not a time"),
        (("--p2p-us", "1,2,3"), 2, "p2p_us has 3 entries"),
        (("--p2p-us", "inf"), 2, "p2p_us: inf is not a time"),
        (("--activation-bytes", "1.5"), 2, "--activation-bytes '1.5': give one whole number, or a comma list of whole"),
        (("--activation-bytes", "0"), 2, "activation_bytes: 0 is out of range"),
        (("--activation-bytes", "24,24,24"), 2, "activation_bytes has 3 entries"),
        (("--weight-activation-bytes", "-1"), 2, "weight_activation_bytes: -1 is out of range"),
        (("--memory-limit", "0"), 2, "memory limit 0.0: give a number of microbatches above 0"),
        (("--memory-limit", "many"), 2, "--memory-limit 'many': give one number"),
        (("--memory-limit", "3,3,3"), 2, "memory_limit has 3 entries; give one number, or one for each of the 2 ranks"),
        (("--memory-limit", "3", "--capacity-bytes", "9"), 2, "both limit memory; give one of them"),
        (("--capacity-bytes", "1e9"), 2, "--capacity-bytes '1e9': give one whole number"),
        (("--capacity-bytes", "-1"), 2, "capacity_bytes: -1 is no size"),
        (("--capacity-bytes", "9,9,9"), 2, "capacity_bytes has 3 entries"),
        (("--fixed-bytes", "9"), 2, "fixed_bytes counts against capacity_bytes; give that, too"),
        (("--capacity-bytes", "99", "--fixed-bytes", "1,2,3"), 2, "fixed_bytes has 3 entries"),
        (("--fused-stages", "some"), 2, "--fused-stages 'some': give one whole number"),
        (("--fused-stages", "7"), 2, "fused_stages: there is no"),
        (("--max-in-flight", "0"), 2, "max_in_flight: 0 is out of range; give a whole number from 1"),
        (("--recompute-us", "5"), 2, "recompute_us is given without checkpoint_bytes"),
        (("--checkpoint-bytes", "5"), 2, "checkpoint_bytes is given without recompute_us"),
        (("--recompute-us", "5", "--checkpoint-bytes", "900"), 2, "checkpoint_bytes of stage 0 is"),
        (("--microbatch-scale", "1,2"), 2, "microbatch_scale has 2 entries; give one for each of the 4 microbatches"),
        (("--microbatch-scale", "1,2,3,0"), 2, "microbatch_scale: 0.0 is no share; give a number from 0.01 to 1000"),
        (("--microbatch-scale", "a,b,c,d"), 2, "--microbatch-scale 'a,b,c,d': give one number"),
        (("--microbatch-scale", "1,1,2,2", "--solver", "cp-sat"), 2, "microbatch_scale goes with the solver auto"),
        (("--work-limit", "0"), 2, "work limit 0.0: give a finite amount above 0"),
        (("--time-limit", "nan"), 2, "--time-limit"),
        (("--time-limit", "inf"), 2, "time limit inf: give a finite number of seconds above 0"),
        (("--solver", "gurobi"), 2, "no solver is called 'gurobi'; known: auto, list-scheduling"),
        (("--objective", "cost"), 2, "--objective"),
        (("-m", "0"), 2, "-m"),
        (("-m", "900000000"), 2, "actions; at most 2500000 are scheduled"),
        (("-o", "/nowhere/answer.json"), 2, "its folder /nowhere does not exist"),
        (("--memory-limit", "0.5"), 1, "with a single microbatch, and the memory limit of 0.5 microbatches is"),
        (("--capacity-bytes", "99", "--fixed-bytes", "98"), 1, "with a single microbatch, and its capacity is 99"),
    ],
)
def test_wrong_input_gets_one_clear_message(pipewright, command, options, code, words):
    ended, out, err = pipewright(command, *COSTS, *options)
    assert ended == code
    assert out == ""
    assert words in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--placement", "zigzag"), 2, "placement 'zigzag' is not known"),
        (("--placement", "0,5"), 2, "puts stage 1 on rank 5; the ranks are 0 to 1"),
        (("--placement", "0,0"), 2, "leaves rank 1 of 2 without a stage"),
        (("--placement", "0,1,1,0", "-v", "3"), 2, "lists 4 stages, but 2 ranks with 3 stages each make 6"),
        (("--placement", "auto", "-v", "2"), 2, "placement auto chooses chunks and order by itself"),
        (("--placement", "auto", "--family", "1f1b"), 2, "leave out family and virtual_stages, or compare"),
        (("--family", "zb-v"), 2, "family 'zb-v': it runs two stages per rank, in a V, not 1; choose virtual_stages=2"),
        (("--family", "zb-v", "-v", "2", "--placement", "linear"), 2, "has a placement of its own, vee"),
        (("--family", "zb-x"), 2, "no schedule family is called 'zb-x'; did you mean 'zb-"),
        (("--family", "gpipe", "--memory-limit", "2"), 1, "no gpipe schedule fits: rank 0 holds 8 at its peak"),
        (("--family", "gpipe", "--max-in-flight", "2"), 1, "more than 2 microbatches of stage 0 in flight; raise max"),
    ],
)
def test_wrong_placements_and_families_get_one_clear_message(pipewright, options, code, words):
    ended, out, err = pipewright("schedule", *COSTS, *options)
    assert ended == code
    assert out == ""
    assert words in " ".join(err.split())
