"""Stage partition: cut a chain of layers into consecutive pipeline stages, exactly.

minimise   max over ranks of the time of the layers it hosts
over       cuts 0 = c_0 < c_1 < ... < c_S = L; stage s holds layers [c_s, c_s+1) and runs on rank_of_stage[s];
           and a choice of every layer: 0 is the problem's own numbers, k ≥ 1 those of choices[k − 1]
such that  on every rank, the sum over its stages s and their layers of static_bytes + in_flight[s] · activation_bytes
           + weights_in_flight[s] · weight_activation_bytes, plus the largest temporary_bytes of any of its layers,
           is at most its capacity_bytes;
           no cut lies inside a range of `together`; with choose_per "stage" all layers of a stage choose alike.

Among the answers of least bottleneck, those of least total time are preferred: nothing is recomputed for its own sake.
Times are whole µs, sizes whole bytes, so every backend must prove the same optimum. Nothing here reads a file, a
clock or a solver. `solve_partition` picks the backend: with one stage per rank `partition_chain` needs no solver.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from typing import Literal, Protocol, cast

from solvers.status import SolverError, Status


@dataclass(frozen=True)
class LayerChoice:
    """Another way to run every layer, say with recomputation: what differs from the problem's own numbers."""

    times_us: tuple[int, ...]  # shape (L,)
    activation_bytes: tuple[int, ...]  # shape (L,)
    weight_activation_bytes: tuple[int, ...] | None = None  # shape (L,); None is as the problem
    temporary_bytes: tuple[int, ...] | None = None  # shape (L,); None is as the problem
    times_by_rank: tuple[tuple[int, ...], ...] | None = None  # shape (p, L); needed where the problem has them


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
    times_by_rank: tuple[tuple[int, ...], ...] | None = None  # shape (p, L), of a mixed cluster; None is times_us
    choices: tuple[LayerChoice, ...] = ()  # what layers may choose besides the numbers above
    choose_per: Literal["layer", "stage"] = "layer"  # who chooses: every layer, or every stage for all its layers
    together: tuple[tuple[int, int], ...] = ()  # ranges [a, b) of layers that lie in one stage

    def __post_init__(self) -> None:
        if not isinstance(self.num_stages, int) or self.num_stages < 1:
            raise ValueError(f"num_stages is {self.num_stages}, it must be a whole number from 1")
        if self.choose_per not in ("layer", "stage"):
            raise ValueError(f"choose_per is {self.choose_per!r}, it must be 'layer' or 'stage'")
        for name, values, want in self._shapes():
            if values is None:
                continue
            if len(values) != want:
                raise ValueError(f"{name} has {len(values)} entries, {want} are needed")
            for index, value in enumerate(values):
                if not isinstance(value, int) or (value < 0 and name != "capacity_bytes"):
                    raise ValueError(f"{name}[{index}] is {value}, it must be a whole number from 0")
        if set(self.placement) != set(range(self.num_ranks)):
            raise ValueError(f"rank_of_stage {self.rank_of_stage} leaves a rank below {self.num_ranks} without a stage")
        for number, choice in enumerate(self.choices):
            if self.times_by_rank is not None and choice.times_by_rank is None:
                raise ValueError(f"choices[{number}] has no times_by_rank, but the problem has; give both or neither")
        for first, last in self.together:
            if not 0 <= first < last <= self.num_layers:
                raise ValueError(f"together holds [{first}, {last}), no range of the {self.num_layers} layers")

    def _shapes(self) -> Iterator[tuple[str, Sequence[int] | None, int]]:
        yield "rank_of_stage", self.rank_of_stage, self.num_stages
        per_stage = {"in_flight": self.num_stages, "weights_in_flight": self.num_stages}
        owners: list[tuple[str, StagePartition | LayerChoice]] = [("", self)]
        owners += [(f"choices[{number}].", choice) for number, choice in enumerate(self.choices)]
        for prefix, owner in owners:
            for field in fields(owner):
                if field.name.endswith(("_us", "_bytes")) or field.name in per_stage:
                    want = (
                        self.num_ranks
                        if field.name == "capacity_bytes"
                        else per_stage.get(field.name, len(self.times_us))
                    )
                    yield prefix + field.name, getattr(owner, field.name), want
            if owner.times_by_rank is not None:
                if len(owner.times_by_rank) != self.num_ranks:
                    has = len(owner.times_by_rank)
                    raise ValueError(f"{prefix}times_by_rank has {has} rows, {self.num_ranks} are needed")
                for rank, row in enumerate(owner.times_by_rank):
                    yield f"{prefix}times_by_rank[{rank}]", row, len(self.times_us)

    @property
    def num_layers(self) -> int:
        """Layers, L."""
        return len(self.times_us)

    @property
    def num_choices(self) -> int:
        """Choices of a layer, the problem's own numbers included."""
        return 1 + len(self.choices)

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

    @cached_property
    def items(self) -> tuple[tuple[int, int], ...]:
        """Ranges [a, b) of layers between neighbouring places where a cut may lie."""
        closed = {cut for first, last in self.together for cut in range(first + 1, last)}
        places = [cut for cut in range(self.num_layers + 1) if cut not in closed]
        return tuple(pairwise(places))

    def layer_times_us(self, rank: int, choice: int = 0) -> tuple[int, ...]:
        """Time of each layer on this rank under a choice, shape (L,)."""
        numbers = self.choices[choice - 1] if choice else self
        return numbers.times_us if numbers.times_by_rank is None else numbers.times_by_rank[rank]

    def layer_bytes(self, stage: int, choice: int = 0) -> list[int]:
        """What each layer would take on this stage under a choice, its temporaries aside; shape (L,)."""
        nothing = (0,) * self.num_layers
        held = 1 if self.in_flight is None else self.in_flight[stage]
        waiting = 0 if self.weights_in_flight is None else self.weights_in_flight[stage]
        activations, weights = self.activation_bytes, self.weight_activation_bytes
        if choice:
            activations = self.choices[choice - 1].activation_bytes
            weights = self.choices[choice - 1].weight_activation_bytes or weights
        columns = zip(*(values or nothing for values in (self.static_bytes, activations, weights)), strict=True)
        return [static + held * activation + waiting * weight for static, activation, weight in columns]

    def layer_temporaries(self, choice: int = 0) -> tuple[int, ...]:
        """`temporary_bytes` of each layer under a choice, or zeros; shape (L,)."""
        chosen = self.choices[choice - 1].temporary_bytes if choice else None
        return chosen or self.temporary_bytes or (0,) * self.num_layers

    def rank_times_us(self, cuts: Sequence[int], choices: Sequence[int] | None = None) -> list[int]:
        """Load of every rank under these S − 1 inner cuts, shape (p,); ValueError unless S non-empty stages."""
        placed = list(self._placed(cuts, choices))
        tables = {
            (rank, choice): self.layer_times_us(rank, choice)
            for rank in range(self.num_ranks)
            for choice in {0, *(choices or ())}
        }
        totals = [0] * self.num_ranks
        for stage, layer, choice in placed:
            rank = self.placement[stage]
            totals[rank] += tables[rank, choice][layer]
        return totals

    def rank_bytes(self, cuts: Sequence[int], choices: Sequence[int] | None = None) -> list[int]:
        """Memory of every rank under these cuts, shape (p,)."""
        placed = list(self._placed(cuts, choices))
        used = {0, *(choices or ())}
        sizes = {(s, choice): self.layer_bytes(s, choice) for s in range(self.num_stages) for choice in used}
        temporaries = {choice: self.layer_temporaries(choice) for choice in used}
        held, largest = [0] * self.num_ranks, [0] * self.num_ranks
        for stage, layer, choice in placed:
            rank = self.placement[stage]
            held[rank] += sizes[stage, choice][layer]
            largest[rank] = max(largest[rank], temporaries[choice][layer])
        return [a + b for a, b in zip(held, largest, strict=True)]

    def bottleneck_us(self, cuts: Sequence[int], choices: Sequence[int] | None = None) -> int:
        """The objective: load of the busiest rank."""
        return max(self.rank_times_us(cuts, choices))

    def fits(self, cuts: Sequence[int], choices: Sequence[int] | None = None) -> bool:
        """Whether no rank is over its capacity."""
        if self.capacity_bytes is None:
            return True
        return all(used <= room for used, room in zip(self.rank_bytes(cuts, choices), self.capacity_bytes, strict=True))

    def broken_rule(self, cuts: Sequence[int], choices: Sequence[int] | None = None) -> str | None:
        """What these cuts and choices break, in words: a capacity, `together` or `choose_per`; None if nothing."""
        if not self.fits(cuts, choices):
            return f"overflow a rank: {self.rank_bytes(cuts, choices)}"
        for cut in cuts:
            for first, last in self.together:
                if first < cut < last:
                    return f"separate layers [{first}, {last})"
        if self.choose_per == "stage" and choices is not None:
            for first, last in pairwise((0, *cuts, self.num_layers)):
                if len(set(choices[first:last])) > 1:
                    return f"make different choices in the stage [{first}, {last})"
        return None

    def _placed(self, cuts: Sequence[int], choices: Sequence[int] | None) -> Iterator[tuple[int, int, int]]:
        """The stage, number and choice of every layer; ValueError unless S non-empty stages and known choices."""
        bounds = (0, *cuts, self.num_layers)
        if len(bounds) != self.num_stages + 1 or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"cuts {tuple(cuts)} do not make {self.num_stages} non-empty stages")
        if choices is None:
            choices = (0,) * self.num_layers
        if len(choices) != self.num_layers or not all(0 <= choice < self.num_choices for choice in choices):
            raise ValueError(f"choices {tuple(choices)} are not {self.num_layers} numbers below {self.num_choices}")
        for stage, (first, last) in enumerate(pairwise(bounds)):
            for layer in range(first, last):
                yield stage, layer, choices[layer]


