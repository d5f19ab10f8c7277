"""Every family, with every number of chunks it supports, and auto, on the same costs: what `pipewright compare` shows.

Costs are of the p ranks' pieces of the model, as where the placement is chosen, so that all rows have the same model
and the same memory. Bidirectional families hold every stage on two ranks, so what is fixed counts twice; the bound
is on schedules that hold it once.
"""

from collections.abc import Callable, Sequence

from planner.errors import LayoutError
from planner.ordering import Limits, Ordered, by_family, num_transfers
from planner.pipeline_costs import UNIT, MemoryLimits, PipelineCosts
from planner.placements import placement_of_family
from planner.schedule.answer import Comparison, FamilyRow, Objective
from planner.schedule.families import FAMILIES
from planner.scheduling import Question, choose_placement
from solvers.bounds import Bound
from solvers.registry import Progress

MAX_CHUNKS = 4


def compare(
    costs: PipelineCosts,
    *,
    num_ranks: int,
    num_microbatches: int,
    memory_limit: float | Sequence[float] | None = None,
    capacity_bytes: int | Sequence[int] | None = None,
    fixed_bytes: int | Sequence[int] | None = None,
    objective: Objective = "span",
    solver: str = "auto",
    time_limit_s: float = 30.0,
    work_limit: float | None = None,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """All fixed families and auto side by side, least objective first.

    Arguments as those of `planner.schedule_costs`; auto is its `placement="auto"`. InfeasibleError where nothing fits.
    """
    question = Question(
        costs.sized(UNIT),
        num_ranks,
        num_microbatches,
        MemoryLimits(memory_limit, capacity_bytes, fixed_bytes),
        objective,
        Limits(solver, time_limit_s, seed, work_limit, on_progress),
    )
    rows, refused = family_orders(question)
    best, _, bound = choose_placement(question)
    rows.append(best)
    fitting = [row for row in rows if row.overflow is None]
    least_us = min(row.objective_us for row in fitting)
    once_us = min(row.objective_us for row in fitting if row.schedule.num_replicas == 1)
    return Comparison(
        objective=objective,
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        memory_capacity=question.capacity_bytes(),
        microbatch_memory=question.costs.largest_activation_bytes,
        lower_bound_us=bound.value_us,
        lower_bound_kind=bound.kind,
        gap=max(0.0, (once_us - bound.value_us) / once_us),
        rows=tuple(_row(row, least_us) for row in sorted(rows, key=lambda row: row.objective_us)),
        refused=refused,
        seed=seed,
        time_limit_s=time_limit_s,
        work_limit=work_limit,
        limited_by_time=best.limited_by_time,
        interrupted=best.interrupted,
    )


def family_orders(question: Question) -> tuple[list[Ordered], dict[str, str]]:
    """Every family with every number of chunks it supports, up to `MAX_CHUNKS`; and why others have no schedule."""
    found: list[Ordered] = []
    refused: dict[str, str] = {}
    p, m = question.num_ranks, question.num_microbatches
    no_bound = Bound(0, "")  # of a single row nothing is said
    for family in FAMILIES.values():
        obstacle, supported = "", False
        for chunks in range(1, MAX_CHUNKS + 1 if p > 1 else 2):
            reason = family.supports(p, m, chunks)
            if reason is not None:
                obstacle = reason
                continue
            supported = True
            place = placement_of_family(family, p, chunks)
            try:
                found.append(by_family(family, question.task_of_pieces(place), no_bound))
            except LayoutError as error:
                if chunks == 1 and family.num_replicas == 1:
                    raise
                refused[f"{family.name}, {chunks} chunks" if chunks > 1 else family.name] = str(error)
        if not supported:
            refused[family.name] = obstacle
    return found, refused


def _row(one: Ordered, least_us: int) -> FamilyRow:
    over = one.memory_over
    return FamilyRow(
        family=one.family,
        solver=one.solver,
        placement=one.task.placement.name,
        virtual_stages=one.task.placement.virtual_stages,
        num_replicas=one.schedule.num_replicas,
        objective_us=one.objective_us,
        span_us=one.span_us,
        makespan_us=one.makespan_us,
        bubble_rate_span=one.bubble_rate_span,
        bubble_rate_makespan=one.bubble_rate_makespan,
        peak_memory=one.peak_bytes,
        transfers=num_transfers(one.task.problem),
        fits=one.overflow is None,
        memory_over=over,
        note=one.overflow or "",
        gap_to_best=(one.objective_us - least_us) / one.objective_us,
    )
