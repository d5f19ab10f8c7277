"""The portfolio behind `auto`: backends in turn, each from the best order so far, and a proof beside the search.

    list scheduling     always; small rules, many of them
    CP-SAT              on small problems, for a while, as it may prove everything; longer on tiny ones
    steady states       the pattern of the middle, for any number of microbatches
    neighbourhoods      until the limit, from the best order and from others

and, in a second thread from the second stage on, or the third on tiny problems, the nested bound.

It stops when the bound meets the order, on Ctrl-C, or when time or work are used up. Every backend is deterministic by
itself. The two threads know of each other only to stop early when one's bound meets the other's order, and then
the order is optimal and the first the search found at that cost: so the clock matters only where the answer says so.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from solvers.backend import Backend, Event, OnProgress, infeasible
from solvers.bounds import Bound, best_bound
from solvers.cp_sat import CpSat
from solvers.list_scheduling import ListScheduling, Simulator, rule_family
from solvers.neighbourhood import NeighbourhoodSearch
from solvers.nested import NestedBound
from solvers.periodic import PeriodicSchedule
from solvers.pipeline import Order, PipelineProblem, PipelineSolution, Status

NAME = "auto"
_LIST_SHARE, _SMALL_SHARE, _TINY_SHARE = 0.2, 0.15, 0.5  # of the limit, at most
_PERIODIC_SHARE, _CHUNKS_SHARE = 0.25, 0.6  # with one stage per rank, and with more, where patterns matter most
_TINY_OPS = 300
_EXACT_OPS = 1000  # above this CP-SAT proves nothing in the time people wait
_MIN_RUN_S = 0.2  # less than this is not worth another run
_STAY_WORK, _TRY_WORK = 3.0, 1.0  # of neighbourhood search without a better order, from the best and from others
_RESTART_OPS = 5000  # above this, the limits leave no time for other starts
_SEARCH_SHARE = 0.5  # of a work limit, for the neighbourhoods and for the proof
_JOIN_S = 0.05


def solve_portfolio(
    problem: PipelineProblem,
    *,
    time_limit_s: float,
    work_limit: float | None = None,
    seed: int = 0,
    hint: Order | None = None,
    on_progress: OnProgress | None = None,
    workers: int = 2,
) -> PipelineSolution:
    """The best order of the portfolio, never worse than a hint that fits, with the best bound.

    `work_limit` is in CP-SAT's deterministic time, about seconds on one core; every part gets its share.
    """
    began = time.monotonic()
    if not problem.is_feasible():
        return infeasible(NAME, seed, time.monotonic() - began)
    run = _Run(problem, best_bound(problem), began, time_limit_s, work_limit, seed, on_progress, workers)
    try:
        run.take_hint(hint)
        run.all_stages()
    except KeyboardInterrupt:
        run.interrupted = True
        if run.best is None:  # before the first order
            run.stage(ListScheduling(max_rules=1), time_limit_s)
    return run.answer()


@dataclass
class _Run:
    """The state of one solve."""

    problem: PipelineProblem
    bound: Bound
    began: float
    time_limit_s: float
    work_limit: float | None
    seed: int
    on_progress: OnProgress | None
    workers: int
    best: PipelineSolution | None = None
    _found_us: int | None = None  # the least cost a running search has reported
    limited_by_time: bool = False
    interrupted: bool = False
    starts: list[Order] = field(default_factory=list)  # found without the best order, worth a search of their own
    notes: list[str] = field(default_factory=list)
    _proven: threading.Event = field(default_factory=threading.Event)  # by the thread, of a running search

    def all_stages(self) -> None:
        """Everything, in turn."""
        limit_s, num_ops = self.time_limit_s, self.problem.num_ops
        self.stage(ListScheduling(), _LIST_SHARE * limit_s)
        if num_ops <= _TINY_OPS:
            self.stage(CpSat(work_limit=self._work(_TINY_SHARE)), _TINY_SHARE * limit_s)
        if self.is_proven or self.interrupted:
            return
        deadline = self.began + limit_s
        has_chunks = self.problem.num_stages > self.problem.num_ranks
        proof = NestedBound(self.problem)

        def known_us() -> int:
            self._take_bound(proof.bound)
            self._report(Event(proof.bound.kind, self._spent_s, None, proof.bound.value_us))
            if self.bound.value_us >= self._incumbent_us:
                self._proven.set()
            return self._incumbent_us

        def prove() -> None:
            if has_chunks and num_ops > _EXACT_OPS:
                return  # programs too large to gain on the other bounds, and in the way of the search
            proof.run(known_us, deadline=deadline, work_limit=self._work(_SEARCH_SHARE))

        with _beside(prove, proof.stop) as thread:
            if num_ops > _EXACT_OPS:
                self.notes.append(f"cp-sat not tried: {num_ops} ops, more than {_EXACT_OPS}")
            elif num_ops > _TINY_OPS:
                self.stage(CpSat(work_limit=self._work(_SMALL_SHARE)), _SMALL_SHARE * limit_s)
            share = _CHUNKS_SHARE if has_chunks else _PERIODIC_SHARE
            periodic = PeriodicSchedule()
            if self.work_limit is not None:
                periodic.work_limit = self._work(share)
            self.stage(periodic, share * limit_s, from_best=False)
            out_of_time = self._neighbourhoods(deadline, self._work(_SEARCH_SHARE))
            if self.work_limit is not None and not self.is_proven and not self.interrupted:
                thread.wait()
        self._take_bound(proof.bound)
        self.limited_by_time = self.limited_by_time or out_of_time or proof.limited_by_time

    def _work(self, share: float) -> float | None:
        return None if self.work_limit is None else self.work_limit * share

    @property
    def is_proven(self) -> bool:
        """Whether the bound meets the order."""
        return self.best is not None and self.bound.value_us >= self._best_us

    @property
    def _best_order(self) -> Order:
        assert self.best is not None
        assert self.best.order is not None
        return self.best.order

    @property
    def _best_us(self) -> int:
        assert self.best is not None
        assert self.best.score is not None
        return self.best.score.objective_us

    @property
    def _incumbent_us(self) -> int:
        """The least cost found, the running search included."""
        return self._best_us if self._found_us is None else min(self._best_us, self._found_us)

    @property
    def _spent_s(self) -> float:
        return time.monotonic() - self.began

    def take_hint(self, hint: Order | None) -> None:
        """Begin with this order if it fits."""
        if hint is None:
            return
        hint = self.problem.canonical(hint)
        score = self.problem.evaluate(hint)
        if score.fits:
            self._take_order(
                PipelineSolution(
                    status=Status.FEASIBLE,
                    order=hint,
                    score=score,
                    lower_bound_us=self.bound.value_us,
                    lower_bound_kind=self.bound.kind,
                    solver="hint",
                    seconds=0.0,
                    seed=self.seed,
                )
            )

    def stage(self, backend: Backend, most_s: float, *, from_best: bool = True) -> None:
        """Run one backend for at most that long, from the best order or by itself, and take what it found."""
        left_s = min(most_s, self.time_limit_s - self._spent_s)
        if self.is_proven or self.interrupted:
            return
        if self.best is not None and left_s < _MIN_RUN_S:
            self.limited_by_time = True
            return
        found = backend.solve(
            self.problem,
            time_limit_s=max(left_s, 0.01),
            seed=self.seed,
            hint=self.best.order if self.best is not None and from_best else None,
            on_progress=self._report,
            workers=self.workers,
            bound=self.bound,
        )
        if not from_best and found.order is not None:
            self.starts.append(found.order)
        self.notes.append(f"{backend.name} {found.seconds:.1f} s" + (f" ({found.note})" if found.note else ""))
        self._take(found)

    def _neighbourhoods(self, deadline: float, work_limit: float | None) -> bool:
        """Search from the best order; where that finds nothing any more, in turn from others. Whether time ended it.

        Windows cannot leave a bad steady state, and which one is good is only seen after a while of search.
        """
        left_work = float("inf") if work_limit is None else work_limit
        others = self._other_starts()
        order, share = self._best_order, _STAY_WORK
        num_runs = 0
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return True
            if left_work <= 0 or self.is_proven or self.interrupted or self._proven.is_set():
                return False
            before_us = self._best_us
            search = NeighbourhoodSearch(work_limit=min(share, left_work), cancel=self._proven)
            found = search.solve(
                self.problem,
                time_limit_s=left_s,
                seed=self.seed + num_runs,
                hint=order,
                on_progress=self._report,
                bound=self.bound,
            )
            num_runs += 1
            left_work -= share
            self._take(replace(found, interrupted=found.interrupted and not self._proven.is_set()))
            if num_runs == 1 or self._best_us < before_us:
                self.notes.append(f"{search.name} {found.seconds:.1f} s ({found.note})")
            other = None if self._best_us < before_us else next(others, None)
            order, share = (self._best_order, _STAY_WORK) if other is None else (other, _TRY_WORK)

    def _other_starts(self) -> Iterator[Order | None]:
        """The steady state's order, those of the first rules, and between them None: the best order again."""
        for order in self.starts:
            if order != self._best_order:
                yield order
                yield None
        if self.problem.num_ops > _RESTART_OPS:
            return
        simulator = Simulator(self.problem)
        for rule in rule_family(self.problem):
            yield simulator.order(simulator.run(rule))
            yield None

    def answer(self) -> PipelineSolution:
        """What came out of it."""
        assert self.best is not None
        proven = self.is_proven
        return replace(
            self.best,
            status=Status.OPTIMAL if proven else Status.FEASIBLE,
            lower_bound_us=min(self.bound.value_us, self._best_us),
            lower_bound_kind=self.bound.kind,
            seconds=self._spent_s,
            seed=self.seed,
            interrupted=self.interrupted,
            limited_by_time=self.limited_by_time and not proven and not self.interrupted,
            note="; ".join(self.notes),
        )

    def _take(self, found: PipelineSolution) -> None:
        self._take_order(found)
        self._take_bound(Bound(found.lower_bound_us, found.lower_bound_kind))
        self.interrupted = self.interrupted or found.interrupted
        self.limited_by_time = self.limited_by_time or found.limited_by_time

    def _take_order(self, found: PipelineSolution) -> None:
        if found.score is not None and (self.best is None or found.score.objective_us < self._best_us):
            self.best = found

    def _take_bound(self, bound: Bound) -> None:
        if bound.value_us > self.bound.value_us:
            self.bound = bound

    def _report(self, event: Event) -> None:
        """Pass news on, with the best order and bound of all backends."""
        if event.objective_us is not None and (self._found_us is None or event.objective_us < self._found_us):
            self._found_us = event.objective_us
        if self.on_progress is not None:
            objective_us = self._found_us if self.best is None else self._incumbent_us
            bound_us = max(event.lower_bound_us, self.bound.value_us)
            self.on_progress(Event(event.solver, self._spent_s, objective_us, bound_us))


class _Thread(threading.Thread):
    """A thread whose error is raised where it is waited for, and whose wait Ctrl-C can end."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(name="proof", daemon=True)
        self._work = work
        self.done = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Called by the base class."""
        try:
            self._work()
        except BaseException as error:  # handed to the caller's thread
            self.error = error
        finally:
            self.done.set()

    def wait(self) -> None:
        """Until the work has ended by itself."""
        while not self.done.wait(_JOIN_S):
            pass


@contextmanager
def _beside(work: Callable[[], object], stop: Callable[[], None]) -> Iterator[_Thread]:
    """Work in a thread beside the block, stopped when the block ends."""
    thread = _Thread(work)
    thread.start()
    try:
        yield thread
    finally:
        while not thread.done.is_set():
            stop()
            thread.done.wait(_JOIN_S)
    if thread.error is not None:
        raise thread.error
