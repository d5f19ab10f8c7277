"""Answers beside the plan: the best few layouts, why not another one, what if, the smallest cluster, a token budget.

What is read off a plan (`top_layouts`, `compare_layouts`, `budget`) costs nothing; `what_if` and `smallest_cluster`
plan again. All are functions of facts with frozen facts as results.
"""

from planner.answers.bundle import Answers, answer
from planner.answers.readings import (
    Budget,
    LayoutComparison,
    LayoutRow,
    PartDifference,
    TopLayouts,
    budget,
    compare_layouts,
    parse_tokens,
    top_layouts,
)
from planner.answers.sizing import NodeCount, SmallestCluster, smallest_cluster
from planner.answers.variations import Change, Outcome, WhatIf, what_if

__all__ = [
    "Answers",
    "Budget",
    "Change",
    "LayoutComparison",
    "LayoutRow",
    "NodeCount",
    "Outcome",
    "PartDifference",
    "SmallestCluster",
    "TopLayouts",
    "WhatIf",
    "answer",
    "budget",
    "compare_layouts",
    "parse_tokens",
    "smallest_cluster",
    "top_layouts",
    "what_if",
]
