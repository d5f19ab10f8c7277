"""Placement: both backends meet one zoo, agree with enumeration on drawn instances, and are rescored."""

from itertools import permutations, product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.placement import (
    PLACEMENT_BACKENDS,
    BlockAssignment,
    Group,
    TreePlacement,
    placement_backend,
    solve_assignment,
    solve_tree,
    ways_to_lie,
)
from solvers.status import Status


def outside(cost, degree, sizes):
    """A table that asks `cost` for every doubling that is not on the innermost level."""
    return {way: cost * (prod(way[1:]) - 1) for way in ways_to_lie(degree, sizes)}


TREES = {  # name: (problem, optimum; None is infeasible)
    "the_dear_axis_goes_inside": (
        TreePlacement((2, 2), (2, 2), (Group((0,), outside(1, 2, (2, 2))), Group((1,), outside(9, 2, (2, 2))))),
        1,
    ),
    "an_axis_is_split_over_levels": (
        TreePlacement((4, 2), (8,), (Group((0,), {(4, 2): 7, (2, 4): 1}),)),
        7,  # (2, 4) does not fill the levels
    ),
    "two_axes_together_cost_less_than_apart": (
        TreePlacement(
            (4, 4),
            (2, 2, 4),
            (
                Group((0, 1), {(4, 1): 5, (2, 2): 1, (1, 4): 5}),
                Group((2,), {(4, 1): 0, (2, 2): 3, (1, 4): 0}),
            ),
        ),
        4,  # half of both inside
    ),
    "nothing_talks": (TreePlacement((6, 5), (10, 3), ()), 0),
    "one_device": (TreePlacement((1,), (1,), (Group((0,), {(1,): 3}),)), 3),
    "a_prime_that_no_degree_has": (TreePlacement((3, 2), (2, 4), ()), None),
    "levels_not_full": (TreePlacement((4, 4), (2, 4), ()), None),
    "forbidden_everywhere": (TreePlacement((2, 2), (2, 2), (Group((0,), {}),)), None),
    "forbidden_together": (
        TreePlacement((2, 2), (2, 2), (Group((0,), {(2, 1): 0}), Group((1,), {(2, 1): 0}))),
        None,
    ),
}


@pytest.mark.parametrize("solver", PLACEMENT_BACKENDS)
@pytest.mark.parametrize("name", TREES)
def test_every_backend_proves_the_known_optimum(name, solver):
    problem, want = TREES[name]
    got = solve_tree(problem, solver=solver)
    assert got.status is (Status.INFEASIBLE if want is None else Status.OPTIMAL), got
    assert got.cost == want, got
    if want is not None:
        assert got.lower_bound == want


@st.composite
def trees(draw):
    sizes = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=3)))
    degrees = [1] * draw(st.integers(1, 4))
    for size in sizes:
        for prime in (2, 2, 3):
            if size % prime == 0:
                degrees[draw(st.integers(0, len(degrees) - 1))] *= prime
                size //= prime
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        axes = draw(st.lists(st.integers(0, len(degrees) - 1), min_size=1, max_size=3, unique=True))
        ways = list(ways_to_lie(prod(degrees[axis] for axis in axes), sizes))
        kept = [way for way in ways if draw(st.integers(0, 9))]  # one in ten is forbidden
        groups.append(Group(tuple(axes), {way: draw(st.integers(0, 1000)) for way in kept}))
    return TreePlacement(sizes, tuple(degrees), tuple(groups))


def least_tree_cost(problem):
    """Least cost over all tables of factors, tried one by one."""
    levels, best = range(len(problem.sizes)), None
    rows = [
        [row for row in product(range(1, degree + 1), repeat=len(problem.sizes)) if prod(row) == degree]
        for degree in problem.degrees
    ]
    for table in product(*rows):
        if any(prod(row[level] for row in table) != problem.sizes[level] for level in levels):
            continue
        total = 0
        for group in problem.groups:
            lies = tuple(prod(table[axis][level] for axis in group.axes) for level in levels)
            if lies not in group.costs:
                break
            total += group.costs[lies]
        else:
            best = total if best is None else min(best, total)
    return best


