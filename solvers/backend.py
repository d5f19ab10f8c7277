"""What every pipeline backend looks like from outside, so that one registry and one zoo of tests serve them all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from solvers.bounds import Bound
from solvers.pipeline import Order, PipelineProblem, PipelineSolution, Status


@dataclass(frozen=True)
class Event:
    """News from a running search, for a progress display."""

    solver: str
    seconds: float  # since the solve began
    objective_us: int | None  # best order so far
    lower_bound_us: int


OnProgress = Callable[[Event], None]


class Backend(Protocol):
    """One way to solve pipeline problems."""

    @property
    def name(self) -> str:
        """As in the registry."""

    @property
    def is_exact(self) -> bool:
        """Whether it proves optimality by search, given time."""

    def why_not(self, problem: PipelineProblem) -> str | None:
        """Why this backend does not take this problem; None if it does."""

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
        """The best order found within the limit, with what is proven about it; `bound` saves computing it again."""


def infeasible(solver: str, seed: int, seconds: float) -> PipelineSolution:
    """The answer when one microbatch alone does not fit, which `PipelineProblem.is_feasible` decides exactly."""
    return PipelineSolution(
        status=Status.INFEASIBLE,
        order=None,
        score=None,
        lower_bound_us=0,
        lower_bound_kind="memory",
        solver=solver,
        seconds=seconds,
        seed=seed,
        note="a single microbatch does not fit",
    )
