"""What the processes of a run wrote down, put together: the report, and a profile to plan from again."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

import torch

from planner.executor.job import RankResult, ReferenceResult, RunRequest
from planner.executor.measured_profile import corrected_profile
from planner.executor.run_report import ActionTime, Exactness, RunReport, StepParts, Updates
from planner.plans import Plan, StageCosts
from planner.schedule.actions import Kind
from profiles.model import ModelProfile

_WARM_UP_STEPS = 2
_ON_THE_RANK = {*(kind.value for kind in Kind), "validate", "drain"}  # one after the other; reductions run beside


def make_report(
    plan: Plan, request: RunRequest, results: Sequence[RankResult], reference: ReferenceResult | None
) -> RunReport:
    """The report of a run; `reference` where it was held against one process."""
    layout, predicted = plan.layout, plan.prediction
    skipped = min(_WARM_UP_STEPS, request.steps - 1)
    # Per step, the parts of the process that took longest.
    parts_by_process = [zip(r.pipeline_us, r.data_parallel_us, r.optimizer_us, strict=True) for r in results]
    slowest = [max(step, key=sum) for step in zip(*parts_by_process, strict=True)]
    step_times = [sum(parts) for parts in slowest]
    pipeline, reduction, optimizer = zip(*slowest, strict=True)
    predicted_us = predicted.pipeline_us
    if request.post_validation:  # no barrier: a step costs its span; work is the same share of both
        predicted_us *= (1 - predicted.bubble_rate_makespan) / (1 - predicted.bubble_rate_span)
    losses = next(result.losses for result in results if result.losses)
    memory = [result.peak_device_memory_bytes for result in results[:: layout.dp * layout.tp]]
    return RunReport(
        layout=layout.degrees,
        family=plan.family,
        num_processes=layout.num_devices,
        device=torch.cuda.get_device_name() if request.device == "cuda" else "cpu",
        backend=results[0].backend,
        engine=request.engine,
        dtype=request.dtype,
        planned_dtype=plan.dtype,
        torch_version=torch.__version__,
        threads_per_process=results[0].threads,
        seed=request.seed,
        learning_rate=request.learning_rate,
        losses=losses,
        step_times_us=tuple(step_times),
        num_skipped_steps=skipped,
        measured=StepParts(
            step_us=statistics.median(step_times[skipped:]),
            pipeline_us=statistics.median(pipeline[skipped:]),
            data_parallel_us=statistics.median(reduction[skipped:]),
            optimizer_us=statistics.median(optimizer[skipped:]),
        ),
        predicted=StepParts(
            step_us=predicted.step_time_us - predicted.pipeline_us + predicted_us,
            pipeline_us=predicted_us,
            data_parallel_us=predicted.exposed_data_parallel_us,
            optimizer_us=predicted.optimizer_us,
        ),
        actions=_action_times(plan.stages, results, skipped, hands_over=request.engine == "pipewright"),
        updates=Updates(
            max_grad_norm=request.max_grad_norm,
            post_validation=request.post_validation,
            gradient_norms=results[0].gradient_norms,
            num_skipped=results[0].num_skipped,
            num_rolled_back=tuple(r.num_rolled_back for r in results[:: layout.dp * layout.tp]),
            num_restarted=results[0].num_restarted,
        ),
        peak_boundary_tensors=tuple(r.peak_boundary_tensors for r in results[:: layout.dp * layout.tp]),
        peak_device_memory_bytes=tuple(m for m in memory if m is not None) if None not in memory else None,
        exactness=None if reference is None else _exactness(losses, reference),
    )


def make_profile(
    base: ModelProfile, plan: Plan, request: RunRequest, results: Sequence[RankResult], report: RunReport
) -> ModelProfile:
    """What the run measured, as a profile."""
    updates: defaultdict[int, list[float]] = defaultdict(list)
    for result in results:
        updates[result.trace.pipeline_rank].append(statistics.median(result.optimizer_us[report.num_skipped_steps :]))
    counted = request.steps - report.num_skipped_steps
    return corrected_profile(
        base,
        plan,
        report.actions,
        {rank: statistics.fmean(times) for rank, times in updates.items()},
        device_name=base.origin.device if request.device == "cpu" else report.device,
        how=(
            f"a run of {plan.layout.degrees}, {plan.family}, {plan.layout.num_microbatches} microbatches: mean of "
            f"{counted} {'step' if counted == 1 else 'steps'} after {report.num_skipped_steps}, torch "
            f"{report.torch_version}, {report.threads_per_process} threads, engine {report.engine}"
        ),
    )


def _action_times(
    stages: Sequence[StageCosts], results: Sequence[RankResult], skipped: int, *, hands_over: bool
) -> tuple[ActionTime, ...]:
    """Means by kind and stage. `hands_over`: waiting is told apart, so that the rest between two actions is sending."""
    seen: defaultdict[tuple[Kind, int], list[tuple[float, float, float]]] = defaultdict(list)
    for result in results:
        for step in result.trace.steps:
            if step.step < skipped:
                continue
            inside = [event for event in step.events if event.kind in _ON_THE_RANK]
            for event, following in zip(inside, [*inside[1:], None], strict=True):
                if event.stage is None or event.microbatch is None:
                    continue
                turned_us = event.end_us
                if hands_over and following is not None:
                    turned_us = following.start_us - following.waited_us
                handed_over_us = max(0.0, turned_us - event.end_us)
                times = event.end_us - event.start_us, event.waited_us, handed_over_us
                seen[Kind(event.kind), event.stage].append(times)
    rows = []
    for kind, stage in sorted(seen, key=lambda key: (key[1], list(Kind).index(key[0]))):
        costs = stages[stage]
        predicted_us = {
            Kind.F: costs.forward_us,
            Kind.B: costs.backward_input_us,
            Kind.W: costs.backward_weight_us,
            Kind.BW: costs.fused_backward_us,
            Kind.R: costs.recompute_us or 0.0,
        }[kind]
        durations, waits, handing_over = zip(*seen[kind, stage], strict=True)
        rows.append(
            ActionTime(
                kind=kind.value,
                stage=stage,
                count=len(durations),
                measured_us=statistics.fmean(durations),
                waited_us=statistics.fmean(waits),
                handed_over_us=statistics.fmean(handing_over),
                predicted_us=predicted_us,
            )
        )
    return tuple(rows)


def _exactness(losses: Sequence[float], reference: ReferenceResult) -> Exactness:
    differences = (abs(a - b) / (abs(b) or 1.0) for a, b in zip(losses, reference.losses, strict=True))
    return Exactness(
        reference_losses=reference.losses,
        loss_relative_differences=tuple(differences),
        gradient_relative_difference=reference.gradient_relative_difference,
        worst_parameter=reference.worst_parameter,
    )
