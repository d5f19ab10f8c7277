"""`pipewright schedule` and `pipewright compare`: pipelines from their costs alone."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.shell import (
    FAMILY_NAMES,
    Json,
    SaveAnswer,
    Seed,
    TimeLimit,
    hand_over,
    maybe,
    numbers,
    spinner,
    wholes,
)
from planner.placements import PLACEMENTS
from profiles.facts import check_writable

if TYPE_CHECKING:
    from planner.pipeline_costs import PipelineCosts


class ObjectiveName(StrEnum):
    """What a schedule minimises."""

    span = "span"
    makespan = "makespan"


PLACEMENT_NAMES = ", ".join(PLACEMENTS)

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
    with spinner("scheduling") as say:
        answer = schedule_costs(
            costs,
            num_ranks=ranks,
            num_microbatches=microbatches,
            virtual_stages=virtual_stages,
            placement=placement,
            memory_limit=maybe(numbers, memory_limit, "--memory-limit"),
            capacity_bytes=maybe(wholes, capacity_bytes, "--capacity-bytes"),
            fixed_bytes=maybe(wholes, fixed_bytes, "--fixed-bytes"),
            family=family,
            objective=objective.value,
            solver=solver,
            time_limit_s=time_limit,
            work_limit=work_limit,
            seed=seed,
            on_progress=lambda p: say(f"{p.solver}: best {p.objective_us} µs, bound {p.lower_bound_us} µs"),
        )
    hand_over(answer, output, as_json, render_schedule)


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
    with spinner("comparing") as say:
        comparison = compare_families(
            costs,
            num_ranks=ranks,
            num_microbatches=microbatches,
            memory_limit=maybe(numbers, memory_limit, "--memory-limit"),
            capacity_bytes=maybe(wholes, capacity_bytes, "--capacity-bytes"),
            fixed_bytes=maybe(wholes, fixed_bytes, "--fixed-bytes"),
            objective=objective.value,
            solver=solver,
            time_limit_s=time_limit,
            work_limit=work_limit,
            seed=seed,
            on_progress=lambda p: say(f"{p.solver}: best {p.objective_us} µs, bound {p.lower_bound_us} µs"),
        )
    hand_over(comparison, output, as_json, render_comparison)


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
        forward_us=numbers(forward_us, "--forward-us"),
        backward_us=numbers(backward_us, "--backward-us"),
        weight_us=numbers(weight_us, "--weight-us"),
        p2p_us=numbers(p2p_us, "--p2p-us"),
        activation_bytes=maybe(wholes, activation_bytes, "--activation-bytes"),
        weight_activation_bytes=maybe(wholes, weight_activation_bytes, "--weight-activation-bytes"),
        fused_stages="all" if fused_stages == "all" else maybe(wholes, fused_stages, "--fused-stages") or (),
        max_in_flight=maybe(wholes, max_in_flight, "--max-in-flight"),
        recompute_us=maybe(numbers, recompute_us, "--recompute-us"),
        checkpoint_bytes=maybe(wholes, checkpoint_bytes, "--checkpoint-bytes"),
        microbatch_scale=maybe(numbers, microbatch_scale, "--microbatch-scale"),
    )
