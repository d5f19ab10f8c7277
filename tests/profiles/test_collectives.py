"""What communication costs: against measured collectives, by hand, and as laws."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles import catalog
from profiles.cluster import Cluster, Link, NodeGroup
from profiles.collectives import SHORT_RING, START_US, Fabric, Span

A100 = catalog.device("a100-80gb")
NODE = Fabric((8, 1), (A100.scale_up, A100.scale_out))
TWO_LEVELS = Fabric(
    (8, 16), (Link(bandwidth_bytes_per_s=1e11, latency_us=2), Link(bandwidth_bytes_per_s=1e10, latency_us=10))
)
MIB = 2**20


@pytest.mark.parametrize(
    ("num_devices", "payload_mib", "measured_us"),
    [  # NCCL all-reduce on A100s of one node (VIA-Research/vTrain trace a100@f8dda847)
        (2, 8, 86.9),
        (2, 64, 404.7),
        (2, 1024, 5442.8),
        (4, 8, 116.8),
        (4, 64, 543.8),
        (4, 1024, 7259.4),
        (8, 16, 232.4),
        (8, 64, 579.9),
        (8, 1024, 8193.0),
    ],
)
def test_all_reduce_in_a_node_takes_what_nccl_measured(num_devices: int, payload_mib: int, measured_us: float) -> None:
    predicted_us = NODE.all_reduce_us(payload_mib * MIB, NODE.span(num_devices))
    assert predicted_us == pytest.approx(measured_us, rel=0.09)


def test_a_gather_moves_all_but_its_own_part_at_the_pace_of_its_slowest_level() -> None:
    inside = Span((8, 1))
    share = 1 - SHORT_RING / 8
    assert TWO_LEVELS.gather_us(8e9, inside) == pytest.approx(START_US + 7 * 2 + 7e9 / (1e5 * share))
    # two members in each of four nodes drive two network cards of 1e4 bytes/us each
    across = Span((2, 4))
    assert TWO_LEVELS.gather_us(8e9, across) == pytest.approx(START_US + 1 * 2 + 3 * 10 + 7e9 / 2e4)


def test_one_device_sends_nothing() -> None:
    alone = Span((1, 1))
    assert TWO_LEVELS.gather_us(1e9, alone) == TWO_LEVELS.all_reduce_us(1e9, alone) == 0
    assert TWO_LEVELS.all_to_all_us(1e9, alone) == TWO_LEVELS.pass_on_us(1e9, alone) == 0


@pytest.mark.parametrize(
    ("degree", "stride", "members"),
    [(8, 1, (8, 1)), (16, 1, (8, 2)), (4, 8, (1, 4)), (4, 4, (2, 2)), (16, 2, (4, 4)), (3, 1, (3, 1)), (12, 2, (4, 3))],
)
def test_a_group_fills_nodes_first(degree: int, stride: int, members: tuple[int, ...]) -> None:
    assert TWO_LEVELS.span(degree, stride).members == members


@given(st.integers(1, 128), st.sampled_from([1, 2, 4, 8, 16]))
@settings(derandomize=True, deadline=None)
def test_the_members_of_a_span_multiply_to_its_degree(degree: int, stride: int) -> None:
    assert TWO_LEVELS.span(degree, stride).degree == degree


@given(st.floats(0, 1e10), st.floats(0, 1e10), st.sampled_from([2, 4, 8, 16, 64]))
@settings(derandomize=True, deadline=None)
def test_more_bytes_take_more_time_and_two_messages_more_than_one(one: float, two: float, degree: int) -> None:
    span = TWO_LEVELS.span(degree)
    for cost in (TWO_LEVELS.gather_us, TWO_LEVELS.all_reduce_us, TWO_LEVELS.all_to_all_us, TWO_LEVELS.pass_on_us):
        together = cost(one + two, span)
        assert max(cost(one, span), cost(two, span)) <= together * (1 + 1e-9)
        assert together <= (cost(one, span) + cost(two, span)) * (1 + 1e-9)


def test_small_all_reduces_over_many_nodes_go_by_tree() -> None:
    fabric = Fabric((8, 512), TWO_LEVELS.links)
    span = fabric.span(4096)
    assert fabric.all_reduce_us(1e3, span) < 2 * fabric.gather_us(1e3, span) / 10
    assert fabric.all_reduce_us(1e12, span) == pytest.approx(2 * fabric.gather_us(1e12, span), rel=0.02)


def test_tokens_for_experts_leave_a_node_in_the_share_of_experts_outside() -> None:
    # 16 experts on two nodes: half of what a device sends goes over its network card
    span = TWO_LEVELS.span(16)
    assert TWO_LEVELS.all_to_all_us(1e9, span) == pytest.approx(2 + 10 + 0.5e9 / 1e4)


def test_islands_are_a_level_of_their_own() -> None:
    group = NodeGroup(device=A100, num_nodes=4, devices_per_node=4, intra_node=A100.scale_up)
    pcie = Link(bandwidth_bytes_per_s=2.5e10, latency_us=10)
    cluster = Cluster(
        name="islands", groups=(group,), inter_node=pcie, nodes_per_pod=2, inter_pod=A100.scale_out, source="a test"
    )
    fabric = Fabric.of(cluster)
    assert fabric.sizes == (4, 2, 2)
    assert fabric.span(8).members == (4, 2, 1)
    assert fabric.all_reduce_us(1e8, fabric.span(8)) > 1.5 * NODE.all_reduce_us(1e8, NODE.span(8))


@pytest.mark.parametrize(
    ("device", "num_devices", "measured_bytes_per_s"),  # of large all-reduces: bytes / time × 2 (n − 1) / n
    [
        ("v100-32gb", 2, 22.6e9),  # vTrain, trace of V100
        ("v100-32gb", 3, 45.1e9),
        ("v100-32gb", 8, 134.5e9),
        ("mi300x", 2, 47.7e9),  # ml-engineering, network page
        ("mi300x", 8, 312.9e9),
    ],
)
def test_devices_without_a_switch_have_the_links_to_their_peers_only(
    device: str, num_devices: int, measured_bytes_per_s: float
) -> None:
    spec = catalog.device(device)
    fabric = Fabric((8, 1), (spec.scale_up, spec.scale_out))
    time_us = fabric.all_reduce_us(2**32, fabric.span(num_devices))
    assert 2**32 / time_us * 1e6 * 2 * (num_devices - 1) / num_devices == pytest.approx(measured_bytes_per_s, rel=0.15)


def test_a_pair_without_a_switch_is_as_fast_as_its_part_of_the_links() -> None:
    wide = Link(bandwidth_bytes_per_s=7e9, latency_us=1.0)
    narrow = wide.model_copy(update={"switched": False})
    through, between = (Fabric((8, 1), (link, wide)) for link in (wide, narrow))
    span = through.span(8)
    assert through.pass_on_us(7e6, span) == pytest.approx(1 + 1000)
    assert between.pass_on_us(7e6, span) == pytest.approx(1 + 7000)
    assert between.all_to_all_us(8e6, span) == through.all_to_all_us(8e6, span) == pytest.approx(1 + 1000)
