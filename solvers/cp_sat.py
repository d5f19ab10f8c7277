"""CP-SAT for pipeline problems: interval scheduling, exact, best with a hint.

One start variable per op, in microbatch order per stage and kind (no loss, see `solvers.pipeline`); a W of 0 µs is
part of its back op. Per rank one no-overlap constraint and one cumulative constraint, whose intervals are what a
microbatch holds: M_B − M_W from F start to back op end and M_W from F start to W end; where M_W > M_B,
M_B from F start to W end and M_W − M_B from B start to W end. Times and bytes are divided by their greatest
common divisors.

Horizon. For the makespan, the incumbent's. For the span: in any schedule F(S-1, 0) lies inside the window of every
rank, since each rank has an op before it and an op after it (or is its host), so no rank starts earlier than C before its
start or ends later than C after it. Fixing that start at an upper bound of C, all ops lie between 0 and twice that.

The lower bound of `solvers.bounds` goes into the model; the solver's own may be larger, and the answer says which counts.
"""

import queue
import threading
import time
from math import gcd
from typing import Any

from solvers.backend import Event, OnProgress, infeasible
from solvers.bounds import Bound, best_bound
from solvers.list_scheduling import ListScheduling
from solvers.pipeline import Op, Order, PipelineProblem, PipelineSolution, SolverError, Status

_MAX_OPS = 30_000  # above this, building the model alone takes longer than it is worth
_POLL_S = 0.05


class CpSat:
    """The backend. Needs an order to start from for its horizon: the hint, or a quick list schedule."""

    name = "cp-sat"
    is_exact = True

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
        if hint is None or not problem.evaluate(hint).fits:
            quick = ListScheduling(max_rules=1).solve(problem, time_limit_s=time_limit_s, seed=seed, bound=bound)
            hint = quick.order
        assert hint is not None
        hint = problem.canonical(hint)
        model = _Model(problem, hint, bound)
        run = _run(model, max(0.1, time_limit_s - (time.monotonic() - began)), seed, workers, on_progress, began)

        best, best_score = hint, problem.evaluate(hint)
        if run.status.has_solution:
            order = model.order(run.solver)
            score = problem.evaluate(order)
            if not score.fits or score.objective_us > model.value_us(run.solver.objective_value):
                raise SolverError(
                    f"CP-SAT's order scores {score.objective_us} µs and {score.peak_bytes} bytes, its model says "
                    f"{model.value_us(run.solver.objective_value)} µs within {problem.capacity_bytes} bytes"
                )
            if score.objective_us < best_score.objective_us:
                best, best_score = order, score
        elif run.status is Status.INFEASIBLE:
            raise SolverError("CP-SAT finds no order at all, but the hint is one")
        if run.status.has_solution and model.value_us(run.solver.best_objective_bound) > bound.value_us:
            bound = Bound(min(best_score.objective_us, model.value_us(run.solver.best_objective_bound)), self.name)
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
            interrupted=run.interrupted,
            limited_by_time=not proven and not run.interrupted,
        )


