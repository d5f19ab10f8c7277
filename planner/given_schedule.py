"""A plan with another schedule put into it: predicted anew, with nothing claimed that was proven of the old one.

The way to run an order that the layout search does not make, such as one with recompute as an action (R).
"""

from planner.errors import PlanError
from planner.plans import Certificate, Plan, Prediction
from planner.schedule.actions import Kind, Schedule
from planner.schedule.simulation import simulate
from planner.schedule.validation import check
from planner.traffic import BYTES_OF
from planner.verify import memory_of, verify
from profiles.model import BYTES_PER_ELEMENT


def with_schedule(plan: Plan, schedule: Schedule) -> Plan:
    """`plan` running `schedule`, which has the plan's stages on the plan's ranks and its microbatches.

    Pipeline time, bubble and memory are those of the schedule on the plan's stage costs; what follows the pipeline
    stays as it was. A bidirectional schedule takes one stage per rank, in order, and makes each rank hold the mirrored
    rank's stage, too: memory and optimizer step are of both, data-parallel traffic counts twice, and the sum of
    gradients between two ranks is estimated by the slowest boundary of the plan. The certificate has
    the work of the busiest rank as its bound and says so. Parts of the step,
    alternatives and HFU, which belong to the old schedule, are dropped.

    ScheduleError when the schedule is not for this layout; PlanError when a rank's memory does not hold it, or it
    recomputes a stage whose costs are not told.
    """
    layout, old = plan.layout, plan.prediction
    if schedule.num_replicas != layout.num_replicas:
        plan, old = _with_replicas(plan, schedule.num_replicas)
        layout = plan.layout
    check(
        schedule,
        num_stages=layout.num_stages,
        num_microbatches=layout.num_microbatches,
        rank_of_stage=layout.rank_of_stage,
        num_replicas=layout.num_replicas,
    )
    for stage in {a.stage for actions in schedule.ranks for a in actions if a.kind is Kind.R}:
        if plan.stages[stage].recompute_us is None or plan.stages[stage].checkpoint_bytes is None:
            raise PlanError(
                f"the schedule recomputes stage {stage}, but plan.stages[{stage}] has no recompute_us or no "
                "checkpoint_bytes; make the plan again"
            )
    timeline = simulate(schedule, plan.stages)
    step_us = timeline.makespan_us + old.exposed_data_parallel_us + old.optimizer_us
    slower = old.step_time_us / step_us
    prediction = old.model_copy(
        update={
            "step_time_us": step_us,
            "pipeline_us": timeline.makespan_us,
            "bubble_rate_span": timeline.bubble_rate_span,
            "bubble_rate_makespan": timeline.bubble_rate_makespan,
            "mfu": old.mfu * slower,
            "hfu": 0.0,
            "tokens_per_s": plan.global_batch_size * plan.sequence_length / (step_us / 1e6),
            "parts": None,
            "memory": memory_of(plan, timeline),
        }
    )
    given = plan.model_copy(
        update={
            "family": "auto",
            "schedule": schedule.to_lines(),
            "prediction": prediction,
            "certificate": _certificate(plan, step_us, timeline.makespan_us),
            "alternatives": (),
        }
    )
    verify(given)
    return given


def _with_replicas(plan: Plan, num_replicas: int) -> tuple[Plan, Prediction]:
    """The plan with every stage on its mirrored rank, too, and what is then predicted after the pipeline."""
    layout, old = plan.layout, plan.prediction
    if num_replicas == 1 or layout.pp < 2 or layout.rank_of_stage != tuple(range(layout.pp)):
        raise PlanError(
            f"the schedule runs {num_replicas} replicas of the model, the plan {layout.num_replicas} with stages on "
            f"ranks {list(layout.rank_of_stage)}; two replicas go into a plan of one replica with stage s on rank s"
        )
    pairs = list(zip(plan.stages, plan.stages[::-1], strict=True))
    shards = layout.shard_degree if layout.zero_stage >= 1 else 1
    us_per_byte = max(s.transfer_us / s.output_bytes for s in plan.stages[:-1] if s.output_bytes)
    of_gradients = BYTES_OF[plan.precision.gradients] / BYTES_PER_ELEMENT[plan.precision.compute]
    summing_us = max(one.parameter_bytes + other.parameter_bytes for one, other in pairs) * of_gradients * us_per_byte
    given = plan.model_copy(update={"layout": layout.model_copy(update={"num_replicas": 2})})
    return given, old.model_copy(
        update={
            "exposed_data_parallel_us": old.exposed_data_parallel_us * (2 if layout.dp > 1 else 1) + summing_us,
            "optimizer_us": max(one.optimizer_us + other.optimizer_us for one, other in pairs) / shards,
        }
    )


def _certificate(plan: Plan, step_us: float, pipeline_us: float) -> Certificate:
    """No order of any actions does with less than the work of the busiest rank."""
    work_us = [0.0] * plan.layout.pp
    replicas = plan.layout.num_replicas
    for stage, rank in zip(plan.stages, plan.layout.rank_of_stage, strict=True):
        backward_us = min(stage.fused_backward_us, stage.backward_input_us + stage.backward_weight_us)
        work_us[rank] += plan.layout.num_microbatches * (stage.forward_us + backward_us)
    if replicas == 2:  # each microbatch goes either way; half of them each is the least for the busier of two ranks
        work_us = [(one + other) / 2 for one, other in zip(work_us, work_us[::-1], strict=True)]
    bound_us = min(max(work_us), pipeline_us)
    lower_us = step_us - pipeline_us + bound_us
    gap = (step_us - lower_us) / step_us
    return plan.certificate.model_copy(
        update={
            "objective_us": step_us,
            "lower_bound_us": lower_us,
            "lower_bound_kind": "work of the busiest rank, in this layout, cut like this",
            "gap": gap,
            "status": "optimal" if gap == 0 else "feasible",
            "schedule_solver": "given",
            "schedule_lower_bound_us": bound_us,
            "num_candidates": 1,
            "num_evaluated": 1,
            "num_overflowing": 0,
            "num_pruned": 0,
            "num_unreached": 0,
            "refused": {},
            "dropped": {},
            "interrupted": False,
        }
    )
