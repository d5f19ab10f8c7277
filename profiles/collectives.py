"""What communication costs over a hierarchy of links: how a group of devices lies in it, and each collective's time.

A `Fabric` is a cluster as one device sees it: levels from the inside out (node, pod, cluster), each with the link a
device uses to leave the level below. A `Span` says how many members a group has at each level. Latency plus bandwidth
at every level (Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005);
the levels follow one another, as in hierarchical rings.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, log2, prod
from typing import NamedTuple, Self

from profiles.cluster import Cluster, Link

START_US = 16.0
"""From the launch of an all-gather or reduce-scatter until its first bytes move.

Fitted, with the latency of a step and `SHORT_RING`, on all-reduces of 1 MiB to 1 GiB among 2 to 8 A100 of one node.
"""

SHORT_RING = 0.36
"""A ring of n devices inside a node reaches 1 − this / n of what a long one does: fewer channels fill fewer links."""


class Span(NamedTuple):
    """How a group lies in a fabric: members in one node, nodes it has in one pod, pods. The degree is the product."""

    members: tuple[int, ...]

    @property
    def degree(self) -> int:
        """Devices of the group."""
        return prod(self.members)

    @property
    def level(self) -> int:
        """The outermost level the group crosses; -1 for one device."""
        return max((level for level, count in enumerate(self.members) if count > 1), default=-1)


@dataclass(frozen=True)
class Fabric:
    """`sizes[k]` units of level k − 1 make one unit of level k (devices in a node, nodes in a pod, pods);

    `links[k]` is what one device gets between two units of level k − 1 inside a unit of level k.
    """

    sizes: tuple[int, ...]
    links: tuple[Link, ...]

    @classmethod
    def of(cls, cluster: Cluster) -> Self:
        """The fabric of a cluster; where groups of nodes differ, the narrowest links and the smallest node."""
        inside = min((group.intra_node for group in cluster.groups), key=achieved_bytes_per_s)
        per_node = min(group.devices_per_node for group in cluster.groups)
        per_pod = min(cluster.nodes_per_pod or cluster.num_nodes, cluster.num_nodes)
        sizes, links = [per_node, per_pod], [inside, cluster.narrowest_uplink]
        if cluster.inter_pod is not None:
            sizes.append(ceil(cluster.num_nodes / per_pod))
            links.append(cluster.inter_pod)
        return cls(tuple(sizes), tuple(links))

    @cached_property
    def num_devices(self) -> int:
        """Devices, if all levels are full."""
        return prod(self.sizes)

    def span(self, degree: int, stride: int = 1) -> Span:
        """How `degree` devices lie that are `stride` apart, counted through the cluster from an aligned start.

        Where numbers do not divide, the outermost level takes the rest, rounded up.
        """
        members, left, below = [], degree, stride
        for size in self.sizes[:-1]:
            here = max(1, min(left, size // below if size % below == 0 else ceil(size / below)))
            while left % here:
                here -= 1
            members.append(here)
            left //= here
            below = max(1, ceil(below / size)) if here == 1 else max(1, ceil(below * here / size))
        members.append(left)
        return Span(tuple(members))

    def all_reduce_us(self, num_bytes: float, span: Span) -> float:
        """Sum of `num_bytes` on every device, in µs: reduce-scatter and all-gather, or a tree where that is faster."""
        ring = 2 * self.gather_us(num_bytes, span)
        if span.level <= 0:
            return ring
        return min(ring, self._tree_all_reduce_us(num_bytes, span))

    def gather_us(self, num_bytes: float, span: Span) -> float:
        """All-gather or reduce-scatter of `num_bytes` in total, in µs; 0 for one device.

        A ring through the whole group: every device passes on (n − 1) / n of the payload, at the pace of the
        slowest level it crosses, where a group with k members in a node drives k network cards at once.
        """
        if span.degree == 1:
            return 0.0
        moved = num_bytes * (span.degree - 1) / span.degree
        latency_us = START_US + sum((count - 1) * link.latency_us for count, link in self._crossed(span))
        return latency_us + moved / self._ring_bytes_per_us(span)

    def all_to_all_us(self, num_bytes: float, span: Span) -> float:
        """Every device sends `num_bytes` in equal parts to all of the group, in µs.

        The part that stays inside a level goes over that level's link; levels overlap.
        """
        if span.degree == 1:
            return 0.0
        inside, slowest, latency_us = 1, 0.0, 0.0
        for level, (count, link) in enumerate(zip(span.members, self.links, strict=True)):
            part = num_bytes * inside * (count - 1) / span.degree
            if count > 1:
                slowest = max(slowest, part / bytes_per_us(link) / self._reached(level, count))
                latency_us += link.latency_us
            inside *= count
        return latency_us + slowest

    def _reached(self, level: int, count: int) -> float:
        """Share of a device's bandwidth that goes to `count` − 1 of its peers: all of it through a switch."""
        peers = self.sizes[level] - 1
        return 1.0 if self.links[level].switched or peers < count else (count - 1) / peers

    def pass_on_us(self, num_bytes: float, span: Span) -> float:
        """Every device passes `num_bytes` to its neighbour in a ring of this span, in µs; 0 for one device."""
        if span.degree == 1:
            return 0.0
        times = []
        for level, (count, link) in enumerate(zip(span.members, self.links, strict=True)):
            if count > 1:
                times.append(link.transfer_us(num_bytes / self._reached(level, 2)))
        return max(times)

    def _crossed(self, span: Span) -> list[tuple[int, Link]]:
        return [(count, link) for count, link in zip(span.members, self.links, strict=True) if count > 1]

    def _ring_bytes_per_us(self, span: Span) -> float:
        inside, slowest = 1, float("inf")
        for level, (count, link) in enumerate(zip(span.members, self.links, strict=True)):
            if count > 1:
                share = 1 - SHORT_RING / count if level == 0 and link.switched else self._reached(level, count)
                slowest = min(slowest, inside * bytes_per_us(link) * share)
            inside *= count
        return slowest

    def _tree_all_reduce_us(self, num_bytes: float, span: Span) -> float:
        """Reduced inside the node, then over a binary tree of nodes and back: the payload crosses a card twice."""
        inside, link = span.members[0], self.links[span.level]
        nodes = span.degree // inside
        hops_us = 2 * ceil(log2(nodes)) * link.latency_us
        node = Span((inside, *[1] * (len(span.members) - 1)))
        outside = num_bytes * 2 / (inside * bytes_per_us(link))
        return hops_us + max(outside, 2 * self.gather_us(num_bytes, node))


def achieved_bytes_per_s(link: Link) -> float:
    """What large transfers get."""
    return link.bandwidth_bytes_per_s * link.efficiency


def bytes_per_us(link: Link) -> float:
    """What large transfers get, in bytes/µs."""
    return achieved_bytes_per_s(link) / 1e6
