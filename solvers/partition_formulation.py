"""Stage partition as whole variables and linear rows, by counts: what partition_cp_sat and partition_cbc both solve.

Layers repeat, so nothing says which layer is where. A cut is, for every run of repeating items, how many whole repeats
lie before it and which items of one more; a run is begun only when the one before it is through. The layers of each
kind on a stage are then differences of linear sums, and whole variables split them over the choices. The largest
temporary of a rank is the sum of the steps between its levels, with a 0-1 variable for each step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from solvers.partition import StagePartition
from solvers.partition_kinds import Kinds, choices_of_layers


@dataclass(frozen=True)
class Sum:
    """A linear sum over variables, by number."""

    factors: dict[int, int] = field(default_factory=dict)
    constant: int = 0

    def __add__(self, other: "Sum") -> "Sum":
        factors = dict(self.factors)
        for number, factor in other.factors.items():
            factors[number] = factors.get(number, 0) + factor
        return Sum(factors, self.constant + other.constant)

    def __mul__(self, factor: int) -> "Sum":
        return Sum({number: factor * old for number, old in self.factors.items()}, factor * self.constant)

    def __sub__(self, other: "Sum") -> "Sum":
        return self + other * -1

    def value(self, values: Sequence[int]) -> int:
        """The sum when the variables have these values."""
        return self.constant + sum(factor * values[number] for number, factor in self.factors.items())


@dataclass(frozen=True)
class _Taken:
    """How many layers of a kind take a choice on a stage."""

    stage: int
    kind: int
    choice: int
    count: Sum


class Formulation:
    """`variables` are (name, least, most), `rows` sums that are at most 0; minimise `bottleneck`, then `total_us`."""

    def __init__(self, problem: StagePartition) -> None:
        self.problem, self.kinds = problem, Kinds(problem)
        self.variables: list[tuple[str, int, int]] = []
        self.rows: list[Sum] = []
        self._ends: list[Sum] = []  # items before every cut
        self._taken = self._choose(self._cut())
        times = [problem.layer_times_us(r, k) for r in range(problem.num_ranks) for k in range(problem.num_choices)]
        columns = list(zip(*times, strict=True))
        least = max(max(map(min, columns)), -(-sum(map(min, columns)) // problem.num_ranks))
        self.bottleneck = self._whole("bottleneck_us", least, max(least, sum(map(max, columns))))
        self.total_us = Sum()
        for rank in range(problem.num_ranks):
            load = self._load(rank)
            self.rows.append(load - self.bottleneck)
            self.total_us += load
            if problem.capacity_bytes is not None:
                self._fit(rank, problem.capacity_bytes[rank])

    def read(self, values: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The cuts and the choice of every layer when the variables have these values."""
        cuts = [self.problem.items[end.value(values)][0] for end in self._ends]
        counts: list[dict[tuple[int, int], int]] = [{} for _ in range(self.problem.num_stages)]
        for one in self._taken:
            counts[one.stage][one.kind, one.choice] = one.count.value(values)
        return tuple(cuts), choices_of_layers(self.kinds, cuts, counts)

    def _whole(self, name: str, least: int, most: int) -> Sum:
        self.variables.append((name, least, most))
        return Sum({len(self.variables) - 1: 1})

    def _cut(self) -> list[list[Sum]]:
        """Layers of every kind on every stage, shape (S, kinds)."""
        runs, num_kinds = self.kinds.runs, len(self.kinds.examples)
        layers = [[Sum() for _ in range(num_kinds)]]  # of every kind before stage s
        places = [[Sum() for _ in runs]]  # items of every run before stage s
        for stage in range(1, self.problem.num_stages):
            layers.append([Sum() for _ in range(num_kinds)])
            places.append([])
            through = Sum(constant=1)  # whether the run before this one is
            for q, run in enumerate(runs):
                most = run.num_repeats
                repeats = self._whole(f"repeats{stage}_{q}", 0, most)
                one_more = [self._whole(f"item{stage}_{q}_{i}", 0, 1) for i in range(len(run.pattern) - 1)]
                begun = repeats + one_more[0] if one_more else repeats
                self.rows.append(begun - through * most)
                self.rows += [later - earlier for earlier, later in pairwise(one_more)]
                for i, item in enumerate(run.pattern):
                    before = repeats + one_more[i] if i < len(one_more) else repeats
                    for kind, count in item:
                        layers[-1][kind] += before * count
                places[-1].append(sum(one_more, repeats * len(run.pattern)))
                if most == 1:
                    through = repeats
                elif q + 1 < len(runs):
                    through = self._whole(f"through{stage}_{q}", 0, 1)
                    self.rows.append(through * most - repeats)
            self._ends.append(sum(places[-1], Sum()))
        layers.append([Sum(constant=count) for count in self.kinds.num_layers])
        places.append([Sum(constant=len(run.pattern) * run.num_repeats) for run in runs])
        for here, after in pairwise(places):
            self.rows += [a - b for a, b in zip(here, after, strict=True)]
            self.rows.append(sum(here, Sum(constant=1)) - sum(after, Sum()))  # no stage is empty
        return [[b - a for a, b in zip(here, after, strict=True)] for here, after in pairwise(layers)]

    def _choose(self, layers: list[list[Sum]]) -> list[_Taken]:
        problem, taken = self.problem, []
        alike = problem.choose_per == "stage" and bool(problem.choices)
        for stage, held in enumerate(layers):
            picks = [self._whole(f"pick{stage}_{k}", 0, 1) for k in range(problem.num_choices)] if alike else []
            if picks:
                self._equal(sum(picks, Sum()), Sum(constant=1))
            for kind, options in enumerate(self.kinds.options):
                if len(options) == 1:
                    taken.append(_Taken(stage, kind, options[0], held[kind]))
                    continue
                most = self.kinds.num_layers[kind]
                counts = [self._whole(f"taken{stage}_{kind}_{choice}", 0, most) for choice in options]
                self._equal(sum(counts, Sum()), held[kind])
                for choice, count in zip(options, counts, strict=True):
                    if picks:
                        self.rows.append(count - picks[choice] * most)
                    taken.append(_Taken(stage, kind, choice, count))
        return taken

    def _equal(self, left: Sum, right: Sum) -> None:
        self.rows += [left - right, right - left]

    def _load(self, rank: int) -> Sum:
        times = [self.problem.layer_times_us(rank, choice) for choice in range(self.problem.num_choices)]
        hosted = [one for one in self._taken if self.problem.placement[one.stage] == rank]
        return sum((one.count * times[one.choice][self.kinds.examples[one.kind]] for one in hosted), Sum())

    def _fit(self, rank: int, room: int) -> None:
        problem, used = self.problem, Sum()
        levels: dict[int, list[_Taken]] = {}
        for one in self._taken:
            if problem.placement[one.stage] == rank:
                layer = self.kinds.examples[one.kind]
                used += one.count * problem.layer_bytes(one.stage, one.choice)[layer]
                levels.setdefault(problem.layer_temporaries(one.choice)[layer], []).append(one)
        lowest, *higher = sorted(levels)
        below, reached = lowest, Sum(constant=1)
        for top in higher:
            reaches = self._whole(f"temporary{rank}_{top}", 0, 1)
            self.rows.append(reaches - reached)
            self.rows += [one.count - reaches * self.kinds.num_layers[one.kind] for one in levels[top]]
            used += reaches * (top - below)
            below, reached = top, reaches
        self.rows.append(used + Sum(constant=lowest - room))
