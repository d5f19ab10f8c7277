"""Answers beside the plan, for people."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from planner.answers import (
    Answers,
    Budget,
    LayoutComparison,
    NodeCount,
    Outcome,
    SmallestCluster,
    TopLayouts,
    WhatIf,
)
from planner.report.plan import plan_parts
from planner.report.text import WIDTH, duration, facts, grid, render, size

_COLUMNS = 5  # of what-ifs side by side
_MOST_REASONS = 3


def render_answers(answers: Answers) -> str:
    """Everything `pipewright plan` prints for people."""
    return render(*_parts(answers), width=WIDTH)


def render_smallest(found: SmallestCluster) -> str:
    """What `pipewright plan --smallest` prints for people."""
    parts: list[RenderableType] = [_sizing(found), _tried(found.tried)]
    if found.budget is not None:
        parts.append(_budget(found.budget))
    if found.plan is not None:
        parts.append(Text("\nThe plan for it", style="bold"))
        parts.extend(plan_parts(found.plan))
    return render(*parts, width=WIDTH)


def _parts(answers: Answers) -> Iterable[RenderableType]:
    yield from plan_parts(answers.plan, with_alternatives=answers.top is None)
    if answers.top is not None:
        yield _top(answers.top)
    if answers.comparison is not None:
        yield _comparison(answers.comparison)
    if answers.budget is not None:
        yield _budget(answers.budget)
    if answers.what_if is not None:
        yield _what_if(answers.what_if)


def _top(top: TopLayouts) -> RenderableType:
    rows, notes = [], []
    for number, row in enumerate(top.rows, 1):
        gap = f"{row.gap_to_best:+.2%}" if number > 1 else "best"
        figures = (duration(row.step_time_us), gap, f"{row.mfu:.1%}", size(row.peak_memory_bytes))
        rows.append([str(number), row.layout, row.family, *figures])
        label = f"{row.label}: " if row.label else ""
        notes.append((str(number), label + (row.separated_by if number > 1 else "the best")))
    columns = ("", "layout", "schedule", "step time", "to best", "MFU", "memory")
    return Group(
        grid(f"The best {len(rows)} layouts", columns, rows, left=("layout", "schedule"), folds=("layout",)),
        Text("\nWhat separates them from the best (shares of its step time)", style="bold"),
        facts(notes),
    )


def _comparison(comparison: LayoutComparison) -> RenderableType:
    mine, other = comparison.layout, comparison.other
    if not comparison.parts or mine.parts is None or other.parts is None:
        return Text("")
    own, reference = mine.parts.by_name, other.parts.by_name
    rows = [
        [
            part.part,
            duration(own[part.part]),
            duration(reference[part.part]),
            _signed(part.difference_us),
            f"{part.difference_us / other.step_time_us:+.2%}",
        ]
        for part in comparison.parts
    ]
    rows.append(
        [
            "step",
            duration(mine.step_time_us),
            duration(other.step_time_us),
            _signed(comparison.difference_us),
            f"{comparison.difference_us / other.step_time_us:+.2%}",
        ]
    )
    certain = ""
    if comparison.other_gap is not None:
        least = other.step_time_us * (1 - comparison.other_gap)
        certain = f"Without pins nothing is faster than {duration(least)}; "
        certain += f"what was found is within {comparison.other_gap:.1%}."
    if comparison.is_same:
        return Text(f"\nWithout pins nothing better was found. {certain}")
    title = f"With the pins ({mine.layout}, {mine.family}) and without ({other.layout}, {other.family})"
    table = grid(title, ("part", "with", "without", "difference", "of best"), rows, left=("part",))
    return Group(table, Text(certain))


def _budget(budget: Budget) -> RenderableType:
    days = f"{budget.days:,.1f} days" if budget.days >= 1 else f"{budget.days * 24:.1f} hours"
    rows = [
        ("tokens", f"{budget.tokens:,} in {budget.num_steps:,} steps of {budget.tokens_per_step:,}"),
        ("time", f"{days} on {budget.num_devices:,} devices, without failures and restarts"),
        ("cost", f"{budget.gpu_hours:,.0f} device-hours"),
    ]
    return Group(Text("\nToken budget", style="bold"), facts(rows))


def _what_if(answer: WhatIf) -> RenderableType:
    outcomes = (answer.base, *answer.changes)
    possible = [outcome for outcome in outcomes if outcome.problem is None]
    lines = [
        ("devices", [f"{o.num_devices:,}" for o in possible]),
        ("step time", [duration(o.step_time_us) for o in possible]),
        ("tokens/s", [f"{o.tokens_per_s:,.0f}" for o in possible]),
        ("", [f"{o.tokens_per_s / answer.base.tokens_per_s - 1:+.1%}" for o in possible]),
        ("MFU", [f"{o.mfu:.1%}" for o in possible]),
        ("memory", [size(o.peak_memory_bytes) for o in possible]),
        ("gap", [f"{o.gap:.2%}" for o in possible]),
    ]
    names = [o.change for o in possible]
    tables = [
        grid(
            "What if" if start == 0 else "",
            ("", *names[start : start + _COLUMNS]),
            [[name, *cells[start : start + _COLUMNS]] for name, cells in lines],
            left=("",),
        )
        for start in range(0, len(names), _COLUMNS)
    ]
    words = [(o.change, _said(o)) for o in outcomes]
    if answer.interrupted:
        words.append(("", "interrupted: changes may be missing"))
    return Group(*tables, Text(""), facts(words))


def _said(outcome: Outcome) -> str:
    if outcome.problem is not None:
        return outcome.problem
    return f"{outcome.layout}, {outcome.family}" + (f": {outcome.changed}" if outcome.changed else "")


def _sizing(found: SmallestCluster) -> RenderableType:
    wanted = (
        "fits" if found.deadline_days is None else f"trains on {found.tokens:,} tokens in {found.deadline_days:g} days"
    )
    if found.num_nodes is None:
        rows = [("answer", f"no number of nodes was found on which the model {wanted}")]
    else:
        rows = [("answer", f"{_nodes(found.num_nodes)}, {found.num_devices:,} devices: the model {wanted}")]
    rows.append(("at least", f"{_nodes(found.least_nodes)}: {found.least_reason}"))
    if found.num_nodes is not None:
        rows.append(("proven", _proof(found)))
    if found.interrupted:
        rows.append(("", "interrupted"))
    return facts(rows)


def _nodes(number: int) -> str:
    return "1 node" if number == 1 else f"{number:,} nodes"


def _proof(found: SmallestCluster) -> str:
    if found.proven:
        return "yes: every smaller number is refused by proof"
    smaller = [row for row in found.tried if row.num_nodes < (found.num_nodes or 0)]
    open_counts = [row.num_nodes for row in smaller if row.verdict == "undecided"]
    if open_counts:
        return f"no: undecided at {', '.join(map(str, open_counts))} nodes; raise the time limit"
    return "no: not every smaller number was tried; it rests on more nodes being no worse"


def _tried(tried: Sequence[NodeCount]) -> RenderableType:
    rows = []
    for count in tried:
        step = "" if count.step_time_us is None else duration(count.step_time_us)
        bound = "" if count.lower_bound_us is None else duration(count.lower_bound_us)
        rows.append([f"{count.num_nodes:,}", f"{count.num_devices:,}", count.verdict, step, bound])
    columns = ("nodes", "devices", "verdict", "step time", "bound")
    reasons = [(f"{count.num_nodes:,}", count.reason) for count in tried if count.reason and count.verdict != "fits"]
    return Group(grid("Tried", columns, rows, left=("verdict",)), facts(reasons[-_MOST_REASONS:]))


def _signed(microseconds: float) -> str:
    return ("-" if microseconds < 0 else "+") + duration(abs(microseconds))
