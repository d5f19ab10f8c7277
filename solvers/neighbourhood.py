"""Large neighbourhood search: CP-SAT reorders a window of time on some or all ranks, again and again.

The incumbent is an order with a timing that attains its objective. One step takes the ops that start in a window
of time, frees those of a block of adjacent ranks, keeps every other op in its present order, and asks CP-SAT for a
better order of the free ones; `solvers.window` has the program. A step costs as much as its window, not as the
problem; only an improvement is followed by a pass over all ops.

Which windows: at the start, at the end, where the critical path changes ranks, or anywhere; of all ranks or
of a few; a choice that improved lately is taken more often. Windows grow where CP-SAT proves there is nothing, and
shrink where it runs out of its limit. Half of the steps must improve the cost; the others may keep it and lower the
costs of the single ranks, so that plateaus have a slope.

Everything is counted in CP-SAT's deterministic time, so with a work limit the same seed gives the same order. If a
window of everything has no better order, the incumbent is optimal and the search ends.
"""

import random
import threading
import time
from dataclasses import dataclass
from typing import Any

from ortools.sat.python import cp_model

from solvers.backend import Event, OnProgress, infeasible
from solvers.bounds import Bound, best_bound
from solvers.incumbent import Incumbent, NumberedOps
from solvers.list_scheduling import quick_order
from solvers.pipeline import Order, PipelineProblem, PipelineSolution, SolverError, Status
from solvers.searched_ops import order_by, starts_us
from solvers.window import Window, WindowModel

_EXACT_CELLS = 100_000  # ops × ranks up to which every rank has its own column: finds more, in more time
_STEP_WORK = 0.1  # deterministic time of CP-SAT per step
_BISECT_AFTER = 20  # conflicts; else CP-SAT may raise its bound µs by µs, which its deterministic time hardly counts
_BASE_WORK = 0.002  # what a step costs besides
_MIN_FREE, _MAX_FREE = 24, 1000  # free ops of a window
_FIRST_FREE = 90
_GROW, _SHRINK = 1.03, 0.93
_RELEASE_EVERY = 20  # improvements between two adjustments of the ranks' starts, on large problems


@dataclass
class _Arm:
    """One kind of window, and how well it did lately."""

    place: str  # "start", "end", "critical" or "any"
    width: int  # ranks in the block
    gain: float = 1.0
    work: float = 1.0

    def count(self, gain: float, work: float) -> None:
        """Remember a step, and forget older ones a little."""
        self.gain = 0.97 * self.gain + gain
        self.work = 0.97 * self.work + work / _STEP_WORK


class NeighbourhoodSearch:
    """The backend. `work_limit` counts CP-SAT's deterministic time, so that the same seed gives the same answer.

    Setting `cancel` ends a search that runs in another thread, like Ctrl-C in the main one.
    """

    name = "lns"
    is_exact = False

    def __init__(self, work_limit: float | None = None, cancel: threading.Event | None = None) -> None:
        self.work_limit = work_limit
        self.cancel = cancel

    def why_not(self, problem: PipelineProblem) -> str | None:
        """None: it takes every problem."""
        del problem
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
        """Improve the hint, or a quick list schedule, until the bound is met or the work or the time is used up.

        `workers` is ignored: steps are short, and one thread keeps them deterministic.
        """
        del workers
        began = time.monotonic()
        if not problem.is_feasible():
            return infeasible(self.name, seed, time.monotonic() - began)
        if bound is None:
            bound = best_bound(problem)
        first = quick_order(problem, hint)
        score = problem.evaluate(first)
        interrupted = out_of_time = False
        search = None
        if score.objective_us > bound.value_us:
            try:
                search = _Search(problem, first, bound, began, seed, on_progress)
                out_of_time = search.run(began + time_limit_s, self.work_limit, self.cancel)
            except KeyboardInterrupt:
                interrupted = True
        best = first
        note = "0 windows"
        if search is not None:
            interrupted = interrupted or search.cancelled
            note = f"{search.num_steps} windows, {search.num_improved} improved, work {search.work:.1f}"
            if search.proven is not None and search.proven.value_us > bound.value_us:
                bound = search.proven
            if search.incumbent.cost_us < score.objective_us:
                best = search.order()
        found = problem.evaluate(best)
        if not found.fits or found.objective_us > score.objective_us:
            raise SolverError(
                f"the neighbourhood search's order scores {found.objective_us} µs and {found.peak_bytes} bytes, it "
                f"began with {score.objective_us} µs within {problem.capacity_bytes} bytes"
            )
        return PipelineSolution(
            status=Status.OPTIMAL if found.objective_us <= bound.value_us else Status.FEASIBLE,
            order=best,
            score=found,
            lower_bound_us=bound.value_us,
            lower_bound_kind=bound.kind,
            solver=self.name,
            seconds=time.monotonic() - began,
            seed=seed,
            interrupted=interrupted,
            limited_by_time=out_of_time,
            note=note,
        )


