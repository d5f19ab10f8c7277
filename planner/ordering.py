"""An order for stages that have a place: from a schedule family, or from a solver, scored and with a bound.

Families are scored by `planner.schedule.simulation`, solvers' orders by the problem itself; the two share no code.
Where microbatches differ, the problem scores both.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from planner.errors import InfeasibleError, LayoutError
from planner.pipeline_costs import MemoryLimits
from planner.placements import Placement
from planner.problems import adapted, of_any_backward, order_of
from planner.schedule.actions import Schedule
from planner.schedule.families import FAMILIES, Family
from planner.schedule.simulation import StageTimes, simulate
from solvers.bounds import Bound, best_bound
from solvers.pipeline import PipelineProblem, PipelineSolution
from solvers.registry import BACKENDS, Progress, get_backend, solve_pipeline
from solvers.varied import VariedProblem, lower_bound, solve_varied

_LEAST_SHARE = 0.25  # of the time limit that solvers get, however long the families took


@dataclass(frozen=True)
class Limits:
    """How long, with what, and from which seed to search."""

    solver: str = "auto"
    time_limit_s: float = 30.0
    seed: int = 0
    work_limit: float | None = None
    on_progress: Callable[[Progress], None] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.time_limit_s) and self.time_limit_s > 0):
            raise LayoutError(f"time limit {self.time_limit_s}: give a finite number of seconds above 0")
        if self.work_limit is not None and not (math.isfinite(self.work_limit) and self.work_limit > 0):
            raise LayoutError(f"work limit {self.work_limit}: give a finite amount above 0")
        if self.solver != "auto" and self.solver not in BACKENDS:
            raise LayoutError(f"no solver is called {self.solver!r}; known: auto, {', '.join(BACKENDS)}")


@dataclass(frozen=True)
class Task:
    """Stages with costs and a place, to be ordered."""

    problem: PipelineProblem
    placement: Placement
    percent: tuple[int, ...] | None = None  # what every microbatch takes of the costs, where they differ

    @cached_property
    def varied(self) -> VariedProblem | None:
        """The problem with different microbatches, where they differ."""
        return None if self.percent is None else VariedProblem.scaled(self.problem, self.percent)

    @cached_property
    def of_any_backward(self) -> "Task":
        """See `planner.problems.of_any_backward`."""
        return replace(self, problem=of_any_backward(self.problem))

    @property
    def fused(self) -> "Task":
        """The same with every backward in one piece."""
        return replace(self, problem=replace(self.problem, split=(False,) * self.problem.num_stages))

    @property
    def work_us(self) -> int:
        """What the busiest rank computes."""
        return max(self.problem.work_us if self.varied is None else self.varied.work_us)

    def bound(self) -> Bound:
        """The best lower bound that is known without a search."""
        return best_bound(self.problem) if self.varied is None else lower_bound(self.varied)

    def bound_of_any_backward(self) -> Bound:
        """A lower bound on every schedule of these costs, its backward split or not."""
        return self.of_any_backward.bound()

    def bound_of_two_replicas(self) -> Bound:
        """A lower bound on every schedule in which each microbatch takes this placement or its mirror.

        Of the span, and so of the makespan. Work: where a of the m microbatches take the placement, rank r computes
        a · w_r + (m − a) · w_(p − 1 − r). Over
        all ranks the largest of these is convex in a and the same for a and m − a, so m / 2 is its least. Chain: the
        rank that runs F of a microbatch's stage 0 runs its backward and W, too, and between lie its forwards and
        backwards on all stages, and the transfers.
        """
        problem = self.problem
        m, p = problem.num_microbatches, problem.num_ranks
        ours = [
            sum(
                problem.forward_us[s] + problem.backward_us[s] + problem.weight_us[s] + problem.rerun_us[s]
                for s in mine
            )
            for mine in ([s for s, home in enumerate(problem.rank_of_stage) if home == rank] for rank in range(p))
        ]
        work_us = max(m // 2 * own + (m - m // 2) * mirrored for own, mirrored in zip(ours, ours[::-1], strict=True))
        chain_us = (
            sum(problem.forward_us) + sum(problem.backward_us) + problem.weight_us[0] + 2 * sum(problem.transfer_us)
        )
        return max(
            Bound(work_us, "work of two replicas"),
            Bound(chain_us, "chain of one microbatch"),
            key=lambda known: known.value_us,
        )


@dataclass(frozen=True)
class Ordered:
    """One order for one task, and its price."""

    family: str  # or "auto"
    solver: str
    task: Task
    schedule: Schedule
    work_us: int  # what the busiest rank computes
    span_us: int
    makespan_us: int
    peak_bytes: tuple[int, ...]  # shape (p,), what is fixed included
    overflow: str | None  # why it does not fit; None if it does
    bound: Bound
    seconds: float = 0.0
    limited_by_time: bool = False
    interrupted: bool = False

    @property
    def objective_us(self) -> int:
        """What the problem minimises."""
        return self.span_us if self.task.problem.objective == "span" else self.makespan_us

    @property
    def bubble_rate_span(self) -> float:
        """(span − work) / span, work being the busiest rank's."""
        return self._rate(self.span_us)

    @property
    def bubble_rate_makespan(self) -> float:
        """(makespan − work) / makespan."""
        return self._rate(self.makespan_us)

    @property
    def gap(self) -> float:
        """(objective − bound) / objective."""
        return (self.objective_us - self.bound.value_us) / self.objective_us

    @property
    def memory_over(self) -> int:
        """By how many bytes the worst rank is over its capacity; 0 if none is."""
        capacity = self.task.problem.capacity_bytes
        return 0 if capacity is None else max(0, *map(int.__sub__, self.peak_bytes, capacity))

    def _rate(self, cost_us: int) -> float:
        return (cost_us - self.work_us) / cost_us


