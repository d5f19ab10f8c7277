"""The command line: parse, call one public function, print.

The answer goes to stdout, talk to stderr. Exit 0 found, 1 no feasible answer, 2 wrong usage or bad input. Everything
that loads a solver or torch is imported inside the command that needs it.
"""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from planner.placements import PLACEMENTS
from planner.schedule.families import FAMILIES
from profiles.errors import PipewrightError
from profiles.facts import Facts, check_writable

if TYPE_CHECKING:
    from planner.executor.job import StepProgress
    from planner.executor.run_report import RunReport
    from planner.pipeline_costs import PipelineCosts
    from planner.search import SearchProgress

app = typer.Typer(
    name="pipewright",
    help="Plans how to train a large network on a cluster: layout, pipeline schedule, and how far from optimal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
talk = Console(stderr=True, highlight=False)
T = TypeVar("T")
FactsT = TypeVar("FactsT", bound=Facts)


class DtypeName(StrEnum):
    """Compute precisions."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float64 = "float64"


class RecomputeName(StrEnum):
    """Activation recomputation."""

    none = "none"
    full = "full"


class DeviceName(StrEnum):
    """Where a run's processes compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ObjectiveName(StrEnum):
    """What a schedule minimises."""

    span = "span"
    makespan = "makespan"


FAMILY_NAMES = ", ".join(FAMILIES)
PLACEMENT_NAMES = ", ".join(PLACEMENTS)
Json = Annotated[bool, typer.Option("--json", help="Print the machine-readable answer on stdout.")]
TimeLimit = Annotated[float, typer.Option(min=0.01, help="Seconds of search.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]

# What `schedule` and `compare` are given. "Likewise": one number, or a comma list with one entry per stage.
Ranks = Annotated[int, typer.Option("-p", "--ranks", min=1, help="Pipeline ranks.")]
Microbatches = Annotated[int, typer.Option("-m", "--microbatches", min=1, help="Microbatches per step.")]
ForwardUs = Annotated[str, typer.Option(help="F: one number, or a comma list with one entry per stage.")]
BackwardUs = Annotated[str, typer.Option(help="B, the input gradient: likewise.")]
WeightUs = Annotated[str, typer.Option(help="W, the weight gradient: likewise.")]
P2pUs = Annotated[str, typer.Option(help="Transfer to the next stage: one number, or one entry less than stages.")]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        help="Most that a rank may hold, in units of the largest --activation-bytes: one number, or one per rank "
        "[default: no limit]."
    ),
]
CapacityBytes = Annotated[str | None, typer.Option(help="The same limit in bytes: likewise.")]
FixedBytes = Annotated[
    str | None, typer.Option(help="Of --capacity-bytes, held all the time, as weights are: likewise.")
]
ActivationBytes = Annotated[
    str | None, typer.Option(help="M_B, taken by F, held to the backward: per stage, likewise [default: 2 units].")
]
WeightActivationBytes = Annotated[
    str | None, typer.Option(help="M_W, of that, held from B to W: per stage, likewise [default: 1 unit].")
]
FusedStages = Annotated[
    str | None, typer.Option(help="Stages whose backward stays in one piece: a comma list, or all [default: none].")
]
MaxInFlight = Annotated[
    str | None, typer.Option(help="Most microbatches between the start of F and the end of B: per stage, likewise.")
]
RecomputeUs = Annotated[
    str | None, typer.Option(help="R, the forward again before the backward; 0 where there is none: likewise.")
]
CheckpointBytes = Annotated[
    str | None, typer.Option(help="What F takes, instead of M_B, where the stage recomputes: likewise.")
]
Objective = Annotated[ObjectiveName, typer.Option(help="What auto minimises, and what the gap is of.")]
SolverName = Annotated[str, typer.Option(help="Who makes auto's order: auto, or one backend's name.")]
WorkLimit = Annotated[
    float | None, typer.Option(min=0, help="Amount of search, the same on every machine [default: --time-limit only].")
]
MicrobatchScale = Annotated[
    str | None,
    typer.Option(help="Microbatches that differ: what each takes of all times and sizes, one entry per microbatch."),
]
SaveAnswer = Annotated[Path | None, typer.Option("-o", "--output", help="Save the machine-readable answer here.")]


def main() -> None:
    """Entry point: user errors become one message and an exit code; Ctrl-C ends with 130."""
    try:
        app()
    except PipewrightError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(1) from None
    except OSError as error:  # of stdout: files that are read and written have their own message
        _fail(f"the answer cannot be written ({error.strerror})", 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"pipewright: {message}", file=sys.stderr)
    raise SystemExit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version("pipewright"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Catalogue name, Hugging Face config.json, or a profile.")],
    cluster: Annotated[str, typer.Option(help="Catalogue name, NODESxPER_NODExDEVICE, or a cluster file.")],
    global_batch_size: Annotated[int, typer.Option(min=1, help="Sequences per optimizer step.")],
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence [default: the model's].")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Compute precision [default: the device's best].")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Pin the tensor-parallel degree.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pin the pipeline-parallel degree.")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Pin the data-parallel degree.")] = None,
    virtual_stages: Annotated[int | None, typer.Option(min=1, help="Pin the chunks per rank.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="Pin the micro-batch size.")] = None,
    zero: Annotated[int | None, typer.Option(min=0, max=1, help="Pin the ZeRO stage.")] = None,
    recompute: Annotated[RecomputeName | None, typer.Option(help="Pin activation recomputation.")] = None,
    family: Annotated[
        str, typer.Option(help=f"auto (the best family or a solver's order), or one of {FAMILY_NAMES}.")
    ] = "auto",
    time_limit: TimeLimit = 30.0,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Save the plan here.")] = None,
    as_json: Json = False,
) -> None:
    """Choose layout and schedule for a model on a cluster."""
    from planner.api import plan as make_plan

    if output is not None:
        check_writable(output)
    with _search_progress() as on_progress:
        found = make_plan(
            model,
            cluster,
            global_batch_size=global_batch_size,
            sequence_length=seq_len,
            dtype=None if dtype is None else dtype.value,
            tp=tp,
            pp=pp,
            dp=dp,
            virtual_stages=virtual_stages,
            micro_batch_size=micro_batch_size,
            zero_stage=0 if zero == 0 else 1 if zero == 1 else None,
            recompute=None if recompute is None else recompute.value,
            family=family,
            time_limit_s=time_limit,
            seed=seed,
            command=shlex.join(["pipewright", *sys.argv[1:]]),
            on_progress=on_progress,
        )
    if output is not None:
        found.save(output)
        talk.print(f"saved {output}")
    print(found.model_dump_json(indent=1) if as_json else found)


@app.command()
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
    repeats: Annotated[int, typer.Option(min=3, help="Timed runs; the median counts.")] = 10,
    warmups: Annotated[int, typer.Option(min=1, help="Runs before the timed ones.")] = 3,
    links: Annotated[bool, typer.Option(help="Also measure transfers between two processes.")] = True,
    output: Annotated[Path, typer.Option("-o", "--output", help="Save the profile here.")] = Path("profile.json"),
    as_json: Json = False,
) -> None:
    """Measure F, B, W times and memory of every layer on this device."""
    check_writable(output)
    _torch_part("profiles.measure")
    from planner.api import profile as measure

    with _steps_progress("profiling") as on_step:
        found = measure(
            model,
            sequence_length=seq_len,
            num_layers=num_layers,
            micro_batch_sizes=_positive_integers(micro_batch_sizes, "--micro-batch-sizes"),
            recompute=("none", "full") if recompute else ("none",),
            dtype=dtype.value,
            device=device,
            num_threads=threads,
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


@app.command()
def schedule(
    ranks: Ranks,
    microbatches: Microbatches,
    forward_us: ForwardUs,
    backward_us: BackwardUs,
    weight_us: WeightUs,
    p2p_us: P2pUs = "0",
    virtual_stages: Annotated[
        int | None, typer.Option("-v", "--virtual-stages", min=1, help="Stages per rank [default: 1].")
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            help=f"{PLACEMENT_NAMES}, or the rank of every stage, like 0,1,1,0; auto chooses among {PLACEMENT_NAMES} "
            "and up to 4 stages per rank [default: linear; interleaved for more stages than ranks]."
        ),
    ] = None,
    memory_limit: MemoryLimit = None,
    capacity_bytes: CapacityBytes = None,
    fixed_bytes: FixedBytes = None,
    activation_bytes: ActivationBytes = None,
    weight_activation_bytes: WeightActivationBytes = None,
    fused_stages: FusedStages = None,
    max_in_flight: MaxInFlight = None,
    recompute_us: RecomputeUs = None,
    checkpoint_bytes: CheckpointBytes = None,
    microbatch_scale: MicrobatchScale = None,
    family: Annotated[str, typer.Option(help=f"auto, or one of {FAMILY_NAMES}.")] = "auto",
    objective: Objective = ObjectiveName.span,
    solver: SolverName = "auto",
    time_limit: TimeLimit = 30.0,
    work_limit: WorkLimit = None,
    seed: Seed = 0,
    output: SaveAnswer = None,
    as_json: Json = False,
) -> None:
    """Schedule a pipeline from its costs alone. Costs are per stage; with --placement auto, per rank."""
    from planner.report.schedule import render_schedule
    from planner.scheduling import schedule_costs

    if output is not None:
        check_writable(output)
    costs = _costs(
        forward_us,
        backward_us,
        weight_us,
        p2p_us,
        activation_bytes,
        weight_activation_bytes,
        fused_stages,
        max_in_flight,
        recompute_us,
        checkpoint_bytes,
        microbatch_scale,
    )
    with _spinner("scheduling") as say:
        answer = schedule_costs(
            costs,
            num_ranks=ranks,
            num_microbatches=microbatches,
            virtual_stages=virtual_stages,
            placement=placement,
            memory_limit=_maybe(_numbers, memory_limit, "--memory-limit"),
            capacity_bytes=_maybe(_wholes, capacity_bytes, "--capacity-bytes"),
            fixed_bytes=_maybe(_wholes, fixed_bytes, "--fixed-bytes"),
            family=family,
            objective=objective.value,
            solver=solver,
            time_limit_s=time_limit,
            work_limit=work_limit,
            seed=seed,
            on_progress=lambda p: say(f"{p.solver}: best {p.objective_us} µs, bound {p.lower_bound_us} µs"),
        )
    _hand_over(answer, output, as_json, render_schedule)


@app.command()
def compare(
    ranks: Ranks,
    microbatches: Microbatches,
    forward_us: ForwardUs,
    backward_us: BackwardUs,
    weight_us: WeightUs,
    p2p_us: P2pUs = "0",
    memory_limit: MemoryLimit = None,
    capacity_bytes: CapacityBytes = None,
    fixed_bytes: FixedBytes = None,
    activation_bytes: ActivationBytes = None,
    weight_activation_bytes: WeightActivationBytes = None,
    fused_stages: FusedStages = None,
    max_in_flight: MaxInFlight = None,
    recompute_us: RecomputeUs = None,
    checkpoint_bytes: CheckpointBytes = None,
    microbatch_scale: MicrobatchScale = None,
    objective: Objective = ObjectiveName.span,
    solver: SolverName = "auto",
    time_limit: TimeLimit = 30.0,
    work_limit: WorkLimit = None,
    seed: Seed = 0,
    output: SaveAnswer = None,
    as_json: Json = False,
) -> None:
    """Compare every schedule family, and auto, on the same costs, given per rank."""
    from planner.comparison import compare as compare_families
    from planner.report.schedule import render_comparison

    if output is not None:
        check_writable(output)
    costs = _costs(
        forward_us,
        backward_us,
        weight_us,
        p2p_us,
        activation_bytes,
        weight_activation_bytes,
        fused_stages,
        max_in_flight,
        recompute_us,
        checkpoint_bytes,
        microbatch_scale,
    )
    with _spinner("comparing") as say:
        comparison = compare_families(
            costs,
            num_ranks=ranks,
            num_microbatches=microbatches,
            memory_limit=_maybe(_numbers, memory_limit, "--memory-limit"),
            capacity_bytes=_maybe(_wholes, capacity_bytes, "--capacity-bytes"),
            fixed_bytes=_maybe(_wholes, fixed_bytes, "--fixed-bytes"),
            objective=objective.value,
            solver=solver,
            time_limit_s=time_limit,
            work_limit=work_limit,
            seed=seed,
            on_progress=lambda p: say(f"{p.solver}: best {p.objective_us} µs, bound {p.lower_bound_us} µs"),
        )
    _hand_over(comparison, output, as_json, render_comparison)


@app.command()
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
    check: Annotated[bool, typer.Option(help="Also train in one process, and compare losses and gradients.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Save start and end of every action here.")] = None,
    as_json: Json = False,
) -> None:
    """Train as planned, here, under torchrun: losses, and measured against predicted."""
    from planner.api import validate as load

    loaded = load(plan_file)
    if trace is not None:
        check_writable(trace)
    launch = _torch_part("planner.executor.launch")
    with _spinner(f"training on {loaded.layout.num_devices} processes") as say:

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
            check=check,
            trace_path=trace,
            on_progress=on_progress,
        )
    if as_json:
        print(report.model_dump_json(indent=1))
    else:
        from planner.report.run import render_run

        print(render_run(report))


