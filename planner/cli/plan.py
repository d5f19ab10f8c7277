"""`pipewright plan`: the main job, and the answers beside it."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.pins import read_pins
from planner.cli.shell import FAMILY_NAMES, DtypeName, Json, Seed, TimeLimit, fail, hand_over, search_progress, talk
from profiles.facts import check_writable

if TYPE_CHECKING:
    from planner.questions import PlanArguments


def _pin(help_text: str) -> Any:
    return typer.Option(metavar="[not:]LIST", help=help_text)


def plan(
    model: Annotated[str, typer.Argument(help="Catalogue name, Hugging Face config.json, or a profile.")],
    cluster: Annotated[str, typer.Option(help="Catalogue name, NODESxPER_NODExDEVICE, or a cluster file.")],
    global_batch_size: Annotated[int, typer.Option(min=1, help="Sequences per optimizer step.")],
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence [default: the model's].")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Compute precision [default: the device's best].")] = None,
    gradient_dtype: Annotated[DtypeName | None, typer.Option(help="Of accumulated gradients.")] = None,
    master_weight_dtype: Annotated[
        str | None, typer.Option(help="Of the optimizer's own copy of the weights, or none.")
    ] = None,
    optimizer_dtype: Annotated[DtypeName | None, typer.Option(help="Of the optimizer's two moments.")] = None,
    tp: Annotated[str | None, _pin("Tensor-parallel degree.")] = None,
    pp: Annotated[str | None, _pin("Pipeline-parallel degree.")] = None,
    dp: Annotated[str | None, _pin("Data-parallel degree.")] = None,
    cp: Annotated[str | None, _pin("Context-parallel degree.")] = None,
    ep: Annotated[str | None, _pin("Expert-parallel degree.")] = None,
    virtual_stages: Annotated[str | None, _pin("Chunks per pipeline rank.")] = None,
    micro_batch_size: Annotated[str | None, _pin("Sequences per microbatch.")] = None,
    zero: Annotated[str | None, _pin("ZeRO stage, 0 to 3; 3 is FSDP.")] = None,
    shard_degree: Annotated[str | None, _pin("Devices over which ZeRO shards; fewer than all is hybrid.")] = None,
    recompute: Annotated[str | None, _pin("none, selective, full, or mixed: each layer as it serves best.")] = None,
    family: Annotated[str, _pin(f"Schedule: auto (the best, or a solver's order), or of {FAMILY_NAMES}.")] = "auto",
    sequence_parallel: Annotated[
        bool | None,
        typer.Option(
            "--sequence-parallel/--no-sequence-parallel",
            help="Of what tensor parallelism leaves whole [default: with it].",
        ),
    ] = None,
    overlap: Annotated[
        bool | None,
        typer.Option(
            "--overlap/--no-overlap",
            help="Data-parallel traffic beside the backward [default: with estimates, and not with measured profiles].",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Table of the best so many layouts.")] = 0,
    tokens: Annotated[str | None, typer.Option(help="Token budget, like 300B or 15T: days, GPU-hours.")] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Plan again under a change, once for each: link=2x, intra-link=, latency=, memory=, "
            "memory-bandwidth=, flops=; batch=, seq-len=, nodes=, devices= also take numbers.",
        ),
    ] = None,
    smallest: Annotated[
        bool, typer.Option("--smallest", help="Find the fewest nodes of the cluster's kind that will do.")
    ] = False,
    deadline_days: Annotated[
        float | None, typer.Option(min=1e-6, help="With --smallest and --tokens: time there is.")
    ] = None,
    max_nodes: Annotated[int | None, typer.Option(min=1, help="With --smallest: try no more.")] = None,
    time_limit: TimeLimit = 30.0,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Save the plan here.")] = None,
    as_json: Json = False,
) -> None:
    """Choose layout and schedule for a model on a cluster.

    A LIST is one value, or a comma list of allowed ones, like 4,8; with not: in front it is what to leave out. What is
    pinned so is set beside the best there is without.
    """
    from planner.answers import parse_tokens

    if output is not None:
        check_writable(output)
    if smallest and (what_if or top):
        fail("--smallest answers one question: leave out --what-if and --top", 2)
    if not smallest and (deadline_days is not None or max_nodes is not None):
        fail("--deadline-days and --max-nodes go with --smallest", 2)
    if deadline_days is not None and tokens is None:
        fail("--deadline-days needs a token budget: give --tokens, too", 2)
    if master_weight_dtype not in (None, "none", *DtypeName):
        fail(f"--master-weight-dtype {master_weight_dtype!r}: give none, or one of {', '.join(DtypeName)}", 2)
    num_tokens = None if tokens is None else parse_tokens(tokens)
    pins = read_pins(
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        ep=ep,
        virtual_stages=virtual_stages,
        micro_batch_size=micro_batch_size,
        zero_stage=zero,
        shard_degree=shard_degree,
        recompute=recompute,
        family=family,
    )
    arguments: PlanArguments = {
        **pins,  # type: ignore[typeddict-item]
        "global_batch_size": global_batch_size,
        "sequence_length": seq_len,
        "dtype": None if dtype is None else dtype.value,
        "gradient_dtype": None if gradient_dtype is None else gradient_dtype.value,
        "master_weight_dtype": master_weight_dtype,
        "optimizer_dtype": None if optimizer_dtype is None else optimizer_dtype.value,
        "sequence_parallel": sequence_parallel,
        "overlap": overlap,
        "top": top,
        "time_limit_s": time_limit,
        "seed": seed,
        "command": shlex.join(["pipewright", *sys.argv[1:]]),
    }
    if smallest:
        _smallest(model, cluster, arguments, num_tokens, deadline_days, max_nodes, output, as_json)
        return
    from planner.answers import answer
    from planner.report.answers import render_answers

    with search_progress() as on_progress:
        arguments["on_progress"] = on_progress
        found = answer(model, cluster, tokens=num_tokens, changes=what_if or (), **arguments)
    if output is not None:
        found.plan.save(output)
        talk.print(f"saved {output}")
    if not as_json:
        print(render_answers(found))
    elif top or what_if or tokens:
        print(found.model_dump_json(indent=1))
    else:
        print(found.plan.model_dump_json(indent=1))


def _smallest(
    model: str,
    cluster: str,
    arguments: "PlanArguments",
    tokens: int | None,
    deadline_days: float | None,
    max_nodes: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    from planner.answers import smallest_cluster
    from planner.report.answers import render_smallest

    with search_progress() as on_progress:
        arguments["on_progress"] = on_progress
        found = smallest_cluster(
            model, cluster, tokens=tokens, deadline_days=deadline_days, max_nodes=max_nodes, **arguments
        )
    if output is not None and found.plan is not None:
        found.plan.save(output)
        talk.print(f"saved {output}")
    hand_over(found, None, as_json, render_smallest)
    if found.plan is None:
        raise SystemExit(1)
