"""Placement on clusters: groups lie as reported, costs are least, and the words say what came out."""

import re
from collections import Counter
from itertools import pairwise
from math import inf

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.layout import Candidate
from planner.topology import GROUPS, kind_of_rank, level_sizes, place
from planner.traffic import Spans
from profiles import catalog
from profiles.cluster import Cluster, Link, NodeGroup
from profiles.collectives import Fabric
from solvers.status import Status

H100, A100 = catalog.device("h100-sxm"), catalog.device("a100-80gb")
SLOW = Link(bandwidth_bytes_per_s=5e9, latency_us=10, efficiency=0.85)


def candidate(tp=1, pp=1, dp=1, cp=1, ep=1, shard_degree=1):
    return Candidate(
        tp=tp,
        pp=pp,
        dp=dp,
        virtual_stages=1,
        micro_batch_size=1,
        num_microbatches=pp,
        zero_stage=0 if shard_degree == 1 else 1,
        recompute="none",
        cp=cp,
        ep=ep,
        shard_degree=shard_degree,
    )


def group(num_nodes, device=H100, **changes):
    fields = {"devices_per_node": device.devices_per_node, "intra_node": device.scale_up}
    return NodeGroup(device=device, num_nodes=num_nodes, **(fields | changes))


def cluster(*groups, **changes):
    return Cluster(**({"name": "c", "groups": groups, "inter_node": H100.scale_out, "source": "a test"} | changes))


def traffic(fabric, tp=0.0, cp=0.0, ep=0.0, shard=0.0, replicas=0.0, pp=0.0):
    """Bytes per step of every group, priced over a fabric."""
    return {
        "tp": lambda span: fabric.all_reduce_us(tp, span),
        "cp": lambda span: fabric.gather_us(cp, span),
        "ep": lambda span: fabric.all_to_all_us(ep, span),
        "shard": lambda span: 2 * fabric.gather_us(shard, span),
        "replicas": lambda span: 2 * fabric.gather_us(replicas, span),
        "pp": lambda span: fabric.pass_on_us(pp, span),
    }


def placed(layout, machines, fabric=None, **num_bytes):
    return place(layout, machines, traffic(fabric or Fabric.of(machines), **num_bytes))


USUAL_BYTES = {"tp": 5e10, "replicas": 5e9, "shard": 5e9, "cp": 5e9, "ep": 5e9, "pp": 4e8}


def copies_of(layout, rank_pp, t):
    """Global ranks of the dp × cp copies, cp fastest."""
    c = layout
    return [((rank_pp * c.dp + d) * c.cp + k) * c.tp + t for d in range(c.dp) for k in range(c.cp)]


