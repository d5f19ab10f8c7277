"""Facts in, plans out: the layout space, its price, its search, schedules, and the doors a Plan leaves through.

    import planner

    plan = planner.plan("llama-3.1-8b", cluster="2x8xh100-sxm", global_batch_size=256)
    print(plan)
    plan.save("plan.json")

Names are loaded when first used: `import planner` loads neither a solver nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.api import json_schema, plan, profile, validate
    from planner.comparison import compare
    from planner.given_schedule import with_schedule
    from planner.pipeline_costs import PipelineCosts
    from planner.plans import Plan
    from planner.scheduling import schedule_costs

__all__ = [
    "PipelineCosts",
    "Plan",
    "compare",
    "json_schema",
    "plan",
    "profile",
    "schedule_costs",
    "validate",
    "with_schedule",
]

_HOME = {
    "PipelineCosts": "planner.pipeline_costs",
    "Plan": "planner.plans",
    "compare": "planner.comparison",
    "json_schema": "planner.api",
    "plan": "planner.api",
    "profile": "planner.api",
    "schedule_costs": "planner.scheduling",
    "validate": "planner.api",
    "with_schedule": "planner.given_schedule",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
