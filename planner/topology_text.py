"""What a placement is, in words: one line per axis, what it gains over the usual order, and where odd nodes went."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import isfinite

import numpy as np

from planner.layout import Candidate
from profiles.cluster import Cluster
from profiles.collectives import Span, achieved_bytes_per_s

NAMES = {
    "tp": "tensor parallel",
    "cp": "context parallel",
    "ep": "expert parallel",
    "dp": "data parallel",
    "pp": "pipeline",
}
SENT_BY = {
    "tp": ("tp",),
    "cp": ("cp",),
    "ep": ("ep",),
    "dp": ("shard", "replicas", "expert_shard", "expert_replicas"),
    "pp": ("pp",),
}
_NVLINK_BYTES_PER_S = 64e9  # of one device in one direction; PCIe 5.0 ×16 has 64 GB/s, NVLink 2 of a V100 has 150


def explain(
    candidate: Candidate,
    cluster: Cluster,
    sizes: Sequence[int],
    devices: Sequence[int],
    *,
    lies: Mapping[str, Span],
    usual: Mapping[str, Span],
    us_of: Mapping[str, float],
    usual_us_of: Mapping[str, float],
) -> tuple[str, ...]:
    """Lines for people: `lies` and `usual` hold a span per axis, the other two the µs per step of every group."""
    lines = []
    for axis, name in NAMES.items():
        degree = lies[axis].degree
        if degree == 1:
            continue
        text = f"{name} {degree}: {where(lies[axis], cluster, sizes)}"
        if cluster.rails and lies[axis].level >= 1 and lies[axis].members[0] == 1:
            text += ", each on one rail"
        if lies[axis] != usual[axis]:
            text += f" (in the usual order {where(usual[axis], cluster, sizes)})"
        sent_us = sum(us_of[group] for group in SENT_BY[axis])
        lines.append(f"{text}; {_us(sent_us)} per step" if sent_us else text)
    if not lines:
        lines.append("one device holds the whole model")
    if lies != usual:
        lines.append(_difference(us_of, usual_us_of))
    return (*lines, *_kinds(candidate, cluster, devices), *_slow_nodes(candidate, cluster, devices))


def where(span: Span, cluster: Cluster, sizes: Sequence[int]) -> str:
    """How a group lies: inside one unit of a level, or over several."""
    inside, *outside = span.members
    domain = _domain(cluster, sizes[0])
    if span.level <= 0:
        return f"inside {domain} ({inside} of its {sizes[0]} devices)"
    counts = [f"{count} {unit}" for count, unit in zip(outside, _units(cluster, sizes), strict=True) if count > 1]
    across = f"across {' in each of '.join(counts)}"
    return f"{inside} in {domain}, {across}" if inside > 1 else across


def _domain(cluster: Cluster, size: int) -> str:
    """What the innermost level is called."""
    groups = cluster.groups
    linked = all(
        group.device.kind == "cuda" and group.intra_node.bandwidth_bytes_per_s > _NVLINK_BYTES_PER_S for group in groups
    )
    if any(group.devices_per_node != size for group in groups):
        return f"{size} neighbouring devices of a node"
    return "the NVLink domain" if linked else "a node"


def _units(cluster: Cluster, sizes: Sequence[int]) -> list[str]:
    whole = all(group.devices_per_node == sizes[0] for group in cluster.groups)
    names = ["nodes" if whole else f"parts of {sizes[0]} devices"]
    if len(sizes) > 2:
        is_pod = whole and sizes[1] == min(cluster.nodes_per_pod or 0, cluster.num_nodes)
        names.append("pods" if is_pod else f"stretches of {sizes[1]} {names[0]}")
    return names


def _us(time_us: float) -> str:
    if time_us >= 1e7:
        return f"{time_us / 1e6:,.1f} s"
    return f"{time_us / 1e3:,.1f} ms" if time_us >= 1e4 else f"{time_us:,.0f} µs"


def _difference(us_of: Mapping[str, float], usual_us_of: Mapping[str, float]) -> str:
    """What this placement gains over the usual order, and which axes win and lose."""
    usual = "the usual order (tensor, context, data, pipeline from inside out)"
    cost_us, usual_us = sum(us_of.values()), sum(usual_us_of.values())
    if not isfinite(usual_us):
        return f"{usual} is ruled out"
    parts = []
    for axis, groups in SENT_BY.items():
        change_us = sum(us_of[group] - usual_us_of[group] for group in groups)
        if abs(change_us) >= 0.5:
            parts.append(f"{NAMES[axis]} {_us(abs(change_us))} {'more' if change_us > 0 else 'less'}")
    if cost_us > usual_us:
        return f"against {usual}, which mixes kinds of device in pipeline ranks: {', '.join(parts)} per step"
    gain = f"{_us(usual_us - cost_us)} per step ({100 - 100 * cost_us / usual_us:.2g} %) less sent than in {usual}"
    return f"{gain}: {', '.join(parts)}"


def _kinds(candidate: Candidate, cluster: Cluster, devices: Sequence[int]) -> list[str]:
    """Which pipeline ranks are on which kind of device, where there are several."""
    names = [group.device.name for group in cluster.groups]
    if len(set(names)) == 1:
        return []
    kind_of_device = np.asarray([names[cluster.group_index_of_node[node]] for node in cluster.node_of_device])
    per_rank = kind_of_device[np.asarray(devices)].reshape(candidate.pp, -1)
    of_rank = [" and ".join(sorted(map(str, np.unique(row)))) for row in per_rank]
    parts = []
    for kind, same in groupby(range(candidate.pp), key=of_rank.__getitem__):
        ranks = list(same)
        parts.append(f"{_range(ranks)} on {kind}")
    return [f"device kinds: pipeline {', '.join(parts)}"]


def _range(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def _slow_nodes(candidate: Candidate, cluster: Cluster, devices: Sequence[int]) -> list[str]:
    """Where nodes are whose uplink is not the fastest, where the kinds of device do not say it."""
    rates = [achieved_bytes_per_s(group.uplink or cluster.inter_node) for group in cluster.groups]
    rank_of = np.empty(cluster.num_devices, dtype=np.int64)
    rank_of[np.asarray(devices)] = np.arange(cluster.num_devices) // (cluster.num_devices // candidate.pp)
    lines, first = [], 0
    for group, rate in zip(cluster.groups, rates, strict=True):
        last = first + group.num_devices
        if rate < max(rates):
            ranks = sorted(set(rank_of[first:last].tolist()))
            listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
            nodes = f"{group.num_nodes} node{'s' if group.num_nodes > 1 else ''} of {group.device.name}"
            lines.append(
                f"slow uplink: {nodes} with {rate / 1e9:.3g} of {max(rates) / 1e9:.3g} GB/s "
                f"{'are' if group.num_nodes > 1 else 'is'} in pipeline rank{'s' if len(ranks) > 1 else ''} {listed}"
            )
        first = last
    return lines
