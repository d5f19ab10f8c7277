"""Layers of equal numbers count as one kind: what lets a stage partition count layers instead of naming them.

All backends of solvers.partition share this view: kinds, runs of equal items (an item is a range of layers that no cut
divides), and the way back from counts to a choice for every layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from solvers.partition import StagePartition

Item = tuple[tuple[int, int], ...]  # (kind, layers of it)

LONGEST_PATTERN = 8  # items after which layers repeat: dense and mixture-of-experts layers in turn are a pattern of 2


@dataclass(frozen=True)
class Run:
    """A pattern of items, so many times in a row."""

    pattern: tuple[Item, ...]
    num_repeats: int


@dataclass(frozen=True)
class Kinds:
    """The kinds of the layers of one problem, numbered as they first appear."""

    problem: StagePartition

    @cached_property
    def of_layer(self) -> tuple[int, ...]:
        """The kind of every layer, shape (L,)."""
        problem, columns = self.problem, []
        for choice in range(problem.num_choices):
            columns += [problem.layer_times_us(rank, choice) for rank in range(problem.num_ranks)]
            if problem.capacity_bytes is not None:
                columns += [tuple(problem.layer_bytes(stage, choice)) for stage in range(problem.num_stages)]
                columns.append(problem.layer_temporaries(choice))
        number: dict[tuple[int, ...], int] = {}
        return tuple(number.setdefault(row, len(number)) for row in zip(*columns, strict=True))

    @cached_property
    def examples(self) -> tuple[int, ...]:
        """The first layer of every kind."""
        first: dict[int, int] = {}
        for layer, kind in enumerate(self.of_layer):
            first.setdefault(kind, layer)
        return tuple(first.values())

    @cached_property
    def num_layers(self) -> tuple[int, ...]:
        """How many layers every kind has."""
        return tuple(self.of_layer.count(kind) for kind in range(len(self.examples)))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The items in order, what repeats in one run; each run is as long as any that starts there."""
        items: list[Item] = []
        for first, last in self.problem.items:
            inside = self.of_layer[first:last]
            items.append(tuple((kind, inside.count(kind)) for kind in sorted(set(inside))))
        runs, start = [], 0
        while start < len(items):
            best = Run((items[start],), 1)
            for length in range(1, LONGEST_PATTERN + 1):
                pattern, repeats = items[start : start + length], 1
                while items[start + repeats * length : start + (repeats + 1) * length] == pattern:
                    repeats += 1
                if repeats > 1 and repeats * length > best.num_repeats * len(best.pattern):
                    best = Run(tuple(pattern), repeats)
            runs.append(best)
            start += best.num_repeats * len(best.pattern)
        return tuple(runs)

    @cached_property
    def options(self) -> tuple[tuple[int, ...], ...]:
        """The choices of every kind that matter: with a choice per layer, those that no other one beats in everything.

        Where two are equal the earlier one stays.
        """
        problem = self.problem
        every = tuple(range(problem.num_choices))
        if problem.choose_per == "stage":
            return (every,) * len(self.examples)
        kept = []
        for layer in self.examples:
            rows = []
            for choice in every:
                row = [problem.layer_times_us(rank, choice)[layer] for rank in range(problem.num_ranks)]
                if problem.capacity_bytes is not None:
                    row += [problem.layer_bytes(stage, choice)[layer] for stage in range(problem.num_stages)]
                    row.append(problem.layer_temporaries(choice)[layer])
                rows.append(row)
            beaten = {
                loser
                for loser in every
                for other in every
                if all(a <= b for a, b in zip(rows[other], rows[loser], strict=True))
                and (rows[other] != rows[loser] or other < loser)
            }
            kept.append(tuple(choice for choice in every if choice not in beaten))
        return tuple(kept)


def choices_of_layers(
    kinds: Kinds, cuts: Sequence[int], counts: Sequence[Mapping[tuple[int, int], int]]
) -> tuple[int, ...]:
    """The choice of every layer, shape (L,), from how many layers of each (kind, choice) every stage has.

    The first layers of a stage take the highest choices. A kind whose layers are not counted takes its first option.
    """
    chosen = [kinds.options[kind][0] for kind in kinds.of_layer]
    for (first, last), counted in zip(pairwise((0, *cuts, kinds.problem.num_layers)), counts, strict=True):
        left = {kind: sorted((k for k in counted if k[0] == kind), reverse=True) for kind, _ in counted}
        remaining = dict(counted)
        for layer in range(first, last):
            queue = left.get(kinds.of_layer[layer], [])
            while queue and not remaining[queue[0]]:
                queue.pop(0)
            if queue:
                remaining[queue[0]] -= 1
                chosen[layer] = queue[0][1]
    return tuple(chosen)
