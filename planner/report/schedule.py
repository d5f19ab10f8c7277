"""Schedules made from costs alone, for people."""

from collections.abc import Sequence

from rich.console import Group, RenderableType

from planner.report.text import SHOWN_RANKS, facts, grid, render, schedule_excerpt
from planner.schedule.answer import Comparison, FamilyRow, PlacementRow, ScheduleAnswer

_WIDTH = 140  # of the tables; a schedule's excerpt is narrower


def render_schedule(answer: ScheduleAnswer) -> str:
    """What `pipewright schedule` prints for people."""
    chunks = f", up to {answer.virtual_stages} stages per rank" if answer.virtual_stages > 1 else ""
    if answer.num_replicas > 1:
        chunks = "; every stage also on the mirrored rank, so weights, gradients and optimizer state are held twice"
    rows = [
        ("schedule", f"{answer.family}, made by {answer.solver} in {answer.solve_seconds:.2f} s, {answer.status}"),
        ("placement", f"{answer.placement}: {len(answer.rank_of_stage)} stages on {answer.num_ranks} ranks{chunks}"),
        ("span", f"{answer.span_us} µs, bubble rate {answer.bubble_rate_span:.4f}"),
        ("makespan", f"{answer.makespan_us} µs, bubble rate {answer.bubble_rate_makespan:.4f}"),
        (
            "gap",
            f"{answer.gap:.2%}: no {answer.objective} is under {answer.lower_bound_us} µs ({answer.lower_bound_kind})"
            + (", of all placements below" if answer.comparison else ""),
        ),
        ("peak memory", _per_rank(answer.peak_memory)),
        ("limits", _limits(answer)),
    ]
    parts: list[RenderableType] = [facts(rows)]
    if answer.comparison:
        parts.append(_placements(answer.comparison, answer.objective))
    parts.append(
        schedule_excerpt(answer.schedule, title="Schedule", rest="the whole schedule: --json, or -o FILE for a file")
    )
    return render(*parts, width=_WIDTH)


def render_comparison(comparison: Comparison) -> str:
    """What `pipewright compare` prints for people."""
    unit = max(1, comparison.microbatch_memory)
    rows = [
        (
            "pipeline",
            f"{comparison.num_ranks} ranks, {comparison.num_microbatches} microbatches; memory counts M_B of the "
            f"largest rank, {unit}; sent: tensors between ranks per step",
        ),
        (
            "gap",
            f"{comparison.gap:.2%}: no {comparison.objective} is under {comparison.lower_bound_us} µs "
            f"({comparison.lower_bound_kind}), with the weights held once",
        ),
        (
            "limits",
            _limits(comparison),
        ),
    ]
    if comparison.memory_capacity is not None:
        held = _per_rank([f"{capacity / unit:.2f}" for capacity in comparison.memory_capacity])
        rows.insert(1, ("memory", f"at most {held}"))
    columns = (
        "family",
        "placement",
        "v",
        "span µs",
        "bubble",
        "makespan µs",
        "bubble",
        "peak",
        "weights",
        "sent",
        "fits",
    )
    table = [
        [
            row.family if row.family != "auto" else f"auto ({row.solver})",
            row.placement,
            str(row.virtual_stages),
            str(row.span_us),
            f"{row.bubble_rate_span:.4f}",
            str(row.makespan_us),
            f"{row.bubble_rate_makespan:.4f}",
            f"{max(row.peak_memory) / unit:.2f}",
            f"{row.num_replicas}x",
            str(row.transfers),
            _fit(row, unit),
            f"{row.gap_to_best:+.2%}" if row.gap_to_best else "best",
        ]
        for row in comparison.rows
    ]
    parts: list[RenderableType] = [
        facts(rows),
        grid(
            f"By {comparison.objective}",
            (*columns, "to best"),
            table,
            left=("family", "placement", "fits"),
        ),
    ]
    if comparison.refused:
        parts.append(grid("No schedule", ("family", "why"), list(comparison.refused.items()), left=("family", "why")))
    return render(*parts, width=_WIDTH)


def _placements(rows: Sequence[PlacementRow], objective: str) -> RenderableType:
    columns = ("placement", "v", f"{objective} µs", "bubble span", "makespan", "bound µs", "gap", "peak memory")
    table = [
        [
            row.placement,
            str(row.virtual_stages),
            str(row.objective_us),
            f"{row.bubble_rate_span:.4f}",
            f"{row.bubble_rate_makespan:.4f}",
            str(row.lower_bound_us),
            f"{row.gap:.2%}",
            str(row.peak_memory),
        ]
        for row in rows
        if row.objective_us is not None
    ]
    others = facts((f"{row.placement} v{row.virtual_stages}", row.note) for row in rows if row.objective_us is None)
    return Group(grid("Placements", columns, table, left=("placement",)), others)


def _fit(row: FamilyRow, unit: int) -> str:
    if row.fits:
        return "yes"
    return f"no: {row.memory_over / unit:.2f} over" if row.memory_over else "no: in flight"


def _per_rank(sizes: Sequence[int | str]) -> str:
    if len(set(sizes)) == 1:
        return f"{sizes[0]} on every rank"
    if len(sizes) <= SHOWN_RANKS:
        return " ".join(map(str, sizes))
    numbers = [float(size) for size in sizes]
    least, most = numbers.index(min(numbers)), numbers.index(max(numbers))
    return f"{sizes[least]} to {sizes[most]}, most on rank {most}"


def _limits(answer: ScheduleAnswer | Comparison) -> str:
    return (
        f"{answer.time_limit_s:g} s"
        + (f", work {answer.work_limit:g}" if answer.work_limit is not None else "")
        + f", seed {answer.seed}"
        + (", cut short by the time limit: another run may differ" if answer.limited_by_time else "")
        + (", interrupted" if answer.interrupted else "")
    )
