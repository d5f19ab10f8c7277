"""CP-SAT for pipeline problems: interval scheduling, exact, best with a hint.

One start variable per op, in microbatch order per stage and kind (no loss, see `solvers.pipeline`); a W of 0 µs is
part of its back op. Per rank one no-overlap constraint and one cumulative constraint, whose intervals are what a
microbatch holds: M_B − M_W from F start to back op end and M_W from F start to W end; where M_W > M_B,
M_B from F start to W end and M_W − M_B from B start to W end. Where the stage recomputes, what exceeds the checkpoint
starts with R instead of F, of the part up to the back op's end first. Times and bytes are divided by their greatest
common divisors. The limit in flight is among the precedences.

Horizon. For the makespan, the incumbent's. For the span: in any schedule F(S-1, 0) lies inside the window of every
rank, since each rank has an op before it and an op after it (or is its host), so no rank starts earlier than C before
its start or ends later than C after it. Fixing that start at an upper bound of C, all ops lie between 0 and 2·C.

The lower bound of `solvers.bounds` goes into the model; the solver's own may be larger, and the answer says which.
"""

import queue
import threading
import time
from fractions import Fraction
from math import ceil, floor, lcm
from typing import Any, Protocol

from ortools.sat.python import cp_model

from solvers.backend import Event, OnProgress, infeasible
from solvers.bounds import Bound, best_bound
from solvers.cp_sat_memory import add_memory
from solvers.list_scheduling import quick_order
from solvers.pipeline import Order, PipelineProblem, PipelineSolution, SolverError, Status
from solvers.searched_ops import Key, duration_us, order_by, precedences, searched_ops, starts_us, time_unit_us

_MAX_OPS = 30_000  # above this, building the model alone takes longer than it is worth
_EXACT_OPS = 400  # above this, all workers improve the incumbent and none tries to prove by itself
_POLL_S = 0.05


_STATUS = {  # MODEL_INVALID is absent on purpose: it is a bug of ours, and raises SolverError
    cp_model.OPTIMAL: Status.OPTIMAL,  # proven
    cp_model.FEASIBLE: Status.FEASIBLE,  # a limit stopped the proof
    cp_model.INFEASIBLE: Status.INFEASIBLE,  # proven
    cp_model.UNKNOWN: Status.NO_SOLUTION,  # a limit came first, nothing is proven
}


class CpSat:
    """The backend. Needs an order to start from for its horizon: the hint, or a quick list schedule."""

    name = "cp-sat"
    is_exact = True

    def __init__(self, work_limit: float | None = None) -> None:
        """`work_limit` is CP-SAT's deterministic time, after which the answer is the same on every machine."""
        self.work_limit = work_limit

    def why_not(self, problem: PipelineProblem) -> str | None:
        """A reason for problems so large that the model would not pay."""
        if problem.num_ops > _MAX_OPS:
            return f"{problem.num_ops} ops, more than the {_MAX_OPS} this model is good for"
        return None

    def solve(
        self,
        problem: PipelineProblem,
        *,
        time_limit_s: float,
        seed: int = 0,
        hint: Order | None = None,
        on_progress: OnProgress | None = None,
        workers: int = 2,
        bound: Bound | None = None,
    ) -> PipelineSolution:
        """Search until proven, or out of time, or Ctrl-C: then the best so far, at least as good as the hint."""
        began = time.monotonic()
        if not problem.is_feasible():
            return infeasible(self.name, seed, time.monotonic() - began)
        if bound is None:
            bound = best_bound(problem)
        best = quick_order(problem, hint)
        best_score = problem.evaluate(best)
        interrupted = False
        left_work = self.work_limit
        limited_by_time = False
        for grain in _grains_us(problem):
            left_s = time_limit_s - (time.monotonic() - began)
            if bound.value_us >= best_score.objective_us or interrupted or (left_work is not None and left_work <= 0):
                break
            if left_s <= 0:
                limited_by_time = True
                break
            model = _Model(problem, best, grain, best_score.objective_us, bound)
            run = run_model(model, max(0.1, left_s), seed, workers, on_progress, began, left_work)
            interrupted = run.interrupted
            if left_work is not None:
                left_work -= run.work
            limited_by_time = run.status is not Status.OPTIMAL and (left_work is None or left_work > 0.01)
            if run.status is Status.INFEASIBLE:
                raise SolverError("CP-SAT finds no order at all, but the hint is one")
            if not run.status.has_solution:
                break
            order = model.order(run.solver)
            score = problem.evaluate(order)
            claimed_us = model.cost_us(run.solver.objective_value)
            if not score.fits or score.objective_us > claimed_us:
                raise SolverError(
                    f"CP-SAT's order scores {score.objective_us} µs and {score.peak_bytes} bytes, its model says "
                    f"{claimed_us} µs within {problem.capacity_bytes} bytes and {problem.max_in_flight} in flight"
                )
            if score.objective_us < best_score.objective_us:
                best, best_score = order, score
            proven_us = min(model.least_us(run.solver.best_objective_bound), best_score.objective_us)
            if proven_us > bound.value_us:
                bound = Bound(proven_us, self.name)
            if run.status is not Status.OPTIMAL:
                break
        proven = bound.value_us >= best_score.objective_us
        return PipelineSolution(
            status=Status.OPTIMAL if proven else Status.FEASIBLE,
            order=best,
            score=best_score,
            lower_bound_us=bound.value_us,
            lower_bound_kind=bound.kind,
            solver=self.name,
            seconds=time.monotonic() - began,
            seed=seed,
            interrupted=interrupted,
            limited_by_time=limited_by_time and not proven and not interrupted,
        )


