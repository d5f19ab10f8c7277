"""Placement: where the axes of a layout lie in a hierarchy, and which block goes to which place of an uneven one.

Both problems are choices of one option each, with linear equations between them and a cost on every option
(`ChoiceProgram`), so a backend is one function. Costs are whole numbers, so every backend must prove the same optimum.

`TreePlacement`: units of level k − 1 make units of level k. Every axis gets a factor at every level; the factors of an
axis multiply to its degree, and those of a level to the level's size.

`BlockAssignment`: blocks go to places of several classes; the places of one class are interchangeable, so the program
counts them and does not name them. Pairs of blocks that talk cost what the two classes say.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import product
from math import prod
from typing import Protocol, cast

from solvers.status import SolverError, Status

Term = tuple[int, int, int]  # (choice, option, coefficient)


@dataclass(frozen=True)
class ChoiceProgram:
    """minimise the sum of the costs of one option per choice, under equations over what is chosen."""

    costs: tuple[tuple[int, ...], ...]  # costs[i][j] of option j of choice i
    equations: tuple[tuple[tuple[Term, ...], int], ...]  # (terms, right-hand side)
    num_decisions: int  # the first so many choices decide; the others follow from them
    hint: tuple[int, ...] | None = None  # options of the deciding choices to start from

    @property
    def trivial_bound(self) -> int:
        """The sum of every choice's cheapest option."""
        return sum(min(options) for options in self.costs)


@dataclass(frozen=True)
class ChoiceResult:
    """What a backend says about a program; `chosen` holds one option per choice."""

    status: Status
    chosen: tuple[int, ...] | None
    lower_bound: int


class ChoiceBackend(Protocol):
    """One way to solve choice programs."""

    NAME: str

    def solve(self, program: ChoiceProgram, *, time_limit_s: float, seed: int) -> ChoiceResult:
        """The cheapest choices found within the limit."""


PLACEMENT_BACKENDS = {"cp-sat": "solvers.placement_cp_sat", "cbc": "solvers.placement_cbc"}


def placement_backend(name: str) -> ChoiceBackend:
    """The backend of this name, loaded now; ValueError lists the known ones."""
    if name not in PLACEMENT_BACKENDS:
        raise ValueError(f"no placement backend is called {name!r}; known: {', '.join(PLACEMENT_BACKENDS)}")
    return cast(ChoiceBackend, import_module(PLACEMENT_BACKENDS[name]))


# axes in a regular hierarchy


@dataclass(frozen=True)
class Group:
    """Members that talk: all points along these axes. `costs` has an entry for every way they may lie.

    The key is how many members the group has at each level, inside out; a way that has no entry is not allowed.
    """

    axes: tuple[int, ...]
    costs: Mapping[tuple[int, ...], int]


