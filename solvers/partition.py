"""Stage partition: cut a chain of layers into consecutive pipeline stages, exactly.

minimise   max over ranks of the time of the layers it hosts
over       cuts 0 = c_0 < c_1 < ... < c_S = L; stage s holds layers [c_s, c_s+1) and runs on rank_of_stage[s]
such that  on every rank, the sum over its stages s and their layers of static_bytes + in_flight[s] · activation_bytes
           + weights_in_flight[s] · weight_activation_bytes, plus the largest temporary_bytes of any of its layers,
           is at most its capacity_bytes.

Times are whole µs, sizes whole bytes, so every backend must prove the same optimum. Nothing here reads a file, a
clock or a solver. `solve_partition` picks the backend: with one stage per rank `partition_chain` needs no solver.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from typing import Protocol, cast

from solvers.status import SolverError, Status


@dataclass(frozen=True)
class StagePartition:
    """L layers, S stages, p ranks. ValueError when shapes disagree or a number is negative or not whole."""

    times_us: tuple[int, ...]  # shape (L,)
    num_stages: int
    static_bytes: tuple[int, ...] | None = None  # shape (L,): weights, gradients, optimizer; None is 0
    activation_bytes: tuple[int, ...] | None = None  # shape (L,), of one microbatch from F to B; None is 0
    in_flight: tuple[int, ...] | None = None  # shape (S,), microbatches a stage holds between F and B; None is 1
    weight_activation_bytes: tuple[int, ...] | None = None  # shape (L,), of one microbatch from B to W; None is 0
    weights_in_flight: tuple[int, ...] | None = None  # shape (S,), those it holds between B and W meanwhile; None is 0
    temporary_bytes: tuple[int, ...] | None = None  # shape (L,), while one of its actions runs; None is 0
    capacity_bytes: tuple[int, ...] | None = None  # shape (p,); None is no limit
    rank_of_stage: tuple[int, ...] | None = None  # shape (S,); None puts stage s on rank s

    def __post_init__(self) -> None:
        if not isinstance(self.num_stages, int) or self.num_stages < 1:
            raise ValueError(f"num_stages is {self.num_stages}, it must be a whole number from 1")
        for name, want in (
            ("times_us", len(self.times_us)),
            ("static_bytes", len(self.times_us)),
            ("activation_bytes", len(self.times_us)),
            ("in_flight", self.num_stages),
            ("weight_activation_bytes", len(self.times_us)),
            ("weights_in_flight", self.num_stages),
            ("temporary_bytes", len(self.times_us)),
            ("rank_of_stage", self.num_stages),
            ("capacity_bytes", self.num_ranks),
        ):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != want:
                raise ValueError(f"{name} has {len(values)} entries, {want} are needed")
            for index, value in enumerate(values):
                if not isinstance(value, int) or (value < 0 and name != "capacity_bytes"):
                    raise ValueError(f"{name}[{index}] is {value}, it must be a whole number from 0")
        if set(self.placement) != set(range(self.num_ranks)):
            raise ValueError(f"rank_of_stage {self.rank_of_stage} leaves a rank below {self.num_ranks} without a stage")

    @property
    def num_layers(self) -> int:
        """Layers, L."""
        return len(self.times_us)

    @cached_property
    def placement(self) -> tuple[int, ...]:
        """The rank of every stage, shape (S,)."""
        return tuple(range(self.num_stages)) if self.rank_of_stage is None else self.rank_of_stage

    @cached_property
    def num_ranks(self) -> int:
        """Ranks, p."""
        return max(self.placement) + 1

    @property
    def is_chain(self) -> bool:
        """Whether every rank hosts exactly one stage."""
        return self.num_ranks == self.num_stages

    def layer_bytes(self, stage: int) -> list[int]:
        """What each layer would take on this stage, shape (L,)."""
        nothing = (0,) * self.num_layers
        held = 1 if self.in_flight is None else self.in_flight[stage]
        waiting = 0 if self.weights_in_flight is None else self.weights_in_flight[stage]
        sizes = (self.static_bytes, self.activation_bytes, self.weight_activation_bytes)
        columns = zip(*(values or nothing for values in sizes), strict=True)
        return [static + held * activation + waiting * weight for static, activation, weight in columns]

    def rank_times_us(self, cuts: Sequence[int]) -> list[int]:
        """Load of every rank under these S − 1 inner cuts, shape (p,); ValueError unless S non-empty stages."""
        return self._per_rank(cuts, [self.times_us] * self.num_stages)

    def rank_bytes(self, cuts: Sequence[int]) -> list[int]:
        """Memory of every rank under these cuts, shape (p,)."""
        held = self._per_rank(cuts, [self.layer_bytes(stage) for stage in range(self.num_stages)])
        bounds = (0, *cuts, self.num_layers)
        for rank in range(self.num_ranks):
            hosted = (stage for stage, host in enumerate(self.placement) if host == rank)
            held[rank] += max(max(self.temporaries[bounds[s] : bounds[s + 1]]) for s in hosted)
        return held

    @cached_property
    def temporaries(self) -> tuple[int, ...]:
        """`temporary_bytes`, or zeros, shape (L,)."""
        return self.temporary_bytes or (0,) * self.num_layers

    def bottleneck_us(self, cuts: Sequence[int]) -> int:
        """The objective: load of the busiest rank."""
        return max(self.rank_times_us(cuts))

    def fits(self, cuts: Sequence[int]) -> bool:
        """Whether no rank is over its capacity."""
        if self.capacity_bytes is None:
            return True
        return all(used <= room for used, room in zip(self.rank_bytes(cuts), self.capacity_bytes, strict=True))

    def _per_rank(self, cuts: Sequence[int], amounts: Sequence[Sequence[int]]) -> list[int]:
        bounds = (0, *cuts, self.num_layers)
        if len(bounds) != self.num_stages + 1 or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"cuts {tuple(cuts)} do not make {self.num_stages} non-empty stages")
        totals = [0] * self.num_ranks
        for stage, (first, last) in enumerate(pairwise(bounds)):
            totals[self.placement[stage]] += sum(amounts[stage][first:last])
        return totals


@dataclass(frozen=True)
class PartitionSolution:
    """What a backend found; `bottleneck_us` is the problem's own score of the cuts."""

    status: Status
    cuts: tuple[int, ...] | None
    bottleneck_us: int | None
    lower_bound_us: int
    solver: str