def _grains_us(problem: PipelineProblem) -> list[Fraction]:
    """The grids, in µs, on which starts are searched, coarse to fine; the last one loses nothing.

    All longest paths are multiples of the times' greatest common divisor g, so for the makespan that grid is exact.
    A least span is the mean of up to p such paths (see `TimingGraph.least_span`), rounded up to whole µs: a multiple
    of g / k with k ≤ p, which a grid of g / lcm(1..p) contains. Coarse grids are far quicker to search, so
    both are used, one after the other, unless whole µs are no finer.
    """
    unit = time_unit_us(problem)
    if problem.objective == "makespan" or problem.num_ranks == 1 or unit == 1:
        return [Fraction(unit)]
    return [Fraction(unit), max(Fraction(1), Fraction(unit, lcm(*range(1, problem.num_ranks + 1))))]


class _Model:
    """The CP model of a problem, and the way back."""

    def __init__(self, problem: PipelineProblem, hint: Order, grain_us: Fraction, upper_us: int, bound: Bound) -> None:
        self.problem = problem
        self.improves_only = problem.num_ops > _EXACT_OPS
        self._grain_us = grain_us
        num_stages, m = problem.num_stages, problem.num_microbatches
        span = problem.objective == "span"
        upper = ceil(upper_us / grain_us)
        horizon = 2 * upper if span else upper
        model = self.model = cp_model.CpModel()

        intervals: list[list[Any]] = [[] for _ in range(problem.num_ranks)]
        starts = self._starts = dict[Key, Any]()
        length = {key: int(duration_us(problem, key) / grain_us) for key in searched_ops(problem)}
        for key, duration in length.items():
            start = starts[key] = model.new_int_var(0, horizon - duration, "")
            interval = model.new_fixed_size_interval_var(start, duration, "")
            intervals[problem.rank_of_stage[key[1]]].append(interval)
        for before, after, delay_us in precedences(problem):
            model.add(starts[after] >= starts[before] + (length[before] + int(delay_us / grain_us)))
        for row in intervals:
            model.add_no_overlap(row)
        for rank in range(problem.num_ranks):
            add_memory(model, problem, rank, starts, length, horizon)

        cost = self._cost = model.new_int_var(floor(bound.value_us / grain_us), upper, "cost")
        for stages in problem.stages_of_rank:
            begin = starts["F", stages[0], 0] if span else 0
            for s in stages:
                last = ("W" if problem.has_weight_op[s] else "B", s, m - 1)
                model.add(cost >= starts[last] + length[last] - begin)
        model.minimize(cost)

        hints = {key: start / grain_us for key, start in starts_us(problem, hint).items()}
        shift = 0
        if span:
            model.add(starts["F", num_stages - 1, 0] == upper)
            shift = upper - floor(hints["F", num_stages - 1, 0])
        for key, start in starts.items():
            model.add_hint(start, floor(hints[key]) + shift)
        model.add_hint(cost, upper)

    def cost_us(self, value: float) -> int:
        """What an answer with this objective value costs at most."""
        return ceil(round(value) * self._grain_us)

    def least_us(self, value: float) -> int:
        """What every order costs at least if none on the grid is below this objective value.

        An order between two points of a coarse grid would cost a multiple of (the unit of all times) / k, k ≤ p.
        """
        if self.problem.objective == "makespan" or self._grain_us <= 1:
            return self.cost_us(value)
        if self._grain_us < time_unit_us(self.problem):
            return self.cost_us(value)
        return ceil((round(value) - 1 + Fraction(1, self.problem.num_ranks)) * self._grain_us)

    def order(self, solver: Any) -> Order:
        """The order of the solver's answer."""
        return order_by(self.problem, lambda key: solver.value(self._starts[key]))


