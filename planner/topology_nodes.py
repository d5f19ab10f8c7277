"""Nodes that are not alike: which block of a layout is on which of them.

A block is a unit of the cluster's outermost level: a node, or a stretch of nodes of one kind in a pod. Blocks of nodes
with the same device, uplink and pod are interchangeable and make a class. In this order of weight, the assignment of
blocks to classes (`solvers.placement.BlockAssignment`) keeps a pipeline rank on one kind of device, keeps ranks of one
kind together in the pipeline, and keeps traffic off slow uplinks: a block talks to its neighbours along every axis,
in rings except for the pipeline, and what it says costs as much more as the link there is slower than the best one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from profiles.cluster import Cluster, Link
from profiles.collectives import achieved_bytes_per_s
from solvers.placement import BlockAssignment, solve_assignment
from solvers.status import Status

MAX_CLASSES = 8  # beyond, blocks in different pods count as one class
MAX_OPTIONS = 200_000  # pairs of classes over all pairs of blocks; beyond, blocks stay in order
_RESOLUTION = 10_000  # integer cost of the dearest axis over the best link


@dataclass(frozen=True)
class NodeClass:
    """What blocks of a class have in common."""

    kind: str  # name of the device
    uplink: Link  # the slowest in the block
    pod: int


def unmixed_factors(cluster: Cluster, pp: int, sizes: Sequence[int]) -> frozenset[int] | None:
    """Factors of pp at the outermost level with which no pipeline rank needs to mix kinds of device.

    None if there is one kind, or if every factor mixes.
    """
    counts: dict[str, int] = {}
    for group in cluster.groups:
        counts[group.device.name] = counts.get(group.device.name, 0) + group.num_devices
    if len(counts) == 1:
        return None
    block = cluster.num_devices // sizes[-1]
    fitting = frozenset(
        factor
        for factor in range(1, min(pp, sizes[-1]) + 1)
        if pp % factor == 0
        and sizes[-1] % factor == 0
        and all(count // block % (sizes[-1] // factor) == 0 for count in counts.values())
    )
    return fitting or None


def classes_of_blocks(cluster: Cluster, num_blocks: int) -> list[NodeClass]:
    """The class of every block, in the order of devices, shape (num_blocks,)."""
    size = cluster.num_devices // num_blocks
    made = []
    for first in range(0, cluster.num_devices, size):
        nodes = range(cluster.node_of_device[first], cluster.node_of_device[first + size - 1] + 1)
        uplink = min(
            (cluster.uplink_of_node(node) for node in (nodes if len(cluster.groups) > 1 else nodes[:1])),
            key=achieved_bytes_per_s,
        )
        made.append(NodeClass(cluster.group_of_node(nodes[0]).device.name, uplink, cluster.pod_of_node(nodes[0])))
    if len(set(made)) > MAX_CLASSES:
        made = [NodeClass(each.kind, each.uplink, 0) for each in made]
    return made


def assign_blocks(
    cluster: Cluster,
    factors: Sequence[int],
    weights: Sequence[float],
    *,
    solver: str,
    time_limit_s: float,
    seed: int,
) -> tuple[list[int], bool]:
    """The cluster's block for every block of the layout, and whether it is proven that none is better.

    `factors` are those of the outermost level for every axis, the pipeline last; blocks of the layout count with the
    first axis fastest. `weights` is the µs per step that each axis sends. Where nothing is better, blocks are in order.
    """
    num_blocks = prod(factors)
    in_order = list(range(num_blocks))
    if len({(group.device.name, group.uplink or cluster.inter_node) for group in cluster.groups}) == 1:
        return in_order, True
    of_block = classes_of_blocks(cluster, num_blocks)
    classes = list(dict.fromkeys(of_block))
    kinds = {each.kind for each in classes}
    given = [classes.index(each) for each in of_block]
    num_places = tuple(given.count(kind) for kind in range(len(classes)))
    per_rank = num_blocks // factors[-1]
    whole_ranks = len(classes) == len(kinds) and all(count % per_rank == 0 for count in num_places)
    if whole_ranks:  # whole pipeline ranks, of one class each
        factors, num_places = [factors[-1]], tuple(count // per_rank for count in num_places)
        weights = [weights[-1]]
        aligned = all(kind == given[block - block % per_rank] for block, kind in enumerate(given))
        hint = (given if aligned else sorted(given))[::per_rank]
    else:
        hint = given
    pairs = _neighbours(factors)
    if len(classes) == 1:
        return in_order, True
    if len(pairs) * len(classes) ** 2 > MAX_OPTIONS:
        return in_order, False
    tables = _tables(cluster, classes, weights, pairs)
    nothing = ((0,) * len(classes),) * prod(factors)
    problem = BlockAssignment(num_places, nothing, pairs, tables)
    found = solve_assignment(problem, solver=solver, time_limit_s=time_limit_s, seed=seed, hint=hint)
    assert found.classes is not None  # the hint is an answer
    repeated = per_rank if whole_ranks else 1
    wanted = [kind for kind in found.classes for _ in range(repeated)]
    free = {kind: iter([block for block in in_order if given[block] == kind]) for kind in range(len(classes))}
    return [next(free[kind]) for kind in wanted], found.status is Status.OPTIMAL


def _neighbours(factors: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Pairs of blocks that talk along each axis: the last is a line, the others are rings."""
    pairs, stride, num_blocks = [], 1, prod(factors)
    for axis, factor in enumerate(factors):
        is_line = axis == len(factors) - 1
        for block in range(num_blocks if factor > 1 else 0):
            place = block // stride % factor
            if place + 1 < factor:
                pairs.append((block, block + stride, axis))
            elif factor > 2 and not is_line:
                pairs.append((block, block - place * stride, axis))
        stride *= factor
    return tuple(pairs)


def _tables(
    cluster: Cluster, classes: Sequence[NodeClass], weights: Sequence[float], pairs: Sequence[tuple[int, int, int]]
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Cost of a pair per axis and two classes: slower links, then kinds that change, then kinds that mix."""
    order = range(len(classes))
    rate = [[_rate(cluster, classes[a], classes[b]) for b in order] for a in order]
    best = max(max(row) for row in rate)
    most = max(weights) or 1.0
    slower = [
        [[round(_RESOLUTION * weight / most * (best / rate[a][b] - 1)) for b in order] for a in order]
        for weight in weights
    ]
    change = 1 + sum(max(map(max, slower[axis])) for *_, axis in pairs)
    mix = change * (1 + len(pairs))
    for axis, a, b in product(range(len(weights)), order, order):
        if classes[a].kind != classes[b].kind:
            slower[axis][a][b] += change if axis == len(weights) - 1 else mix
    return tuple(tuple(tuple(row) for row in table) for table in slower)


def _rate(cluster: Cluster, a: NodeClass, b: NodeClass) -> float:
    links = [a.uplink, b.uplink, *([cluster.inter_pod] if cluster.inter_pod and a.pod != b.pod else [])]
    return min(map(achieved_bytes_per_s, links))
