"""The command line as a user meets it: answers on stdout, one message on stderr, exit codes, nothing half-written."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "planner.cli"]
ZERO_BUBBLE_1_5B = [
    *("schedule", "-p", "8", "-m", "24", "--forward-us", "18522", "--backward-us", "18086", "--weight-us", "9337"),
    *("--p2p-us", "601", "--memory-limit", "8", "--json"),
]


def pipewright(*arguments, cwd=None):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False)


def refused(result, code=2):
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize(("family", "rate"), [("auto", 0.1585), ("zb-h1", 0.1585), ("1f1b", 0.2431)])
def test_the_zero_bubble_papers_rates_come_out(family, rate):
    result = pipewright(*ZERO_BUBBLE_1_5B, "--family", family)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert round(answer["bubble_rate_span"], 4) == rate
    assert max(answer["peak_memory"]) <= 16
    assert len(answer["schedule"]) == 8
    if family != "1f1b":
        assert answer["status"] == "optimal"
        assert answer["gap"] == 0


def test_schedule_prints_the_documented_keys():
    answer = json.loads(pipewright(*ZERO_BUBBLE_1_5B, "--family", "zb-h1").stdout)
    documented = (
        "family solver status objective span_us makespan_us bubble_rate_span bubble_rate_makespan lower_bound_us "
        "lower_bound_kind gap peak_memory solve_seconds schedule"
    )
    assert set(documented.split()) <= set(answer)


def test_a_memory_limit_a_family_breaks_is_an_answer_not_found():
    limit = ZERO_BUBBLE_1_5B.index("--memory-limit") + 1
    arguments = [*ZERO_BUBBLE_1_5B[:limit], "4", *ZERO_BUBBLE_1_5B[limit + 1 :]]
    assert "no 1f1b schedule fits: rank 0 holds 16 at its peak, the memory limit of 4 microbatches is 8" in refused(
        pipewright(*arguments, "--family", "1f1b"), 1
    )


def test_plan_saves_what_validate_accepts(tmp_path):
    plan = tmp_path / "plan.json"
    arguments = ("gpt2-xl", "--cluster", "1x4xa100-40gb", "--global-batch-size", 32, "--time-limit", 5, "-o", plan)
    made = pipewright("plan", *arguments)
    assert made.returncode == 0, made.stderr
    assert "step time" in made.stdout
    checked = pipewright("validate", plan)
    assert checked.returncode == 0
    assert "valid" in checked.stdout


def test_plan_json_is_the_plan():
    result = pipewright(
        *("plan", "gpt2-xl", "--cluster", "1x2xa100-40gb", "--global-batch-size", 8, "--family", "1f1b", "--json")
    )
    assert json.loads(result.stdout)["schema"] == "pipewright.plan/1"


SMALL = ("llama-3.2-1b", "--cluster", "1x8xa100-80gb", "--global-batch-size", 64, "--seq-len", 2048)


def test_every_answer_can_be_asked_for_at_once():
    asked = ("--tp", "4,8", "--pp", "not:1", "--recompute", "not:none", "--top", 3, "--tokens", "1T")
    changes = ("--what-if", "flops=2x", "--what-if", "memory=0.001x")
    arguments = ("plan", *SMALL, *asked, *changes, "--time-limit", 6)
    shown = pipewright(*arguments)
    assert shown.returncode == 0, shown.stderr
    for words in (
        "Where the step goes",
        "The best 3 layouts",
        "What separates them",
        "and without",
        "Token budget",
        "What if",
        "no layout of 'llama-3.2-1b' found that fits",
        "Certificate",
        "Made from",
    ):
        assert words in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100
    answers = json.loads(pipewright(*arguments, "--json").stdout)
    assert set(answers) == {"plan", "comparison", "top", "budget", "what_if"}
    layout = answers["plan"]["layout"]
    assert layout["tp"] in (4, 8)
    assert layout["pp"] > 1
    assert layout["recompute"] in ("selective", "full")
    assert len(answers["top"]["rows"]) == 3
    assert answers["budget"]["tokens"] == 10**12
    assert [outcome["change"] for outcome in answers["what_if"]["changes"]] == ["flops=2x", "memory=0.001x"]
    parts = answers["comparison"]["parts"]
    assert sum(part["difference_us"] for part in parts) == pytest.approx(answers["comparison"]["difference_us"])


def test_pins_of_every_kind_reach_the_plan():
    pins = ("--tp", 2, "--cp", 2, "--dp", 2, "--zero", 3, "--shard-degree", 2, "--no-sequence-parallel")
    dtypes = ("--dtype", "float16", "--gradient-dtype", "bfloat16", "--master-weight-dtype", "none")
    more = ("--optimizer-dtype", "bfloat16", "--no-overlap", "--family", "1f1b,zb-h1", "--recompute", "full,none")
    result = pipewright("plan", *SMALL, *pins, *dtypes, *more, "--time-limit", 3, "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    wanted = {"tp": 2, "cp": 2, "dp": 2, "pp": 1, "zero_stage": 3, "shard_degree": 2, "sequence_parallel": False}
    assert {name: plan["layout"][name] for name in wanted} == wanted
    assert plan["layout"]["recompute"] in ("full", "none")
    assert plan["family"] in ("1f1b", "zb-h1")
    assert plan["precision"] == {
        "compute": "float16",
        "gradients": "bfloat16",
        "master_weights": None,
        "optimizer": "bfloat16",
    }
    assert "data-parallel traffic is not overlapped;" in plan["provenance"]["assumptions"]


def test_the_smallest_cluster_is_answered_with_its_plan(tmp_path):
    arguments = ("plan", "llama-2-7b", "--cluster", "8x2xa100-40gb", "--global-batch-size", 64, "--seq-len", 2048)
    found = pipewright(*arguments, "--smallest", "--time-limit", 5, "-o", tmp_path / "plan.json")
    assert found.returncode == 0, found.stderr
    assert re.search(r"answer +[0-9]+ nodes?, [0-9]+ devices: the model fits", found.stdout)
    assert pipewright("validate", tmp_path / "plan.json").returncode == 0
    nothing = pipewright(*arguments, "--smallest", "--max-nodes", 1, "--time-limit", 5, "-o", tmp_path / "none.json")
    assert nothing.returncode == 1
    assert "no number of nodes was found" in nothing.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_catalog_lists_every_kind_and_shows_one_entry():
    names = json.loads(pipewright("catalog", "--json").stdout)
    assert len(names["models"]) >= 25
    assert {"a100-40gb", "a100-80gb", "h100-sxm", "h200", "b200", "mi300x", "l40s", "rtx-4090", "cpu"} <= set(
        names["devices"]
    )
    assert "auto" in names["families"]
    assert json.loads(pipewright("catalog", "h100-sxm").stdout)["name"] == "h100-sxm"
    assert "Models" in pipewright("catalog").stdout


PLAN = ("plan", "llama-3.1-8b", "--global-batch-size", "8")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((*PLAN, "--cluster", "0x8xh100-sxm"), 2, "0x8xh100-sxm"),
        ((*PLAN, "--cluster", "1x8xh100-sxn"), 2, "h100-sxm"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--tp", "3"), 2, "tp=3 does not divide num_heads=32"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--tp", "0"), 2, "--tp"),
        ((*PLAN, "--cluster", "1x1xrtx-4090"), 1, "fits cluster '1x1xrtx-4090'"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "-o", "/nowhere/plan.json"), 2, "its folder /nowhere does not exist"),
        (
            (*PLAN, "--cluster", "1x8xh100-sxm", "--pp", "4,x"),
            2,
            "--pp '4,x': give a whole number from 1, a comma list",
        ),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--pp", "not:"), 2, "--pp 'not:'"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--zero", "4"), 2, "zero_stage=4 is not known; choose one of 0, 1, 2, 3"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--recompute", "some"), 2, "--recompute 'some'"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--family", "1f1b,zbh1"), 2, "did you mean 'zb-h1'"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--tokens", "many"), 2, "token budget 'many': write a number of tokens"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--what-if", "link=fast"), 2, "what if 'link=fast': write KEY=FACTORx"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--deadline-days", "3"), 2, "go with --smallest"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--smallest", "--top", "3"), 2, "leave out --what-if and --top"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--smallest", "--deadline-days", "3"), 2, "give --tokens, too"),
        ((*PLAN, "--cluster", "1x8xh100-sxm", "--master-weight-dtype", "int8"), 2, "give none, or one of float8"),
        ((*PLAN, "--cluster", "1x8xa100-80gb", "--dtype", "float8"), 2, "float8"),
        (("plan", "lama-3.1-8b", "--cluster", "1x8xh100-sxm", "--global-batch-size", "8"), 2, "llama-3.1-8b"),
        (("plan", "llama-3.1-8b", "--cluster", "1x8xh100-sxm"), 2, "--global-batch-size"),
        (("validate", "missing.json"), 2, "missing.json: no such file"),
        (("run", "missing.json"), 2, "missing.json: no such file"),
        (("catalog", "h1000"), 2, "'h1000' is no model, device or cluster"),
        (("schedule", "-p", "2", "-m", "4", "--forward-us", "x", "--backward-us", "1", "--weight-us", "1"), 2, "'x'"),
        (("schedule", "-p", "2", "-m", "4", "--forward-us", "nan", "--backward-us", "1", "--weight-us", "1"), 2, "nan"),
        (
            ("schedule", "-p", "3", "-m", "4", "--forward-us", "1,2", "--backward-us", "1", "--weight-us", "1"),
            2,
            "forward_us has 2 entries; give one number, or one for each of the 3 stages",
        ),
    ],
)
def test_bad_input_gets_one_clear_message(arguments, code, words):
    assert words in refused(pipewright(*arguments), code)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:300], "not valid JSON"),
        (lambda text: text.replace('"latency_us": 5', '"latency_us": NaN', 1), "latency_us"),
        (lambda text: text.replace('"num_nodes": 2', '"num_nodes": 0', 1), "num_nodes"),
        (lambda text: text.replace('"memory_bytes": 6', '"memory_bytes": -6', 1), "memory_bytes"),
        (lambda text: text.replace('"name"', '"nome"', 1), "nome"),
    ],
)
def test_a_broken_cluster_file_gets_one_clear_message(tmp_path, change, words):
    link = {"bandwidth_bytes_per_s": 1e9, "latency_us": 5}
    device = {
        "name": "toy",
        "kind": "cuda",
        "memory_bytes": 1 << 36,
        "memory_bandwidth_bytes_per_s": 1e12,
        "peak_flops": {"bfloat16": 1e14},
        "matmul_efficiency": 0.8,
        "memory_efficiency": 0.8,
        "kernel_launch_us": 5.0,
        "scale_up": link,
        "scale_out": link,
        "devices_per_node": 2,
        "source": "made up for this test",
    }
    group = {"device": device, "num_nodes": 2, "devices_per_node": 2, "intra_node": link}
    cluster = {
        "schema": "pipewright.cluster/1",
        "name": "toys",
        "groups": [group],
        "inter_node": link,
        "source": "made up for this test",
    }
    text = json.dumps(cluster)
    path = tmp_path / "cluster.json"
    path.write_text(change(text))
    assert change(text) != text
    assert words in refused(
        pipewright("plan", "gpt2", "--global-batch-size", 8, "--cluster", path, "-o", tmp_path / "plan.json")
    )
    assert [p.name for p in tmp_path.iterdir()] == ["cluster.json"]


def test_the_readmes_own_commands_name_real_options():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for line in readme.splitlines():
        words = line.replace(".venv/bin/", "").split()
        if words[:1] != ["pipewright"] or len(words) < 2:
            continue
        shown = pipewright(words[1], "--help").stdout
        for word in words[2:]:
            option = word.split("=")[0]
            if option.startswith("--"):
                assert option in shown, line


CUT_SHORT = (
    *("schedule", "-p", "8", "-m", "24", "--backward-us", "18086", "--weight-us", "9337", "--p2p-us", "601"),
    *("--forward-us", "18522,18000,17000,19000,18522,18000,17500,19100", "--memory-limit", "5.5", "--time-limit", "60"),
)


@pytest.mark.parametrize("solver", ["auto", "cp-sat", "list-scheduling"])
def test_ctrl_c_gives_the_best_schedule_so_far(solver):
    process = subprocess.Popen(
        [*COMMAND, *CUT_SHORT, "--solver", solver, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert answer["interrupted"] or answer["status"] == "optimal" or not answer["limited_by_time"]
    assert len(answer["schedule"]) == 8