class _Model:
    """The CP model of a problem, and the way back."""

    def __init__(self, problem: PipelineProblem, hint: Order, bound: Bound) -> None:
        from ortools.sat.python import cp_model

        self.problem = problem
        score = problem.evaluate(hint)
        num_stages, m = problem.num_stages, problem.num_microbatches
        times = (*problem.forward_us, *problem.back_us, *problem.weight_us, *problem.transfer_us)
        unit = self._unit_us = gcd(*times)
        forward = [t // unit for t in problem.forward_us]
        back = [t // unit for t in problem.back_us]
        weight = [t // unit for t in problem.weight_us]
        transfer = [t // unit for t in problem.transfer_us]
        upper = score.objective_us // unit
        span = problem.objective == "span"
        horizon = 2 * upper if span else upper
        model = self.model = cp_model.CpModel()

        starts: dict[tuple[str, int, int], Any] = {}
        intervals: list[list[Any]] = [[] for _ in range(problem.num_ranks)]
        durations = {"F": forward, "B": back, "W": weight}
        for kind, duration in durations.items():
            for s in range(num_stages):
                if kind == "W" and not problem.has_weight_op[s]:
                    continue
                for j in range(m):
                    start = model.new_int_var(0, horizon - duration[s], "")
                    starts[kind, s, j] = start
                    intervals[problem.rank_of_stage[s]].append(
                        model.new_fixed_size_interval_var(start, duration[s], "")
                    )
                    if j:
                        model.add(start >= starts[kind, s, j - 1] + duration[s])
        self._starts = starts
        for s in range(num_stages):
            for j in range(m):
                if s:
                    model.add(starts["F", s, j] >= starts["F", s - 1, j] + (forward[s - 1] + transfer[s - 1]))
                    model.add(starts["B", s - 1, j] >= starts["B", s, j] + (back[s] + transfer[s - 1]))
                if s == num_stages - 1:
                    model.add(starts["B", s, j] >= starts["F", s, j] + forward[s])
                if problem.has_weight_op[s]:
                    model.add(starts["W", s, j] >= starts["B", s, j] + back[s])
        for row in intervals:
            model.add_no_overlap(row)
        if problem.capacity_bytes is not None:
            for rank in range(problem.num_ranks):
                self._add_memory(rank, forward, back, weight, horizon)

        cost = self._cost = model.new_int_var(-(-bound.value_us // unit), upper, "cost")
        for stages in problem.stages_of_rank:
            begin = starts["F", stages[0], 0] if span else 0
            for s in stages:
                end = starts["W", s, m - 1] + weight[s] if problem.has_weight_op[s] else starts["B", s, m - 1] + back[s]
                model.add(cost >= end - begin)
        model.minimize(cost)

        hints = {
            (op.kind if op.kind != "BW" else "B", op.stage, op.microbatch): start
            for ops, row in zip(hint, score.starts_us, strict=True)
            for op, start in zip(ops, row, strict=True)
        }
        shift = 0
        if span:
            model.add(starts["F", num_stages - 1, 0] == upper)
            shift = upper * unit - hints["F", num_stages - 1, 0]
        for key, start in starts.items():
            model.add_hint(start, (hints[key] + shift) // unit)
        model.add_hint(cost, upper)

    def _add_memory(self, rank: int, forward: list[int], back: list[int], weight: list[int], horizon: int) -> None:
        problem, model, starts = self.problem, self.model, self._starts
        assert problem.capacity_bytes is not None
        capacity = problem.capacity_bytes[rank]
        held: list[tuple[Any, Any, int]] = []
        for s in problem.stages_of_rank[rank]:
            taken, kept, extra = problem.activation_bytes[s], problem.kept_bytes[s], problem.extra_bytes[s]
            for j in range(problem.num_microbatches):
                start = starts["F", s, j]
                back_end = starts["B", s, j] + back[s]
                if problem.has_weight_op[s]:
                    weight_end = starts["W", s, j] + weight[s]
                    held.append((start, back_end, max(0, taken - kept)))
                    held.append((start, weight_end, min(taken, kept)))
                    held.append((starts["B", s, j], weight_end, extra))
                else:
                    held.append((start, back_end, taken))
                    held.append((starts["B", s, j], back_end, extra))
        held = [(start, end, size) for start, end, size in held if size]
        if sum(size for _, _, size in held) <= capacity:
            return
        unit = gcd(*(size for _, _, size in held))
        rows = []
        for start, end, _ in held:
            length = model.new_int_var(0, horizon, "")
            rows.append(model.new_interval_var(start, length, end, ""))
        model.add_cumulative(rows, [size // unit for _, _, size in held], capacity // unit)

    def value_us(self, value: float) -> int:
        """An objective value of the model in µs."""
        return round(value) * self._unit_us

    def order(self, solver: Any) -> Order:
        """The order of the solver's answer."""
        problem = self.problem
        ranks: list[list[tuple[int, list[Op]]]] = [[] for _ in range(problem.num_ranks)]
        for (kind, s, j), start in self._starts.items():
            if kind == "B" and not problem.split[s]:
                ops = [Op("BW", s, j)]
            elif kind == "B" and not problem.has_weight_op[s]:
                ops = [Op("B", s, j), Op("W", s, j)]
            else:
                ops = [Op(kind, s, j)]
            ranks[problem.rank_of_stage[s]].append((solver.value(start), ops))
        return tuple(
            tuple(op for _, ops in sorted(row, key=lambda entry: entry[0]) for op in ops) for row in ranks
        )


class _Run:
    """What a run of the solver left behind."""

    def __init__(self, solver: Any, status: Status, interrupted: bool) -> None:
        self.solver = solver
        self.status = status
        self.interrupted = interrupted


def _run(
    model: _Model, time_limit_s: float, seed: int, workers: int, on_progress: OnProgress | None, began: float
) -> _Run:
    """Solve in a thread of its own, so that Ctrl-C and progress are dealt with at once, in this one."""
    from ortools.sat.python import cp_model

    status_of = {  # MODEL_INVALID is absent on purpose: it is a bug of ours, and raises SolverError
        cp_model.OPTIMAL: Status.OPTIMAL,  # proven
        cp_model.FEASIBLE: Status.FEASIBLE,  # a limit stopped the proof
        cp_model.INFEASIBLE: Status.INFEASIBLE,  # proven
        cp_model.UNKNOWN: Status.NO_SOLUTION,  # a limit came first, nothing is proven
    }

    news: queue.SimpleQueue[Event] = queue.SimpleQueue()

    class Callback(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]  # ortools ships no types
        def on_solution_callback(self) -> None:
            value, lower = model.value_us(self.objective_value), model.value_us(self.best_objective_bound)
            news.put(Event(CpSat.name, time.monotonic() - began, value, lower))

    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.random_seed = seed & 0x7FFFFFFF
    solver.parameters.num_workers = workers
    solver.parameters.catch_sigint_signal = False
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(solver.solve(model.model, Callback()))
        except BaseException as error:  # handed to the caller's thread below
            outcome.append(error)

    thread = threading.Thread(target=work, name="cp-sat", daemon=True)
    thread.start()
    interrupted = False
    while thread.is_alive():
        try:
            thread.join(_POLL_S)
            while on_progress is not None and not news.empty():
                on_progress(news.get())
        except KeyboardInterrupt:
            interrupted = True
            solver.stop_search()
    (result,) = outcome
    if isinstance(result, BaseException):
        raise result
    if result not in status_of:
        raise SolverError(f"CP-SAT calls the model {solver.status_name(result)}: {model.model.validate()}")
    return _Run(solver, status_of[result], interrupted)