@given(trees())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_backend_agrees_with_enumeration(problem):
    want = least_tree_cost(problem)
    for solver in PLACEMENT_BACKENDS:
        got = solve_tree(problem, solver=solver)
        assert got.status is (Status.INFEASIBLE if want is None else Status.OPTIMAL), f"{solver}: {got}"
        assert got.cost == want, f"{solver}: {got}, want {want}"


def test_a_hint_does_not_change_the_optimum():
    problem, want = TREES["the_dear_axis_goes_inside"]
    for solver in PLACEMENT_BACKENDS:
        got = solve_tree(problem, solver=solver, hint=((2, 1), (1, 2)))
        assert (got.cost, got.factors) == (want, ((1, 2), (2, 1)))


def test_16384_units_in_three_levels_are_proven():
    sizes, degrees = (8, 128, 16), (8, 2, 4, 16, 16)
    weights = {(0,): 1000, (1,): 70, (2,): 30, (1, 2): 11, (3,): 17, (1, 2, 3): 13, (4,): 2}
    groups = tuple(
        Group(
            axes,
            {
                way: weight * (way[1] - 1 + 5 * (way[2] - 1))
                for way in ways_to_lie(prod(degrees[axis] for axis in axes), sizes)
            },
        )
        for axes, weight in weights.items()
    )
    found = [solve_tree(TreePlacement(sizes, degrees, groups), solver=solver) for solver in PLACEMENT_BACKENDS]
    assert {solution.status for solution in found} == {Status.OPTIMAL}
    assert len({solution.cost for solution in found}) == 1
    assert found[0].factors[0] == (8, 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (0, 2)}, r"sizes\[0\] is 0, it must be a whole number from 1"),
        ({"degrees": (2, -1)}, r"degrees\[1\] is -1"),
        ({"groups": (Group((2,), {}),)}, "group 0 has axes .2,.; there are axes 0 to 1"),
        ({"groups": (Group((0,), {(2,): 1}),)}, "does not have 2 levels"),
        ({"groups": (Group((0,), {(2, 1): -4}),)}, "group 0 costs -4 at"),
    ],
)
def test_a_tree_with_wrong_numbers_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TreePlacement(**({"sizes": (2, 2), "degrees": (2, 2), "groups": ()} | changes))


def test_scoring_refuses_factors_that_do_not_fill_the_levels():
    problem = TreePlacement((2, 2), (2, 2), ())
    with pytest.raises(ValueError, match="do not multiply to the degrees"):
        problem.cost(((1, 1), (2, 1)))
    with pytest.raises(ValueError, match="do not fill levels of sizes"):
        problem.cost(((2, 1), (2, 1)))


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="no placement backend is called 'gurobi'; known: cp-sat, cbc"):
        placement_backend("gurobi")


# blocks on places of several classes

CHAIN = ((0, 1, 0), (1, 2, 0), (2, 3, 0))
APART = ((0, 1), (1, 0))
ASSIGNMENTS = {  # name: (problem, optimum)
    "a_chain_changes_class_once": (BlockAssignment((2, 2), ((0, 0),) * 4, CHAIN, (APART,)), 1),
    "the_odd_one_goes_to_an_end": (
        BlockAssignment((3, 1), ((0, 0),) * 4, CHAIN, (((0, 1), (1, 1)),)),
        1,
    ),
    "own_costs_pull_it_to_the_middle": (
        BlockAssignment((3, 1), ((0, 9), (0, 0), (0, 9), (0, 9)), CHAIN, (APART,)),
        2,
    ),
    "one_class": (BlockAssignment((2,), ((1,), (2,)), ((0, 1, 0),), (((5,),),)), 8),
    "nobody_talks": (BlockAssignment((1, 1), ((3, 1), (1, 3)), (), ()), 2),
}


