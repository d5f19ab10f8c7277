"""A cluster of two device kinds: stages are sized to the speeds of the devices they run on."""

import pytest

from planner.jobs import prepare
from planner.layout import Pins, enumerate_space
from planner.pricing import Pricer
from planner.schedule.families import get_family
from planner.schedule.simulation import simulate
from planner.search import search
from profiles.catalog import load_cluster, model
from profiles.cluster import Cluster


@pytest.fixture(scope="module")
def machines():
    fast, slow = load_cluster("8x8xh100-sxm"), load_cluster("8x8xa100-80gb")
    return Cluster(
        name="8 H100 and 8 A100 nodes",
        groups=(*fast.groups, *slow.groups),
        inter_node=slow.inter_node,
        source="made up for this test",
    )


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_stages_are_sized_to_the_speeds_and_beat_the_best_even_cut(machines, pp):
    pins = Pins(tp=2, pp=pp, cp=1, virtual_stages=1, micro_batch_size=1, zero_stage=1, recompute="none", family="1f1b")
    job, dims = prepare(model("llama-3.1-8b"), machines, 512, 4096, None, (pins,))
    best = search(job, enumerate_space(dims, pins), pins, time_limit_s=20, seed=0).ranked[0]
    pricer, family = Pricer(job), get_family("1f1b")
    sizes = best.cut.layers_per_stage
    assert min(sizes[: pp // 2]) > max(sizes[pp // 2 :])
    least, rest = divmod(len(pricer.options(best.candidate).base), pp)
    even = [least] * pp
    for stage in range(rest):
        even[-1 - stage] += 1
    even_step_us = min(
        pricer.price_fixed(best.candidate, layers, family).step_us for layers in (even, list(reversed(even)))
    )
    assert best.step_us < 0.8 * even_step_us
    again = simulate(best.schedule, best.cut.stages)
    assert again.makespan_us == best.timeline.makespan_us
    fast, slow = best.cut.stages[0], best.cut.stages[-1]
    per_layer = [fast.forward_us / sizes[0], slow.forward_us / sizes[-1]]
    assert per_layer[1] > 1.5 * per_layer[0]


def test_the_floor_of_a_mixed_cluster_is_under_its_layouts(machines):
    pins = Pins(tp=2, cp=1, pp=(2, 4), micro_batch_size=1, zero_stage=1, recompute="none")
    job, dims = prepare(model("llama-3.1-8b"), machines, 512, 4096, None, (pins,))
    pricer = Pricer(job)
    for candidate in enumerate_space(dims, pins).candidates:
        floor = pricer.floor(candidate)
        for name in ("1f1b", "zb-h1", "interleaved-1f1b", "zb-v"):
            family = get_family(name)
            if family.supports(candidate.pp, candidate.num_microbatches, candidate.virtual_stages) is None:
                priced = pricer.price_family(candidate, family)
                if priced is not None:
                    assert priced.step_us >= floor.step_us(splits_backward=family.splits_backward) * (1 - 1e-9)
