"""Schedules from costs alone: what `pipewright schedule` asks, for a placement that is given or chosen here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from planner.errors import InfeasibleError, LayoutError
from planner.ordering import (
    Limits,
    Ordered,
    Task,
    by_family,
    by_solver,
    refuse_if_too_small,
    refuse_solver,
)
from planner.pipeline_costs import UNIT, MemoryLimits, PipelineCosts
from planner.placements import Placement, named_placement, placement_of_family, read_placement
from planner.schedule.answer import Objective, PlacementRow, ScheduleAnswer
from planner.schedule.families import get_family
from solvers.bounds import Bound
from solvers.registry import Progress

__all__ = ["MAX_ACTIONS", "PipelineCosts", "Question", "choose_placement", "schedule_costs"]

MAX_ACTIONS = 2_500_000
AUTO_PLACEMENTS = (
    ("linear", 1),
    ("interleaved", 2),
    ("vee", 2),
    ("interleaved", 3),
    ("vee", 3),
    ("interleaved", 4),
    ("vee", 4),
)
_FIRST_PASS = 0.5  # of the time limit: every placement gets the same
_SECOND_PASS = (0.65, 1.0)  # of what is left then: the most promising placement, then the next


@dataclass(frozen=True)
class Question:
    """What is to be scheduled, but for the placement; LayoutError where a number makes no sense."""

    costs: PipelineCosts
    num_ranks: int
    num_microbatches: int
    memory: MemoryLimits
    objective: Objective
    limits: Limits

    def __post_init__(self) -> None:
        _check_numbers(self.num_ranks, self.num_microbatches, 1)

    def task(self, placement: Placement) -> Task:
        """What is to be ordered with this placement, the costs being of its stages."""
        return self._task(self.costs, placement)

    def task_of_pieces(self, placement: Placement) -> Task:
        """What is to be ordered with this placement, the costs being of the ranks' pieces of the model."""
        return self._task(self.costs.chunked(self.num_ranks, placement.rank_of_stage), placement)

    def capacity_bytes(self) -> tuple[int, ...] | None:
        """What every rank may hold, shape (p,); None is no limit."""
        return self.memory.capacity_per_rank(self.costs, self.num_ranks)

    def _task(self, costs: PipelineCosts, placement: Placement) -> Task:
        _check_numbers(self.num_ranks, self.num_microbatches, len(placement.rank_of_stage) / self.num_ranks)
        problem = costs.problem(
            placement.rank_of_stage,
            self.num_microbatches,
            objective=self.objective,
            capacity_bytes=self.capacity_bytes(),
            fixed_bytes=self.memory.fixed_per_rank(self.num_ranks),
        )
        return Task(problem, placement, costs.percent_of_microbatch(self.num_microbatches))


