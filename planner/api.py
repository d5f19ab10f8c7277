"""What a user can ask for, as functions: each command of `pipewright` calls one of these."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from planner.assembly import NUM_ALTERNATIVES, assemble, next_best, runners_up
from planner.errors import InfeasibleError, LayoutError, PlanError, ScheduleError
from planner.layout import Degrees
from planner.placing import place_best, place_layout
from planner.plans import WITHOUT_PINS, Plan, Precision, RecomputePlan
from planner.pricing import PricedLayout
from planner.questions import OnProgress, PlanArguments, Question, ask, check_time_limit
from planner.schedule.families import FAMILIES
from planner.search import SearchResult
from planner.two_replicas import one_replica_arguments, with_two_replicas
from planner.verify import verify
from profiles.catalog import load_model_spec
from profiles.cluster import Cluster
from profiles.errors import ProfileError
from profiles.model import Dtype, ModelProfile, ModelSpec, Recompute

DEFAULT_TIME_LIMIT_S = 30.0
MAX_TOP = 1000
MAX_MICRO_BATCH = 10**5
_MENDING_SHARE = 0.2  # of the time limit more, to find the nearest change where nothing fits
_LEAST_MENDING_S = 2.0
_PINNED_SHARE = 0.5  # of the time limit; what is left goes to the space without pins
_SEARCH_SHARE = 0.97  # of the time limit; the rest puts the plan together


def plan(
    model: str | Path | ModelSpec | ModelProfile,
    cluster: str | Path | Cluster,
    *,
    global_batch_size: int,
    sequence_length: int | None = None,
    dtype: Dtype | None = None,
    precision: Precision | None = None,
    gradient_dtype: Dtype | None = None,
    master_weight_dtype: Dtype | Literal["none"] | None = None,
    optimizer_dtype: Dtype | None = None,
    tp: Degrees = None,
    pp: Degrees = None,
    dp: Degrees = None,
    cp: Degrees = None,
    ep: Degrees = None,
    virtual_stages: Degrees = None,
    micro_batch_size: Degrees = None,
    zero_stage: Degrees = None,
    shard_degree: Degrees = None,
    recompute: RecomputePlan | tuple[RecomputePlan, ...] | None = None,
    sequence_parallel: bool | None = None,
    family: str = "auto",
    excluded: Sequence[tuple[str, int | str]] = (),
    overlap: bool | None = None,
    top: int = 0,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    seed: int = 0,
    command: str = "",
    on_progress: OnProgress = None,
) -> Plan:
    """The fastest layout and schedule found for this model on this cluster, with its certificate.

    `model` is a catalogue name, a Hugging Face config.json, a profile file, or the facts themselves; `cluster` a
    catalogue name, NODESxPER_NODExDEVICE, a cluster file, or the facts. Degrees that are given are pinned to a value
    or to several, `excluded` names (dimension, value) pairs that must not be used; then the best layout without either
    is priced beside the answer. `global_batch_size` counts sequences per optimizer step. `precision` says what is kept
    in which dtype, where `dtype` alone means the usual mixed precision; `gradient_dtype`, `master_weight_dtype` (or
    "none") and `optimizer_dtype` replace parts of that. `overlap`: whether data-parallel traffic runs beside the
    backward, by default with estimated profiles, as Megatron-LM and FSDP do it, and not with measured ones, as the
    bundled executor does not. A bidirectional family takes the best layout of 1F1B at the pp that is pinned
    (`planner.two_replicas`). With `top`, the plan's alternatives are the next best layouts, `top` with its own.

    Raises CatalogError, FileError, LayoutError or ProfileError for bad input, and InfeasibleError when no layout fits.
    """
    arguments: PlanArguments = {
        "global_batch_size": global_batch_size,
        "sequence_length": sequence_length,
        "dtype": dtype,
        "precision": precision,
        "gradient_dtype": gradient_dtype,
        "master_weight_dtype": master_weight_dtype,
        "optimizer_dtype": optimizer_dtype,
        "tp": tp,
        "pp": pp,
        "dp": dp,
        "cp": cp,
        "ep": ep,
        "virtual_stages": virtual_stages,
        "micro_batch_size": micro_batch_size,
        "zero_stage": zero_stage,
        "shard_degree": shard_degree,
        "recompute": recompute,
        "sequence_parallel": sequence_parallel,
        "family": family,
        "excluded": excluded,
        "overlap": overlap,
    }
    twice = FAMILIES.get(family)
    if twice is not None and twice.num_replicas > 1:
        if top:
            raise LayoutError(f"top {top}: {family} takes the best layout of 1f1b, there is no list; leave out either")
        once = one_replica_arguments(twice, dict(arguments))
        found = plan(
            model, cluster, **once, time_limit_s=time_limit_s, seed=seed, command=command, on_progress=on_progress
        )
        return with_two_replicas(found, twice)
    check_time_limit(time_limit_s)
    if not 0 <= top <= MAX_TOP:
        raise LayoutError(f"top {top}: give 0 to {MAX_TOP} layouts")
    began = time.monotonic()
    question = ask(model, cluster, arguments)
    try:
        return solve(
            question,
            top=top,
            time_limit_s=time_limit_s,
            began=began,
            seed=seed,
            command=command,
            on_progress=on_progress,
        )
    except InfeasibleError as error:
        from planner.answers.mending import nearest_change  # which plans, too

        limit_s = max(_LEAST_MENDING_S, _MENDING_SHARE * time_limit_s)
        known = model if isinstance(model, ModelProfile) else question.dims.spec
        change = nearest_change(known, question.job.cluster, arguments, limit_s)
        if change is None:
            raise
        raise InfeasibleError(f"{error}. Nearest change that fits: {change}") from None


def solve(
    question: Question,
    *,
    top: int,
    time_limit_s: float,
    seed: int,
    command: str,
    began: float | None = None,
    known: Sequence[PricedLayout] = (),
    on_progress: OnProgress = None,
) -> Plan:
    """The plan for a question that was read; `known`: layouts of its space that are priced already.

    `began`: since when the time limit runs, by `time.monotonic`.
    """
    pinned = question.is_pinned
    spent_s = 0.0 if began is None else time.monotonic() - began
    search_s = max(0.01, (time_limit_s - spent_s) * _SEARCH_SHARE)
    share = _PINNED_SHARE if pinned else 1.0
    result = question.search(search_s * share, seed=seed, num_best=max(1, top), known=known, on_progress=on_progress)
    placed = place_best(question.pricer, result.ranked, seed=seed)
    beside = [("", priced) for priced in (next_best(result, top - 1) if top else runners_up(result)[:NUM_ALTERNATIVES])]
    free = None
    if pinned and not result.interrupted:
        free = question.search_without_pins(
            max(0.01, search_s - result.seconds), seed=seed, known=result.ranked, on_progress=on_progress
        )
        result.interrupted |= free.interrupted
        result.limited_by_time |= free.limited_by_time
        beside = [(WITHOUT_PINS, free.ranked[0]), *(beside if top else _others(result.ranked[0], free))]
    others = [(label, place_layout(question.pricer, priced, seed=seed)) for label, priced in beside]
    return assemble(
        placed,
        result,
        beside=others,
        free=free,
        scope=question.scope,
        time_limit_s=time_limit_s,
        seed=seed,
        command=command,
    )


def _others(pinned: PricedLayout, free: SearchResult) -> list[tuple[str, PricedLayout]]:
    """Further layouts of a search without pins."""
    others = [priced for priced in runners_up(free) if priced.candidate.degrees != pinned.candidate.degrees]
    return [("", priced) for priced in others[: NUM_ALTERNATIVES - 1]]


def profile(
    model: str | Path | ModelSpec,
    *,
    sequence_length: int | None = None,
    num_layers: int | None = None,
    micro_batch_sizes: Sequence[int] = (1, 2, 4),
    recompute: Sequence[Recompute] = ("none",),
    dtype: Dtype = "float32",
    device: str = "cpu",
    num_threads: int = 1,
    num_processes: int = 1,
    repeats: int = 10,
    warmups: int = 3,
    with_links: bool = True,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ModelProfile:
    """Measure the bundled GPT-2-like or Llama-like torch model of this shape on this device. Needs torch.

    Rotary, gated models without biases are Llama-like; LayerNorm, learned positions and biases make GPT-2. Embeddings
    are tied where the model's are; each layer is measured with its own matrix. `num_processes` of the run share this
    machine's CPU: all but one are kept busy while layers are timed.
    Your own layers are measured with `profiles.measure.profile_layers`. ProfileError if the shape is of neither kind.
    """
    from profiles.measure import profile_bundled

    sizes = tuple(sorted(set(micro_batch_sizes)))
    if not sizes or sizes[0] < 1 or sizes[-1] > MAX_MICRO_BATCH:
        raise ProfileError(f"micro-batch sizes {sizes}: give whole numbers from 1 to {MAX_MICRO_BATCH}")
    spec = model if isinstance(model, ModelSpec) else load_model_spec(str(model))
    changes: dict[str, Any] = {}
    if sequence_length is not None:
        changes["sequence_length"] = sequence_length
    if num_layers is not None:
        changes["num_layers"] = num_layers
    shape = ModelSpec.model_validate({**spec.model_dump(), **changes})
    return profile_bundled(
        "llama" if shape.gated_mlp else "gpt2",
        shape,
        device=device,
        dtype=dtype,
        micro_batch_sizes=sizes,
        recompute=recompute,
        repeats=repeats,
        warmups=warmups,
        num_threads=num_threads,
        num_processes=num_processes,
        with_links=with_links,
        on_progress=on_progress,
    )


def validate(path: str | Path) -> Plan:
    """Load a plan file and check that its parts agree and that its schedule can run.

    FileError, PlanError or ScheduleError say what is wrong and where.
    """
    loaded = Plan.load(path)
    try:
        verify(loaded)
    except (PlanError, ScheduleError) as error:
        raise type(error)(f"{path}: {error}") from None
    return loaded


def json_schema() -> dict[str, Any]:
    """The JSON schema of a plan file."""
    return Plan.model_json_schema()
