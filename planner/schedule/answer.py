"""What is said of a schedule made from costs alone: the order, its price, and how far it can be from the best."""

from typing import Literal

from profiles.facts import Bytes, Facts, NonNegative

Objective = Literal["span", "makespan"]


class ScheduleAnswer(Facts):
    """A schedule, its cost and how far it can be from the best; the `--json` of `pipewright schedule`."""

    family: str
    solver: str
    status: Literal["optimal", "feasible"]
    objective: Objective
    span_us: int
    makespan_us: int
    bubble_rate_span: NonNegative
    bubble_rate_makespan: NonNegative
    lower_bound_us: int
    lower_bound_kind: str
    gap: NonNegative
    peak_memory: tuple[Bytes, ...]  # per rank, in the unit of the activation bytes given
    solve_seconds: NonNegative
    seed: int
    time_limit_s: NonNegative
    limited_by_time: bool  # a wall-clock limit cut the search: another run may end elsewhere
    interrupted: bool
    schedule: tuple[str, ...]
