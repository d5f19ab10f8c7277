"""What running a schedule costs beside computing: our interpreter, torch's runtime and a hand-written loop in one run.

    python benchmarks/executor.py                          # all parts, about 5 minutes on two quiet cores
    python benchmarks/executor.py --part overhead --part backward --repeats 5

overhead: wall and thread-CPU µs per compute action; tiny stages, 2 processes, m 64. memory: peak of a process in
boundary tensors, for growing m. backward: thread CPU of B and W against BW on transformer blocks, and bytes held.
prediction: profiled here beside a busy process, planned, trained: the step as measured against predicted for stages of
at least 20 ms; and as predicted from a profile measured alone, and from the times of the run itself. Everything in
turns, so that noise of the machine meets all alike.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from executor_worker import split_ratio
from rich.console import Console
from rich.table import Table

import planner
from planner.executor.launch import run_plan
from planner.executor.run_report import RunReport
from profiles.measure.models import model_spec_for
from profiles.model import LayerGroup, LayerProfile, ModelProfile, Origin, Variant

WORKER = Path(__file__).with_name("executor_worker.py")
FAMILIES = {"1f1b": (1,), "zb-h1": (1,), "zb-v": (2,), "auto": (1, 2)}  # chunks per rank: more make stages too short
talk, out = Console(stderr=True), Console(width=120)


class Part(StrEnum):
    """What can be asked for alone."""

    overhead = "overhead"
    memory = "memory"
    backward = "backward"
    prediction = "prediction"


def main(
    part: Annotated[list[Part] | None, typer.Option(help="Only these parts.")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Timed runs of overhead and backward.")] = 15,
    rounds: Annotated[int, typer.Option(min=1, help="Trainings of each family in prediction.")] = 2,
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps of each training.")] = 6,
    num_blocks: Annotated[int, typer.Option(min=2, help="Blocks of the model in prediction.")] = 6,
    hidden_size: Annotated[int, typer.Option(min=64, help="Its width.")] = 256,
    global_batch_size: Annotated[int, typer.Option(min=8, help="Sequences per step in prediction.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Save every number here.")] = None,
) -> None:
    """Run the benchmark and print its protocol and tables."""
    parts = part or list(Part)
    load = os.getloadavg()[0]
    out.print(
        f"Protocol: {_processor()}, {os.cpu_count()} cores, load {load:.1f}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, gloo, 2 processes of 1 thread; seed 0; overhead and backward: {repeats} runs in "
        f"turns after 3 and 2 warm-ups; prediction: {rounds} rounds of {steps} steps, median after 2"
    )
    found: dict[str, Any] = {"load": load}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "options.json").write_text(json.dumps({"repeats": repeats}))
        if Part.overhead in parts or Part.memory in parts:
            for family, m in [*product(("1f1b", "zb-h1"), (4, 16, 32, 64)), ("zb-v", 64)]:
                _tiny_plan(family, m).save(directory / f"{family}-{m}.json")
        if Part.overhead in parts:
            found["overhead"] = _overhead(_launched("overhead", directory, 2))
        if Part.memory in parts:
            found["memory"] = _memory(_launched("memory", directory, 2))
        if Part.backward in parts:
            found["backward"] = _split(_launched("backward", directory, 1)[0])
        if Part.prediction in parts:
            found["prediction"] = _prediction(directory, rounds, steps, num_blocks, hidden_size, global_batch_size)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [n for n in info.read_text().splitlines() if n.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _launched(part: str, directory: Path, processes: int) -> list[dict[str, Any]]:
    talk.print(f"{part} ...")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), part, str(directory)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            # Large blocks go back to the system when freed, so that resident memory is memory in use.
            **({"MALLOC_MMAP_THRESHOLD_": str(2**20)} if part == "memory" else {}),
            "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{part} failed:\n{done.stderr[-3000:]}")
    return [json.loads((directory / f"found-{rank}.json").read_text()) for rank in range(processes)]


def _tiny_plan(family: str, m: int) -> planner.Plan:
    """A plan whose layers are replaced by the worker's: four equal ones on two ranks."""
    layer = LayerProfile(
        variant=Variant(micro_batch_size=4, sequence_length=8, dtype="float32"),
        forward_us=100.0,
        backward_input_us=100.0,
        backward_weight_us=100.0,
        fused_backward_us=200.0,
        parameter_bytes=64,
        activation_bytes=1024,
        weight_activation_bytes=512,
        output_bytes=256,
    )
    spec = model_spec_for("gpt2", num_layers=2, hidden_size=16, num_heads=2, vocab_size=31, sequence_length=8)
    profile = ModelProfile(
        model=spec,
        layers=(
            LayerGroup(name="embedding", kind="embedding", profiles=(layer,)),
            LayerGroup(name="block", kind="block", count=2, profiles=(layer,)),
            LayerGroup(name="head", kind="head", profiles=(layer,)),
        ),
        origin=Origin(kind="measured", device="made up", when="", how="made up"),
    )
    return planner.plan(
        profile,
        "1x2xcpu",
        global_batch_size=4 * m,
        pp=2,
        dp=1,
        micro_batch_size=4,
        virtual_stages=FAMILIES[family],
        family=family,
        time_limit_s=2,
    )