def groups_of(layout):
    """Global ranks of every group of every kind, from the numbering alone."""
    found = {name: [] for name in GROUPS}
    c = layout
    copies = c.dp * c.cp
    expert_shard = max(n for n in range(1, copies // c.ep + 1) if (copies // c.ep) % n == 0 and n <= c.shard_degree)
    for rank in range(c.pp):
        for copy in copies_of(layout, rank, 0):
            found["tp"].append([copy + t for t in range(c.tp)])
        for t in range(c.tp):
            ranks = copies_of(layout, rank, t)

            def every(count, stride, ranks=ranks):
                block = count * stride
                return [
                    [ranks[first + offset + i * stride] for i in range(count)]
                    for first in range(0, copies, block)
                    for offset in range(stride)
                ]

            found["cp"] += every(c.cp, 1)
            found["ep"] += every(c.ep, 1)
            found["shard"] += every(c.shard_degree, 1)
            found["replicas"] += every(copies // c.shard_degree, c.shard_degree)
            found["expert_shard"] += every(expert_shard, c.ep)
            found["expert_replicas"] += every(copies // c.ep // expert_shard, c.ep * expert_shard)
    found["pp"] = [[rank * copies * c.tp + place for rank in range(c.pp)] for place in range(copies * c.tp)]
    return found


def lies(devices, sizes):
    """Members per level of some devices, or None where they lie unevenly."""
    members, units = [], list(devices)
    for size in sizes:
        counts = set(Counter(unit // size for unit in units).values())
        if len(counts) > 1:
            return None
        members.append(counts.pop())
        units = sorted({unit // size for unit in units})
    assert len(units) == 1
    return tuple(members)


def disagreements(devices, spans, layout, sizes):
    """Groups that do not lie on these devices as their span says."""
    wrong = {}
    for name, groups in groups_of(layout).items():
        seen = {lies([devices[rank] for rank in ranks], sizes) for ranks in groups}
        if seen != {getattr(spans, name).members}:
            wrong[name] = seen
    return wrong


LAYOUTS = [  # with the nodes of 8 they are drawn for
    (candidate(tp=8, pp=2, dp=4), 8),
    (candidate(tp=2, pp=4, dp=8, shard_degree=8), 8),
    (candidate(tp=2, pp=2, dp=4, cp=4, ep=2, shard_degree=4), 8),
    (candidate(tp=4, dp=2, cp=2, ep=4, shard_degree=2), 2),
    (candidate(tp=1, pp=3, dp=16, ep=8, shard_degree=4), 6),
    (candidate(tp=2, pp=2, dp=6, cp=2, ep=6), 6),
    (candidate(tp=16, pp=2, dp=2), 8),
]


@st.composite
def costs(draw):
    """Costs that grow as a group spreads, by drawn amounts per level."""
    weights = {name: tuple(draw(st.integers(0, 50)) for _ in range(3)) for name in GROUPS}

    def of(weight):
        return lambda span: float(sum(w * (n - 1) for w, n in zip(weight, span.members, strict=False)))

    return {name: of(weight) for name, weight in weights.items()}


@given(st.sampled_from(LAYOUTS), st.booleans(), costs())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_group_lies_as_its_span_says_and_costs_no_more_than_in_the_usual_order(drawn, has_pods, cost_of):
    layout, num_nodes = drawn
    pods = {"nodes_per_pod": num_nodes // 2, "inter_pod": SLOW} if has_pods else {}
    machines = cluster(group(num_nodes), **pods)
    answer = place(layout, machines, cost_of)
    assert sorted(answer.devices) == list(range(machines.num_devices))
    sizes = (8, num_nodes // 2, 2) if has_pods else (8, num_nodes)
    assert disagreements(answer.devices, answer.spans, layout, sizes) == {}
    cost = sum(cost_of[name](getattr(answer.spans, name)) for name in GROUPS)
    assert answer.cost_us == pytest.approx(cost)
    packed = Spans.packed(layout, Fabric.of(machines))
    packed_is_valid = not disagreements(range(machines.num_devices), packed, layout, sizes)
    assert packed_is_valid or layout.dp == 6 or layout.pp == 3  # all powers of two fit
    if packed_is_valid:
        assert answer.cost_us <= sum(cost_of[name](getattr(packed, name)) for name in GROUPS) + 1e-9
    assert answer.status is Status.OPTIMAL
    assert answer.cost_us * (1 - 1e-5) - 1e-5 <= answer.lower_bound_us <= answer.cost_us
    by_cbc = place(layout, machines, cost_of, solver="cbc")
    assert by_cbc.cost_us == pytest.approx(answer.cost_us, rel=1e-5, abs=1e-5)


def test_without_costs_the_answer_is_the_usual_order():
    machines = cluster(group(8))
    layout = candidate(tp=4, pp=4, dp=4, shard_degree=4)
    answer = place(layout, machines, {})
    assert answer.devices == tuple(range(64))
    assert answer.spans == Spans.packed(layout, Fabric.of(machines))


def test_tensor_parallelism_goes_inside_the_node_and_the_pipeline_across():
    answer = placed(candidate(tp=8, pp=8, dp=8), cluster(group(64)), **USUAL_BYTES)
    assert answer.spans.tp.members == (8, 1)
    assert answer.spans.pp.members == (1, 8)
    assert answer.explanation[0].startswith("tensor parallel 8: inside the NVLink domain (8 of its 8 devices)")
    assert any(line.startswith("pipeline 8: across 8 nodes") for line in answer.explanation)


def test_what_is_left_of_a_node_goes_to_whoever_gains_most():
    machines, layout = cluster(group(4)), candidate(tp=4, pp=2, dp=4)
    much_data = placed(layout, machines, tp=5e10, replicas=5e9, pp=4e8)
    assert (much_data.spans.replicas.members, much_data.spans.pp.members) == ((2, 2), (1, 2))
    long_pipeline = placed(layout, machines, tp=5e10, replicas=5e7, pp=4e9)
    assert (long_pipeline.spans.replicas.members, long_pipeline.spans.pp.members) == ((1, 4), (2, 1))
    assert "in the usual order 2 in the NVLink domain, across 2 nodes" in " ".join(long_pipeline.explanation)
    last = long_pipeline.explanation[-1]
    assert "less sent than in the usual order" in last
    assert "data parallel" in last.split(": ")[1]
    assert last.endswith("less")


def test_tensor_parallelism_of_8_crosses_islands_of_4_and_says_so():
    machines = catalog.load_cluster("jean-zay-v100")
    answer = placed(candidate(tp=8, pp=4, dp=8), machines, **USUAL_BYTES)
    assert answer.spans.tp.members == (4, 2)
    assert answer.explanation[0].startswith("tensor parallel 8: 4 in the NVLink domain, across 2 nodes")


def test_two_islands_of_a_host_are_nodes_of_a_pod():
    pcie = Link(bandwidth_bytes_per_s=2.5e10, latency_us=5)
    machines = cluster(group(16, A100, devices_per_node=4), inter_node=pcie, nodes_per_pod=2, inter_pod=A100.scale_out)
    answer = placed(candidate(tp=4, pp=8, dp=2), machines, **USUAL_BYTES)
    assert answer.spans.tp.members == (4, 1, 1)
    assert answer.spans.replicas.members == (1, 2, 1)  # data parallel inside the host
    eight = placed(candidate(tp=8, pp=8), machines, **USUAL_BYTES)
    assert eight.spans.tp.members == (4, 2, 1)


def test_a_rack_of_72_holds_tensor_and_pipeline_parallelism():
    rack = catalog.load_cluster("gb200-nvl72")
    alone = placed(candidate(tp=8, pp=9), rack, **USUAL_BYTES)
    assert alone.explanation[0].startswith("tensor parallel 8: inside the NVLink domain (8 of its 72 devices)")
    assert any(line.startswith("pipeline 9: inside the NVLink domain") for line in alone.explanation)
    four = rack.model_copy(update={"groups": (rack.groups[0].model_copy(update={"num_nodes": 4}),)})
    answer = placed(candidate(tp=8, pp=9, dp=4), four, tp=5e10, pp=5e9, replicas=5e7)
    assert (answer.spans.tp.members, answer.spans.pp.members) == ((8, 1), (9, 1))
    assert answer.spans.replicas.members == (1, 4)


def test_pods_that_do_not_divide_the_cluster_are_cut_into_equal_stretches():
    llama = catalog.load_cluster("meta-llama3-h100")
    assert level_sizes(llama) == (8, 128, 16)  # pods of 384 nodes, the last of 128
    layout = candidate(tp=8, pp=16, dp=8, cp=16, shard_degree=128)
    answer = placed(layout, llama, **USUAL_BYTES)
    assert answer.status is Status.OPTIMAL
    assert disagreements(answer.devices, answer.spans, layout, (8, 128, 16)) == {}


# nodes that are not alike


def slow_node_cluster(before=2, after=5):
    """One node with a tenth of the uplink, and so many before and after it."""
    around = [group(count) for count in (before, after) if count]
    return cluster(*around[: bool(before)], group(1, uplink=SLOW), *around[bool(before) :])


def slow_fabric(machines):
    fabric = Fabric.of(machines)
    return Fabric(fabric.sizes, (fabric.links[0], machines.narrowest_uplink, *fabric.links[2:]))


def test_a_slow_uplink_carries_pipeline_neighbours_and_no_ring_of_a_large_model():
    machines, layout = slow_node_cluster(), candidate(tp=4, pp=8, dp=2)
    answer = placed(layout, machines, slow_fabric(machines), tp=5e10, replicas=2e9, pp=1e9)
    assert answer.spans.replicas.members == (2, 1)
    assert answer.spans.pp.members == (1, 8)
    of_slow = {answer.devices.index(device) // 8 for device in range(16, 24)}
    assert of_slow in ({0}, {7})  # one neighbour instead of two
    assert any(
        re.match(r"slow uplink: 1 node of h100-sxm with ([\d.]+) of \S+ GB/s is in", line)
        for line in answer.explanation
    )


def test_a_slow_uplink_carries_the_ring_of_a_small_model_with_large_activations():
    machines, layout = slow_node_cluster(before=1, after=0), candidate(tp=4, pp=2, dp=2)
    answer = placed(layout, machines, slow_fabric(machines), tp=5e10, replicas=1e7, pp=1e10)
    assert (answer.spans.replicas.members, answer.spans.pp.members) == ((1, 2), (2, 1))


@pytest.mark.parametrize("solver", ["cp-sat", "cbc"])
def test_pipeline_ranks_do_not_mix_kinds_of_device_when_pp_allows(solver):
    machines = cluster(group(8), group(8, A100))
    layout = candidate(tp=8, pp=4, dp=4)
    answer = place(layout, machines, traffic(Fabric.of(machines), **USUAL_BYTES), solver=solver)
    assert kind_of_rank(layout, machines, answer.devices, (2.0, 1.0)) == (0, 0, 1, 1)
    assert kind_of_rank(layout, machines, answer.devices, (1.0, 2.0)) == (0, 0, 1, 1)
    assert "device kinds: pipeline ranks 0-1 on h100-sxm, ranks 2-3 on a100-80gb" in answer.explanation


def test_pipeline_ranks_do_not_mix_kinds_even_where_mixing_sends_less():
    machines = cluster(group(8), group(8, A100))
    layout = candidate(tp=4, pp=2, dp=16)
    answer = placed(layout, machines, tp=5e10, replicas=1e6, pp=1e10)  # the pipeline would rather be in the node
    assert answer.spans.pp.members == (1, 2)
    assert kind_of_rank(layout, machines, answer.devices, (2.0, 1.0)) == (0, 1)


def test_kinds_that_alternate_in_the_cluster_are_sorted_along_the_pipeline():
    machines = cluster(*[group(1, device) for device in (H100, A100) * 4])
    layout = candidate(tp=8, pp=4, dp=2)
    answer = placed(layout, machines, **USUAL_BYTES)
    assert sorted(answer.devices) == list(range(64))
    kinds = [group % 2 for group in kind_of_rank(layout, machines, answer.devices, [1.0] * 8)]
    assert sum(a != b for a, b in pairwise(kinds)) == 1
    for rank in range(4):
        nodes = {machines.node_of_device[device] for device in answer.devices[rank * 16 : rank * 16 + 16]}
        assert len({node % 2 for node in nodes}) == 1


def test_spans_hold_where_blocks_of_nodes_change_places():
    machines = cluster(group(4, A100), group(8), group(4, A100), nodes_per_pod=8, inter_pod=SLOW)
    layout = candidate(tp=4, pp=4, dp=8, shard_degree=2)
    answer = placed(layout, machines, **USUAL_BYTES)
    assert answer.devices != tuple(range(128))
    assert disagreements(answer.devices, answer.spans, layout, level_sizes(machines)) == {}
    kinds = [kind == 1 for kind in kind_of_rank(layout, machines, answer.devices, (1.0, 2.0, 1.0))]
    assert sum(a != b for a, b in pairwise(kinds)) == 1


def test_where_kinds_must_mix_the_slowest_counts():
    machines, layout = cluster(group(2), group(2, A100)), candidate(tp=8, dp=4)
    answer = placed(layout, machines, **USUAL_BYTES)
    assert kind_of_rank(layout, machines, answer.devices, (2.0, 1.0)) == (1,)
    assert kind_of_rank(layout, machines, answer.devices, (1.0, 2.0)) == (0,)
    assert "device kinds: pipeline rank 0 on a100-80gb and h100-sxm" in answer.explanation


def test_an_uneven_share_of_kinds_mixes_as_few_ranks_as_can_be():
    machines, layout = cluster(group(3), group(5, A100)), candidate(tp=8, pp=4, dp=2)
    answer = placed(layout, machines, **USUAL_BYTES)
    of_rank = [
        {machines.node_of_device[device] < 3 for device in answer.devices[rank * 16 : rank * 16 + 16]}
        for rank in range(4)
    ]
    assert sum(len(kinds) == 2 for kinds in of_rank) == 1


def test_nodes_of_two_sizes_are_cut_into_equal_parts():
    machines = cluster(group(2), group(4, devices_per_node=4))
    assert level_sizes(machines) == (4, 8)
    answer = placed(candidate(tp=4, dp=8), machines, **USUAL_BYTES)
    for copy in range(8):
        nodes = {machines.node_of_device[device] for device in answer.devices[4 * copy : 4 * copy + 4]}
        assert len(nodes) == 1


# the rest of the contract


def test_groups_that_overlap_keep_the_usual_order_with_a_bound():
    layout, machines = candidate(tp=2, dp=8, cp=3, ep=2), cluster(group(6))
    answer = placed(layout, machines, **USUAL_BYTES)
    assert answer.devices == tuple(range(48))
    assert answer.status is Status.FEASIBLE
    assert 0 < answer.lower_bound_us <= answer.cost_us
    assert "overlap" in answer.explanation[0]


def test_costs_that_rule_everything_out_are_infeasible():
    answer = place(candidate(tp=8, dp=2), cluster(group(2)), {"tp": lambda span: inf})
    assert (answer.status, answer.cost_us) == (Status.INFEASIBLE, inf)


@pytest.mark.parametrize("solver", ["cp-sat", "cbc"])
def test_without_time_there_is_an_answer_and_a_bound(solver):
    machines = cluster(*[group(1, device) for device in (H100, A100, H100) * 4])
    layout, cost_of = candidate(tp=2, pp=4, dp=12, shard_degree=4), traffic(Fabric.of(machines), **USUAL_BYTES)
    answer = place(layout, machines, cost_of, solver=solver, time_limit_s=1e-6)
    assert answer.status.has_solution
    assert sorted(answer.devices) == list(range(96))
    assert 0 <= answer.lower_bound_us <= answer.cost_us


def test_equal_seeds_give_equal_devices():
    machines = cluster(*[group(1, device) for device in (H100, A100) * 4])
    layout = candidate(tp=2, pp=4, dp=8, shard_degree=4)
    assert placed(layout, machines, **USUAL_BYTES) == placed(layout, machines, **USUAL_BYTES)


def test_one_device_is_placed():
    answer = place(candidate(), cluster(group(1, devices_per_node=1)), {})
    assert (answer.devices, answer.explanation) == ((0,), ("one device holds the whole model",))


@pytest.mark.parametrize(
    ("layout", "cost_of", "message"),
    [
        (candidate(tp=8), {}, "the candidate has 8 devices, cluster 'c' has 16"),
        (candidate(tp=8, dp=2), {"zero": lambda span: 1.0}, "no group is called 'zero'; known: tp, cp"),
        (candidate(tp=8, dp=2), {"tp": lambda span: -1.0}, r"tp costs -1.0 µs at \("),
        (candidate(tp=8, dp=2), {"tp": lambda span: float("nan")}, "tp costs nan µs"),
    ],
)
def test_wrong_arguments_are_named(layout, cost_of, message):
    with pytest.raises(ValueError, match=message):
        place(layout, cluster(group(2)), cost_of)


def test_kinds_need_a_speed_for_every_group_and_all_devices():
    machines, layout = cluster(group(1), group(1, A100)), candidate(tp=8, pp=2)
    with pytest.raises(ValueError, match="1 speeds for the 2 groups"):
        kind_of_rank(layout, machines, range(16), (1.0,))
    with pytest.raises(ValueError, match="8 devices, cluster 'c' has 16"):
        kind_of_rank(layout, machines, range(8), (1.0, 1.0))


# links and graph of uneven clusters


@pytest.mark.parametrize("changes", [{}, {"nodes_per_pod": 2, "inter_pod": SLOW}])
@pytest.mark.parametrize("rails", [False, True])
def test_the_graph_honours_uplinks_rails_and_groups(changes, rails):
    fast = Link(bandwidth_bytes_per_s=1e11, latency_us=5)
    slower = Link(bandwidth_bytes_per_s=1e10, latency_us=5)
    machines = cluster(
        group(2, devices_per_node=3, uplink=fast),
        group(2, A100, devices_per_node=2, uplink=slower),
        rails=rails,
        **changes,
    )
    assert machines.link_between(0, 1) == H100.scale_up
    assert machines.link_between(0, 3) == fast
    assert machines.link_between(6, 8) == slower
    assert machines.link_between(0, 6) == (SLOW if changes else slower)
    assert machines.narrowest_uplink == slower
    graph = machines.graph()
    assert graph.nodes["device", 6] == {"group": 1, "device": "a100-80gb"}
    assert graph.nodes["node", 0] == {"group": 0}
    num_rails = (5 if changes else 3) if rails else 0
    assert sum(kind == "rail" for kind, _ in graph) == num_rails
    for a in range(machines.num_devices):
        for b in range(a):
            path = nx.shortest_path(graph, ("device", a), ("device", b))
            rates = [graph.edges[edge]["link"].bandwidth_bytes_per_s for edge in pairwise(path)]
            assert min(rates) == machines.link_between(a, b).bandwidth_bytes_per_s
    if rails:
        assert nx.shortest_path(graph, ("device", 1), ("device", 4)) == [("device", 1), ("rail", 1), ("device", 4)]


def test_a_cluster_with_rails_and_uplinks_is_saved_and_loaded(tmp_path):
    machines = cluster(group(1), group(1, A100, uplink=SLOW), rails=True)
    machines.save(tmp_path / "c.json")
    assert catalog.load_cluster(str(tmp_path / "c.json")) == machines
    answer = placed(candidate(tp=8, dp=2), machines, **USUAL_BYTES)
    assert "across 2 nodes, each on one rail" in answer.explanation[1]
