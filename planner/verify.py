"""Whether a plan's parts agree: everything in it that follows from other parts is computed again and compared."""

import math

from planner.errors import PlanError
from planner.layout import candidate_of
from planner.memory import rank_memory
from planner.plans import Plan, RankMemory
from planner.schedule.actions import Kind, Schedule, keep_together
from planner.schedule.families import FAMILIES
from planner.schedule.simulation import Timeline, simulate
from planner.schedule.validation import check

_TOLERANCE = 1e-6  # relative; everything compared was computed by the same code


def verify(plan: Plan) -> None:
    """PlanError or ScheduleError with the part that is wrong and both numbers.

    What a plan does not hold cannot be checked from it: single layers, the devices' peak (so only the ratio of MFU and
    rate), the candidates that were searched.
    """
    schedule, layout = plan.parsed_schedule, plan.layout
    check(
        schedule,
        num_stages=layout.num_stages,
        num_microbatches=layout.num_microbatches,
        rank_of_stage=layout.rank_of_stage,
        num_replicas=layout.num_replicas,
    )
    _check_layers(plan)
    _check_family(plan)
    _check_recompute(plan, schedule)
    timeline = simulate(schedule, plan.stages)
    _check_times(plan, timeline)
    _check_memory(plan, timeline)
    _check_certificate(plan)


def _check_layers(plan: Plan) -> None:
    """Of a bundled model; other models' layers are their owner's business."""
    layers, wanted = sum(plan.layout.layers_per_stage), plan.model.num_layers + 2
    ours = plan.provenance.profile_origin.startswith("analytic") or plan.architecture is not None
    if ours and layers != wanted:
        raise PlanError(
            f"plan.layout.layers_per_stage adds up to {layers}, but the model has {wanted} layers, with embedding and "
            "head"
        )


def _check_family(plan: Plan) -> None:
    if plan.family == "auto":
        return
    family, layout = FAMILIES.get(plan.family), plan.layout
    if family is None:
        raise PlanError(f"plan.family {plan.family!r} is none of {', '.join(FAMILIES)}, auto")
    generated = family.generate(layout.pp, layout.num_microbatches, layout.virtual_stages)
    if keep_together(generated, [stage.splits_backward for stage in plan.stages]) != plan.parsed_schedule:
        raise PlanError(f"plan.schedule is not what family {plan.family!r} generates for this layout; name it auto")


def _check_recompute(plan: Plan, schedule: Schedule) -> None:
    for rank, actions in enumerate(schedule.ranks):
        for step, action in enumerate(actions):
            costs = plan.stages[action.stage]
            if action.kind is Kind.R and (costs.recompute_us is None or costs.checkpoint_bytes is None):
                raise PlanError(
                    f"plan.schedule: rank {rank}, step {step}: {action} recomputes stage {action.stage}, but "
                    f"plan.stages[{action.stage}] has no recompute_us or no checkpoint_bytes to count it with"
                )


def _check_times(plan: Plan, timeline: Timeline) -> None:
    guess = plan.prediction
    tokens = plan.global_batch_size * plan.sequence_length
    updates = [
        sum(
            stage.optimizer_us
            for stage, host in zip(plan.stages, plan.layout.rank_of_stage, strict=True)
            if host == rank or (plan.layout.num_replicas == 2 and host == plan.layout.pp - 1 - rank)
        )
        for rank in range(plan.layout.pp)
    ]
    shards = plan.layout.shard_degree if plan.layout.zero_stage >= 1 else 1
    _same("prediction.pipeline_us", guess.pipeline_us, timeline.makespan_us, "its schedule and stage costs take")
    _same("prediction.bubble_rate_makespan", guess.bubble_rate_makespan, timeline.bubble_rate_makespan, "they give")
    _same("prediction.bubble_rate_span", guess.bubble_rate_span, timeline.bubble_rate_span, "they give")
    if not any(math.isclose(guess.optimizer_us, us / shards, rel_tol=_TOLERANCE, abs_tol=1e-9) for us in updates):
        raise PlanError(f"plan.prediction.optimizer_us is {guess.optimizer_us}, which is no rank's optimizer step")
    parts_us = guess.pipeline_us + guess.exposed_data_parallel_us + guess.optimizer_us
    _same("prediction.step_time_us", guess.step_time_us, parts_us, "its parts add up to")
    _same("prediction.tokens_per_s", guess.tokens_per_s, tokens / (guess.step_time_us / 1e6), "the step time gives")
    flops = plan.model.step_flops(plan.global_batch_size, plan.sequence_length)
    _same("prediction.model_flops", guess.model_flops, flops, "the model takes")


def memory_of(plan: Plan, timeline: Timeline) -> tuple[RankMemory, ...]:
    """What every rank takes when the schedule runs like this, beside the capacities the plan states, shape (p,)."""
    layout = plan.layout
    return tuple(
        rank_memory(
            plan.stages,
            layout.rank_of_stage,
            rank,
            candidate=candidate_of(layout),
            precision=plan.precision,
            peak_activation_bytes=math.ceil(timeline.peak_activation_bytes[rank]),
            capacity=stated.capacity_bytes,
            num_replicas=layout.num_replicas,
        )
        for rank, stated in enumerate(plan.prediction.memory)
    )


def _check_memory(plan: Plan, timeline: Timeline) -> None:
    for rank, (memory, again) in enumerate(zip(plan.prediction.memory, memory_of(plan, timeline), strict=True)):
        if again != memory:
            name = next(n for n in type(memory).model_fields if getattr(memory, n) != getattr(again, n))
            raise PlanError(
                f"plan.prediction.memory[{rank}].{name} is {getattr(memory, name)}, but stages and schedule give "
                f"{getattr(again, name)}"
            )
        if memory.total_bytes > memory.capacity_bytes:
            raise PlanError(
                f"pipeline rank {rank} needs {memory.total_bytes} bytes and may use {memory.capacity_bytes}"
            )


def _check_certificate(plan: Plan) -> None:
    proof = plan.certificate
    _same("certificate.objective_us", proof.objective_us, plan.prediction.step_time_us, "the step time is")
    if proof.lower_bound_us > proof.objective_us:
        raise PlanError(
            f"plan.certificate.lower_bound_us {proof.lower_bound_us} is over its objective_us {proof.objective_us}"
        )
    gap = (proof.objective_us - proof.lower_bound_us) / proof.objective_us
    _same("certificate.gap", proof.gap, gap, "bound and objective give")
    if (proof.status == "optimal") != (gap == 0):
        raise PlanError(f"plan.certificate.status is {proof.status}, but the gap is {gap}")
    if proof.schedule_lower_bound_us > plan.prediction.pipeline_us * (1 + _TOLERANCE):
        raise PlanError(
            f"plan.certificate.schedule_lower_bound_us {proof.schedule_lower_bound_us} is over the pipeline's "
            f"{plan.prediction.pipeline_us}"
        )


def _same(name: str, claimed: float, computed: float, how: str) -> None:
    if not math.isclose(claimed, computed, rel_tol=_TOLERANCE, abs_tol=1e-9):
        raise PlanError(f"plan.{name} is {claimed}, but {how} {computed}")
