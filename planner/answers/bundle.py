"""The plan with the answers that were asked for beside it: what `pipewright plan` makes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from planner.answers.readings import (
    Budget,
    LayoutComparison,
    TopLayouts,
    budget,
    compare_layouts,
    top_layouts,
)
from planner.answers.variations import Change, WhatIf, what_if
from planner.api import DEFAULT_TIME_LIMIT_S, plan
from planner.plans import WITHOUT_PINS, Plan
from planner.questions import PlanArguments, check_time_limit, within
from profiles.cluster import Cluster
from profiles.facts import Facts
from profiles.model import ModelProfile, ModelSpec


class Answers(Facts):
    """A plan, and what else was asked."""

    plan: Plan
    comparison: LayoutComparison | None = None  # beside the best without pins, where there were any
    top: TopLayouts | None = None
    budget: Budget | None = None
    what_if: WhatIf | None = None


def answer(
    model: str | Path | ModelSpec | ModelProfile,
    cluster: str | Path | Cluster,
    *,
    tokens: int | None = None,
    changes: Sequence[str] = (),
    **arguments: Unpack[PlanArguments],
) -> Answers:
    """Plan, and answer what else is asked within the same time limit; arguments are those of `planner.plan`.

    The plan gets twice the time of each change.
    """
    parsed = [Change.parse(change) for change in changes]
    limit_s = arguments.get("time_limit_s", DEFAULT_TIME_LIMIT_S)
    check_time_limit(limit_s)
    share_s = limit_s / (1 + len(parsed) / 2)
    top = arguments.get("top", 0)
    found = plan(model, cluster, **within(arguments, share_s, top=top))
    return Answers(
        plan=found,
        comparison=compare_layouts(found) if any(a.label == WITHOUT_PINS for a in found.alternatives) else None,
        top=top_layouts(found, top) if top else None,
        budget=None if tokens is None else budget(found, tokens),
        what_if=what_if(model, cluster, parsed, base=found, **within(arguments, limit_s - share_s)) if parsed else None,
    )