@pytest.mark.parametrize("solver", PLACEMENT_BACKENDS)
@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_every_backend_proves_the_known_assignment(name, solver):
    problem, want = ASSIGNMENTS[name]
    got = solve_assignment(problem, solver=solver)
    assert (got.status, got.cost, got.lower_bound) == (Status.OPTIMAL, want, want), got


@st.composite
def assignments(draw):
    num_places = tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=3)))
    blocks, kinds, small = sum(num_places), len(num_places), st.integers(0, 20)
    tables = draw(st.integers(1, 2))
    drawn = st.lists(st.tuples(*[st.integers(0, blocks - 1)] * 2, st.integers(0, tables - 1)), max_size=8)
    return BlockAssignment(
        num_places,
        tuple(tuple(draw(small) for _ in range(kinds)) for _ in range(blocks)),
        tuple(pair for pair in draw(drawn) if pair[0] != pair[1]),
        tuple(tuple(tuple(draw(small) for _ in range(kinds)) for _ in range(kinds)) for _ in range(tables)),
    )


def least_assignment_cost(problem):
    """Least cost over all orders of the places, with every place named."""
    places = [kind for kind, count in enumerate(problem.num_places) for _ in range(count)]
    best = None
    for order in permutations(places):
        total = 0
        for block, kind in enumerate(order):
            total += problem.own_costs[block][kind]
        for first, second, table in problem.pairs:
            total += problem.tables[table][order[first]][order[second]]
        best = total if best is None else min(best, total)
    return best


@given(assignments())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_backend_assigns_as_well_as_enumeration(problem):
    want = least_assignment_cost(problem)
    for solver in PLACEMENT_BACKENDS:
        got = solve_assignment(problem, solver=solver)
        assert (got.status, got.cost) == (Status.OPTIMAL, want), f"{solver}: {got}, want {want}"


@pytest.mark.parametrize("solver", PLACEMENT_BACKENDS)
def test_an_assignment_without_time_answers_with_the_hint_and_a_bound(solver):
    side = 6
    pairs = [(r * side + c, r * side + c + 1, 0) for r in range(side) for c in range(side - 1)]
    pairs += [(r * side + c, (r + 1) * side + c, 0) for r in range(side - 1) for c in range(side)]
    problem = BlockAssignment((12, 12, 12), ((0, 0, 0),) * 36, tuple(pairs), (((0, 1, 1), (1, 0, 1), (1, 1, 0)),))
    hint = tuple(block // 12 for block in range(36))
    got = solve_assignment(problem, solver=solver, time_limit_s=0.01, hint=hint)
    assert got.status.has_solution
    assert got.cost <= problem.cost(hint) == 12
    assert 0 <= got.lower_bound <= got.cost


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_places": (1, 2)}, "2 blocks do not fill 3 places"),
        ({"own_costs": ((0, 0), (0,))}, "a column for each of 2 classes"),
        ({"pairs": ((0, 2, 0),)}, r"pair \(0, 2\) is not of two of the 2 blocks"),
        ({"pairs": ((0, 1, 1),)}, "has table 1, there are 1"),
        ({"tables": (((0,),),)}, "every table must have 2 rows and columns"),
    ],
)
def test_an_assignment_with_wrong_numbers_is_refused(changes, message):
    fields = {"num_places": (1, 1), "own_costs": ((0, 0), (0, 0)), "pairs": (), "tables": (APART,)}
    with pytest.raises(ValueError, match=message):
        BlockAssignment(**(fields | changes))


def test_scoring_refuses_more_blocks_than_places():
    with pytest.raises(ValueError, match=r"take \[2, 0\] places of \[1, 1\]"):
        BlockAssignment((1, 1), ((0, 0), (0, 0)), (), ()).cost((0, 0))