@dataclass(frozen=True)
class PartitionSolution:
    """What a backend found; `bottleneck_us` is the problem's own score of the cuts and choices."""

    status: Status
    cuts: tuple[int, ...] | None
    bottleneck_us: int | None
    lower_bound_us: int
    solver: str
    choices: tuple[int, ...] | None = None  # shape (L,), the choice of every layer; None without cuts


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
    """Cut with the named backend; auto takes the exact chain solver where it can, else CP-SAT."""
    if solver == "auto":
        solver = "cp-sat" if partition_backend("chain").why_not(problem) else "chain"
    backend = partition_backend(solver)
    obstacle = backend.why_not(problem)
    if obstacle is not None:
        raise ValueError(f"partition backend {solver!r} does not take this problem: {obstacle}")
    if len(problem.items) < problem.num_stages:
        return PartitionSolution(Status.INFEASIBLE, None, None, 0, solver)
    return backend.solve(problem, time_limit_s=time_limit_s, seed=seed)


def rescored(
    problem: StagePartition,
    cuts: Sequence[int],
    status: Status,
    lower_bound_us: int,
    solver: str,
    choices: Sequence[int] | None = None,
) -> PartitionSolution:
    """A backend's answer with the problem's own score; SolverError if it breaks the problem. None chooses 0."""
    chosen = (0,) * problem.num_layers if choices is None else tuple(choices)
    score = problem.bottleneck_us(cuts, chosen)
    broken = problem.broken_rule(cuts, chosen)
    if broken is not None:
        raise SolverError(f"{solver} returned cuts {tuple(cuts)}, choices {chosen} that {broken}")
    if status is Status.OPTIMAL:
        lower_bound_us = score
    return PartitionSolution(status, tuple(cuts), score, min(lower_bound_us, score), solver, chosen)
