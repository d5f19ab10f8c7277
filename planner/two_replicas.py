"""Plans with a bidirectional family: the best layout of 1F1B, one stage per rank, with every stage on its mirror, too.

The layout search prices placements that hold each stage once, so this is not the best layout for the family, and the
certificate claims no more than the busiest rank's work in this one.
"""

from typing import Any

from planner.errors import InfeasibleError, LayoutError, PlanError
from planner.given_schedule import with_schedule
from planner.plans import Plan
from planner.schedule.actions import keep_together
from planner.schedule.families import Family
from planner.verify import verify


def one_replica_arguments(family: Family, arguments: dict[str, Any]) -> dict[str, Any]:
    """What to plan first; LayoutError unless pp is pinned to one number of ranks and v to nothing but 1."""
    (pp, v) = (_only(arguments[name]) for name in ("pp", "virtual_stages"))
    if not isinstance(pp, int) or pp < 2:
        raise LayoutError(
            f"family {family.name!r} holds every stage on two ranks, which the layout search does not price; pin pp to "
            "one number of at least 2, and the layout of 1f1b is taken"
        )
    if v not in (None, 1):
        raise LayoutError(f"family {family.name!r} with virtual_stages={v}: {family.supports(2, 4, 2)}")
    return {**arguments, "family": "1f1b", "virtual_stages": 1}


def with_two_replicas(plan: Plan, family: Family) -> Plan:
    """`plan` under a bidirectional family.

    LayoutError where that has no schedule for these numbers, InfeasibleError where it does not fit.
    """
    layout = plan.layout
    reason = family.supports(layout.pp, layout.num_microbatches)
    if reason is not None:
        raise LayoutError(
            f"family {family.name!r} with pp={layout.pp} and {layout.num_microbatches} microbatches, the best layout "
            f"of 1f1b: {reason}; or pin dp and micro_batch_size"
        )
    splits = [stage.splits_backward for stage in plan.stages]
    try:
        given = with_schedule(plan, keep_together(family.generate(layout.pp, layout.num_microbatches), splits))
    except PlanError as error:
        raise InfeasibleError(
            f"family {family.name!r} in the best layout of 1f1b, {layout.degrees}: {error}; use more ranks or a "
            "smaller micro-batch, or a family that holds each stage once"
        ) from None
    named = given.model_copy(update={"family": family.name})
    verify(named)
    return named


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) and len(value) == 1 else value
