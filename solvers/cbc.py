"""The zero-bubble paper's integer program, in PuLP for CBC: for small sizes, and as a second opinion on CP-SAT.

After Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024 (arXiv 2401.10241): a start time per op; for every
two ops of a rank whose order the precedences leave open, a binary that says which comes first, and two big-M rows;
memory at an op as the sum of what the ops before it took and gave back; a row per op that lets the cost cover the
op's end and all work of its rank behind it. We depart in four ways: any number of chunks and a capacity per rank;
big-M is the incumbent's cost, which no two ops of a rank are further apart than; the bound of `solvers.bounds` is
the cost's lower limit; the cost is whole µs. Where a stage recomputes, its R are ops like the others, and the limit
in flight is among the precedences.

The binaries grow as 3·p·m·(m-1)/2 for one chunk per rank; CBC handles a few hundred.
"""

import tempfile
import time
from collections.abc import Sequence
from itertools import combinations
from math import gcd

import pulp

from solvers.backend import OnProgress, infeasible
from solvers.bounds import Bound, best_bound
from solvers.cbc_command import cbc_command
from solvers.list_scheduling import quick_order
from solvers.pipeline import Order, PipelineProblem, PipelineSolution, SolverError, Status
from solvers.searched_ops import Key, duration_us, order_by, precedences, searched_ops, starts_us, time_unit_us

_MAX_BINARIES = 1500
_MAX_OPS = 600  # up to here, counting the binaries is instant
_TOLERANCE = "1e-9"  # CBC's usual 1e-6, times big-M, is a microsecond

_STATUS = {  # (status, sol_status): a run stopped by its limit with an answer in hand has status 1, "Optimal", too
    (pulp.LpStatusOptimal, pulp.LpSolutionOptimal): Status.OPTIMAL,
    (pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible): Status.FEASIBLE,
    (pulp.LpStatusInfeasible, pulp.LpSolutionInfeasible): Status.INFEASIBLE,
    (pulp.LpStatusInfeasible, pulp.LpSolutionNoSolutionFound): Status.INFEASIBLE,  # "Integer infeasible"
    (pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound): Status.NO_SOLUTION,
}


class Cbc:
    """The backend. `workers` is ignored: CBC with several threads is not reproducible."""

    name = "cbc"
    is_exact = True

    def why_not(self, problem: PipelineProblem) -> str | None:
        """A reason for problems with more open decisions than CBC can make."""
        if problem.num_ops > _MAX_OPS:
            return f"{problem.num_ops} ops, more than the {_MAX_OPS} this formulation is good for"
        num_binaries = sum(map(len, _open_pairs(problem, _Reach(problem))))
        if num_binaries > _MAX_BINARIES:
            return f"{num_binaries} ordering binaries, more than the {_MAX_BINARIES} this formulation is good for"
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
        """Solve to the end, the limit or Ctrl-C; NO_SOLUTION, and the reason in `note`, if the problem is too large."""
        del workers, on_progress  # CBC does not report on its way
        began = time.monotonic()
        if not problem.is_feasible():
            return infeasible(self.name, seed, time.monotonic() - began)
        if bound is None:
            bound = best_bound(problem)
        refusal = self.why_not(problem)
        if refusal is not None:
            return PipelineSolution(
                status=Status.NO_SOLUTION,
                order=None,
                score=None,
                lower_bound_us=bound.value_us,
                lower_bound_kind=bound.kind,
                solver=self.name,
                seconds=time.monotonic() - began,
                seed=seed,
                note=refusal,
            )
        best = quick_order(problem, hint)
        best_score = problem.evaluate(best)
        model = _Model(problem, best, best_score.objective_us, bound)
        status, interrupted, note = Status.NO_SOLUTION, False, ""
        try:
            status = model.solve(max(0.1, time_limit_s - (time.monotonic() - began)), seed)
        except KeyboardInterrupt:
            interrupted = True
        if status.has_solution:
            order = model.order()
            score = problem.evaluate(order)
            if score.fits and score.objective_us < best_score.objective_us:
                best, best_score = order, score
            if status is Status.OPTIMAL and model.cost_us() > bound.value_us:
                bound = Bound(min(model.cost_us(), best_score.objective_us), self.name)
        elif status is Status.INFEASIBLE:
            note = "CBC finds nothing where there is an order: numbers too far apart for its tolerance"
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
            limited_by_time=status in (Status.FEASIBLE, Status.NO_SOLUTION) and not interrupted,
            note=note,
        )


