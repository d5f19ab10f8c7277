"""What is said of schedules made from costs alone: order, price, how far from the best, and what else there is."""

from typing import Annotated, Literal

from pydantic import Field

from profiles.facts import Count, Facts, NonNegative, NonNegativeCount

Objective = Literal["span", "makespan"]
Size = Annotated[int, Field(ge=0)]  # in the unit of the activation bytes given


class PlacementRow(Facts):
    """One placement that `--placement auto` looked at; what is None was not to be had, and `note` says why."""

    placement: str
    virtual_stages: Count
    objective_us: int | None = None
    span_us: int | None = None
    makespan_us: int | None = None
    bubble_rate_span: NonNegative | None = None
    bubble_rate_makespan: NonNegative | None = None
    lower_bound_us: int | None = None
    gap: NonNegative | None = None
    peak_memory: Size | None = None  # of the fullest rank
    solver: str = ""
    note: str = ""


class ScheduleAnswer(Facts):
    """A schedule, its cost and how far it can be from the best; the `--json` of `pipewright schedule`."""

    family: str
    solver: str
    status: Literal["optimal", "feasible"]
    objective: Objective
    num_ranks: Count
    num_microbatches: Count
    placement: str
    virtual_stages: Count  # the most stages of any rank
    rank_of_stage: tuple[NonNegativeCount, ...]  # shape (S,)
    num_replicas: Count = 1  # 2: every stage is also on the mirrored rank p − 1 − r, weights and all
    span_us: int
    makespan_us: int
    bubble_rate_span: NonNegative
    bubble_rate_makespan: NonNegative
    lower_bound_us: int  # with a comparison: on every placement in it
    lower_bound_kind: str
    gap: NonNegative
    peak_memory: tuple[Size, ...]  # per rank
    memory_capacity: tuple[Size, ...] | None  # per rank
    solve_seconds: NonNegative
    seed: int
    time_limit_s: NonNegative
    work_limit: NonNegative | None = None  # in CP-SAT's deterministic time
    limited_by_time: bool  # a wall-clock limit cut the search: another run may end elsewhere
    interrupted: bool
    comparison: tuple[PlacementRow, ...] = ()  # best first; empty unless the placement was chosen
    schedule: tuple[str, ...]

    @property
    def objective_us(self) -> int:
        """What was minimised."""
        return self.span_us if self.objective == "span" else self.makespan_us


class FamilyRow(Facts):
    """One family with one number of chunks, or auto, on given costs."""

    family: str
    solver: str  # who made the order: "family", or one of auto's solvers
    placement: str
    virtual_stages: Count
    num_replicas: Count = 1  # of the weights: 2 where every stage is on two ranks
    objective_us: int
    span_us: int
    makespan_us: int
    bubble_rate_span: NonNegative
    bubble_rate_makespan: NonNegative
    peak_memory: tuple[Size, ...]  # per rank
    transfers: NonNegativeCount  # tensors sent between ranks in one step
    fits: bool
    memory_over: Size  # by how much the worst rank is over its capacity
    note: str  # why it does not fit
    gap_to_best: float  # (objective − least objective of what fits) / objective; under 0 only for what does not fit


class Comparison(Facts):
    """Families and auto on the same costs; the `--json` of `pipewright compare`."""

    objective: Objective
    num_ranks: Count
    num_microbatches: Count
    memory_capacity: tuple[Size, ...] | None  # per rank
    microbatch_memory: Size  # M_B of the largest piece: the unit of memory limits that count microbatches
    lower_bound_us: int  # on every placement that auto looked at; bidirectional families are none
    lower_bound_kind: str
    gap: NonNegative  # of the best row that fits and holds the weights once
    rows: tuple[FamilyRow, ...]  # least objective first
    refused: dict[str, str]  # families without a schedule for these numbers, and why
    seed: int
    time_limit_s: NonNegative
    work_limit: NonNegative | None = None  # in CP-SAT's deterministic time
    limited_by_time: bool
    interrupted: bool