def schedule_costs(
    costs: PipelineCosts,
    *,
    num_ranks: int,
    num_microbatches: int,
    virtual_stages: int | None = None,
    placement: str | None = None,
    memory_limit: float | Sequence[float] | None = None,
    capacity_bytes: int | Sequence[int] | None = None,
    fixed_bytes: int | Sequence[int] | None = None,
    family: str = "auto",
    objective: Objective = "span",
    solver: str = "auto",
    time_limit_s: float = 30.0,
    work_limit: float | None = None,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> ScheduleAnswer:
    """Schedule from costs alone. InfeasibleError when nothing fits the memory, or nothing was found in time.

    `placement` is linear, interleaved, vee, a comma list with the rank of every stage, or auto; by default linear for
    one stage per rank, interleaved for more. Costs are per stage. With auto they are of the p ranks' pieces of the
    model instead, and linear, interleaved and vee with up to four chunks per rank are tried under the same memory.

    `memory_limit` is in units of the largest `costs.activation_bytes`, per rank; or `capacity_bytes`, of which
    `fixed_bytes` are held all the time. With a named family the answer is that family's schedule, and its gap is
    against every schedule of these costs, its backward split or not. Bidirectional families hold every stage on two
    ranks, at the same costs, and `fixed_bytes` of both; their gap is against every schedule that lets each microbatch
    go either way, by the work of the ranks and the way of one microbatch.
    """
    limits = Limits(solver, time_limit_s, seed, work_limit, on_progress)
    memory = MemoryLimits(memory_limit, capacity_bytes, fixed_bytes)
    chooses = placement == "auto"
    question = Question(costs.sized(UNIT if chooses else 1), num_ranks, num_microbatches, memory, objective, limits)
    if virtual_stages is not None:
        _check_numbers(num_ranks, num_microbatches, virtual_stages)
    if chooses:
        if family != "auto" or virtual_stages is not None:
            raise LayoutError(
                "placement auto chooses chunks and order by itself; leave out family and virtual_stages, or compare "
                "the families"
            )
        best, rows, bound = choose_placement(question)
        return _answer(replace(best, bound=bound), question, rows)
    if family == "auto":
        default = "interleaved" if (virtual_stages or 1) > 1 else "linear"
        place = read_placement(placement or default, num_ranks, virtual_stages)
        return _answer(_solved(question.task(place), question), question)
    chosen = get_family(family)
    chunks = virtual_stages or 1
    place = placement_of_family(chosen, num_ranks, chunks)
    obstacle = chosen.supports(num_ranks, num_microbatches, chunks)
    if obstacle:
        raise LayoutError(f"family {chosen.name!r}: {obstacle}")
    if placement is not None and read_placement(placement, num_ranks, None).rank_of_stage != place.rank_of_stage:
        raise LayoutError(
            f"family {chosen.name!r} has a placement of its own, {place.name}; leave out {placement!r}, or the family"
        )
    task = question.task(place)
    bound = task.bound_of_any_backward() if chosen.num_replicas == 1 else task.bound_of_two_replicas()
    found = by_family(chosen, task, bound)
    if found.overflow is not None:
        raise InfeasibleError(_why_not_fitting(found, question.memory))
    return _answer(found, question)


def choose_placement(question: Question) -> tuple[Ordered, tuple[PlacementRow, ...], Bound]:
    """The best order over `AUTO_PLACEMENTS`, what became of each, and a bound on all that were tried.

    Every placement gets the same part of the first half of the time, then the two most promising share the rest.
    Costs are of the ranks' pieces. InfeasibleError where a microbatch fits with none.
    """
    notes: dict[tuple[str, int], str] = {}
    tasks: dict[tuple[str, int], Task] = {}
    for name, chunks in AUTO_PLACEMENTS if question.num_ranks > 1 else AUTO_PLACEMENTS[:1]:
        place = named_placement(name, question.num_ranks, chunks)
        try:
            task = question.task_of_pieces(place)
            refuse_solver(question.limits, task)
            refuse_if_too_small(task, question.memory)
        except LayoutError as error:
            if chunks == 1 and not isinstance(error, InfeasibleError):
                raise
            notes[name, chunks] = str(error)
        else:
            tasks[name, chunks] = task
    if not tasks:
        raise InfeasibleError(next(iter(notes.values())))
    limit_s = question.limits.time_limit_s
    found: dict[tuple[str, int], Ordered] = {}
    interrupted = False

    def spend(key: tuple[str, int], seconds: float) -> None:
        nonlocal interrupted
        try:
            better = by_solver(tasks[key], _within(question.limits, seconds, f"{key[0]} v{key[1]}"))
        except KeyboardInterrupt:
            if not found:
                raise
            interrupted = True
            return
        if better is not None:
            interrupted |= better.interrupted
            found[key] = _combined(found.get(key), better)

    left_s = limit_s
    for position, key in enumerate(tasks):
        if not interrupted:
            share_s = (left_s - limit_s * (1 - _FIRST_PASS)) / (len(tasks) - position)
            spend(key, share_s)
            left_s -= found[key].seconds if key in found else share_s
    if not found:
        raise InfeasibleError(_nothing_in_time(limit_s))
    best_us = min(one.objective_us for one in found.values())
    open_ones = sorted(
        (key for key, one in found.items() if one.bound.value_us < min(best_us, one.objective_us)),
        key=lambda key: found[key].objective_us,
    )
    for key, share in zip(open_ones, _SECOND_PASS, strict=False):
        if not interrupted and left_s > 0.01 * limit_s:
            before_s = found[key].seconds
            spend(key, left_s * share)
            left_s -= found[key].seconds - before_s
    best = min(found.values(), key=lambda one: one.objective_us)
    rows = tuple(_row(key, found.get(key), notes.get(key, "")) for key in (*tasks, *notes))
    rows = tuple(sorted(rows, key=lambda row: (row.objective_us is None, row.objective_us or 0)))
    bound = min((one.bound for one in found.values()), key=lambda known: known.value_us)
    for key in tasks.keys() - found.keys():
        bound = min(bound, tasks[key].bound_of_any_backward(), key=lambda known: known.value_us)
    best = replace(
        best,
        seconds=sum(one.seconds for one in found.values()),
        limited_by_time=any(one.limited_by_time for one in found.values()),
        interrupted=interrupted,
    )
    return best, rows, bound


def _solved(task: Task, question: Question) -> Ordered:
    refuse_solver(question.limits, task)
    refuse_if_too_small(task, question.memory)
    found = by_solver(task, question.limits)
    if found is None:
        raise InfeasibleError(_nothing_in_time(question.limits.time_limit_s))
    return found


def _within(limits: Limits, seconds: float, label: str) -> Limits:
    """The same limits for a part of the search, whose news are labelled."""
    tell = limits.on_progress

    def labelled(event: Progress) -> None:
        if tell is not None:
            tell(replace(event, solver=f"{label}, {event.solver}"))

    return replace(limits, time_limit_s=max(seconds, 1e-3), on_progress=labelled)


def _combined(first: Ordered | None, second: Ordered) -> Ordered:
    """The better order and the larger bound of two searches of one problem."""
    if first is None:
        return second
    better = min(first, second, key=lambda one: one.objective_us)
    return replace(
        better,
        bound=max(first.bound, second.bound, key=lambda known: known.value_us),
        seconds=first.seconds + second.seconds,
        limited_by_time=second.limited_by_time,
        interrupted=second.interrupted,
    )


def _row(key: tuple[str, int], one: Ordered | None, note: str) -> PlacementRow:
    name, chunks = key
    if one is None:
        return PlacementRow(placement=name, virtual_stages=chunks, note=note or "nothing was found in its time")
    return PlacementRow(
        placement=name,
        virtual_stages=chunks,
        objective_us=one.objective_us,
        span_us=one.span_us,
        makespan_us=one.makespan_us,
        bubble_rate_span=one.bubble_rate_span,
        bubble_rate_makespan=one.bubble_rate_makespan,
        lower_bound_us=one.bound.value_us,
        gap=one.gap,
        peak_memory=max(one.peak_bytes),
        solver=one.solver,
    )


def _why_not_fitting(found: Ordered, memory: MemoryLimits) -> str:
    capacity = found.task.problem.capacity_bytes
    if found.memory_over and capacity is not None:
        over = list(map(int.__sub__, found.peak_bytes, capacity))
        rank = over.index(max(over))
        return (
            f"no {found.family} schedule fits: {found.overflow}, {memory.described(rank, capacity[rank])}; raise the "
            "limit, or let auto make an order that holds less"
        )
    return f"no {found.family} schedule fits: {found.overflow}; raise max_in_flight, or let auto make the order"


def _nothing_in_time(time_limit_s: float) -> str:
    return f"no schedule found in {time_limit_s:g} s, and none proven impossible; raise the time limit"


def _check_numbers(num_ranks: int, num_microbatches: int, virtual_stages: float) -> None:
    if num_ranks < 1 or num_microbatches < 1 or virtual_stages < 1:
        raise LayoutError(
            f"p={num_ranks}, m={num_microbatches}, v={virtual_stages:g}: ranks, microbatches and chunks count from 1"
        )
    num_actions = round(3 * num_ranks * num_microbatches * virtual_stages)
    if num_actions > MAX_ACTIONS:
        raise LayoutError(
            f"p={num_ranks}, m={num_microbatches}, v={virtual_stages:g} make {num_actions} actions; "
            f"at most {MAX_ACTIONS} are scheduled"
        )


def _answer(found: Ordered, question: Question, comparison: tuple[PlacementRow, ...] = ()) -> ScheduleAnswer:
    return ScheduleAnswer(
        family=found.family,
        solver=found.solver,
        status="optimal" if found.gap <= 0 else "feasible",
        objective=question.objective,
        num_ranks=question.num_ranks,
        num_microbatches=question.num_microbatches,
        placement=found.task.placement.name,
        virtual_stages=found.task.placement.virtual_stages,
        rank_of_stage=found.task.placement.rank_of_stage,
        num_replicas=found.schedule.num_replicas,
        span_us=found.span_us,
        makespan_us=found.makespan_us,
        bubble_rate_span=found.bubble_rate_span,
        bubble_rate_makespan=found.bubble_rate_makespan,
        lower_bound_us=found.bound.value_us,
        lower_bound_kind=found.bound.kind,
        gap=found.gap,
        peak_memory=found.peak_bytes,
        memory_capacity=found.task.problem.capacity_bytes,
        solve_seconds=round(found.seconds, 3),
        seed=question.limits.seed,
        time_limit_s=question.limits.time_limit_s,
        work_limit=question.limits.work_limit,
        limited_by_time=found.limited_by_time and found.gap > 0,
        interrupted=found.interrupted,
        comparison=comparison,
        schedule=found.schedule.to_lines(),
    )