class SearchModel(Protocol):
    """A model that `run_model` can solve."""

    model: Any  # cp_model.CpModel
    improves_only: bool  # too large to prove anything: all workers improve the incumbent

    def cost_us(self, value: float) -> int:
        """What an answer with this objective value costs at most."""

    def least_us(self, value: float) -> int:
        """What every order costs at least if the solver's bound is this."""


class Run:
    """What a run of the solver left behind."""

    def __init__(self, solver: Any, status: Status, interrupted: bool) -> None:
        self.solver = solver
        self.status = status
        self.interrupted = interrupted
        self.work = float(solver.deterministic_time)


def run_model(
    model: SearchModel,
    time_limit_s: float,
    seed: int,
    workers: int,
    on_progress: OnProgress | None,
    began: float,
    work_limit: float | None = None,
) -> Run:
    """Solve in a thread of its own, so that Ctrl-C and progress are dealt with at once, in this one."""
    news: queue.SimpleQueue[Event] = queue.SimpleQueue()

    class Callback(cp_model.CpSolverSolutionCallback):
        def on_solution_callback(self) -> None:  # what the base class calls
            value, lower = model.cost_us(self.objective_value), model.least_us(self.best_objective_bound)
            news.put(Event(CpSat.name, time.monotonic() - began, value, lower))

    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    if work_limit is not None:
        solver.parameters.max_deterministic_time = work_limit
    solver.parameters.random_seed = seed & 0x7FFFFFFF
    solver.parameters.num_workers = workers
    solver.parameters.catch_sigint_signal = False
    solver.parameters.interleave_search = True  # the same seed gives the same answer, whatever the threads do
    if model.improves_only:
        solver.parameters.use_lns_only = True
        solver.parameters.linearization_level = 0
        solver.parameters.cp_model_probing_level = 0
        solver.parameters.symmetry_level = 0
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put(solver.solve(model.model, Callback()))
        except BaseException as error:  # handed to the caller's thread below
            outcome.put(error)

    thread = threading.Thread(target=work, name="cp-sat", daemon=True)
    thread.start()
    result, interrupted = None, False
    try:
        while result is None:  # not Thread.join: Ctrl-C inside it makes a running thread look ended on Python 3.11
            try:
                while not news.empty():
                    event = news.get()
                    if on_progress is not None:
                        on_progress(event)
                result = outcome.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            except KeyboardInterrupt:
                interrupted = True
                solver.stop_search()
    finally:
        solver.stop_search()
        if result is None:  # an error of the progress display is on its way out
            outcome.get()
        thread.join()
    if isinstance(result, BaseException):
        raise result
    if result not in _STATUS:
        raise SolverError(f"CP-SAT calls the model {solver.status_name(result)}: {model.model.validate()}")
    return Run(solver, _STATUS[result], interrupted)