def _overhead(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each run the mean thread CPU over ranks and the longer wall time."""
    table = Table(title="Per compute action, µs (F, B, W or BW; 2 processes, m 64, 4 × 16 floats)", box=None)
    for name in ("", "thread CPU, min", "median", "wall, min", "median"):
        table.add_column(name, justify="right" if name else "left")
    rows = {}
    for name in found[0]:
        cpu = [statistics.fmean(pair) for pair in zip(*(f[name]["cpu_us"] for f in found), strict=True)]
        wall = [max(pair) for pair in zip(*(f[name]["wall_us"] for f in found), strict=True)]
        rows[name] = [min(cpu), statistics.median(cpu), min(wall), statistics.median(wall)]
        table.add_row(name, *(f"{value:.0f}" for value in rows[name]))
    out.print(table)
    return rows


def _memory(found: list[dict[str, Any]]) -> dict[str, Any]:
    table = Table(title="Peak of the first step above before, in boundary tensors of 8 MiB, rank 0 / rank 1", box=None)
    for name in ("", "pipewright", "torch's runtime"):
        table.add_column(name, justify="right" if name else "left")
    rows: dict[str, dict[str, list[float]]] = {}
    for name in found[0]:
        case, _, engine = name.partition(": ")
        rows.setdefault(case, {})[engine] = [f[name] for f in found]
    for case, engines in rows.items():
        table.add_row(case, *(" / ".join(f"{value:.1f}" for value in ranks) for ranks in engines.values()))
    out.print(table)
    return rows


def _split(found: dict[str, Any]) -> dict[str, Any]:
    table = Table(title="Split backward of one block, thread CPU (2 × 256 tokens, float32)", box=None)
    for name in (
        "",
        "",
        "B, ms",
        "W, ms",
        "BW, ms",
        "(B + W) / BW, min",
        "median",
        "MiB after F",
        "after B",
        "after W",
    ):
        table.add_column(name, justify="right" if name else "left")
    for block, of_block in found.items():
        times = of_block["times_us"]
        fused = times["BW"]
        for way in ("ours", "torch's"):
            b, w = times[f"B, {way}"], times[f"W, {way}"]
            middle = statistics.median((x + y) / z for x, y, z in zip(b, w, fused, strict=True))
            held = [f"{of_block[f'bytes, {way}'][phase] / 2**20:.2f}" for phase in "FBW"]
            least = [f"{min(samples) / 1e3:.2f}" for samples in (b, w, fused)]
            table.add_row(block, way, *least, f"{split_ratio(times, way):.3f}", f"{middle:.3f}", *held)
    out.print(table)
    return found


def _prediction(
    directory: Path, rounds: int, steps: int, num_blocks: int, hidden_size: int, global_batch_size: int
) -> dict[str, Any]:
    talk.print("profiling ...")
    spec = model_spec_for(
        "gpt2",
        num_layers=num_blocks,
        hidden_size=hidden_size,
        num_heads=hidden_size // 64,
        vocab_size=4096,
        sequence_length=256,
    )
    alone = planner.profile(spec, micro_batch_sizes=(2,), num_threads=1)
    profile = planner.profile(spec, micro_batch_sizes=(2,), num_threads=1, num_processes=2)
    profile.save(directory / "profile.json")
    plans = {family: _plan(profile, family, global_batch_size) for family in FAMILIES}
    measured: dict[str, list[float]] = {family: [] for family in FAMILIES}
    reports: dict[str, RunReport] = {}
    for number in range(rounds):
        for family, plan in plans.items():
            talk.print(f"round {number + 1} of {rounds}: {family} ...")
            plan.save(directory / "plan.json")
            reports[family] = run_plan(
                directory / "plan.json",
                steps=steps,
                device="cpu",
                measure_path=directory / f"measured-{family}.json",
                profile_path=directory / "profile.json",
            )
            measured[family].append(reports[family].measured.step_us)
    table = Table(title="Step, measured and predicted", box=None)
    names = ("", "measured, min", "median", "predicted", "error", "profiled alone", "error", "from this run", "error")
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    rows = {}
    for family, plan in plans.items():
        real_us, guess_us = statistics.median(measured[family]), plan.prediction.step_time_us
        again = _plan(ModelProfile.load(directory / f"measured-{family}.json"), family, global_batch_size)
        again_us = again.prediction.step_time_us
        alone_us = _plan(alone, family, global_batch_size).prediction.step_time_us
        rows[family] = {
            "measured_us": measured[family],
            "predicted_us": guess_us,
            "alone_us": alone_us,
            "again_us": again_us,
        }
        table.add_row(
            f"{family} (v {plan.layout.virtual_stages}, layers {'+'.join(map(str, plan.layout.layers_per_stage))})",
            *(f"{us / 1e3:.0f} ms" for us in (min(measured[family]), real_us, guess_us)),
            f"{guess_us / real_us - 1:+.1%}",
            f"{alone_us / 1e3:.0f} ms",
            f"{alone_us / real_us - 1:+.1%}",
            f"{again_us / 1e3:.0f} ms",
            f"{again_us / real_us - 1:+.1%}",
        )
    out.print(table)
    actions = Table(title="Actions of the last round, ms", box=None)
    for name in ("", "action", "stage", "took", "and handing over", "predicted", "error", "waited"):
        actions.add_column(name, justify="right" if name else "left")
    for family, report in reports.items():
        for row in report.actions:
            error = f"{row.predicted_us / row.occupied_us - 1:+.1%}"
            numbers = (row.measured_us, row.occupied_us, row.predicted_us)
            cells = [f"{us / 1e3:.1f}" for us in numbers]
            actions.add_row(family, row.kind, str(row.stage), *cells, error, f"{row.waited_us / 1e3:.1f}")
        update_us = report.measured.optimizer_us, report.predicted.optimizer_us
        actions.add_row(family, "step", "", f"{update_us[0] / 1e3:.1f}", "", f"{update_us[1] / 1e3:.1f}", "", "")
    out.print(actions)
    return rows


def _plan(profile: ModelProfile, family: str, global_batch_size: int) -> planner.Plan:
    return planner.plan(
        profile,
        "1x2xcpu",
        global_batch_size=global_batch_size,
        pp=2,
        dp=1,
        micro_batch_size=2,
        virtual_stages=FAMILIES[family],
        recompute="none",
        family=family,
        time_limit_s=5,
    )


if __name__ == "__main__":
    typer.run(main)
