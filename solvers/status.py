"""What a backend may say about a problem, and the one error that is never the problem's fault."""

from enum import StrEnum


class Status(StrEnum):
    """The outcome of a solve. Infeasible and out of time are different results, and neither is an exception."""

    OPTIMAL = "optimal"  # an answer, and a proof that none is better
    FEASIBLE = "feasible"  # an answer; a limit stopped the proof
    INFEASIBLE = "infeasible"  # a proof that there is no answer
    NO_SOLUTION = "no_solution"  # a limit came before an answer; nothing is proven

    @property
    def has_solution(self) -> bool:
        """Whether an answer comes with this status."""
        return self in (Status.OPTIMAL, Status.FEASIBLE)


class SolverError(RuntimeError):
    """A backend broke its own contract: a model it calls invalid, or an answer that does not score. A bug of ours."""
