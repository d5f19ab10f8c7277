"""The registry of pipeline backends, and the portfolio that `auto` stands for. A new backend is a file and a row."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, cast

from solvers.backend import Backend, Event
from solvers.list_scheduling import ListScheduling
from solvers.pipeline import Order, PipelineProblem, PipelineSolution

Progress = Event


@dataclass(frozen=True)
class Row:
    """Where a backend lives; it is loaded when first used."""

    module: str
    cls: str
    counts_work: bool = True  # takes `work_limit`

    def load(self, work_limit: float | None = None) -> Backend:
        """The backend itself."""
        options: dict[str, Any] = {} if work_limit is None else {"work_limit": work_limit}
        return cast(Backend, getattr(import_module(self.module), self.cls)(**options))


BACKENDS = {
    "list-scheduling": Row("solvers.list_scheduling", "ListScheduling", counts_work=False),
    "periodic": Row("solvers.periodic", "PeriodicSchedule"),
    "lns": Row("solvers.neighbourhood", "NeighbourhoodSearch"),
    "cp-sat": Row("solvers.cp_sat", "CpSat"),
    "cbc": Row("solvers.cbc", "Cbc", counts_work=False),
}


def get_backend(name: str, work_limit: float | None = None) -> Backend:
    """The backend of this name; ValueError lists the known ones, or says that it does not count its work."""
    if name not in BACKENDS:
        raise ValueError(f"no solver is called {name!r}; known: auto, {', '.join(BACKENDS)}")
    if work_limit is not None and not BACKENDS[name].counts_work:
        counting = [known for known, row in BACKENDS.items() if row.counts_work]
        raise ValueError(f"solver {name!r} does not count its work; a work limit goes with auto, {', '.join(counting)}")
    return BACKENDS[name].load(work_limit)


def solve_pipeline(
    problem: PipelineProblem,
    *,
    solver: str = "auto",
    time_limit_s: float = 30.0,
    work_limit: float | None = None,
    seed: int = 0,
    hint: Order | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    workers: int = 2,
) -> PipelineSolution:
    """Solve with one backend, or with auto: all of them in turn, see `solvers.portfolio`.

    `work_limit` is in CP-SAT's deterministic time, about seconds on one core: unlike time it stops at the same point
    on every machine. A `hint` that fits is where the search begins. Ctrl-C returns the best so far, marked
    `interrupted`. The same seed gives the same answer unless the answer says `limited_by_time`. ValueError if the
    backend does not exist or does not take the problem or the limit, or without time or work.
    """
    for name, limit in (("time_limit_s", time_limit_s), ("work_limit", work_limit)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name} is {limit}, it must be positive")
    if solver == "auto":
        from solvers.portfolio import solve_portfolio  # loads every backend

        return solve_portfolio(
            problem,
            time_limit_s=time_limit_s,
            work_limit=work_limit,
            seed=seed,
            hint=hint,
            on_progress=on_progress,
            workers=workers,
        )
    backend = get_backend(solver, work_limit)
    obstacle = backend.why_not(problem)
    if obstacle is not None:
        raise ValueError(f"solver {solver!r} does not take this problem: {obstacle}")
    try:
        return backend.solve(
            problem, time_limit_s=time_limit_s, seed=seed, hint=hint, on_progress=on_progress, workers=workers
        )
    except KeyboardInterrupt:  # outside its search: an order that takes no time to make
        quick = ListScheduling(max_rules=1).solve(problem, time_limit_s=time_limit_s, seed=seed, hint=hint)
        return replace(quick, interrupted=True)
