"""What a user can ask for, as functions: each command of `pipewright` calls one of these."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from planner.cost import slowest_group
from planner.errors import LayoutError, PlanError
from planner.layout import Candidate, Pins, enumerate_space
from planner.memory import RESERVE_FRACTION
from planner.plans import Alternative, Certificate, Layout, Plan, Prediction, Provenance, ZeroStage
from planner.pricing import Job, PricedLayout
from planner.schedule.families import get_family
from planner.schedule.simulation import simulate
from planner.schedule.validation import check
from planner.search import SearchProgress, SearchResult, search
from profiles.analytic import profile_model
from profiles.catalog import load_cluster, load_model_spec
from profiles.cluster import Cluster
from profiles.errors import ProfileError
from profiles.facts import canonical_json, parse_facts, read_text
from profiles.model import Dtype, ModelProfile, ModelSpec, Recompute

DEFAULT_TIME_LIMIT_S = 30.0
_NUM_ALTERNATIVES = 5


def plan(
    model: str | Path | ModelSpec | ModelProfile,
    cluster: str | Path | Cluster,
    *,
    global_batch_size: int,
    sequence_length: int | None = None,
    dtype: Dtype | None = None,
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    virtual_stages: int | None = None,
    micro_batch_size: int | None = None,
    zero_stage: ZeroStage | None = None,
    recompute: Recompute | None = None,
    family: str = "auto",
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    seed: int = 0,
    command: str = "",
    on_progress: Callable[[SearchProgress], None] | None = None,
) -> Plan:
    """The fastest layout and schedule found for this model on this cluster, with its certificate.

    `model` is a catalogue name, a Hugging Face config.json, a profile file, or the facts themselves; `cluster` a
    catalogue name, NODESxPER_NODExDEVICE, a cluster file, or the facts. Degrees that are given are pinned; then the
    best layout without pins is priced beside the answer. `global_batch_size` counts sequences per optimizer step.

    Raises CatalogError, FileError, LayoutError or ProfileError for bad input, and InfeasibleError when no layout fits.
    """
    machines = cluster if isinstance(cluster, Cluster) else load_cluster(str(cluster))
    known = model if isinstance(model, ModelSpec | ModelProfile) else load_model(str(model))
    _check_counts(global_batch_size, sequence_length, time_limit_s)
    if family != "auto":
        get_family(family)
    pins = Pins(tp, pp, dp, micro_batch_size, virtual_stages, zero_stage, recompute, family)
    job, space_of = _prepare(known, machines, global_batch_size, sequence_length, dtype, pins)
    free_pins = Pins(family=family)
    share = 0.6 if pins.any else 1.0
    result = search(job, space_of(pins), pins, time_limit_s=time_limit_s * share, seed=seed, on_progress=on_progress)
    best = result.ranked[0]
    beside = [("", priced) for priced in _distinct(result.ranked, best)]
    if pins.any and not result.interrupted:
        free = search(
            job,
            space_of(free_pins),
            free_pins,
            time_limit_s=time_limit_s * (1 - share),
            seed=seed,
            known=result.ranked,
            on_progress=on_progress,
        ).ranked
        label = "best without pins" if free[0].candidate != best.candidate else ""
        others = [("", priced) for priced in _distinct(free, free[0]) if priced.candidate[:4] != best.candidate[:4]]
        beside = [*([(label, free[0])] if label else []), *others, *beside][:_NUM_ALTERNATIVES]
    return _assemble(job, result, beside, family, time_limit_s, seed, command, pinned=pins.any)


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
    repeats: int = 10,
    warmups: int = 3,
    with_links: bool = True,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ModelProfile:
    """Measure the bundled GPT-2-like or Llama-like torch model of this shape on this device. Needs torch.

    Rotary, gated models without biases are Llama-like; LayerNorm, learned positions and biases make GPT-2. The bundled
    models keep embedding and head apart, so the profile's spec has untied embeddings whatever the catalogue says.
    Your own layers are measured with `profiles.measure.profile_layers`. ProfileError if the shape is of neither kind.
    """
    from profiles.measure import profile_bundled

    spec = model if isinstance(model, ModelSpec) else load_model_spec(str(model))
    changes: dict[str, Any] = {"tied_embeddings": False}
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
        micro_batch_sizes=micro_batch_sizes,
        recompute=recompute,
        repeats=repeats,
        warmups=warmups,
        num_threads=num_threads,
        with_links=with_links,
        on_progress=on_progress,
    )


def load_model(text: str) -> ModelSpec | ModelProfile:
    """A catalogue name, a Hugging Face config.json, or a file that `pipewright profile` wrote."""
    path = Path(text)
    if path.is_file():
        content = read_text(path)
        try:
            schema = json.loads(content).get("schema")
        except (ValueError, AttributeError):
            schema = None
        if schema is not None:
            return parse_facts(ModelProfile, content, where=text)
    return load_model_spec(text)


def load_plan(path: str | Path) -> Plan:
    """A saved plan whose parts agree; FileError, PlanError or ScheduleError say what is wrong and where."""
    loaded = Plan.load(path)
    verify(loaded)
    return loaded


def validate(path: str | Path) -> Plan:
    """Check a plan file: schema, agreement of its parts, that the schedule can run, and its predicted pipeline time."""
    return load_plan(path)


def verify(loaded: Plan) -> None:
    """Check everything about a plan that its types do not: order, placement, timing, memory."""
    layout = loaded.layout
    schedule = loaded.parsed_schedule
    check(
        schedule,
        num_stages=layout.num_stages,
        num_microbatches=layout.num_microbatches,
        rank_of_stage=layout.rank_of_stage,
    )
    timeline = simulate(schedule, loaded.stages)
    claimed = loaded.prediction.pipeline_us
    if abs(timeline.makespan_us - claimed) > 1e-6 * max(claimed, 1.0):
        raise PlanError(
            f"plan.prediction.pipeline_us is {claimed}, but its schedule and stage costs take {timeline.makespan_us} µs"
        )
    parts = claimed + loaded.prediction.exposed_data_parallel_us + loaded.prediction.optimizer_us
    if abs(parts - loaded.prediction.step_time_us) > 1e-6 * max(parts, 1.0):
        raise PlanError(
            f"plan.prediction.step_time_us is {loaded.prediction.step_time_us}, but its parts add up to {parts} µs"
        )
    for rank, memory in enumerate(loaded.prediction.memory):
        if memory.total_bytes > memory.capacity_bytes:
            raise PlanError(
                f"pipeline rank {rank} needs {memory.total_bytes} bytes and may use {memory.capacity_bytes}"
            )


def json_schema() -> dict[str, Any]:
    """The JSON schema of a plan file."""
    return Plan.model_json_schema()


def _check_counts(global_batch_size: int, sequence_length: int | None, time_limit_s: float) -> None:
    if global_batch_size < 1:
        raise LayoutError(f"global batch size {global_batch_size}: give at least 1 sequence")
    if sequence_length is not None and sequence_length < 1:
        raise LayoutError(f"sequence length {sequence_length}: give at least 1 token")
    if not (math.isfinite(time_limit_s) and time_limit_s > 0):
        raise LayoutError(f"time limit {time_limit_s}: give a finite number of seconds above 0")


def _prepare(
    known: ModelSpec | ModelProfile,
    machines: Cluster,
    global_batch_size: int,
    sequence_length: int | None,
    dtype: Dtype | None,
    pins: Pins,
) -> tuple[Job, Callable[[Pins], Any]]:
    if isinstance(known, ModelProfile):
        return _prepare_profile(known, machines, global_batch_size, sequence_length, dtype)
    group = slowest_group(machines)
    length = sequence_length or known.sequence_length
    precision = dtype or _default_dtype(group.device.peak_flops)
    num_layers = known.num_layers + 2

    def space_of(wanted: Pins) -> Any:
        return enumerate_space(known, machines, global_batch_size=global_batch_size, num_layers=num_layers, pins=wanted)

    candidates: set[Candidate] = {*space_of(pins).candidates, *space_of(Pins()).candidates}
    variants = sorted({c.variant(length, precision) for c in candidates}, key=str)
    if not variants:
        raise LayoutError(
            f"no layout divides: {machines.num_devices} devices, global batch size {global_batch_size}, "
            f"{known.num_heads} heads, {num_layers} layers; choose a batch with more divisors"
        )
    profile = profile_model(known, group.device, variants, tp_link=group.intra_node)
    return Job(profile, machines, global_batch_size, length, precision), space_of


def _prepare_profile(
    profile: ModelProfile,
    machines: Cluster,
    global_batch_size: int,
    sequence_length: int | None,
    dtype: Dtype | None,
) -> tuple[Job, Callable[[Pins], Any]]:
    lengths = sorted({v.sequence_length for v in profile.variants})
    dtypes = sorted({v.dtype for v in profile.variants})
    length = sequence_length or lengths[-1]
    precision = dtype or dtypes[0]
    if length not in lengths or precision not in dtypes:
        raise ProfileError(
            f"profile of {profile.model.name!r} holds sequence lengths {lengths} in {', '.join(dtypes)}, not {length} "
            f"in {precision}; plan with those, or profile again"
        )
    sizes = tuple(sorted({v.micro_batch_size for v in profile.variants}))

    def space_of(wanted: Pins) -> Any:
        return enumerate_space(
            profile.model,
            machines,
            global_batch_size=global_batch_size,
            num_layers=profile.num_layers,
            pins=wanted,
            micro_batch_sizes=sizes,
        )

    return Job(profile, machines, global_batch_size, length, precision), space_of


def _default_dtype(peak_flops: Mapping[Dtype, float]) -> Dtype:
    names: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
    return next((name for name in names if name in peak_flops), "float32")


def _distinct(ranked: list[PricedLayout], chosen: PricedLayout) -> list[PricedLayout]:
    """The best layout of each (tp, pp, dp, v) but the chosen one's."""
    seen = {chosen.candidate[:4]}
    others = []
    for priced in ranked:
        if priced.candidate[:4] not in seen:
            seen.add(priced.candidate[:4])
            others.append(priced)
    return others[:_NUM_ALTERNATIVES]