@app.command()
def validate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    as_json: Json = False,
) -> None:
    """Check that a plan file is whole, that its parts agree and that its schedule can run."""
    from planner.api import validate as check_plan

    loaded = check_plan(plan_file)
    if as_json:
        print(loaded.model_dump_json(indent=1))
    else:
        print(
            f"{plan_file}: valid; {loaded.model.name} as {loaded.layout.degrees}, {loaded.family}, "
            f"{sum(map(len, loaded.parsed_schedule.ranks))} actions on {loaded.layout.pp} ranks"
        )


@app.command()
def catalog(
    name: Annotated[str | None, typer.Argument(help="Show one entry whole.")] = None,
    as_json: Json = False,
) -> None:
    """List the models, devices, clusters and schedule families there are."""
    from planner.report.catalog import catalog_entry, catalog_names, render_catalog

    if name is not None:
        print(catalog_entry(name).model_dump_json(indent=1))
    elif as_json:
        import json

        print(json.dumps(catalog_names(), indent=1))
    else:
        print(render_catalog())


def _torch_part(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        _fail("this command needs torch; install it with: pip install 'pipewright[torch]'", 2)


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        _fail(f"{option} {text!r}: give one number, or a comma list of numbers", 2)


def _wholes(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        _fail(f"{option} {text!r}: give one whole number, or a comma list of whole numbers", 2)


def _maybe(read: Callable[[str, str], T], text: str | None, option: str) -> T | None:
    return None if text is None else read(text, option)


def _costs(
    forward_us: str,
    backward_us: str,
    weight_us: str,
    p2p_us: str,
    activation_bytes: str | None,
    weight_activation_bytes: str | None,
    fused_stages: str | None,
    max_in_flight: str | None,
    recompute_us: str | None,
    checkpoint_bytes: str | None,
    microbatch_scale: str | None,
) -> "PipelineCosts":
    from planner.pipeline_costs import PipelineCosts

    return PipelineCosts(
        forward_us=_numbers(forward_us, "--forward-us"),
        backward_us=_numbers(backward_us, "--backward-us"),
        weight_us=_numbers(weight_us, "--weight-us"),
        p2p_us=_numbers(p2p_us, "--p2p-us"),
        activation_bytes=_maybe(_wholes, activation_bytes, "--activation-bytes"),
        weight_activation_bytes=_maybe(_wholes, weight_activation_bytes, "--weight-activation-bytes"),
        fused_stages="all" if fused_stages == "all" else _maybe(_wholes, fused_stages, "--fused-stages") or (),
        max_in_flight=_maybe(_wholes, max_in_flight, "--max-in-flight"),
        recompute_us=_maybe(_numbers, recompute_us, "--recompute-us"),
        checkpoint_bytes=_maybe(_wholes, checkpoint_bytes, "--checkpoint-bytes"),
        microbatch_scale=_maybe(_numbers, microbatch_scale, "--microbatch-scale"),
    )


def _hand_over(answer: FactsT, output: Path | None, as_json: bool, render: Callable[[FactsT], str]) -> None:
    """Save the answer where that is asked for, and print it."""
    if output is not None:
        answer.save(output)
        talk.print(f"saved {output}")
    print(answer.model_dump_json(indent=1) if as_json else render(answer))


def _positive_integers(text: str, option: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        _fail(f"{option} {text!r}: give a comma list of whole numbers from 1", 2)
    return values


@contextmanager
def _shown(*columns: ProgressColumn) -> Iterator[Progress]:
    """A progress display on stderr; Ctrl-C inside it, where nobody had an answer yet, ends with one message."""
    try:
        with Progress(SpinnerColumn(), *columns, TimeElapsedColumn(), console=talk, transient=True) as progress:
            yield progress
    except KeyboardInterrupt:
        _fail("interrupted before there was an answer", 130)


@contextmanager
def _spinner(what: str) -> Iterator[Callable[[str], None]]:
    with _shown(TextColumn("{task.description}")) as progress:
        task = progress.add_task(what, total=None)
        yield lambda text: progress.update(task, description=text)


@contextmanager
def _search_progress() -> Iterator[Callable[["SearchProgress"], None]]:
    with _spinner("reading the layout space") as say:

        def on_progress(state: "SearchProgress") -> None:
            say(
                f"{state.phase}: {state.done} of {state.total} priced, best {state.best_us / 1e6:.3f} s, "
                f"bound {state.lower_bound_us / 1e6:.3f} s"
            )

        yield on_progress


@contextmanager
def _steps_progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    with _shown(TextColumn("{task.description}"), BarColumn()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda text, done, total: progress.update(task, description=text, completed=done, total=total)


if __name__ == "__main__":
    main()
