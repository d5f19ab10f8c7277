"""CP-SAT for pipelines whose microbatches differ: as `solvers.cp_sat`, but no stage keeps an order of microbatches.

Per rank one no-overlap constraint, one cumulative constraint for memory, and one per stage for the limit in flight. The
span of a rank runs from a variable that is no later than any of its first chunk's F. For the same reason as there, the
span's horizon is twice an upper bound around the start of F(S-1, 0). Starts are whole µs, which loses nothing;
for the makespan, multiples of the times' greatest common divisor.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

from ortools.sat.python import cp_model

from solvers.backend import OnProgress
from solvers.bounds import Bound
from solvers.cp_sat import run_model
from solvers.cp_sat_memory import add_held
from solvers.pipeline import Op, Order, PipelineScore, SolverError, Status
from solvers.varied import VariedProblem


@dataclass(frozen=True)
class Found:
    """What a search left: an order no worse than its hint, and the larger bound."""

    order: Order
    score: PipelineScore
    bound: Bound
    interrupted: bool
    limited_by_time: bool


def improve(
    problem: VariedProblem,
    hint: Order,
    bound: Bound,
    time_limit_s: float,
    seed: int,
    workers: int,
    on_progress: OnProgress | None,
    began: float,
) -> Found:
    """Search from an order that fits until proven, or out of time, or Ctrl-C."""
    score = problem.evaluate(hint)
    model = _Model(problem, hint, score, bound)
    run = run_model(model, max(0.1, time_limit_s), seed, workers, on_progress, began)
    order = hint
    if run.status is Status.INFEASIBLE:
        raise SolverError("CP-SAT finds no order at all, but the hint is one")
    if run.status.has_solution:
        answer = model.order(run.solver)
        answer_score = problem.evaluate(answer)
        claimed_us = model.cost_us(run.solver.objective_value)
        if not answer_score.fits or answer_score.objective_us > claimed_us:
            raise SolverError(
                f"CP-SAT's order scores {answer_score.objective_us} µs and {answer_score.peak_bytes} bytes, "
                f"its model says {claimed_us} µs"
            )
        if answer_score.objective_us < score.objective_us:
            order, score = answer, answer_score
        proven_us = min(model.least_us(run.solver.best_objective_bound), score.objective_us)
        if proven_us > bound.value_us:
            bound = Bound(proven_us, "cp-sat")
    is_proven = bound.value_us >= score.objective_us
    return Found(order, score, bound, run.interrupted, not is_proven and not run.interrupted)


class _Model:
    """The CP model of a problem, and the way back."""

    def __init__(self, problem: VariedProblem, hint: Order, score: PipelineScore, bound: Bound) -> None:
        self._problem = problem
        self.improves_only = False
        base = problem.base
        ops = [op for row in hint for op in row]
        times = [problem.duration_us(op) for op in ops] + list(base.transfer_us)
        unit = self._unit_us = gcd(*times) if base.objective == "makespan" else 1
        span = base.objective == "span"
        upper = score.objective_us // unit
        horizon = 2 * upper if span else upper
        model = self.model = cp_model.CpModel()
        length = {op: problem.duration_us(op) // unit for op in ops}
        starts = self._starts = {op: model.new_int_var(0, horizon - length[op], "") for op in ops}

        kind_of_back = ["B" if split else "BW" for split in base.split]
        hop = [us // unit for us in base.transfer_us]
        for op in ops:
            kind, s, j = op
            needs: list[tuple[Op, int]] = []
            if kind == "F":
                needs = [(Op("F", s - 1, j), hop[s - 1])] if s else []
            elif kind == "W":
                needs = [(Op("B", s, j), 0)]
            elif s == base.num_stages - 1:
                needs = [(Op("F", s, j), 0)]
            else:
                needs = [(Op(kind_of_back[s + 1], s + 1, j), hop[s])]
            for needed, delay in needs:
                model.add(starts[op] >= starts[needed] + length[needed] + delay)

        cost = model.new_int_var(-(-bound.value_us // unit), upper, "cost")
        for rank, row in enumerate(hint):
            model.add_no_overlap([model.new_fixed_size_interval_var(starts[op], length[op], "") for op in row])
            self._add_memory(rank, length, horizon)
            begin: Any = model.new_int_var(0, horizon, "") if span else 0
            for op in row:
                if op.kind != "F":
                    model.add(cost >= starts[op] + length[op] - begin)
                elif span:
                    model.add(begin <= starts[op])
        for s, limit in enumerate(base.in_flight_limit):
            in_flight = []
            for j in range(base.num_microbatches):
                first, last = Op("F", s, j), Op(kind_of_back[s], s, j)
                in_flight.append((starts[first], starts[last] + length[last], 1))
            add_held(model, in_flight, limit, horizon)
        model.minimize(cost)

        hinted = {
            op: at // unit
            for row, ats in zip(hint, score.starts_us, strict=True)
            for op, at in zip(row, ats, strict=True)
        }
        shift = 0
        if span:
            middle = Op("F", base.num_stages - 1, 0)
            model.add(starts[middle] == upper)
            shift = upper - hinted[middle]
        for op, start in starts.items():
            model.add_hint(start, hinted[op] + shift)
        model.add_hint(cost, upper)

    def _add_memory(self, rank: int, length: dict[Op, int], horizon: int) -> None:
        problem, base, starts = self._problem, self._problem.base, self._starts
        if base.room_bytes is None:
            return
        held: list[tuple[Any, Any, int]] = []
        for s in base.stages_of_rank[rank]:
            for j in range(base.num_microbatches):
                forward, back = Op("F", s, j), Op("B" if base.split[s] else "BW", s, j)
                last = Op("W", s, j) if base.split[s] else back
                size, kept = problem.activation_bytes[s][j], problem.kept_bytes[s][j]
                held.append((starts[forward], starts[back] + length[back], max(0, size - kept)))
                held.append((starts[forward], starts[last] + length[last], min(size, kept)))
                held.append((starts[back], starts[last] + length[last], problem.extra_bytes[s][j]))
        add_held(self.model, held, base.room_bytes[rank], horizon)

    def cost_us(self, value: float) -> int:
        """What an answer with this objective value costs at most."""
        return round(value) * self._unit_us

    def least_us(self, value: float) -> int:
        """What every order costs at least if the solver's bound is this."""
        return round(value) * self._unit_us

    def order(self, solver: Any) -> Order:
        """The order of the solver's answer; an op of 0 µs before what starts with its end."""
        rows: list[list[Op]] = [[] for _ in range(self._problem.base.num_ranks)]
        for op in self._starts:
            rows[self._problem.base.rank_of_stage[op.stage]].append(op)
        return tuple(
            tuple(sorted(row, key=lambda op: (solver.value(self._starts[op]), self._problem.duration_us(op))))
            for row in rows
        )
