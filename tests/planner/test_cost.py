"""Prices: sums are sums, collectives cost what rings cost, and no partition or schedule beats the floor."""

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost import Network, StepFloor, data_parallel_us, optimizer_us, stage_costs
from planner.layout import Candidate
from planner.schedule.families import FAMILIES
from planner.schedule.simulation import simulate
from profiles.catalog import load_cluster
from profiles.cluster import Link
from profiles.model import LayerProfile, Variant

VARIANT = Variant(micro_batch_size=1, sequence_length=8, dtype="float32")
LINK = Link(bandwidth_bytes_per_s=1e9, latency_us=3.0)


def layer(forward, backward, weight, *, parameters=400, output=1000):
    return LayerProfile(
        variant=VARIANT,
        forward_us=forward,
        backward_input_us=backward,
        backward_weight_us=weight,
        fused_backward_us=backward + weight,
        optimizer_us=1.0,
        parameter_bytes=parameters,
        activation_bytes=100,
        weight_activation_bytes=50,
        output_bytes=output,
    )


def candidate(pp, m, v=1, dp=1, zero=0):
    return Candidate(1, pp, dp, v, 1, m, zero, "none")


def test_stages_are_sums_of_their_layers_and_neighbours_on_one_rank_transfer_nothing():
    layers = [layer(1, 2, 3), layer(4, 5, 6), layer(7, 8, 9), layer(1, 1, 1)]
    stages = stage_costs(layers, (1, 3), (0, 0, 1), LINK)
    assert [s.forward_us for s in stages] == [1, 11, 1]
    assert [s.backward_weight_us for s in stages] == [3, 15, 1]
    assert [s.parameter_bytes for s in stages] == [400, 800, 400]
    assert [s.transfer_us for s in stages] == [0, 3.0 + 1.0, 0]
    assert [s.output_bytes for s in stages] == [1000, 1000, 0]


def test_a_ring_all_reduce_moves_twice_n_minus_1_over_n():
    assert LINK.all_reduce_us(4e6, 4) == pytest.approx(2 * 3 * (3.0 + 1000.0))
    assert LINK.all_reduce_us(4e6, 1) == 0


def test_zero_1_replaces_the_all_reduce_by_a_reduce_scatter_and_an_all_gather_of_weights():
    whole = data_parallel_us(400, "float32", candidate(1, 1, dp=4), LINK)
    sharded = data_parallel_us(400, "float32", candidate(1, 1, dp=4, zero=1), LINK)
    assert whole == pytest.approx(sharded)  # float32: gradient and weight have one size
    halves = data_parallel_us(200, "bfloat16", candidate(1, 1, dp=4, zero=1), LINK)
    assert halves < data_parallel_us(200, "bfloat16", candidate(1, 1, dp=4), LINK)
    assert optimizer_us(8.0, candidate(1, 1, dp=4, zero=1)) == 2.0


def test_data_parallel_groups_use_all_network_cards_of_the_node_they_fill():
    cluster = load_cluster("4x8xh100-sxm")
    network = Network(cluster)
    whole_node = network.data_parallel(Candidate(1, 1, 32, 1, 1, 1, 0, "none"))
    one_per_node = network.data_parallel(Candidate(8, 1, 4, 1, 1, 1, 0, "none"))
    inside = network.data_parallel(Candidate(1, 4, 8, 1, 1, 1, 0, "none"))
    card = cluster.inter_node.bandwidth_bytes_per_s * cluster.inter_node.efficiency
    assert one_per_node.bandwidth_bytes_per_s == pytest.approx(card)
    assert whole_node.bandwidth_bytes_per_s > 4 * card
    assert inside == cluster.groups[0].intra_node


def test_neighbouring_ranks_inside_one_node_use_its_links():
    cluster = load_cluster("2x8xh100-sxm")
    network = Network(cluster)
    assert network.pipeline(Candidate(1, 2, 8, 1, 1, 1, 0, "none")) == cluster.inter_node
    alone = load_cluster("1x8xh100-sxm")
    assert Network(alone).pipeline(Candidate(2, 4, 1, 1, 1, 1, 0, "none")) == alone.groups[0].intra_node


times = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 30))


@given(st.lists(times, min_size=4, max_size=6), st.integers(2, 3), st.integers(1, 6), st.integers(0, 4000))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_no_cut_and_no_family_beats_the_floor(rows, pp, m, output):
    layers = tuple(layer(*row, output=output) for row in rows)
    for v in (1, 2):
        num_stages = pp * v
        if num_stages > len(layers):
            continue
        floor = StepFloor(layers, candidate(pp, m, v), "float32", LINK, LINK)
        for family in FAMILIES.values():
            if family.supports(pp, m, v) is not None:
                continue
            least = floor.pipeline_us(splits_backward=family.splits_backward)
            schedule = family.generate(pp, m, v)
            placement = family.placement(pp, v)
            for cuts in combinations(range(1, len(layers)), num_stages - 1):
                got = simulate(schedule, stage_costs(layers, cuts, placement, LINK)).makespan_us
                assert got >= least * (1 - 1e-9), f"{family.name} v={v} cuts {cuts}: {got} under the floor {least}"


