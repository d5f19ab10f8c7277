"""Schedules from costs: the bridge between stages priced in float µs and integer scheduling problems.

Times are rounded to whole µs here, once per stage, F and B to at least 1; solvers see nothing else of the facts.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from planner.errors import InfeasibleError, LayoutError
from planner.plans import StageCosts
from planner.schedule.actions import Schedule
from planner.schedule.answer import Objective, ScheduleAnswer
from planner.schedule.families import FAMILIES, get_family
from solvers.bounds import best_bound
from solvers.pipeline import Op, Order, PipelineProblem, PipelineScore, Status
from solvers.registry import BACKENDS, Progress, get_backend, solve_pipeline

MAX_ACTIONS = 1_000_000
MAX_BYTES = 10**15
MAX_TIME_US = 1e12  # eleven days for one action; more is a mistake in the unit


def pipeline_problem(
    stages: Sequence[StageCosts],
    rank_of_stage: Sequence[int],
    num_microbatches: int,
    *,
    splits_backward: bool,
    capacity_bytes: Sequence[int] | None,
    objective: Objective = "makespan",
    rounding: Callable[[float], int] = round,
) -> PipelineProblem:
    """The integer scheduling problem of these stages; `capacity_bytes` is what activations may take on each rank.

    Rounded down (`math.floor`), its lower bounds hold for the unrounded times; sums are rounded after they are taken.
    """
    backward = [s.backward_input_us if splits_backward else s.fused_backward_us for s in stages]
    weight = [s.backward_weight_us if splits_backward else 0.0 for s in stages]
    return PipelineProblem(
        forward_us=tuple(max(1, rounding(s.forward_us)) for s in stages),
        backward_us=tuple(max(1, rounding(us)) for us in backward),
        weight_us=tuple(map(rounding, weight)),
        split=(splits_backward,) * len(stages),
        transfer_us=tuple(rounding(s.transfer_us) for s in stages[:-1]),
        rank_of_stage=tuple(rank_of_stage),
        num_microbatches=num_microbatches,
        activation_bytes=tuple(s.activation_bytes for s in stages),
        weight_activation_bytes=tuple(s.weight_activation_bytes for s in stages),
        capacity_bytes=None if capacity_bytes is None else tuple(capacity_bytes),
        objective=objective,
    )


def order_of(schedule: Schedule) -> Order:
    """A schedule as solvers see it."""
    return tuple(tuple(Op(str(a.kind), a.stage, a.microbatch) for a in actions) for actions in schedule.ranks)


@dataclass(frozen=True)
class PipelineCosts:
    """What `pipewright schedule` is given: µs per stage, and activation sizes in any one unit."""

    forward_us: tuple[float, ...]  # shape (p · v,) or (1,) for equal stages, likewise the next two
    backward_us: tuple[float, ...]
    weight_us: tuple[float, ...]
    p2p_us: float
    activation_bytes: int = 2
    weight_activation_bytes: int = 1

    def __post_init__(self) -> None:
        for name, least in (("forward_us", 1), ("backward_us", 1), ("weight_us", 0)):
            for value in getattr(self, name):
                if not math.isfinite(value) or not least <= value <= MAX_TIME_US:
                    raise LayoutError(f"{name}: {value} is not a time; give µs from {least} to {MAX_TIME_US:g}")
        if not math.isfinite(self.p2p_us) or not 0 <= self.p2p_us <= MAX_TIME_US:
            raise LayoutError(f"p2p_us: {self.p2p_us} is not a time; give µs from 0 to {MAX_TIME_US:g}")
        if not (0 <= self.weight_activation_bytes <= MAX_BYTES and 0 < self.activation_bytes <= MAX_BYTES):
            raise LayoutError(
                f"activation_bytes={self.activation_bytes}, weight_activation_bytes={self.weight_activation_bytes}: "
                f"the first must be 1 to {MAX_BYTES}, the second 0 to {MAX_BYTES}"
            )

    def stages(self, rank_of_stage: Sequence[int]) -> tuple[StageCosts, ...]:
        """One `StageCosts` per stage, in whole µs; LayoutError when a list has neither 1 nor S entries."""
        num_stages = len(rank_of_stage)
        columns = []
        for name in ("forward_us", "backward_us", "weight_us"):
            values = getattr(self, name)
            if len(values) not in (1, num_stages):
                raise LayoutError(
                    f"{name} has {len(values)} entries; give one number, or one for each of the {num_stages} stages"
                )
            whole = tuple(float(round(value)) for value in values)
            columns.append(whole * num_stages if len(whole) == 1 else whole)
        forward, backward, weight = columns
        return tuple(
            StageCosts(
                forward_us=forward[s],
                backward_input_us=backward[s],
                backward_weight_us=weight[s],
                fused_backward_us=backward[s] + weight[s],
                optimizer_us=0.0,
                parameter_bytes=0,
                activation_bytes=self.activation_bytes,
                weight_activation_bytes=self.weight_activation_bytes,
                output_bytes=0,
                temporary_bytes=0,
                transfer_us=(self.p2p_us if s + 1 < num_stages and rank_of_stage[s] != rank_of_stage[s + 1] else 0.0),
            )
            for s in range(num_stages)
        )


def schedule_costs(
    costs: PipelineCosts,
    *,
    num_ranks: int,
    num_microbatches: int,
    virtual_stages: int = 1,
    memory_limit: float | None = None,
    family: str = "auto",
    objective: Objective = "span",
    solver: str = "auto",
    time_limit_s: float = 30.0,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> ScheduleAnswer:
    """Schedule from costs alone. InfeasibleError when nothing fits the memory, or nothing was found in time.

    `memory_limit` is in units of `costs.activation_bytes`, per rank. With a named family the answer is that family's
    schedule, and its gap is against every schedule of these costs, its backward split or not.
    """
    chosen = None if family == "auto" else get_family(family)
    placement_family = chosen or FAMILIES["interleaved-1f1b" if virtual_stages > 1 else "1f1b"]
    _check_question(num_ranks, num_microbatches, virtual_stages, memory_limit, time_limit_s)
    rank_of_stage = placement_family.placement(num_ranks, virtual_stages)
    stages = costs.stages(rank_of_stage)
    capacity = None if memory_limit is None else [math.floor(memory_limit * costs.activation_bytes)] * num_ranks
    problem = pipeline_problem(
        stages,
        rank_of_stage,
        num_microbatches,
        splits_backward=True,
        capacity_bytes=capacity,
        objective=objective,
    )
    if chosen is None:
        _check_solver(solver, problem)
        solution = solve_pipeline(problem, solver=solver, time_limit_s=time_limit_s, seed=seed, on_progress=on_progress)
        if solution.order is None or solution.score is None:
            raise InfeasibleError(_why_nothing(solution.status, costs, memory_limit, time_limit_s))
        return _answer(
            "auto",
            solution.solver,
            solution.status,
            objective,
            solution.score,
            solution.lower_bound_us,
            solution.lower_bound_kind,
            solution.seconds,
            solution.order,
            seed=seed,
            time_limit_s=time_limit_s,
            limited_by_time=solution.limited_by_time,
            interrupted=solution.interrupted,
        )
    obstacle = chosen.supports(num_ranks, num_microbatches, virtual_stages)
    if obstacle:
        raise LayoutError(f"family {chosen.name!r}: {obstacle}")
    order = order_of(chosen.generate(num_ranks, num_microbatches, virtual_stages))
    own = (
        problem
        if chosen.splits_backward
        else pipeline_problem(
            stages, rank_of_stage, num_microbatches, splits_backward=False, capacity_bytes=capacity, objective=objective
        )
    )
    score = own.evaluate(order)
    if not score.fits:
        worst = max(range(num_ranks), key=lambda rank: score.peak_bytes[rank])
        raise InfeasibleError(
            f"no {chosen.name} schedule fits: rank {worst} holds {score.peak_bytes[worst]} at its peak, the memory "
            f"limit of {memory_limit or 0:g} microbatches is {capacity[worst] if capacity else 0}; raise the "
            "limit, or let auto make an order that holds less"
        )
    bound = min(best_bound(problem), best_bound(own), key=lambda known: known.value_us)
    status = Status.OPTIMAL if bound.value_us >= score.objective_us else Status.FEASIBLE
    return _answer(
        chosen.name,
        "family",
        status,
        objective,
        score,
        bound.value_us,
        bound.kind,
        0.0,
        order,
        seed=seed,
        time_limit_s=time_limit_s,
        limited_by_time=False,
        interrupted=False,
    )


def _why_nothing(status: Status, costs: PipelineCosts, memory_limit: float | None, time_limit_s: float) -> str:
    if status is Status.INFEASIBLE:
        most = max(costs.activation_bytes, costs.weight_activation_bytes)
        return (
            f"no schedule exists: a stage holds {most} of a single microbatch, more than the memory limit of "
            f"{memory_limit or 0:g} × {costs.activation_bytes} per rank allows; raise the limit"
        )
    return f"no schedule found in {time_limit_s:g} s, and none proven impossible; raise the time limit"


def _check_question(
    num_ranks: int, num_microbatches: int, virtual_stages: int, memory_limit: float | None, time_limit_s: float
) -> None:
    if num_ranks < 1 or num_microbatches < 1 or virtual_stages < 1:
        raise LayoutError(
            f"p={num_ranks}, m={num_microbatches}, v={virtual_stages}: ranks, microbatches and chunks count from 1"
        )
    num_actions = 3 * num_ranks * num_microbatches * virtual_stages
    if num_actions > MAX_ACTIONS:
        raise LayoutError(
            f"p={num_ranks}, m={num_microbatches}, v={virtual_stages} make {num_actions} actions; "
            f"at most {MAX_ACTIONS} are scheduled"
        )
    if memory_limit is not None and not 0 < memory_limit <= MAX_ACTIONS:
        raise LayoutError(f"memory limit {memory_limit}: give a number of microbatches above 0, at most {MAX_ACTIONS}")
    if not (math.isfinite(time_limit_s) and time_limit_s > 0):
        raise LayoutError(f"time limit {time_limit_s}: give a finite number of seconds above 0")


def _check_solver(solver: str, problem: PipelineProblem) -> None:
    if solver == "auto":
        return
    if solver not in BACKENDS:
        raise LayoutError(f"no solver is called {solver!r}; known: auto, {', '.join(BACKENDS)}")
    obstacle = get_backend(solver).why_not(problem)
    if obstacle is not None:
        raise LayoutError(f"solver {solver!r} does not take this problem: {obstacle}")


def _answer(
    family: str,
    solver: str,
    status: Status,
    objective: Objective,
    score: PipelineScore,
    bound_us: int,
    bound_kind: str,
    seconds: float,
    order: Iterable[Iterable[tuple[str, int, int]]],
    *,
    seed: int,
    time_limit_s: float,
    limited_by_time: bool,
    interrupted: bool,
) -> ScheduleAnswer:
    return ScheduleAnswer(
        family=family,
        solver=solver,
        status="optimal" if status is Status.OPTIMAL else "feasible",
        objective=objective,
        span_us=score.span_us,
        makespan_us=score.makespan_us,
        bubble_rate_span=score.bubble_rate_span,
        bubble_rate_makespan=score.bubble_rate_makespan,
        lower_bound_us=bound_us,
        lower_bound_kind=bound_kind,
        gap=(score.objective_us - bound_us) / score.objective_us,
        peak_memory=tuple(score.peak_bytes),
        solve_seconds=round(seconds, 3),
        seed=seed,
        time_limit_s=time_limit_s,
        limited_by_time=limited_by_time,
        interrupted=interrupted,
        schedule=Schedule.from_orders(order).to_lines(),
    )
