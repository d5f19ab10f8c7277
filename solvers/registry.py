"""The registry of pipeline backends, and the portfolio that `auto` stands for. A new backend is a file and a row."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import cast

from solvers.backend import Backend, Event, OnProgress
from solvers.bounds import best_bound
from solvers.list_scheduling import ListScheduling
from solvers.pipeline import PipelineProblem, PipelineSolution, Status

Progress = Event

_LIST_SHARE = 0.25  # of the time limit that auto gives to list scheduling first
_CP_SAT_OPS = 1000  # above this, in the time people wait, more rules improve an order more than CP-SAT does
_MIN_RUN_S = 1.0  # less than this is not worth another run


@dataclass(frozen=True)
class Row:
    """Where a backend lives; it is loaded when first used."""

    module: str
    cls: str

    def load(self) -> Backend:
        """The backend itself."""
        return cast(Backend, getattr(import_module(self.module), self.cls)())


BACKENDS = {
    "list-scheduling": Row("solvers.list_scheduling", "ListScheduling"),
    "cp-sat": Row("solvers.cp_sat", "CpSat"),
    "cbc": Row("solvers.cbc", "Cbc"),
}


def get_backend(name: str) -> Backend:
    """The backend of this name; ValueError lists the known ones."""
    if name not in BACKENDS:
        raise ValueError(f"no solver is called {name!r}; known: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name].load()


def solve_pipeline(
    problem: PipelineProblem,
    *,
    solver: str = "auto",
    time_limit_s: float = 30.0,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    workers: int = 2,
) -> PipelineSolution:
    """Solve with one backend, or with auto: list scheduling, then a search from its order unless that is proven.

    Ctrl-C returns the best so far, marked `interrupted`. The same seed gives the same answer unless the answer says
    `limited_by_time`. ValueError if the backend does not exist or does not take the problem, or without time.
    """
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s is {time_limit_s}, it must be positive")
    if solver == "auto":
        return _portfolio(problem, time_limit_s, seed, on_progress, workers)
    backend = get_backend(solver)
    obstacle = backend.why_not(problem)
    if obstacle is not None:
        raise ValueError(f"solver {solver!r} does not take this problem: {obstacle}")
    return backend.solve(problem, time_limit_s=time_limit_s, seed=seed, on_progress=on_progress, workers=workers)


def _portfolio(
    problem: PipelineProblem, time_limit_s: float, seed: int, on_progress: OnProgress | None, workers: int
) -> PipelineSolution:
    """List scheduling; while nothing is proven, CP-SAT from its order, or more rules where the problem is large."""
    began = time.monotonic()

    def since_began(event: Event) -> None:
        if on_progress is not None:
            on_progress(replace(event, seconds=time.monotonic() - began))

    bound = best_bound(problem) if problem.is_feasible() else None
    answer = get_backend("list-scheduling").solve(
        problem, time_limit_s=time_limit_s * _LIST_SHARE, seed=seed, on_progress=since_began, bound=bound
    )
    if problem.num_ops > _CP_SAT_OPS:
        name, deeper = "list-scheduling", cast(Backend, ListScheduling(max_rules=None, max_ops=None))
        note = f"CP-SAT not tried: {problem.num_ops} ops, more than {_CP_SAT_OPS}"
    else:
        name, deeper = "cp-sat", None
        note = ""
    round_number = 0
    limited_by_time = answer.limited_by_time
    while answer.status is Status.FEASIBLE and not answer.interrupted:
        left_s = time_limit_s - (time.monotonic() - began)
        if left_s <= (_MIN_RUN_S if round_number else 0.0):
            break
        round_number += 1
        deeper = deeper or get_backend(name)
        try:
            found = deeper.solve(
                problem,
                time_limit_s=left_s,
                seed=seed + round_number,
                hint=answer.order,
                on_progress=since_began,
                workers=workers,
                bound=bound,
            )
        except KeyboardInterrupt:
            answer = replace(answer, interrupted=True)
            break
        limited_by_time = found.limited_by_time
        answer = _combined(answer, found)
        if name != "cp-sat" and not found.limited_by_time:
            break  # no rule is left to try
    return replace(
        answer,
        seconds=time.monotonic() - began,
        seed=seed,
        limited_by_time=limited_by_time and answer.status is Status.FEASIBLE,
        note=note or answer.note,
    )


def _combined(first: PipelineSolution, second: PipelineSolution) -> PipelineSolution:
    """The better order and the larger bound of two answers; the order's solver signs."""
    assert first.score is not None
    assert second.score is not None
    best = second if second.score.objective_us < first.score.objective_us else first
    proof = second if second.lower_bound_us > first.lower_bound_us else first
    assert best.score is not None
    proven = proof.lower_bound_us >= best.score.objective_us
    return replace(
        best,
        status=Status.OPTIMAL if proven else Status.FEASIBLE,
        lower_bound_us=proof.lower_bound_us,
        lower_bound_kind=proof.lower_bound_kind,
        interrupted=second.interrupted,
    )