def by_family(family: Family, task: Task, bound: Bound, *, splits: bool = False) -> Ordered:
    """The family's schedule for this task, whether it fits or not; `splits` as in `adapted`.

    LayoutError where the family has no schedule for these numbers.
    """
    problem, chunks = task.problem, task.placement.virtual_stages
    obstacle = family.supports(problem.num_ranks, problem.num_microbatches, chunks)
    if obstacle:
        raise LayoutError(f"family {family.name!r}: {obstacle}")
    schedule = family.generate(problem.num_ranks, problem.num_microbatches, chunks)
    if task.percent is not None and family.num_replicas > 1:
        raise LayoutError(
            f"family {family.name!r} holds every stage on two ranks, and such schedules are timed for microbatches "
            "that are all alike; leave out microbatch_scale, or the family"
        )
    if task.percent is not None:
        fused = not (family.splits_backward or splits)
        return _by_family_of_different_microbatches(family, schedule, task.fused if fused else task, bound)
    schedule = adapted(schedule, problem, splits=splits)
    timeline = simulate(schedule, stage_times(problem))
    fixed = problem.fixed_bytes or (0,) * problem.num_ranks
    if family.num_replicas > 1:  # the rank's own stage, and the one of the mirrored rank
        fixed = tuple(map(int.__add__, fixed, fixed[::-1]))
    peak_bytes = tuple(map(int.__add__, timeline.peak_activation_bytes, fixed))
    return Ordered(
        family=family.name,
        solver="family",
        task=task,
        schedule=schedule,
        work_us=round(timeline.work_us),
        span_us=math.ceil(timeline.span_us - 1e-6),  # whole starts make whole spans; a mean of several may be between
        makespan_us=round(timeline.makespan_us),
        peak_bytes=peak_bytes,
        overflow=_overflow(problem, peak_bytes) or _too_many_in_flight(problem, schedule),
        bound=bound,
    )


def _by_family_of_different_microbatches(family: Family, schedule: Schedule, task: Task, bound: Bound) -> Ordered:
    """Scored by the problem itself, so a BW is run as B and W where the stage splits; microbatches in their order."""
    assert task.varied is not None
    problem = task.problem
    schedule = adapted(schedule, problem, splits=True)
    score = task.varied.evaluate(order_of(schedule))
    return Ordered(
        family=family.name,
        solver="family",
        task=task,
        schedule=schedule,
        work_us=task.work_us,
        span_us=score.span_us,
        makespan_us=score.makespan_us,
        peak_bytes=score.peak_bytes,
        overflow=_overflow(problem, score.peak_bytes) or _too_many_in_flight(problem, schedule),
        bound=bound,
    )


def by_solver(task: Task, limits: Limits) -> Ordered | None:
    """The best order found within the limits; None where the limits came before any. The task must be feasible.

    With the solver auto the fixed families are candidates, too: no answer is worse than one of them that fits.
    """
    began = time.monotonic()
    family = _best_family(task) if limits.solver == "auto" else None
    if family is not None and family.gap <= 0:
        return replace(family, seconds=time.monotonic() - began)
    left_s = max(limits.time_limit_s * _LEAST_SHARE, limits.time_limit_s - (time.monotonic() - began))
    solution = _solve(task, replace(limits, time_limit_s=left_s), family)
    found = _best_of(family, solution, task)
    if found is None:
        return None
    return replace(
        found,
        bound=Bound(solution.lower_bound_us, solution.lower_bound_kind),
        seconds=time.monotonic() - began,
        limited_by_time=solution.limited_by_time,
        interrupted=solution.interrupted,
    )


def _solve(task: Task, limits: Limits, start: Ordered | None) -> PipelineSolution:
    if task.varied is not None:
        return solve_varied(
            task.varied, time_limit_s=limits.time_limit_s, seed=limits.seed, on_progress=limits.on_progress
        )
    return solve_pipeline(
        task.problem,
        solver=limits.solver,
        time_limit_s=limits.time_limit_s,
        work_limit=limits.work_limit,
        seed=limits.seed,
        hint=None if start is None else order_of(start.schedule),
        on_progress=limits.on_progress,
    )


