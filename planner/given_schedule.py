"""A plan with another schedule put into it: predicted anew, with nothing claimed that was proven of the old one.

The way to run an order that the layout search does not make, such as one with recompute as an action (R).
"""

import math

from planner.errors import PlanError
from planner.layout import candidate_of
from planner.memory import rank_memory
from planner.plans import Certificate, Plan
from planner.schedule.actions import Kind, Schedule
from planner.schedule.simulation import simulate
from planner.schedule.validation import check
from planner.verify import verify


def with_schedule(plan: Plan, schedule: Schedule) -> Plan:
    """`plan` running `schedule`, which has the plan's stages on the plan's ranks and its microbatches.

    Pipeline time, bubble and memory are those of the schedule on the plan's stage costs; what follows the pipeline
    stays as it was. The certificate has the work of the busiest rank as its bound and says so. Parts of the step,
    alternatives and HFU, which belong to the old schedule, are dropped.

    ScheduleError when the schedule is not for this layout; PlanError when a rank's memory does not hold it, or it
    recomputes a stage whose costs are not told.
    """
    layout, old = plan.layout, plan.prediction
    check(
        schedule,
        num_stages=layout.num_stages,
        num_microbatches=layout.num_microbatches,
        rank_of_stage=layout.rank_of_stage,
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
    memory = tuple(
        rank_memory(
            plan.stages,
            layout.rank_of_stage,
            rank,
            candidate=candidate_of(layout),
            precision=plan.precision,
            peak_activation_bytes=math.ceil(timeline.peak_activation_bytes[rank]),
            capacity=before.capacity_bytes,
        )
        for rank, before in enumerate(old.memory)
    )
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
            "memory": memory,
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


def _certificate(plan: Plan, step_us: float, pipeline_us: float) -> Certificate:
    """No order of any actions does with less than the work of the busiest rank."""
    work_us = [0.0] * plan.layout.pp
    for stage, rank in zip(plan.stages, plan.layout.rank_of_stage, strict=True):
        backward_us = min(stage.fused_backward_us, stage.backward_input_us + stage.backward_weight_us)
        work_us[rank] += plan.layout.num_microbatches * (stage.forward_us + backward_us)
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
