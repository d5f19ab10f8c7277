"""Layouts on the machines: what the placement program finds is priced again, and the faster price is kept."""

import pytest

from planner.jobs import prepare
from planner.layout import Pins, enumerate_space
from planner.placing import place_best, place_layout
from planner.pricing import Pricer
from planner.schedule.families import get_family
from profiles.catalog import load_cluster, model
from profiles.cluster import Link


def priced(machines, **pins):
    wanted = Pins(cp=1, micro_batch_size=1, virtual_stages=1, zero_stage=1, recompute="none", **pins)
    job, dims = prepare(model("llama-3.1-8b"), machines, 256, 4096, None, (wanted,))
    pricer = Pricer(job)
    family = get_family("1f1b")
    found = [pricer.price_family(c, family) for c in enumerate_space(dims, wanted).candidates]
    return pricer, [layout for layout in found if layout is not None]


def test_a_regular_cluster_keeps_devices_in_order():
    pricer, layouts = priced(load_cluster("4x8xh100-sxm"), tp=8, pp=1)
    placed = place_layout(pricer, layouts[0])
    assert placed.devices == tuple(range(32))
    assert placed.priced.step_us == layouts[0].step_us
    assert any("inside the NVLink domain" in note for note in placed.notes)


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_slow_links_between_pods_carry_what_is_cheapest_and_never_make_the_price_worse(pp):
    slow = Link(bandwidth_bytes_per_s=1e9, latency_us=20.0)
    machines = load_cluster("8x8xh100-sxm").model_copy(update={"nodes_per_pod": 2, "inter_pod": slow})
    pricer, layouts = priced(machines, tp=2, pp=pp)
    for layout in layouts:
        placed = place_layout(pricer, layout)
        assert sorted(placed.devices) == list(range(64))
        assert placed.priced.step_us <= layout.step_us
        again = placed.pricer.price(
            placed.priced.cut, placed.priced.schedule, placed.priced.family, placed.priced.solver
        )
        assert again.step_us == placed.priced.step_us


def test_the_best_is_chosen_where_layouts_lie():
    slow = Link(bandwidth_bytes_per_s=1e9, latency_us=20.0)
    machines = load_cluster("8x8xh100-sxm").model_copy(update={"nodes_per_pod": 2, "inter_pod": slow})
    pricer, layouts = priced(machines, tp=2, pp=(1, 2, 4))
    ranked = sorted(layouts, key=lambda layout: layout.step_us)
    best = place_best(pricer, ranked)
    assert ranked[0].candidate == best.priced.candidate
    assert best.priced.step_us == min(place_layout(pricer, layout).priced.step_us for layout in ranked[:4])