class _Search:
    """The state of one solve."""

    def __init__(
        self,
        problem: PipelineProblem,
        order: Order,
        bound: Bound,
        began: float,
        seed: int,
        on_progress: OnProgress | None,
    ) -> None:
        self.problem = problem
        self.bound = bound
        self.proven: Bound | None = None
        self.began = began
        self.on_progress = on_progress
        self.random = random.Random(seed)
        self.work = 0.0
        self.num_steps = self.num_improved = 0
        self.cancelled = False
        ops = self.ops = NumberedOps(problem)
        start_us = starts_us(problem, order)
        topological = sorted(range(ops.count), key=lambda n: start_us[ops.keys[n]])
        self.per_rank = ops.count * problem.num_ranks <= _EXACT_CELLS
        self.incumbent = Incumbent(ops, topological, self.per_rank)
        self.best = self.incumbent  # the first of its cost: where the search is cancelled does not change it
        widths = sorted({w for w in (2, 4, 8) if w < problem.num_ranks} | {problem.num_ranks})
        self.arms = [_Arm(place, width) for place in ("start", "end", "critical", "any") for width in widths]
        self.free_ops = dict.fromkeys(widths, float(_FIRST_FREE))
        self.crossings: list[int] | None = None
        self.since_release = 0

    def order(self) -> Order:
        """The best order in the problem's own form."""
        position, number = self.best.position, self.ops.number
        return order_by(self.problem, lambda key: position[number(key)])

    def run(self, deadline: float, work_limit: float | None, cancel: threading.Event | None) -> bool:
        """Steps until done; whether the clock ended them."""
        while self.incumbent.cost_us > self.bound.value_us and self.proven is None:
            if cancel is not None and cancel.is_set():
                self.cancelled = True
                return False
            if work_limit is not None and self.work >= work_limit:
                return False
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return True
            self._step(left_s)
        return False

    def _step(self, left_s: float) -> None:
        arm = self.random.choices(self.arms, [a.gain / a.work for a in self.arms])[0]
        window = self._window(arm)
        must_improve = window.is_whole or self.random.random() < 0.5
        self.num_steps += 1
        self.work += _BASE_WORK + 1e-5 * len(window.nodes)
        if not window.free or (must_improve and not window.can_improve()):
            arm.count(0.0, _BASE_WORK)
            return
        model = WindowModel(window, self.bound.value_us, must_improve)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = self.random.getrandbits(30)
        solver.parameters.max_deterministic_time = _STEP_WORK
        solver.parameters.max_time_in_seconds = left_s
        solver.parameters.catch_sigint_signal = False
        solver.parameters.linearization_level = 0
        solver.parameters.cp_model_probing_level = 0
        solver.parameters.symmetry_level = 0
        solver.parameters.search_branching = cp_model.PORTFOLIO_WITH_QUICK_RESTART_SEARCH
        solver.parameters.binary_search_num_conflicts = _BISECT_AFTER
        status = solver.solve(model.model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.INFEASIBLE, cp_model.UNKNOWN):
            raise SolverError(f"CP-SAT calls a window {solver.status_name(status)}: {model.model.validate()}")
        work = _BASE_WORK + solver.deterministic_time
        self.work += work
        gain = 0.0
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            gain = self._take(model, solver)
        if window.is_exact and status in (cp_model.OPTIMAL, cp_model.INFEASIBLE):
            self.proven = Bound(self.incumbent.cost_us, NeighbourhoodSearch.name)
        arm.count(gain, work)
        size = self.free_ops[arm.width]
        if work >= _STEP_WORK and gain < 1.0:
            size *= _SHRINK
        elif status in (cp_model.OPTIMAL, cp_model.INFEASIBLE) and gain == 0.0 and work < _STEP_WORK / 4:
            size *= _GROW
        self.free_ops[arm.width] = min(max(size, _MIN_FREE), _MAX_FREE)

    def _window(self, arm: _Arm) -> Window:
        incumbent, ops, rng = self.incumbent, self.ops, self.random
        num_ranks = self.problem.num_ranks
        length = min(ops.count, round(self.free_ops[arm.width] * num_ranks / arm.width))
        first_rank = rng.randrange(num_ranks - arm.width + 1)
        middle = rng.randrange(ops.count)
        if arm.place == "start":
            middle = rng.randrange(length)
        elif arm.place == "end":
            middle = ops.count - 1 - rng.randrange(length)
        elif arm.place == "critical":
            if self.crossings is None:
                self.crossings = incumbent.crossings()
            if self.crossings:
                n = rng.choice(self.crossings)
                middle = incumbent.position[n] + rng.randrange(-length // 3, length // 3 + 1)
                first_rank = ops.rank[n] - rng.randrange(arm.width)
        low = min(max(middle - length // 2, 0), ops.count - length)
        first_rank = min(max(first_rank, 0), num_ranks - arm.width)
        return Window(incumbent, low, low + length, range(first_rank, first_rank + arm.width))

    def _take(self, model: WindowModel, solver: Any) -> float:
        """Go on from the solver's order unless it is the same or worse; what that is worth."""
        topological = model.topological(solver)
        if topological is None:
            return 0.0
        old = self.incumbent
        release_us = None
        if not self.per_rank:
            self.since_release += 1
            if self.since_release < _RELEASE_EVERY:
                release_us = old.begins_us
            else:
                self.since_release = 0
        new = Incumbent(self.ops, topological, self.per_rank, release_us)
        if new.cost_us > solver.value(model.cost):
            raise SolverError(f"a window costs {new.cost_us} µs, its model says {solver.value(model.cost)} µs")
        self.incumbent = new
        self.crossings = None
        if new.cost_us < old.cost_us:
            self.best = new
            self.num_improved += 1
            if self.on_progress is not None:
                seconds = time.monotonic() - self.began
                self.on_progress(Event(NeighbourhoodSearch.name, seconds, new.cost_us, self.bound.value_us))
            return 1.0
        return 0.1 if sum(new.rank_cost_us) < sum(old.rank_cost_us) else 0.0
