"""From what a search found to a Plan: everything is written down that a reader, or a training job, will ask for."""

from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version

from planner.candidate_costs import Job
from planner.memory import RESERVE_FRACTION
from planner.placing import PlacedLayout
from planner.plans import WITHOUT_PINS, Alternative, Certificate, Layout, Plan, Prediction, Provenance, RecomputePlan
from planner.pricing import PricedLayout
from planner.search import SearchResult
from planner.step_parts import recompute_flops, step_parts
from profiles.facts import canonical_json

NUM_ALTERNATIVES = 5


def assemble(
    placed: PlacedLayout,
    result: SearchResult,
    *,
    beside: list[tuple[str, PlacedLayout]],
    free: SearchResult | None = None,
    scope: str,
    time_limit_s: float,
    seed: int,
    command: str,
) -> Plan:
    """The plan of the best layout found, where it lies, with the labelled layouts of `beside` for comparison.

    `scope` says over what the certificate holds; `free` is the search that the best without pins came from.
    """
    pricer, best = placed.pricer, placed.priced
    job, timeline = pricer.job, best.timeline
    flops = job.profile.model.step_flops(job.global_batch_size, job.sequence_length)
    return Plan(
        model=job.profile.model,
        architecture=job.profile.architecture,
        sequence_length=job.sequence_length,
        global_batch_size=job.global_batch_size,
        precision=job.precision,
        engine=job.profile.origin.engine,
        layout=_layout(best, placed.devices),
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
            mfu=_mfu(job, flops, best.step_us),
            hfu=_mfu(job, flops + _repeated_flops(job, best), best.step_us),
            parts=step_parts(pricer, best),
            tokens_per_s=job.global_batch_size * job.sequence_length / (best.step_us / 1e6),
            memory=best.memory,
        ),
        certificate=_certificate(best, result, scope, pricer.schedule_bound_us(best.cut), time_limit_s, seed),
        alternatives=tuple(
            Alternative(
                label=label,
                layout=_layout(other.priced, other.devices).degrees,
                family=other.priced.family,
                step_time_us=other.priced.step_us,
                mfu=_mfu(job, flops, other.priced.step_us),
                peak_memory_bytes=other.priced.peak_memory_bytes,
                parts=step_parts(other.pricer, other.priced),
                gap=1 - free.lower_bound_us / other.priced.step_us
                if free is not None and label == WITHOUT_PINS
                else None,
            )
            for label, other in beside
        ),
        placement_notes=placed.notes,
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


def next_best(result: SearchResult, count: int) -> list[PricedLayout]:
    """The best priced layouts that differ from the answer and each other in degrees, chunks or micro-batch size.

    ZeRO, sharding and recomputation are the best of each. Proven to be the next best as far as the search went on
    beyond the answer (`num_best`).
    """
    best: dict[tuple[object, ...], PricedLayout] = {}
    for priced in result.ranked:
        c = priced.candidate
        best.setdefault((*c.degrees, c.virtual_stages, c.micro_batch_size), priced)
    return list(best.values())[1 : count + 1]


def runners_up(result: SearchResult) -> list[PricedLayout]:
    """The best layout of each set of degrees whose best was looked for, but that of the answer; best first."""
    best: dict[tuple[int, ...], PricedLayout] = {}
    for priced in result.ranked[1:]:
        best.setdefault(priced.candidate.degrees, priced)
    answer = result.ranked[0].candidate.degrees
    return [priced for degrees, priced in best.items() if degrees in result.runners_up and degrees != answer]


def _certificate(
    best: PricedLayout, result: SearchResult, scope: str, schedule_bound_us: float, time_limit_s: float, seed: int
) -> Certificate:
    bound_us = min(result.lower_bound_us, best.step_us)  # it may lie better on its devices than the search took
    gap = (best.step_us - bound_us) / best.step_us
    return Certificate(
        objective_us=best.step_us,
        lower_bound_us=bound_us,
        lower_bound_kind=f"step-time floor over {scope}, devices in order",
        gap=gap,
        status="optimal" if gap == 0 else "feasible",
        schedule_solver=best.solver,
        schedule_lower_bound_us=min(schedule_bound_us, best.timeline.makespan_us),
        num_candidates=result.num_candidates,
        num_evaluated=result.num_evaluated,
        num_overflowing=result.num_overflowing,
        num_pruned=result.num_pruned,
        num_unreached=result.num_unreached,
        refused=dict(result.refused),
        dropped=dict(result.dropped),
        interrupted=result.interrupted,
        limited_by_time=result.limited_by_time,
        seconds=round(result.seconds, 3),
        seed=seed,
        time_limit_s=time_limit_s,
    )


def _mfu(job: Job, flops: float, step_us: float) -> float:
    peak = sum(g.num_devices * g.device.peak_flops.get(job.dtype, 0.0) for g in job.cluster.groups)
    return flops / (step_us / 1e6) / peak if peak else 0.0


def _repeated_flops(job: Job, priced: PricedLayout) -> float:
    tokens = job.global_batch_size * job.sequence_length
    return recompute_flops(job.profile.model, priced.cut.recompute_of_layer, tokens, job.sequence_length)


def _layout(priced: PricedLayout, devices: Sequence[int]) -> Layout:
    c, layers = priced.candidate, priced.cut.recompute_of_layer
    blocks = set(layers[1:-1]) or {"none"}
    recompute: RecomputePlan = blocks.pop() if len(blocks) == 1 else "mixed"
    return Layout(
        tp=c.tp,
        pp=c.pp,
        dp=c.dp,
        cp=c.cp,
        ep=c.ep,
        virtual_stages=c.virtual_stages,
        micro_batch_size=c.micro_batch_size,
        num_microbatches=c.num_microbatches,
        zero_stage=c.zero_stage,
        shard_degree=c.shard_degree,
        sequence_parallel=c.sequence_parallel,
        recompute=recompute,
        recompute_of_layer=layers if recompute == "mixed" else (),
        layers_per_stage=priced.cut.layers_per_stage,
        rank_of_stage=priced.cut.rank_of_stage,
        devices=tuple(devices),
    )


def _assumptions(job: Job) -> tuple[str, ...]:
    notes = [
        f"costs {job.profile.origin.kind} for {job.profile.origin.device};",
        f"data-parallel traffic {'runs beside the backward' if job.overlaps else 'is not overlapped'};",
        f"{RESERVE_FRACTION:.0%} of device memory is kept free;",
        "processes are numbered tensor-parallel first, then context, data and pipeline.",
    ]
    if len(job.cluster.groups) > 1:
        notes.append("The cluster is mixed: every pipeline rank is priced on the slowest of its devices.")
    if job.profile.links is not None and job.cluster.num_nodes == 1:
        notes.append("Transfers as measured with the profile.")
    return tuple(notes)
