"""Nested bound: a pipeline's smaller copies, solved smallest first, bound the pipeline itself.

Drop some microbatches from a schedule and keep the times: what is left is a schedule of the smaller problem, since
every precedence and every "one op at a time" still holds and memory only falls. So the least times of the problem
with n microbatches hold between any n consecutive microbatches of every larger schedule. On one *observed* rank r with
first stage s, microbatches numbered in the order they run:

    gap(n)   least time from the start of F(s, j) to the start of F(s, j + n), which needs room for one more;
    cost(n)  least time from the start of F(s, j) to the end of r's ops of microbatches j .. j + n - 1
             (makespan, where s is stage 0: to the end of all ops of those microbatches).

cost(m) bounds the objective. CP-SAT finds both for n = 1, 2, 3, ..., and is given all smaller values as redundant
constraints, which is what makes the next n solvable (Russian doll search: Verfaillie, Lemaître and Schiex, AAAI 1996,
there for constraint optimisation). A run stopped by its limit still leaves what it has proven. And since one gap
ends where the next begins, gap(a + b) ≥ gap(a) + gap(b) and cost(a + b) ≥ gap(a) + cost(b): small values reach any m.

Left out, to keep the programs small: W, R (but not its time between F and B) and the memory of all ranks but the
observed and the busiest. The forwards and backwards of all ranks still exclude each other, which is what one-rank
bounds cannot see: where memory is short, a microbatch coming down meets others going up on every rank, and most
phases collide.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ortools.sat.python import cp_model

from solvers.bounds import Bound, Chains
from solvers.cp_sat_memory import add_memory
from solvers.list_scheduling import quick_order
from solvers.pipeline import PipelineProblem, SolverError
from solvers.searched_ops import Key, duration_us, precedences, searched_ops, time_unit_us

KIND = "nested"
_STEP_WORK = 3.0  # CP-SAT's deterministic time for one value; more is better spent on the next ones
_STEP_LIMIT_S = 30.0  # rarely, seconds pass that the deterministic time does not count
_MAX_OPS = 3_000  # of one program

Measure = Literal["gap", "cost"]


@dataclass(frozen=True)
class _Step:
    """One value to find: the observed rank, the number of microbatches, what is measured."""

    rank: int
    num_microbatches: int
    measure: Measure


class NestedBound:
    """The bound of one feasible problem, growing while `run` runs. Without a memory limit that binds it stays 0.

    The same work gives the same bound, unless the clock cut a step short (`limited_by_time`). `observed` are the ranks
    to observe, by default one that promises most.
    """

    def __init__(self, problem: PipelineProblem, observed: Sequence[int] | None = None) -> None:
        self._problem = problem
        self._ranks = _observed_ranks(problem) if observed is None else list(observed)
        self._gap_us = {rank: [0] for rank in self._ranks}
        self._cost_us = {rank: [0] for rank in self._ranks}
        self._steps = self._all_steps()
        self.work = 0.0  # deterministic time of CP-SAT so far
        self.limited_by_time = False
        self._stopped = False
        self._solver: Any = None  # while it runs

    def stop(self) -> None:
        """End `run` for good, from another thread, at once."""
        self._stopped = True
        solver = self._solver
        if solver is not None:
            solver.stop_search()

    @property
    def bound(self) -> Bound:
        """What is proven so far."""
        m = self._problem.num_microbatches
        return Bound(max((_closed(self._gap_us[r], self._cost_us[r], m) for r in self._ranks), default=0), KIND)

    def run(
        self,
        enough_us: Callable[[], int],
        *,
        deadline: float,
        work_limit: float | None = None,
    ) -> Bound:
        """Find value after value until the bound is `enough_us()`, or time, work or values are used up, or `stop`.

        `enough_us` is asked after every value. `deadline` is a time of `time.monotonic`; it also cuts the value that
        is being looked for. Another run goes on where this one ended.
        """
        while not self._stopped and (work_limit is None or self.work < work_limit):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self.limited_by_time = True
                break
            step = next(self._steps, None)
            if step is None:
                break
            self._solve(step, left_s)
            if self.bound.value_us >= enough_us():
                break
        return self.bound

    def _all_steps(self) -> Iterator[_Step]:
        problem = self._problem
        for n in range(1, problem.num_microbatches + 1):
            if n * problem.num_stages * 2 > _MAX_OPS or not _fits_int64(problem, n + 1):
                return
            for rank in self._ranks:
                if n < problem.num_microbatches:
                    yield _Step(rank, n, "gap")
                yield _Step(rank, n, "cost")

    def _solve(self, step: _Step, left_s: float) -> None:
        """Find one value and add it to its table."""
        gap_us, cost_us = self._gap_us[step.rank], self._cost_us[step.rank]
        n = step.num_microbatches
        if step.measure == "gap":
            table_us, known_us = gap_us, max((gap_us[a] + gap_us[n - a] for a in range(1, n)), default=0)
        else:
            table_us, known_us = cost_us, _closed(gap_us, cost_us, n)
        program = _Program(self._problem, step, gap_us, cost_us, known_us)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.max_deterministic_time = _STEP_WORK
        solver.parameters.max_time_in_seconds = min(left_s, _STEP_LIMIT_S)
        solver.parameters.catch_sigint_signal = False
        # measured on programs of this kind: the first two make the difference, the rest saves time
        solver.parameters.use_objective_lb_search = True
        solver.parameters.use_strong_propagation_in_disjunctive = True
        solver.parameters.use_precedences_in_disjunctive_constraint = False
        solver.parameters.linearization_level = 0
        solver.parameters.cp_model_probing_level = 0
        solver.parameters.symmetry_level = 0
        self._solver = solver
        if self._stopped:  # while the program was built
            return
        status = solver.solve(program.model)
        self._solver = None
        proven_us = known_us
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.UNKNOWN):
            proven_us = max(known_us, round(solver.best_objective_bound) * program.unit_us)
        else:
            raise SolverError(f"CP-SAT calls {step} {solver.status_name(status)}: {program.model.validate()}")
        table_us.append(proven_us)
        work = float(solver.deterministic_time)
        self.work += max(work, 1e-3)
        if status != cp_model.OPTIMAL and work < _STEP_WORK:
            self.limited_by_time = True


def _fits_int64(problem: PipelineProblem, num_microbatches: int) -> bool:
    """Whether all sums of a program stay inside 64 bits, and all times among the whole numbers of a float."""
    total = _room_after_us(replace(problem, num_microbatches=num_microbatches)) // time_unit_us(problem)
    num_variables = 16 * problem.num_stages * num_microbatches
    most_bytes = num_microbatches * (sum(problem.activation_bytes) + sum(problem.extra_bytes))
    capacity_bytes = max(problem.capacity_bytes or (0,))
    return total < 2**50 and 4 * total * num_variables < 2**62 and most_bytes + capacity_bytes < 2**62


def _closed(gap_us: Sequence[int], cost_us: Sequence[int], n: int) -> int:
    """The largest cost(n) that the tables prove: gaps, then a cost."""
    if n < len(cost_us):
        return cost_us[n]
    gaps = list(gap_us)
    while len(gaps) <= n:
        k = len(gaps)
        gaps.append(max((gaps[a] + gaps[k - a] for a in range(1, min(k, len(gap_us)))), default=0))
    return max((gaps[n - k] + cost_us[k] for k in range(1, len(cost_us))), default=0)


def _observed_ranks(problem: PipelineProblem) -> list[int]:
    """The rank on which a microbatch stays longest for the room there is; none where everything fits.

    For the makespan always the rank of stage 0, where the horizon begins.
    """
    chains, m = Chains(problem), problem.num_microbatches

    def stay_us(rank: int) -> float:
        """Least time per microbatch of the rank's longest stay, were the room used all the time; 0: no limit."""
        longest = 0.0
        for s in problem.stages_of_rank[rank]:
            below = sum(problem.taken_by_forward_bytes[t] for t in problem.stages_of_rank[rank] if t <= s)
            room = None if problem.room_bytes is None else problem.room_bytes[rank]
            most = min(problem.in_flight_limit[s], m if room is None or below == 0 else room // below)
            if most < m:
                longest = max(longest, (chains.window_us(s, s) + problem.back_us[s]) / max(1, most))
        return longest

    stays_us = [stay_us(rank) for rank in range(problem.num_ranks)]
    if not any(stays_us):
        return []
    if problem.objective == "makespan":
        return [problem.rank_of_stage[0]]
    return [max(range(problem.num_ranks), key=stays_us.__getitem__)]


def _detailed_ranks(problem: PipelineProblem, observed: int) -> set[int]:
    """The ranks whose W, R and memory are in the programs: the observed and the busiest."""
    return {observed, max(range(problem.num_ranks), key=problem.work_us.__getitem__)}


class _Program:
    """The program of one step."""

    def __init__(
        self, problem: PipelineProblem, step: _Step, gap_us: Sequence[int], cost_us: Sequence[int], known_us: int
    ) -> None:
        n, observed = step.num_microbatches, step.rank
        num_forwards = n + 1 if step.measure == "gap" else n
        small = replace(problem, num_microbatches=num_forwards)
        unit = self.unit_us = time_unit_us(problem)
        first_stage, last_stage = problem.stages_of_rank[observed][0], problem.num_stages - 1
        detailed = _detailed_ranks(problem, observed)
        upper = small.evaluate(quick_order(small, None)).objective_us // unit + 1
        model = self.model = cp_model.CpModel()

        def is_kept(key: Key) -> bool:
            kind, s, j = key
            if j >= n:  # of the microbatch that ends the gap, only that op
                return kind == "F" and s == first_stage
            return kind in ("F", "B") or problem.rank_of_stage[s] in detailed

        length = {key: duration_us(small, key) // unit for key in searched_ops(small) if is_kept(key)}
        begin = _room_before_us(small, first_stage) // unit
        horizon = begin + upper + _room_after_us(small) // unit + 1
        starts = {key: model.new_int_var(0, horizon - duration, "") for key, duration in length.items()}
        rows: list[list[Any]] = [[] for _ in range(problem.num_ranks)]
        for key, start in starts.items():
            rows[problem.rank_of_stage[key[1]]].append(model.new_fixed_size_interval_var(start, length[key], ""))
        for row in rows:
            model.add_no_overlap(row)
        for before, after, delay_us in precedences(small):
            if before in starts and after in starts:
                model.add(starts[after] >= starts[before] + (length[before] + delay_us // unit))
        for s in range(problem.num_stages):  # where R between them is left out, its time is not
            if s == last_stage or (problem.has_recompute[s] and problem.rank_of_stage[s] not in detailed):
                apart = (problem.forward_us[s] + problem.rerun_us[s]) // unit
                for j in range(n):
                    model.add(starts["B", s, j] >= starts["F", s, j] + apart)
        for rank in sorted(detailed):
            add_memory(model, small, rank, starts, length, horizon)

        forwards = [starts["F", first_stage, j] for j in range(num_forwards)]
        model.add(forwards[0] == begin)
        ends = [self._end(small, observed, starts, length, j, horizon) for j in range(n)]
        for i in range(num_forwards):
            for k in range(1, min(len(gap_us), num_forwards - i)):
                model.add(forwards[i + k] >= forwards[i] + gap_us[k] // unit)
        for i in range(n):
            for k in range(1, min(len(cost_us), n - i + 1)):
                model.add(ends[i + k - 1] >= forwards[i] + cost_us[k] // unit)
        value = model.new_int_var(known_us // unit, upper, "")
        model.add(value == (forwards[n] if step.measure == "gap" else ends[n - 1]) - begin)
        model.minimize(value)

    def _end(
        self,
        small: PipelineProblem,
        observed: int,
        starts: Mapping[Key, Any],
        length: Mapping[Key, int],
        j: int,
        horizon: int,
    ) -> Any:
        """When the observed ops of microbatch j, and with them those of all before it, have ended."""
        stages = small.stages_of_rank[observed] if small.objective == "span" else range(small.num_stages)
        lasts = [("W", s, j) if ("W", s, j) in starts else ("B", s, j) for s in stages]
        if len(lasts) == 1:
            return starts[lasts[0]] + length[lasts[0]]
        end = self.model.new_int_var(0, horizon, "")
        self.model.add_max_equality(end, [starts[key] + length[key] for key in lasts])
        return end


def _room_after_us(problem: PipelineProblem) -> int:
    """Time after the measured ops that no schedule needs more of: what is left, one microbatch after the other."""
    rows = (problem.forward_us, problem.rerun_us, problem.back_us, problem.weight_us)
    return problem.num_microbatches * (sum(map(sum, rows)) + 2 * sum(problem.transfer_us))


def _room_before_us(problem: PipelineProblem, first_stage: int) -> int:
    """Time before the start of F(first_stage, 0) that no schedule needs more of.

    Before it only F and R of lower stages run: everything else of a microbatch follows its F on `first_stage`. In a
    schedule in which none of them could start later, each is tied to a later one, by a precedence or by the order of
    its rank, up to that start or past it; such a path runs every op, and every hop, at most once.
    """
    rows = (problem.forward_us, problem.rerun_us, problem.transfer_us)
    return problem.num_microbatches * sum(sum(row[:first_stage]) for row in rows)
