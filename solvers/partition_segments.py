"""What neighbouring items cost on a stage at the least: the two questions `partition_chain` asks of a problem.

`furthest(stage, first, deadline_us)` is the last end that the stage can reach from an item within deadline and memory,
`least_us(stage, first, end)` the least time of these items within the stage's memory. Whatever holds a range of items
holds every part of it, in no more time. Stages that choose alike and problems without choices need prefix sums only;
layers that choose for themselves need `partition_knapsack`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import sub
from typing import Protocol

from solvers.partition import StagePartition
from solvers.partition_kinds import Kinds, choices_of_layers
from solvers.partition_knapsack import Option, StageKnapsack


class Segments(Protocol):
    """One problem, asked about ranges [first, end) of its N items."""

    def furthest(self, stage: int, first: int, deadline_us: int) -> int:
        """The furthest end within deadline and memory; `first` if not even one item fits."""

    def least_us(self, stage: int, first: int, end: int) -> int | None:
        """The least time within memory; None if the items fit under no choices."""

    def singles_us(self, stage: int) -> Sequence[int | None]:
        """The least time of every item alone, shape (N,); None where it does not fit."""

    def choices(self, bounds: Sequence[int]) -> tuple[int, ...]:
        """The choice of every layer, shape (L,), that takes the least time on each stage of these S + 1 item bounds."""


class StageSegments:
    """All layers of a stage choose alike, or there is no choice."""

    def __init__(self, problem: StagePartition) -> None:
        self._problem = problem
        self._times = []  # of every stage and choice: prefix sums over items, and the furthest ends by memory
        for stage, rank in enumerate(problem.placement):
            room = None if problem.capacity_bytes is None else problem.capacity_bytes[rank]
            rows = []
            for choice in range(problem.num_choices):
                times = _sums(problem, problem.layer_times_us(rank, choice))
                reaches = [len(problem.items)] * len(times)
                if room is not None:
                    sums = _sums(problem, problem.layer_bytes(stage, choice))
                    temporaries = problem.layer_temporaries(choice)
                    largest = [max(temporaries[first:last]) for first, last in problem.items]
                    reaches = _reaches([b - a for a, b in pairwise(sums)], largest, room)
                rows.append((times, reaches))
            self._times.append(rows)

    def furthest(self, stage: int, first: int, deadline_us: int) -> int:
        """As `Segments`."""
        end = first
        for times, reaches in self._times[stage]:
            reached = min(bisect_right(times, times[first] + deadline_us) - 1, reaches[first])
            end = max(end, reached)
        return end

    def least_us(self, stage: int, first: int, end: int) -> int | None:
        """As `Segments`."""
        times = [times[end] - times[first] for times, reaches in self._times[stage] if reaches[first] >= end]
        return min(times, default=None)

    def singles_us(self, stage: int) -> Sequence[int | None]:
        """As `Segments`."""
        items = range(len(self._problem.items))
        if len(self._times[stage]) > 1:
            return [self.least_us(stage, item, item + 1) for item in items]
        times, reaches = self._times[stage][0]
        return [times[item + 1] - times[item] if reaches[item] > item else None for item in items]

    def choices(self, bounds: Sequence[int]) -> tuple[int, ...]:
        """As `Segments`; of equal times the first choice."""
        chosen: list[int] = []
        for stage, rows in enumerate(self._times):
            first, end = bounds[stage], bounds[stage + 1]
            least = self.least_us(stage, first, end)
            choice = next(
                number
                for number, (times, reaches) in enumerate(rows)
                if reaches[first] >= end and times[end] - times[first] == least
            )
            items = self._problem.items
            chosen += [choice] * (items[end - 1][1] - items[first][0])
        return tuple(chosen)


class LayerSegments:
    """Every layer chooses for itself."""

    def __init__(self, problem: StagePartition) -> None:
        self._kinds = Kinds(problem)
        num_kinds = len(self._kinds.examples)
        self._counts = [(0,) * num_kinds]  # layers of every kind before each item
        for first, last in problem.items:
            counts = list(self._counts[-1])
            for kind in self._kinds.of_layer[first:last]:
                counts[kind] += 1
            self._counts.append(tuple(counts))
        alike: dict[object, StageKnapsack] = {}  # stages of equal numbers share what they know
        self._stages = []
        for stage, rank in enumerate(problem.placement):
            room = None if problem.capacity_bytes is None else problem.capacity_bytes[rank]
            sizes = [problem.layer_bytes(stage, choice) for choice in range(problem.num_choices)]
            options = tuple(
                tuple(
                    Option(
                        choice,
                        problem.layer_times_us(rank, choice)[layer],
                        sizes[choice][layer],
                        problem.layer_temporaries(choice)[layer],
                    )
                    for choice in usable
                )
                for layer, usable in zip(self._kinds.examples, self._kinds.options, strict=True)
            )
            self._stages.append(alike.setdefault((options, room), StageKnapsack(options, room)))

    def furthest(self, stage: int, first: int, deadline_us: int) -> int:
        """As `Segments`."""

        def is_late(end: int) -> bool:
            least = self.least_us(stage, first, end)
            return least is None or least > deadline_us

        return first + bisect_left(range(first + 1, len(self._counts)), True, key=is_late)

    def least_us(self, stage: int, first: int, end: int) -> int | None:
        """As `Segments`."""
        found = self._stages[stage].least(tuple(map(sub, self._counts[end], self._counts[first])))
        return None if found is None else found[0]

    def singles_us(self, stage: int) -> Sequence[int | None]:
        """As `Segments`."""
        return [self.least_us(stage, item, item + 1) for item in range(len(self._counts) - 1)]

    def choices(self, bounds: Sequence[int]) -> tuple[int, ...]:
        """As `Segments`."""
        counts = []
        for stage, knapsack in enumerate(self._stages):
            here = self._counts[bounds[stage + 1]], self._counts[bounds[stage]]
            found = knapsack.least(tuple(map(sub, *here)))
            assert found is not None
            counts.append(found[1])
        cuts = [self._kinds.problem.items[bound][0] for bound in bounds[1:-1]]
        return choices_of_layers(self._kinds, cuts, counts)


def segments_of(problem: StagePartition) -> Segments:
    """The one that fits the problem."""
    return LayerSegments(problem) if problem.choices and problem.choose_per == "layer" else StageSegments(problem)


def _sums(problem: StagePartition, amounts: Sequence[int]) -> list[int]:
    """The sum of a layer's numbers before every item, and of all; shape (items + 1,)."""
    sums = list(accumulate(amounts, initial=0))
    return [0, *(sums[last] for _, last in problem.items)]


def _reaches(sizes: Sequence[int], temporaries: Sequence[int], room: int) -> list[int]:
    """For every first item, the furthest end that fits: the sum of sizes and the largest temporary. Shape (N + 1,)."""
    num_items, end, used, reaches = len(sizes), 0, 0, []
    for first in range(num_items):
        end, used = max(end, first), used if end > first else 0
        largest = max(temporaries[first:end], default=0)
        while end < num_items and used + sizes[end] + max(largest, temporaries[end]) <= room:
            largest = max(largest, temporaries[end])
            used += sizes[end]
            end += 1
        reaches.append(end)
        if end > first:
            used -= sizes[first]
    return [*reaches, num_items]