def _best_of(family: Ordered | None, solution: PipelineSolution, task: Task) -> Ordered | None:
    """The better of a family's order and a solver's, where there are any."""
    score = solution.score
    if solution.order is None or score is None:
        return family
    if family is not None and family.objective_us <= score.objective_us:
        return family
    return Ordered(
        family="auto",
        solver=solution.solver,
        task=task,
        schedule=Schedule.from_orders(solution.order),
        work_us=task.work_us,
        span_us=score.span_us,
        makespan_us=score.makespan_us,
        peak_bytes=score.peak_bytes,
        overflow=None,
        bound=Bound(solution.lower_bound_us, solution.lower_bound_kind),
    )


def refuse_if_too_small(task: Task, memory: MemoryLimits) -> None:
    """InfeasibleError where a single microbatch is more than some rank may hold."""
    capacity = task.problem.capacity_bytes
    if capacity is None:
        return
    alone = (task.problem,) if task.varied is None else task.varied.alone
    for microbatch, problem in enumerate(alone):
        over = list(map(int.__sub__, problem.single_microbatch_bytes(), capacity))
        rank = over.index(max(over))
        if over[rank] > 0:
            which = "a single microbatch" if task.varied is None else f"microbatch {microbatch} alone"
            raise InfeasibleError(
                f"no schedule exists: rank {rank} holds {capacity[rank] + over[rank]} with {which}, and "
                f"{memory.described(rank, capacity[rank])}; raise the limit"
            )


def refuse_solver(limits: Limits, task: Task) -> None:
    """LayoutError where the solver that is asked for does not take this problem."""
    if task.percent is not None and (limits.solver != "auto" or limits.work_limit is not None):
        raise LayoutError("microbatch_scale goes with the solver auto and a time limit; leave out the others")
    if limits.solver == "auto":
        return
    try:
        obstacle = get_backend(limits.solver, limits.work_limit).why_not(task.problem)
    except ValueError as error:
        raise LayoutError(str(error)) from None
    if obstacle is not None:
        raise LayoutError(f"solver {limits.solver!r} does not take this problem: {obstacle}")


def stage_times(problem: PipelineProblem) -> list[StageTimes]:
    """The problem's stages as the simulation reads them."""
    checkpoints = problem.checkpoint_bytes or (0,) * problem.num_stages
    return [
        StageTimes(
            forward_us=problem.forward_us[s],
            backward_input_us=problem.backward_us[s],
            backward_weight_us=problem.weight_us[s],
            fused_backward_us=problem.backward_us[s] + problem.weight_us[s],
            transfer_us=problem.transfer_us[s] if s + 1 < problem.num_stages else 0,
            activation_bytes=problem.activation_bytes[s],
            weight_activation_bytes=problem.weight_activation_bytes[s],
            recompute_us=problem.rerun_us[s],
            checkpoint_bytes=checkpoints[s],
        )
        for s in range(problem.num_stages)
    ]


def num_transfers(problem: PipelineProblem) -> int:
    """Tensors that go from rank to rank in one step: activations and gradients."""
    home = problem.rank_of_stage
    return 2 * problem.num_microbatches * sum(a != b for a, b in pairwise(home))


def _best_family(task: Task) -> Ordered | None:
    """The best fixed family with this placement that fits, as an order that solvers could have made."""
    best: Ordered | None = None
    bound: Bound | None = None
    p, m, home = task.problem.num_ranks, task.problem.num_microbatches, task.placement.rank_of_stage
    chunks = task.placement.virtual_stages
    for family in FAMILIES.values():
        if (
            family.name == "naive"
            or family.num_replicas > 1
            or len(home) != p * chunks
            or family.supports(p, m, chunks) is not None
        ):
            continue
        if family.placement(p, chunks) != home:
            continue
        bound = bound or task.bound_of_any_backward()
        found = by_family(family, task, bound, splits=True)
        if found.overflow is None and (best is None or found.objective_us < best.objective_us):
            best = replace(found, family="auto", solver=f"family {family.name}")
    return best


def _overflow(problem: PipelineProblem, peak_bytes: tuple[int, ...]) -> str | None:
    capacity = problem.capacity_bytes
    if capacity is None:
        return None
    over = list(map(int.__sub__, peak_bytes, capacity))
    rank = over.index(max(over))
    return None if over[rank] <= 0 else f"rank {rank} holds {peak_bytes[rank]} at its peak"


def _too_many_in_flight(problem: PipelineProblem, schedule: Schedule) -> str | None:
    if problem.max_in_flight is None:
        return None
    for rank, actions in enumerate(schedule.ranks):
        now = [0] * problem.num_stages
        for kind, stage, _ in actions:
            if kind == "F":
                now[stage] += 1
                if now[stage] > problem.max_in_flight[stage]:
                    return (
                        f"rank {rank} has more than {problem.max_in_flight[stage]} microbatches of stage {stage} in "
                        "flight"
                    )
            elif kind == "B" or kind == "BW":
                now[stage] -= 1
    return None