class _Model:
    """The program of a problem, and the way back."""

    def __init__(self, problem: PipelineProblem, hint: Order, upper_us: int, bound: Bound) -> None:
        self._problem = problem
        self._program = program = pulp.LpProblem("pipeline", pulp.LpMinimize)
        unit = time_unit_us(problem)
        # starts count in units, the cost in µs: a span need not be a multiple of the unit, see `solvers.cp_sat`
        upper = -(-upper_us // unit)
        span = problem.objective == "span"
        horizon = 2 * upper if span else upper  # see `solvers.cp_sat`
        cost = self._cost = program.add_variable("cost", bound.value_us, upper_us, pulp.LpInteger)
        program += cost
        length = self._length = {key: duration_us(problem, key) // unit for key in searched_ops(problem)}
        starts = self._starts = {
            key: program.add_variable("{}_{}_{}".format(*key), 0, horizon - duration)
            for key, duration in length.items()
        }
        for earlier, later, delay_us in precedences(problem):
            program += starts[later] - starts[earlier] >= length[earlier] + delay_us // unit

        reach = _Reach(problem)
        first_of: dict[tuple[Key, Key], pulp.LpVariable] = {}
        for rank, pairs in enumerate(_open_pairs(problem, reach)):
            for a, b in pairs:
                y = program.add_variable(f"y{len(first_of)}", cat=pulp.LpBinary)  # 1: a before b
                first_of[a, b] = y
                program += starts[b] - starts[a] >= length[a] - upper * (1 - y)
                program += starts[a] - starts[b] >= length[b] - upper * y
            before = _Before(first_of, reach)
            keys = [key for key in length if problem.rank_of_stage[key[1]] == rank]
            begin = starts["F", problem.stages_of_rank[rank][0], 0] if span else 0
            for a in keys:
                behind = before.weighted_sum([(a, b, length[b]) for b in keys if b != a])
                program += cost - unit * (starts[a] - begin + behind) >= unit * length[a]
            self._add_memory(rank, keys, before)

        cost.setInitialValue(upper_us)
        hinted = {key: start / unit for key, start in starts_us(problem, hint).items()}
        for key, variable in starts.items():
            variable.setInitialValue(hinted[key])
        for (a, b), variable in first_of.items():
            variable.setInitialValue(int(hinted[a] < hinted[b]))

    def _add_memory(self, rank: int, keys: Sequence[Key], before: "_Before") -> None:
        problem = self._problem
        if problem.room_bytes is None:
            return
        room = problem.room_bytes[rank]
        take: dict[Key, int] = {}
        change: dict[Key, int] = {}
        for key in keys:
            kind, s, _ = key
            first, rest = problem.taken_by_forward_bytes[s], problem.restored_bytes[s]
            left = problem.kept_bytes[s] if problem.has_weight_op[s] else 0
            take[key] = {"F": first, "R": rest, "B": problem.extra_bytes[s], "W": 0}[kind]
            change[key] = {"F": first, "R": rest, "B": left - first - rest, "W": -left}[kind]
        if sum(take.values()) <= room:
            return
        unit = gcd(*take.values(), *change.values())
        for key in keys:
            if take[key]:
                held = before.weighted_sum([(other, key, change[other] // unit) for other in keys if other != key])
                self._program += held <= room // unit - take[key] // unit

    def solve(self, time_limit_s: float, seed: int) -> Status:
        """Run CBC, its files in a folder that goes away whatever happens."""
        command = cbc_command(time_limit_s=time_limit_s, seed=seed, warm_start=True)
        command.options += [f"integerTolerance {_TOLERANCE}", f"primalTolerance {_TOLERANCE}"]
        with tempfile.TemporaryDirectory(prefix="pipewright-cbc-") as folder:
            command.tmpDir = folder
            self._program.solve(command)
        status = _STATUS.get((self._program.status, self._program.sol_status))
        if status is None:
            raise SolverError(f"CBC ended with {self._program.status}, {self._program.sol_status}")
        return status

    def cost_us(self) -> int:
        """What CBC says its answer costs."""
        return round(float(self._cost.value()))

    def order(self) -> Order:
        """The order of CBC's start times; by the middle of each op, which no tolerance swaps."""
        return order_by(self._problem, lambda key: self._starts[key].value() + self._length[key] / 2)


class _Reach:
    """Which searched ops come before which by precedences alone."""

    def __init__(self, problem: PipelineProblem) -> None:
        keys = searched_ops(problem)
        self._index = {key: index for index, key in enumerate(keys)}
        behind: dict[Key, list[Key]] = {key: [] for key in keys}
        for earlier, later, _ in precedences(problem):
            behind[earlier].append(later)
        self._reached: dict[Key, int] = {}  # bit set of everything behind an op
        # every precedence goes up in: microbatch, then F R B W, then stages up for F and down for B
        keys.sort(key=lambda key: (key[2], "FRBW".index(key[0]), key[1] if key[0] == "F" else -key[1]))
        for key in reversed(keys):
            bits = 0
            for later in behind[key]:
                bits |= self._reached[later] | 1 << self._index[later]
            self._reached[key] = bits

    def leads(self, a: Key, b: Key) -> bool:
        """Whether a must run before b."""
        return bool(self._reached[a] >> self._index[b] & 1)


class _Before:
    """Which op of a rank runs before another, as a linear expression."""

    def __init__(self, first_of: dict[tuple[Key, Key], pulp.LpVariable], reach: _Reach) -> None:
        self._first_of = first_of
        self._reach = reach

    def weighted_sum(self, terms: Sequence[tuple[Key, Key, int]]) -> pulp.LpAffineExpression:
        """Σ weight · [a runs before b] over (a, b, weight)."""
        constant, parts = 0, []
        for a, b, weight in terms:
            if (a, b) in self._first_of:
                parts.append((self._first_of[a, b], weight))
            elif (b, a) in self._first_of:
                parts.append((self._first_of[b, a], -weight))
                constant += weight
            elif self._reach.leads(a, b):
                constant += weight
        return pulp.LpAffineExpression(parts, constant)


def _open_pairs(problem: PipelineProblem, reach: _Reach) -> list[list[tuple[Key, Key]]]:
    """Per rank, the pairs of its ops that no precedence orders."""
    rows: list[list[Key]] = [[] for _ in range(problem.num_ranks)]
    for key in searched_ops(problem):
        rows[problem.rank_of_stage[key[1]]].append(key)
    return [
        [(a, b) for a, b in combinations(row, 2) if not reach.leads(a, b) and not reach.leads(b, a)] for row in rows
    ]