def _layout(priced: PricedLayout) -> Layout:
    c = priced.candidate
    return Layout(
        tp=c.tp,
        pp=c.pp,
        dp=c.dp,
        virtual_stages=c.virtual_stages,
        micro_batch_size=c.micro_batch_size,
        num_microbatches=c.num_microbatches,
        zero_stage=c.zero_stage,
        recompute=c.recompute,
        layers_per_stage=priced.cut.layers_per_stage,
        rank_of_stage=priced.cut.rank_of_stage,
        devices=tuple(range(c.tp * c.pp * c.dp)),
    )


def _assemble(
    job: Job,
    result: SearchResult,
    beside: list[tuple[str, PricedLayout]],
    family: str,
    time_limit_s: float,
    seed: int,
    command: str,
    *,
    pinned: bool,
) -> Plan:
    best = result.ranked[0]
    flops = job.profile.model.step_flops(job.global_batch_size, job.sequence_length)
    peak = sum(g.num_devices * g.device.peak_flops.get(job.dtype, 0.0) for g in job.cluster.groups)

    def mfu(step_us: float) -> float:
        return flops / (step_us / 1e6) / peak if peak else 0.0

    timeline = best.timeline
    gap = max(0.0, (best.step_us - result.lower_bound_us) / best.step_us)
    scope = "the fixed families and solver-made orders" if family == "auto" else f"family {family}"
    if pinned:
        scope += "; within the pins"
    if result.limited_by_time:
        scope += "; the time limit cut the search short, another run may end elsewhere"
    return Plan(
        model=job.profile.model,
        architecture=job.profile.architecture,
        sequence_length=job.sequence_length,
        global_batch_size=job.global_batch_size,
        dtype=job.dtype,
        layout=_layout(best),
        stages=best.cut.stages,
        family=best.family,
        schedule=best.schedule.to_lines(),
        prediction=Prediction(
            step_time_us=best.step_us,
            pipeline_us=timeline.makespan_us,
            exposed_data_parallel_us=best.data_parallel_us,
            optimizer_us=best.optimizer_us,
            bubble_rate_span=timeline.bubble_rate_span,
            bubble_rate_makespan=timeline.bubble_rate_makespan,
            model_flops=flops,
            mfu=mfu(best.step_us),
            tokens_per_s=job.global_batch_size * job.sequence_length / (best.step_us / 1e6),
            memory=best.memory,
        ),
        certificate=Certificate(
            objective_us=best.step_us,
            lower_bound_us=result.lower_bound_us,
            lower_bound_kind=f"step-time floor over all layouts, {scope}",
            gap=gap,
            status="optimal" if gap < 1e-9 else "feasible",
            schedule_solver=best.solver,
            schedule_lower_bound_us=best.schedule_lower_bound_us,
            num_candidates=result.num_candidates,
            num_infeasible=sum(result.infeasible.values()),
            num_pruned=result.num_pruned,
            num_evaluated=result.num_evaluated,
            infeasible_reasons=dict(result.infeasible),
            interrupted=result.interrupted,
            seconds=round(result.seconds, 3),
            seed=seed,
            time_limit_s=time_limit_s,
        ),
        alternatives=tuple(
            Alternative(
                label=label,
                layout=_layout(priced).degrees,
                family=priced.family,
                step_time_us=priced.step_us,
                mfu=mfu(priced.step_us),
                peak_memory_bytes=priced.peak_memory_bytes,
            )
            for label, priced in beside
        ),
        provenance=Provenance(
            pipewright_version=version("pipewright"),
            command=command,
            cluster=job.cluster.name,
            device=" + ".join(dict.fromkeys(g.device.name for g in job.cluster.groups)),
            profile_origin=f"{job.profile.origin.kind}, {job.profile.origin.device}: {job.profile.origin.how}",
            profile_sha256=sha256(canonical_json(job.profile).encode()).hexdigest(),
            cluster_sha256=sha256(canonical_json(job.cluster).encode()).hexdigest(),
            assumptions=_assumptions(job),
        ),
    )


def _assumptions(job: Job) -> tuple[str, ...]:
    notes = [
        f"costs {job.profile.origin.kind} for {job.profile.origin.device};",
        "data-parallel traffic is not overlapped;",
        f"{RESERVE_FRACTION:.0%} of device memory is kept free;",
        "processes are laid out tensor-parallel first, then data, then pipeline.",
    ]
    if len(job.cluster.groups) > 1:
        notes.append("The cluster is mixed: every stage is priced on its slowest device.")
    if job.profile.links is not None:
        notes.append("Transfers as measured with the profile.")
    return tuple(notes)
