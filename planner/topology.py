"""Where the (dp, pp, cp, ep, tp) coordinates of a layout lie on the devices of a cluster, by integer program.

Global ranks are numbered ((pp · dp + d) · cp + c) · tp + t. The dp × cp copies of a pipeline rank count with cp
fastest; consecutive copies make an expert group (ep) and a ZeRO shard group, copies that many apart the groups across
those, as in `Spans.packed`. So that all of these are whole, the copies are cut into axes where those groups end. Each
axis then gets a factor at every level of the cluster (`solvers.placement.TreePlacement`), alike everywhere.

Levels must be regular: a node counts as its greatest part common to all nodes, a pod as the greatest common to all
pods, or all stretches of one device kind in pods. That takes some fast links for slow ones and never the reverse.

Nodes that differ in device or uplink come last (`planner.topology_nodes`): which block of the layout is on which.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby, pairwise
from math import gcd, inf, isfinite, prod
from typing import Self

import numpy as np

from planner.layout import Candidate
from planner.topology_nodes import assign_blocks, unmixed_factors
from planner.topology_text import explain
from planner.traffic import Spans
from profiles.cluster import Cluster
from profiles.collectives import Fabric, Span
from solvers.placement import Group, TreePlacement, TreeSolution, solve_tree, ways_to_lie
from solvers.status import Status

AXES = ("tp", "cp", "ep", "dp", "pp")
GROUPS = tuple(field.name for field in fields(Spans))

_RESOLUTION = 10_000_000  # integer costs of the program: the usual order costs this much, and no answer costs more
_NODES_SHARE = 0.25  # of the time limit; what is not found in it is seldom found

CostTable = dict[tuple[int, ...], float]  # members per level: µs per step
Factors = tuple[tuple[int, ...], ...]  # per axis and level


@dataclass(frozen=True)
class Placed:
    """A layout on devices, what its groups cost there, and a bound on what they cost anywhere.

    The bound is over all placements that lie alike everywhere and mix no device kinds in a pipeline rank if they need
    not. Status: FEASIBLE when a limit stopped a proof, or when groups overlap so that only the usual order is known.
    """

    devices: tuple[int, ...]  # device index of every global rank, shape (num_devices,)
    spans: Spans
    explanation: tuple[str, ...]
    cost_us: float  # per step, as the caller's costs say
    lower_bound_us: float
    status: Status


@dataclass(frozen=True)
class Axes:
    """A layout as axes of a tree placement: tp, then the parts of the copies from fastest to slowest, then pp."""

    degrees: tuple[int, ...]
    of_group: dict[str, tuple[int, ...]]  # axes of every field of Spans
    data: tuple[int, ...]  # axes of the dp dimension

    @classmethod
    def of(cls, candidate: Candidate) -> Self | None:
        """None where the groups of copies end at numbers that do not divide one another."""
        copies, ep, shard = candidate.copies, candidate.ep, candidate.shard_degree
        expert_shard = candidate.expert_shard_degree
        ends = sorted({1, candidate.cp, ep, shard, ep * expert_shard, copies})
        if any(after % before for before, after in pairwise(ends)):
            return None
        degrees = (candidate.tp, *(after // before for before, after in pairwise(ends)), candidate.pp)

        def between(first: int, last: int) -> tuple[int, ...]:
            return tuple(range(1 + ends.index(first), 1 + ends.index(last)))

        of_group = {
            "tp": (0,),
            "cp": between(1, candidate.cp),
            "ep": between(1, ep),
            "shard": between(1, shard),
            "replicas": between(shard, copies),
            "expert_shard": between(ep, ep * expert_shard),
            "expert_replicas": between(ep * expert_shard, copies),
            "pp": (len(degrees) - 1,),
        }
        return cls(degrees, of_group, between(candidate.cp, copies))

    def members(self, axes: Sequence[int], factors: Factors) -> tuple[int, ...]:
        """Members per level of a group along these axes."""
        return tuple(prod(factors[axis][level] for axis in axes) for level in range(len(factors[0])))

    def spans(self, factors: Factors) -> Spans:
        """How every group lies."""
        return Spans(**{name: Span(self.members(axes, factors)) for name, axes in self.of_group.items()})


def place(
    candidate: Candidate,
    cluster: Cluster,
    costs: Mapping[str, Callable[[Span], float]],
    *,
    solver: str = "cp-sat",
    time_limit_s: float = 2.0,
    seed: int = 0,
) -> Placed:
    """The placement of least cost.

    `costs` maps names of `GROUPS` to the µs per step that a group's traffic takes if it lies as the span says, over a
    `Fabric.of(cluster)`; infinity rules a way out, a name left out costs nothing. Where nothing is better, the answer
    is the usual order: tp innermost, then cp, dp and pp. Never dearer than `Spans.packed` where the cluster's levels
    divide evenly. ValueError if the candidate does not use all devices, or for a cost that is unknown or negative.
    """
    used = candidate.num_devices
    if used != cluster.num_devices:
        raise ValueError(f"the candidate has {used} devices, cluster {cluster.name!r} has {cluster.num_devices}")
    unknown = sorted(set(costs) - set(GROUPS))
    if unknown:
        raise ValueError(f"no group is called {unknown[0]!r}; known: {', '.join(GROUPS)}")
    axes, sizes = Axes.of(candidate), level_sizes(cluster)
    if axes is None:
        return _usual_order(candidate, cluster, costs, sizes)
    tables = {
        name: _cost_table(name, costs, prod(axes.degrees[a] for a in axes.of_group[name]), sizes) for name in GROUPS
    }
    usual = usual_factors(axes.degrees, sizes)
    allowed = dict(tables)
    pipelines = unmixed_factors(cluster, candidate.pp, sizes)
    if pipelines is not None:
        allowed["pp"] = {way: cost for way, cost in tables["pp"].items() if way[-1] in pipelines}
    factors, bound_us, status = _solve(axes, sizes, allowed, usual, solver=solver, time_limit_s=time_limit_s, seed=seed)
    spans = axes.spans(factors)
    us_of = {name: tables[name].get(getattr(spans, name).members, inf) for name in GROUPS}
    weights = [sum(us_of[name] for name in GROUPS if axis in axes.of_group[name]) for axis in range(len(factors))]
    outermost, share_s = [row[-1] for row in factors], time_limit_s * _NODES_SHARE
    blocks, proven = assign_blocks(cluster, outermost, weights, solver=solver, time_limit_s=share_s, seed=seed)
    devices = _devices(factors, np.asarray(blocks)).tolist()
    usual_spans = axes.spans(usual)
    usual_us_of = {name: tables[name].get(getattr(usual_spans, name).members, inf) for name in GROUPS}
    text = explain(
        candidate,
        cluster,
        sizes,
        devices,
        lies={**_named(spans), "dp": Span(axes.members(axes.data, factors))},
        usual={**_named(usual_spans), "dp": Span(axes.members(axes.data, usual))},
        us_of=us_of,
        usual_us_of=usual_us_of,
    )
    if status is Status.OPTIMAL and not proven:
        status = Status.FEASIBLE
    cost_us = sum(us_of.values())
    return Placed(tuple(devices), spans, text, cost_us, min(bound_us, cost_us), status)


def level_sizes(cluster: Cluster) -> tuple[int, ...]:
    """The cluster as a regular tree with the levels of `Fabric.of`: units inside out, all full."""
    unit = gcd(*(group.devices_per_node for group in cluster.groups))
    num_units = cluster.num_devices // unit
    if cluster.inter_pod is None:
        return unit, num_units
    places = (
        (cluster.pod_of_node(node), _kind(cluster, node)) for node in cluster.node_of_device[::unit]
    )  # pod and kind of every unit
    stretch = gcd(*(len(list(same)) for _, same in groupby(places)))
    return unit, stretch, num_units // stretch


def usual_factors(degrees: Sequence[int], sizes: Sequence[int]) -> Factors:
    """Axes in order, each as far inside as there is room, prime by prime where they do not divide."""
    room, rows = list(sizes), []
    for degree in degrees:
        row, left = [], degree
        for level, free in enumerate(room):
            row.append(gcd(left, free))
            left //= row[-1]
            room[level] //= row[-1]
        rows.append(tuple(row))
    return tuple(rows)


def kind_of_rank(
    candidate: Candidate, cluster: Cluster, devices: Sequence[int], speed: Sequence[float]
) -> tuple[int, ...]:
    """Index into `cluster.groups` for every pipeline rank, shape (pp,), of the devices it runs on.

    Where a rank has devices of several groups, the one of least `speed`, shape (number of groups,): the others wait.
    """
    if len(speed) != len(cluster.groups):
        raise ValueError(f"{len(speed)} speeds for the {len(cluster.groups)} groups of cluster {cluster.name!r}")
    if len(devices) != cluster.num_devices or len(devices) % candidate.pp:
        raise ValueError(f"{len(devices)} devices, cluster {cluster.name!r} has {cluster.num_devices}")
    group_of_device = np.asarray(cluster.group_index_of_node)[np.asarray(cluster.node_of_device)]
    per_rank = group_of_device[np.asarray(devices)].reshape(candidate.pp, -1)
    return tuple(min(map(int, np.unique(row)), key=lambda group: (speed[group], group)) for row in per_rank)


def _kind(cluster: Cluster, node: int) -> str:
    return cluster.group_of_node(node).device.name


def _named(spans: Spans) -> dict[str, Span]:
    return {name: getattr(spans, name) for name in GROUPS}


def _cost_table(
    name: str, costs: Mapping[str, Callable[[Span], float]], degree: int, sizes: Sequence[int]
) -> CostTable:
    """What a group of this degree costs in every way it may lie; ways of infinite cost are left out."""
    table = {}
    for way in ways_to_lie(degree, sizes):
        cost_us = costs[name](Span(way)) if name in costs else 0.0
        if not cost_us >= 0:
            raise ValueError(f"{name} costs {cost_us} µs at {way}; a cost is a number from 0")
        if isfinite(cost_us):
            table[way] = cost_us
    return table


def _solve(
    axes: Axes,
    sizes: tuple[int, ...],
    tables: dict[str, CostTable],
    usual: Factors,
    *,
    solver: str,
    time_limit_s: float,
    seed: int,
) -> tuple[Factors, float, Status]:
    """Factors, a lower bound in µs, and what is proven.

    Costs are rounded down to whole parts of the usual order's cost, so a bound on them is a bound. What costs more
    than all of the usual order cannot be in a better one.
    """
    groups = {name: axes.of_group[name] for name in GROUPS if prod(axes.degrees[a] for a in axes.of_group[name]) > 1}
    constant_us = sum(next(iter(tables[name].values()), inf) for name in GROUPS if name not in groups)

    def score_us(factors: Factors) -> float:
        return sum(tables[name].get(axes.members(along, factors), inf) for name, along in groups.items())

    def program(limit_us: float) -> TreeSolution:
        scale = _RESOLUTION / limit_us
        made = [
            Group(
                along,
                {way: int(min(cost * scale, _RESOLUTION + 1)) for way, cost in tables[name].items()},
            )
            for name, along in groups.items()
        ]
        problem = TreePlacement(sizes, axes.degrees, tuple(made))
        return solve_tree(problem, solver=solver, time_limit_s=time_limit_s, seed=seed, hint=usual)

    usual_us = score_us(usual)
    limit_us = usual_us
    if not isfinite(usual_us):
        limit_us = sum(max(tables[name].values(), default=0.0) for name in groups) or 1.0
    if limit_us == 0:
        return usual, constant_us, Status.OPTIMAL
    found = program(limit_us)
    if found.status is Status.INFEASIBLE:  # the caller's costs rule everything out
        return usual, inf, found.status
    bound_us = constant_us + found.lower_bound * limit_us / _RESOLUTION
    if found.factors is None or score_us(found.factors) >= usual_us:
        return usual, bound_us, found.status if found.status is Status.OPTIMAL else Status.FEASIBLE
    return found.factors, bound_us, found.status


def _devices(
    factors: Factors, blocks: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Device of every global rank, given the block of units on every block of positions.

    Positions count with the innermost level fastest, and inside a level with the first axis fastest. Global ranks
    count with the first axis fastest, and along an axis with the innermost level fastest.
    """
    num_axes, num_levels = len(factors), len(factors[0])
    shape = [factors[axis][level] for level in reversed(range(num_levels)) for axis in reversed(range(num_axes))]
    block_size = prod(shape) // len(blocks)
    devices = (blocks[:, None] * block_size + np.arange(block_size)[None, :]).reshape(shape)
    order = [level * num_axes + axis for axis in range(num_axes) for level in range(num_levels)]
    return devices.transpose(order).ravel()


def _usual_order(
    candidate: Candidate, cluster: Cluster, costs: Mapping[str, Callable[[Span], float]], sizes: tuple[int, ...]
) -> Placed:
    """Devices in order, for groups that overlap; the bound takes every group alone at its best."""
    spans = Spans.packed(candidate, Fabric.of(cluster))
    us_of = {name: costs[name](span) if name in costs else 0.0 for name, span in _named(spans).items()}
    tables = [_cost_table(name, costs, span.degree, sizes) for name, span in _named(spans).items()]
    bound_us = sum(min(table.values(), default=inf) for table in tables)
    text = (
        f"usual order (tp, cp, dp, pp from inside out): groups of cp={candidate.cp}, ep={candidate.ep} and "
        f"shard_degree={candidate.shard_degree} overlap, so the copies cannot be cut into axes",
    )
    cost_us = sum(us_of.values())
    devices = tuple(range(cluster.num_devices))
    return Placed(devices, spans, text, cost_us, min(bound_us, cost_us), Status.FEASIBLE)
