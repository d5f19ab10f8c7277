"""`pipewright profile` and `pipewright run`: what needs torch."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.shell import DtypeName, Json, Seed, fail, positive_integers, spinner, steps_progress, talk, torch_part
from profiles.facts import check_writable

if TYPE_CHECKING:
    from planner.executor.job import StepProgress
    from planner.executor.run_report import RunReport


class DeviceName(StrEnum):
    """Where a run's processes compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class EngineName(StrEnum):
    """Who runs the actions of a schedule."""

    pipewright = "pipewright"
    torch = "torch"


def profile(
    model: Annotated[str, typer.Argument(help="Catalogue name or Hugging Face config.json of a GPT-2 or Llama kind.")],
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence [default: the model's].")] = None,
    micro_batch_sizes: Annotated[str, typer.Option(help="Comma list of micro-batch sizes to measure.")] = "1,2,4",
    num_layers: Annotated[int | None, typer.Option(min=1, help="Blocks to build [default: the model's].")] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Compute precision.")] = DtypeName.float32,
    device: Annotated[str, typer.Option(help="torch device to measure on.")] = "cpu",
    recompute: Annotated[bool, typer.Option(help="Measure with full recomputation too.")] = False,
    threads: Annotated[
        int, typer.Option(min=1, max=1024, help="CPU threads, as each process of the run will have.")
    ] = 1,
    processes: Annotated[
        int, typer.Option(min=1, max=256, help="Processes of the run that will share this CPU: kept busy beside.")
    ] = 1,
    repeats: Annotated[int, typer.Option(min=3, help="Timed runs; the median counts.")] = 10,
    warmups: Annotated[int, typer.Option(min=1, help="Runs before the timed ones.")] = 3,
    links: Annotated[bool, typer.Option(help="Also measure transfers between two processes.")] = True,
    output: Annotated[Path, typer.Option("-o", "--output", help="Save the profile here.")] = Path("profile.json"),
    as_json: Json = False,
) -> None:
    """Measure F, B, W times and memory of every layer on this device."""
    check_writable(output)
    torch_part("profiles.measure")
    from planner.api import profile as measure

    with steps_progress("profiling") as on_step:
        found = measure(
            model,
            sequence_length=seq_len,
            num_layers=num_layers,
            micro_batch_sizes=positive_integers(micro_batch_sizes, "--micro-batch-sizes"),
            recompute=("none", "full") if recompute else ("none",),
            dtype=dtype.value,
            device=device,
            num_threads=threads,
            num_processes=processes,
            repeats=repeats,
            warmups=warmups,
            with_links=links,
            on_progress=on_step,
        )
    found.save(output)
    talk.print(f"saved {output}")
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        from planner.report.profile import render_profile

        print(render_profile(found))


def run(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan made from a bundled model's profile.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 10,
    seed: Seed = 0,
    dtype: Annotated[DtypeName | None, typer.Option(help="Precision to run in [default: the plan's].")] = None,
    learning_rate: Annotated[float, typer.Option(min=0, max=1e6, help="Of AdamW.")] = 1e-4,
    device: Annotated[
        DeviceName, typer.Option(help="auto takes cuda when there is a device for every process.")
    ] = DeviceName.auto,
    backend: Annotated[str | None, typer.Option(help="gloo or nccl [default: by device].")] = None,
    engine: Annotated[
        EngineName, typer.Option(help="Who runs the actions; torch is its own runtime.")
    ] = EngineName.pipewright,
    max_grad_norm: Annotated[
        float | None, typer.Option(min=1e-12, max=1e12, help="Clip the gradients of the whole model to this norm.")
    ] = None,
    post_validation: Annotated[
        bool, typer.Option(help="No barrier before the optimizer's step: step at once, correct it afterwards.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Also train in one process, and compare losses and gradients.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Save start and end of every action here.")] = None,
    measure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save measured times here, as a profile to plan from again.")
    ] = None,
    profile_file: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE", help="With --measure: what the plan was made from."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train as planned, here, under torchrun: losses, and measured against predicted."""
    from planner.api import validate as load

    if profile_file is not None and measure is None:
        fail("--profile goes with --measure", 2)
    loaded = load(plan_file)
    if trace is not None:
        check_writable(trace)
    if measure is not None:
        check_writable(measure)
    launch = torch_part("planner.executor.launch")
    with spinner(f"training on {loaded.layout.num_devices} processes") as say:

        def on_progress(step: "StepProgress") -> None:
            say(f"step {step.step} of {steps}: loss {step.loss:.6f}, {step.step_us / 1e3:.0f} ms")

        report: RunReport = launch.run_plan(
            plan_file,
            steps=steps,
            seed=seed,
            dtype=None if dtype is None else dtype.value,
            learning_rate=learning_rate,
            device=device.value,
            backend=backend,
            engine=engine.value,
            max_grad_norm=max_grad_norm,
            post_validation=post_validation,
            check=check,
            trace_path=trace,
            measure_path=measure,
            profile_path=profile_file,
            on_progress=on_progress,
        )
    if measure is not None:
        talk.print(f"saved {measure}")
    if as_json:
        print(report.model_dump_json(indent=1))
    else:
        from planner.report.run import render_run

        print(render_run(report))
