"""The benchmark of published runs: its rules, its output, and the accuracy it must not fall behind."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from published import main
from published_cluster import cluster_of
from published_fields import UnpricedError
from published_files import SHIPPED, groups_of, is_compared, measured_s, read, shapes
from published_pricing import predict
from published_ranking import rank, spearman
from published_rows import blocks_per_stage, run_of
from published_software import software_of
from published_tables import layer_errors, schedule_errors
from typer.testing import CliRunner

from profiles import catalog

SHAPES = shapes()
ROW: dict[str, Any] = {
    "id": "a",
    "shape": "gpt3-175b",
    "hardware": "a100_80gb_sxm",
    "num_devices": 1024,
    "devices_per_node": 8,
    "tensor_parallel": 8,
    "pipeline_parallel": 8,
    "micro_batch": 1,
    "global_batch": 1536,
    "precision": "bf16",
    "iteration_time_s": 30.0,
}


def mean_error(name: str) -> float:
    file = read(SHIPPED / f"{name}.json")
    errors = [
        abs(predict(row, file.facts, SHAPES).step_s / measured - 1)
        for row in file.rows
        if is_compared(row) and (measured := measured_s(row, SHAPES))
    ]
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("sc21_megatron", 0.03),
        ("vtrain_multi_node", 0.08),
        ("bloom_prequel_sweeps", 0.05),
        ("korthikanti2022", 0.03),
        ("dgxc_h100_history", 0.03),
        ("llm_foundry_fsdp", 0.09),
        ("fms_fsdp", 0.05),
        ("torchtitan_benchmarks", 0.06),
        ("bigscience_v100", 0.10),
    ],
)
def test_step_times_of_published_runs_are_predicted_this_well(name: str, most: float) -> None:
    assert mean_error(name) < most


def test_memory_of_published_runs_is_predicted_within_10_percent_and_who_runs_out_of_it() -> None:
    errors, misjudged = [], []
    for name in ("bloom_prequel_sweeps", "bigscience_v100", "torchtitan_benchmarks"):
        file = read(SHIPPED / f"{name}.json")
        for row in file.rows:
            predicted = predict(row, file.facts, SHAPES)
            if predicted.fits != row.get("fits", True):
                misjudged.append(row["id"])
            if row.get("peak_memory_gb"):
                errors.append(abs(predicted.memory_gb(row.get("memory_kind", "")) / row["peak_memory_gb"] - 1))
    assert sum(errors) / len(errors) < 0.10
    # the first counts the tied matrix of its one stage twice; the second holds half of what its neighbour does
    assert set(misjudged) <= {"bsp-038", "v100-1b3-32gb-ckpt-tp1pp2dp4mbs16"}


def test_the_layout_picked_is_seldom_far_from_the_best_measured() -> None:
    groups = groups_of(read(SHIPPED / "layout_rankings.json"))
    ranked = [rank(group, SHAPES) for group in groups]
    assert not any(each.unpriced for each in ranked)
    regrets = [each.regret for each in ranked if each.regret is not None]
    assert len(regrets) == 20
    assert sum(regrets) / len(regrets) < 0.02


def test_one_layer_with_and_without_recomputation_is_within_5_percent() -> None:
    errors = layer_errors(read(SHIPPED / "korthikanti2022.json").facts, SHAPES)
    assert len(errors) == 10
    for name, what, measured, predicted in errors:
        assert predicted == pytest.approx(measured, rel=0.05), f"{name} {what}"


def test_bubble_rates_of_fixed_schedules_are_those_of_the_zero_bubble_paper() -> None:
    errors = schedule_errors(read(SHIPPED / "zero_bubble_iclr2024.json").facts)
    assert len(errors) == 18
    for name, printed, simulated in errors:
        assert simulated == pytest.approx(printed, abs=2e-4), name


# -- rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "want"),
    [
        (8, 1, (10,)),
        (8, 4, (3, 2, 2, 3)),
        (126, 64, (2,) * 64),  # Llama 3.1 405B: embedding and head counted as layers
        (10, 4, (3, 3, 3, 3)),
        (9, 4, (3, 2, 3, 3)),
    ],
)
def test_blocks_lie_evenly_on_stages(num_layers: int, num_stages: int, want: tuple[int, ...]) -> None:
    got = blocks_per_stage(num_layers, num_stages)
    assert sum(got) == num_layers + 2
    assert got == want


@pytest.mark.parametrize(
    ("hardware", "device", "gbit"),
    [
        ("Selene: 8 x A100-80GB per node, NVLink 3 / NVSwitch, 8 x HDR 200 Gb/s InfiniBand per node", "a100-80gb", 200),
        ("A100, 400 Gb/s per node; H100, 800 Gb/s per node", "a100-80gb", 50),
        ("A100, 400 Gb/s per node; H100, 800 Gb/s per node", "h100-sxm", 100),
        ("1600 Gb/s RoCE per node for A100 (stated), H100 network not stated", "a100-80gb", 200),
        ("1600 Gb/s RoCE per node for A100 (stated), H100 network not stated", "h100-sxm", 400),  # the usual
        ("NVLink, 400 Gb/s RDMA per GPU", "h100-sxm", 400),
        ("", "h100-sxm", 400),
    ],
)
def test_the_network_rate_is_read_from_words(hardware: str, device: str, gbit: float) -> None:
    row = {"devices_per_node": 8}
    cluster = cluster_of(row, {"hardware": hardware}, catalog.device(device), 64, [])
    assert cluster.inter_node.bandwidth_bytes_per_s == gbit * 1e9 / 8


def test_missing_fields_are_filled_in_and_named() -> None:
    run = run_of(ROW, {}, SHAPES)
    c = run.candidate
    assert (c.tp, c.pp, c.dp, c.num_microbatches, c.zero_stage, c.recompute) == (8, 8, 16, 96, 0, "none")
    assert {"data_parallel=16", "virtual_stages=1", "recompute=none", "sequence_parallel=True"} <= set(run.filled)


def test_frameworks_are_told_apart_by_their_time() -> None:
    old = software_of({**ROW, "precision": "fp16"}, {"source": "SC'21"}, "float16", False, "full")
    assert (old.tensor_overlap, old.accumulation) == ("none", "separate")
    later = software_of({**ROW, "precision": "fp16"}, {"source": "Reducing ..., 2022"}, "float16", False, "full")
    assert (later.tensor_overlap, later.accumulation) == ("gradients", "fused")
    fork = {"source": "vTrain, 2024", "facts": ["Megatron-DeepSpeed"]}
    assert software_of({**ROW, "precision": "fp16"}, fork, "float16", False, "full") == old


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shape": "no-such-model"}, "shape 'no-such-model' is not among the shipped shapes"),
        ({"hardware": "abacus"}, "hardware 'abacus' is not in the catalogue"),
        ({"data_parallel": 3}, "tp × pp × cp × dp = 192, but num_devices is 1024"),
        ({"global_batch": 1500}, "micro_batch 1 × data_parallel 16 does not divide global_batch 1500"),
        ({"global_batch": None}, "global_batch is not stated"),
        ({"precision": "int3"}, "precision 'int3' is not known"),
        ({"tensor_parallel": 5, "num_devices": 960}, "num_heads 96, which tp=5 does not divide"),
    ],
)
def test_a_row_that_cannot_be_priced_says_why(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UnpricedError, match=re.escape(why)):
        predict({**ROW, **changes}, {}, SHAPES)


@pytest.mark.parametrize(
    ("fields", "want_s"),
    [
        ({"iteration_time_s": 2.0}, 2.0),
        ({"derived": {"iteration_time_s": 3.0}}, 3.0),
        ({"tokens_per_s_per_device": 1000}, 1536 * 2048 / 1000 / 1024),
        ({"samples_per_s": 64}, 24.0),
    ],
)
def test_step_time_is_read_or_follows_from_a_rate(fields: dict[str, Any], want_s: float) -> None:
    row = {key: value for key, value in ROW.items() if key != "iteration_time_s"} | fields
    assert measured_s(row, SHAPES) == pytest.approx(want_s)


def test_step_time_follows_from_utilization() -> None:
    row = {key: value for key, value in ROW.items() if key != "iteration_time_s"} | {"mfu_percent": 50.0}
    flops = 3 * 1536 * 2048 * (2 * 174.575e9 + 96 * 4 * 12288 * 2048)
    assert measured_s(row, SHAPES) == pytest.approx(flops / 1024 / 156e12, rel=0.001)


@pytest.mark.parametrize(
    ("first", "second", "want"),
    [
        ([1.0, 2, 3, 4], [10.0, 20, 30, 40], 1.0),
        ([1.0, 2, 3, 4], [4.0, 3, 2, 1], -1.0),
        ([1.0, 2, 3, 4], [1.0, 3, 2, 4], 1 - 6 * 2 / (4 * 15)),  # 1 - 6 sum d^2 / (n (n^2 - 1))
        ([1.0, 1, 2], [1.0, 2, 3], 3**0.5 / 2),  # ranks 0.5, 0.5, 2: covariance 1.5, spreads 1.5 and 2
        ([1.0, 1, 1], [1.0, 2, 3], None),
    ],
)
def test_spearman_of_small_lists_with_and_without_ties(
    first: list[float], second: list[float], want: float | None
) -> None:
    got = spearman(first, second)
    assert got is None if want is None else got == pytest.approx(want)


# -- output --------------------------------------------------------------------------------------------------------


def run_on(tmp_path: Path, data: dict[str, Any]) -> list[str]:
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(data))
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(path)])
    assert result.exit_code == 0, result.output
    return result.output.strip().splitlines()


def test_the_last_line_sums_a_file_up_and_no_row_is_dropped(tmp_path: Path) -> None:
    rows = [
        ROW,
        {**ROW, "id": "b", "hardware": "abacus"},
        {**ROW, "id": "c", "consistent": False},
        {**ROW, "id": "d", "micro_batch": 16, "recompute": "none", "fits": False, "iteration_time_s": None},
    ]
    lines = run_on(tmp_path, {"rows": rows})
    assert re.fullmatch(r"mean \|error\| of step time \d+\.\d % over 1 rows, worst [+-]\d+\.\d % \(a\)", lines[-1])
    text = "\n".join(lines)
    assert "not priced: b: hardware 'abacus'" in text
    assert "apart (context, or numbers that disagree): c" in text
    assert "fits or not: 2 of 2 agree" in text


def test_a_table_of_columns_is_read_like_rows(tmp_path: Path) -> None:
    single = json.loads((SHIPPED / "vtrain_single_node.json").read_text())
    lines = run_on(tmp_path, {"columns": single["columns"], "rows": single["rows"][:5]})
    assert " over 5 rows" in lines[-1]


def test_groups_are_judged_by_regret_and_rank_correlation(tmp_path: Path) -> None:
    listed = json.loads((SHIPPED / "layout_rankings.json").read_text())["groups"]
    lines = run_on(tmp_path, {"groups": [group for group in listed if group["id"] == "rank-vtrain-3.6b"]})
    assert re.fullmatch(r"mean regret 0\.0 %, worst 0\.0 %, mean Spearman 0\.9\d over 1 groups", lines[-1])