@dataclass(frozen=True)
class TreePlacement:
    """Sizes of K levels inside out, degrees of A axes, and what groups cost. ValueError for numbers that make none."""

    sizes: tuple[int, ...]  # shape (K,)
    degrees: tuple[int, ...]  # shape (A,)
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        for name, values in (("sizes", self.sizes), ("degrees", self.degrees)):
            for index, value in enumerate(values):
                if not isinstance(value, int) or value < 1:
                    raise ValueError(f"{name}[{index}] is {value}, it must be a whole number from 1")
        for number, group in enumerate(self.groups):
            if len(set(group.axes)) < len(group.axes) or not set(group.axes) <= set(range(len(self.degrees))):
                raise ValueError(f"group {number} has axes {group.axes}; there are axes 0 to {len(self.degrees) - 1}")
            for members, cost in group.costs.items():
                if len(members) != len(self.sizes):
                    raise ValueError(f"group {number}: {members} does not have {len(self.sizes)} levels")
                if not isinstance(cost, int) or cost < 0:
                    raise ValueError(f"group {number} costs {cost} at {members}, it must be a whole number from 0")

    @cached_property
    def factorizations(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """For every axis, the ways to split its degree over the levels, each dividing the level's size."""
        return tuple(tuple(ways_to_lie(degree, self.sizes)) for degree in self.degrees)

    def members(self, group: Group, factors: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """How many members a group has at each level, shape (K,), given factors of shape (A, K)."""
        return tuple(prod(factors[axis][level] for axis in group.axes) for level in range(len(self.sizes)))

    def cost(self, factors: Sequence[Sequence[int]]) -> int | None:
        """The objective; None if a group lies in a way that is not allowed. ValueError unless levels are full."""
        if [prod(row) for row in factors] != list(self.degrees):
            raise ValueError(f"factors {factors} do not multiply to the degrees {self.degrees}")
        if [prod(column) for column in zip(*factors, strict=True)] != list(self.sizes):
            raise ValueError(f"factors {factors} do not fill levels of sizes {self.sizes}")
        costs = [group.costs.get(self.members(group, factors)) for group in self.groups]
        return None if any(cost is None for cost in costs) else sum(cost for cost in costs if cost is not None)


def ways_to_lie(degree: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Factors per level that multiply to `degree`, each dividing the size of its level."""
    if not sizes:
        if degree == 1:
            yield ()
        return
    for factor in (number for number in range(1, min(degree, sizes[0]) + 1) if degree % number == 0):
        if sizes[0] % factor == 0:
            yield from ((factor, *outer) for outer in ways_to_lie(degree // factor, sizes[1:]))


@dataclass(frozen=True)
class TreeSolution:
    """What a backend found; `cost` is the problem's own score of the factors, of shape (A, K)."""

    status: Status
    factors: tuple[tuple[int, ...], ...] | None
    cost: int | None
    lower_bound: int
    solver: str


def solve_tree(
    problem: TreePlacement,
    *,
    solver: str = "cp-sat",
    time_limit_s: float = 10.0,
    seed: int = 0,
    hint: Sequence[tuple[int, ...]] | None = None,
) -> TreeSolution:
    """Factors of least cost. Levels that the degrees cannot fill are infeasible."""
    backend = placement_backend(solver)
    program, ways = _tree_program(problem, hint)
    if prod(problem.degrees) != prod(problem.sizes) or not all(program.costs):
        return TreeSolution(Status.INFEASIBLE, None, None, 0, solver)
    found = backend.solve(program, time_limit_s=time_limit_s, seed=seed)
    if found.chosen is None:
        return TreeSolution(found.status, None, None, found.lower_bound, solver)
    factors = tuple(ways[axis][found.chosen[axis]] for axis in range(len(problem.degrees)))
    score = problem.cost(factors)
    if score is None:
        raise SolverError(f"{solver} returned factors {factors} that are not allowed")
    bound = score if found.status is Status.OPTIMAL else min(found.lower_bound, score)
    return TreeSolution(found.status, factors, score, bound, solver)


def _tree_program(
    problem: TreePlacement, hint: Sequence[tuple[int, ...]] | None
) -> tuple[ChoiceProgram, tuple[tuple[tuple[int, ...], ...], ...]]:
    """A choice per axis (its factors) and per group (its members); exponents of primes add up along both."""
    ways, num_axes = problem.factorizations, len(problem.degrees)
    costs = [(0,) * len(options) for options in ways]
    chosen_of: list[tuple[tuple[int, ...], ...]] = list(ways)
    equations: list[tuple[tuple[Term, ...], int]] = []
    levels = [(level, prime) for level, size in enumerate(problem.sizes) for prime in _primes(size)]

    def terms(choice: int, level: int, prime: int, sign: int) -> list[Term]:
        exponents = ((option, _exponent(way[level], prime)) for option, way in enumerate(chosen_of[choice]))
        return [(choice, option, sign * exponent) for option, exponent in exponents if exponent]

    for level, prime in levels:
        everywhere = [term for axis in range(num_axes) for term in terms(axis, level, prime, 1)]
        equations.append((tuple(everywhere), _exponent(problem.sizes[level], prime)))
    for group in problem.groups:
        degree = prod(problem.degrees[axis] for axis in group.axes)
        possible = tuple(way for way in ways_to_lie(degree, problem.sizes) if way in group.costs)
        costs.append(tuple(group.costs[way] for way in possible))
        chosen_of.append(possible)
        for level, prime in levels:
            both = terms(len(costs) - 1, level, prime, -1)
            both += [term for axis in group.axes for term in terms(axis, level, prime, 1)]
            if both:
                equations.append((tuple(both), 0))
    start = None if hint is None else tuple(ways[axis].index(row) for axis, row in enumerate(hint))
    return ChoiceProgram(tuple(costs), tuple(equations), num_axes, start), ways


def _primes(number: int) -> list[int]:
    found, divisor = [], 2
    while divisor * divisor <= number:
        if number % divisor == 0:
            found.append(divisor)
            number //= divisor ** _exponent(number, divisor)
        divisor += 1
    return [*found, number] if number > 1 else found


def _exponent(number: int, prime: int) -> int:
    exponent = 0
    while number % prime == 0:
        number //= prime
        exponent += 1
    return exponent


# blocks on an uneven hierarchy


@dataclass(frozen=True)
class BlockAssignment:
    """B blocks for as many places in K classes. ValueError when shapes disagree.

    `tables[t][k][l]` is what a pair of table t costs when its first block is in class k and its second in class l.
    """

    num_places: tuple[int, ...]  # shape (K,), they sum to B
    own_costs: tuple[tuple[int, ...], ...]  # shape (B, K)
    pairs: tuple[tuple[int, int, int], ...]  # (first block, second block, table)
    tables: tuple[tuple[tuple[int, ...], ...], ...]  # shape (T, K, K)

    def __post_init__(self) -> None:
        if sum(self.num_places) != self.num_blocks:
            raise ValueError(f"{self.num_blocks} blocks do not fill {sum(self.num_places)} places")
        num_classes = len(self.num_places)
        if any(len(row) != num_classes for row in self.own_costs):
            raise ValueError(f"own_costs must have a column for each of {num_classes} classes")
        if any(len(table) != num_classes or any(len(row) != num_classes for row in table) for table in self.tables):
            raise ValueError(f"every table must have {num_classes} rows and columns")
        for first, second, table in self.pairs:
            if not (0 <= first < self.num_blocks and 0 <= second < self.num_blocks and first != second):
                raise ValueError(f"pair ({first}, {second}) is not of two of the {self.num_blocks} blocks")
            if not 0 <= table < len(self.tables):
                raise ValueError(f"pair ({first}, {second}) has table {table}, there are {len(self.tables)}")

    @property
    def num_blocks(self) -> int:
        """Blocks, B."""
        return len(self.own_costs)

    def cost(self, classes: Sequence[int]) -> int:
        """The objective of a class for every block, shape (B,); ValueError if a class has too few places."""
        counts = [sum(1 for chosen in classes if chosen == kind) for kind in range(len(self.num_places))]
        if counts != list(self.num_places):
            raise ValueError(f"classes {tuple(classes)} take {counts} places of {list(self.num_places)}")
        own = sum(costs[kind] for costs, kind in zip(self.own_costs, classes, strict=True))
        return own + sum(self.tables[table][classes[a]][classes[b]] for a, b, table in self.pairs)


@dataclass(frozen=True)
class AssignmentSolution:
    """What a backend found; `cost` is the problem's own score of the class of every block, shape (B,)."""

    status: Status
    classes: tuple[int, ...] | None
    cost: int | None
    lower_bound: int
    solver: str


def solve_assignment(
    problem: BlockAssignment,
    *,
    solver: str = "cp-sat",
    time_limit_s: float = 10.0,
    seed: int = 0,
    hint: Sequence[int] | None = None,
) -> AssignmentSolution:
    """Classes of least cost; the hint, if not beaten, is the answer."""
    found = placement_backend(solver).solve(_assignment_program(problem, hint), time_limit_s=time_limit_s, seed=seed)
    known = None if hint is None else problem.cost(hint)
    classes = None if found.chosen is None else found.chosen[: problem.num_blocks]
    score = None if classes is None else problem.cost(classes)
    if known is not None and hint is not None and (score is None or known <= score):
        classes, score = tuple(hint), known
    if classes is None or score is None:
        return AssignmentSolution(found.status, None, None, found.lower_bound, solver)
    bound = score if found.status is Status.OPTIMAL else min(found.lower_bound, score)
    return AssignmentSolution(Status.OPTIMAL if bound == score else Status.FEASIBLE, classes, score, bound, solver)


def _assignment_program(problem: BlockAssignment, hint: Sequence[int] | None) -> ChoiceProgram:
    """A choice of class per block, and of a pair of classes per pair, whose rows and columns agree with the blocks."""
    kinds = range(len(problem.num_places))
    costs = list(problem.own_costs)
    equations: list[tuple[tuple[Term, ...], int]] = []
    for kind in kinds:
        equations.append((tuple((block, kind, 1) for block in range(problem.num_blocks)), problem.num_places[kind]))
    for first, second, table in problem.pairs:
        pair = len(costs)
        costs.append(tuple(problem.tables[table][a][b] for a, b in product(kinds, kinds)))
        for kind in kinds:
            row = tuple((pair, kind * len(kinds) + other, 1) for other in kinds)
            column = tuple((pair, other * len(kinds) + kind, 1) for other in kinds)
            equations.append(((*row, (first, kind, -1)), 0))
            equations.append(((*column, (second, kind, -1)), 0))
    start = None if hint is None else tuple(hint)
    return ChoiceProgram(tuple(costs), tuple(equations), problem.num_blocks, start)
