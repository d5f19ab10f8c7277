"""Profile a GPT-2-like model here, plan it, train it under torchrun: measured beside predicted, and how exact it is.

    python benchmarks/train_here.py                     # the README's model, about 20 minutes on two cores
    python benchmarks/train_here.py --num-layers 2 --sequence-length 64 --steps 4

Everything in one run on one machine: profile, then for each schedule family a plan for two processes (and one for two
pipelines side by side), then training with a single-process reference. The protocol is printed with the table.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import planner
from planner.errors import InfeasibleError
from planner.executor.launch import run_plan
from planner.executor.run_report import RunReport


def main(
    model: str = "gpt2",
    num_layers: Annotated[int | None, typer.Option(help="Change the number of blocks.")] = None,
    sequence_length: int = 256,
    global_batch_size: int = 8,
    steps: int = 10,
    seed: int = 0,
    float64: Annotated[bool, typer.Option(help="Also compare first-step gradients in float64.")] = True,
) -> None:
    """Run the benchmark and print one table."""
    talk = Console(stderr=True)
    talk.print("profiling ...")
    profile = planner.profile(
        model,
        sequence_length=sequence_length,
        num_layers=num_layers,
        micro_batch_sizes=(1,),
        num_threads=1,
        num_processes=2,
    )
    table = Table(title="Measured beside predicted", box=None)
    for name in ("plan", "measured step", "predicted step", "error", "losses within", "gradients within (float64)"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    with tempfile.TemporaryDirectory() as folder:
        for family, processes, dp in (("1f1b", 2, 1), ("zb-h1", 2, 1), ("auto", 2, 1), ("zb-h1", 4, 2)):
            try:
                plan = planner.plan(
                    profile,
                    f"1x{processes}xcpu",
                    global_batch_size=global_batch_size,
                    pp=2,
                    dp=dp,
                    micro_batch_size=1,
                    family=family,
                    time_limit_s=10,
                    seed=seed,
                )
            except InfeasibleError as error:
                talk.print(f"{family} on {processes} processes: {error}")
                continue
            path = Path(folder) / "plan.json"
            plan.save(path)
            talk.print(f"training {plan.layout.degrees}, {family} ...")
            report = run_plan(path, steps=steps, seed=seed, learning_rate=1e-4, check=True)
            strict = run_plan(path, steps=1, seed=seed, dtype="float64", check=True) if float64 else None
            table.add_row(f"{plan.layout.degrees}, {family}", *_cells(report, strict))
    out = Console(width=120)
    out.print(table)
    shape = profile.model
    out.print(
        f"{shape.num_layers} blocks, hidden {shape.hidden_size}, vocabulary {shape.vocab_size}, sequence "
        f"{sequence_length}, global batch {global_batch_size}, {steps} steps of AdamW, seed {seed}; measured = median "
        f"without the first {report.num_skipped_steps}; float32; {profile.origin.device}, {os.cpu_count()} cores, "
        f"1 thread per process; profile: {profile.origin.how}"
    )


def _cells(report: RunReport, strict: RunReport | None) -> list[str]:
    assert report.exactness is not None
    gradients = ""
    if strict is not None:
        assert strict.exactness is not None
        gradients = f"{strict.exactness.gradient_relative_difference:.1e}"
    return [
        f"{report.measured.step_us / 1e6:.2f} s",
        f"{report.predicted.step_us / 1e6:.2f} s",
        f"{report.prediction_error:+.1%}",
        f"{report.exactness.worst_loss_relative_difference:.1e}",
        gradients,
    ]


if __name__ == "__main__":
    typer.run(main)
