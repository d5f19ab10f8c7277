"""The registry of pipeline backends, and the portfolio that `auto` stands for. A new backend is one file and one row."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import cast

from solvers.backend import Backend, Event, OnProgress
from solvers.pipeline import PipelineProblem, PipelineSolution, Status

Progress = Event

_LIST_SHARE = 0.25  # of the time limit that auto gives to list scheduling


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
) -> PipelineSolution:
    """Solve with one backend, or with auto: list scheduling, then CP-SAT from its order unless that is proven already.

    ValueError if the backend does not exist or does not take the problem.
    """
    if solver != "auto":
        backend = get_backend(solver)
        obstacle = backend.why_not(problem)
        if obstacle is not None:
            raise ValueError(f"solver {solver!r} does not take this problem: {obstacle}")
        return backend.solve(problem, time_limit_s=time_limit_s, seed=seed, on_progress=on_progress)
    return _portfolio(problem, time_limit_s, seed, on_progress)


def _portfolio(
    problem: PipelineProblem, time_limit_s: float, seed: int, on_progress: OnProgress | None
) -> PipelineSolution:
    began = time.monotonic()
    first = get_backend("list-scheduling").solve(
        problem, time_limit_s=time_limit_s * _LIST_SHARE, seed=seed, on_progress=on_progress
    )
    left_s = time_limit_s - (time.monotonic() - began)
    exact = get_backend("cp-sat")
    obstacle = exact.why_not(problem)
    if first.status is not Status.FEASIBLE or first.interrupted or obstacle is not None or left_s <= 0:
        note = first.note if obstacle is None else f"{first.note}; CP-SAT not tried: {obstacle}"
        return replace(first, seconds=time.monotonic() - began, note=note)
    second = exact.solve(problem, time_limit_s=left_s, seed=seed, hint=first.order, on_progress=on_progress)
    improved = second.objective_us != first.objective_us
    return replace(second, solver="cp-sat" if improved else first.solver, seconds=time.monotonic() - began)