class PartitionBackend(Protocol):
    """One way to solve stage partitions."""

    def why_not(self, problem: StagePartition) -> str | None:
        """Why this backend does not take this problem; None if it does."""

    def solve(self, problem: StagePartition, *, time_limit_s: float, seed: int) -> PartitionSolution:
        """The best cuts found within the limit."""


PARTITION_BACKENDS = {  # name: module; each has why_not and solve
    "chain": "solvers.partition_chain",
    "cp-sat": "solvers.partition_cp_sat",
    "cbc": "solvers.partition_cbc",
}


def partition_backend(name: str) -> PartitionBackend:
    """The backend of this name, loaded now; ValueError lists the known ones."""
    if name not in PARTITION_BACKENDS:
        raise ValueError(f"no partition backend is called {name!r}; known: {', '.join(PARTITION_BACKENDS)}")
    return cast(PartitionBackend, import_module(PARTITION_BACKENDS[name]))


def solve_partition(
    problem: StagePartition, *, solver: str = "auto", time_limit_s: float = 10.0, seed: int = 0
) -> PartitionSolution:
    """Cut with the named backend; auto takes the exact chain solver with one stage per rank, else CP-SAT."""
    if solver == "auto":
        solver = "chain" if problem.is_chain else "cp-sat"
    backend = partition_backend(solver)
    obstacle = backend.why_not(problem)
    if obstacle is not None:
        raise ValueError(f"partition backend {solver!r} does not take this problem: {obstacle}")
    if problem.num_layers < problem.num_stages:
        return PartitionSolution(Status.INFEASIBLE, None, None, 0, solver)
    return backend.solve(problem, time_limit_s=time_limit_s, seed=seed)


def rescored(
    problem: StagePartition, cuts: Sequence[int], status: Status, lower_bound_us: int, solver: str
) -> PartitionSolution:
    """A backend's answer with the problem's own score; SolverError if it breaks the problem."""
    score = problem.bottleneck_us(cuts)
    if not problem.fits(cuts):
        raise SolverError(f"{solver} returned cuts {tuple(cuts)} that overflow a rank: {problem.rank_bytes(cuts)}")
    if status is Status.OPTIMAL:
        lower_bound_us = score
    return PartitionSolution(status, tuple(cuts), score, min(lower_bound_us, score), solver)