@given(st.lists(times, min_size=2, max_size=5), st.integers(1, 3))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_what_follows_the_pipeline_is_never_below_its_floor(rows, pp):
    layers = tuple(layer(*row, parameters=400 * (1 + row[0])) for row in rows)
    if pp > len(layers):
        return
    for dp, zero in product((1, 4), (0, 1)):
        chosen = candidate(pp, 2, dp=dp, zero=zero)
        floor = StepFloor(layers, chosen, "float32", LINK, LINK).after_pipeline_us
        for cuts in combinations(range(1, len(layers)), pp - 1):
            stages = stage_costs(layers, cuts, range(pp), LINK)
            worst = max(
                data_parallel_us(s.parameter_bytes, "float32", chosen, LINK) + optimizer_us(s.optimizer_us, chosen)
                for s in stages
            )
            assert worst >= floor * (1 - 1e-9)


def brute_force_links(cluster, tp, pp, dp):
    """The worst pipeline and data-parallel bandwidth, device by device."""
    node = cluster.node_of_device
    inside = min(g.intra_node.bandwidth_bytes_per_s * g.intra_node.efficiency for g in cluster.groups)

    def outside(a, b):
        link = cluster.inter_node
        if cluster.nodes_per_pod and node[a] // cluster.nodes_per_pod != node[b] // cluster.nodes_per_pod:
            link = cluster.inter_pod
        return link.bandwidth_bytes_per_s * link.efficiency

    def device(p, d, t):
        return (p * dp + d) * tp + t

    pipeline = inside
    for p, d, t in product(range(pp - 1), range(dp), range(tp)):
        a, b = device(p, d, t), device(p + 1, d, t)
        if node[a] != node[b]:
            pipeline = min(pipeline, outside(a, b))
    data = inside
    for p in range(pp):
        members = [device(p, d, 0) for d in range(dp)]
        nodes = [node[m] for m in members]
        if len(set(nodes)) > 1:
            fewest = min(nodes.count(n) for n in nodes)
            worst = min(outside(a, b) for a, b in product(members, members) if node[a] != node[b])
            data = min(data, fewest * worst)
    return pipeline, data


@pytest.mark.parametrize("name", ["3x8xa100-80gb", "2x6xh100-sxm", "mixed-h100-a100", "4x2xl40s", "pods"])
def test_links_are_those_of_the_worst_group_wherever_it_lies(name):
    if name == "pods":
        slow = Link(bandwidth_bytes_per_s=1e9, latency_us=20.0)
        cluster = load_cluster("6x2xa100-80gb").model_copy(update={"nodes_per_pod": 2, "inter_pod": slow})
    else:
        cluster = load_cluster(name)
    network = Network(cluster)
    sizes = {g.devices_per_node for g in cluster.groups}
    for tp, pp in product((1, 2, 4), (1, 2, 3, 4, 6)):
        if cluster.num_devices % (tp * pp) or any(size % tp for size in sizes):
            continue
        chosen = Candidate(tp, pp, cluster.num_devices // (tp * pp), 1, 1, 1, 0, "none")
        want = brute_force_links(cluster, tp, pp, chosen.dp)
        got = tuple(
            link.bandwidth_bytes_per_s * link.efficiency
            for link in (network.pipeline(chosen), network.data_parallel(chosen))
        )
        assert got == pytest.approx(want), chosen


@given(st.lists(times, min_size=3, max_size=5), st.integers(2, 3), st.integers(1, 5))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_no_order_beats_the_floor_that_memory_sets(rows, pp, m):
    """At exactly the room an order uses, its makespan is not under bytes × lifetime over that room."""
    layers = tuple(layer(*row) for row in rows)
    if pp > len(layers):
        return
    for name in ("1f1b", "gpipe", "zb-h1"):
        schedule = FAMILIES[name].generate(pp, m)
        for cuts in combinations(range(1, len(layers)), pp - 1):
            timeline = simulate(schedule, stage_costs(layers, cuts, range(pp), LINK))
            floor = StepFloor(
                layers, candidate(pp, m), "float32", LINK, LINK, room_bytes=sum(timeline.peak_activation_bytes)
            )
            assert timeline.makespan_us >= floor.pipeline_us(splits_backward=name == "zb-h1") * (1 - 1e-9)
