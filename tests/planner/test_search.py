"""The search against plain enumeration: the bound is under everything there is, and what is dropped cannot fit."""

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.candidate_costs import Job
from planner.errors import InfeasibleError
from planner.layout import Dimensions, Pins, enumerate_space
from planner.plans import Precision
from planner.pricing import Pricer
from planner.schedule.actions import keep_together
from planner.schedule.families import FAMILIES
from planner.search import search
from profiles.cluster import Cluster, DeviceSpec, Link, NodeGroup
from profiles.model import LayerGroup, LayerProfile, ModelProfile, ModelSpec, Origin, Variant

FAST = Link(bandwidth_bytes_per_s=1e9, latency_us=1.0)
SLOW = Link(bandwidth_bytes_per_s=1e8, latency_us=5.0)


def cluster(num_nodes, per_node, memory_bytes):
    device = DeviceSpec(
        name="toy",
        kind="cpu",
        memory_bytes=memory_bytes,
        memory_bandwidth_bytes_per_s=1e9,
        peak_flops={"float32": 1e9},
        matmul_efficiency=1.0,
        memory_efficiency=1.0,
        kernel_launch_us=0.0,
        scale_up=FAST,
        scale_out=SLOW,
        devices_per_node=per_node,
        source="made up for this test",
    )
    group = NodeGroup(device=device, num_nodes=num_nodes, devices_per_node=per_node, intra_node=FAST)
    return Cluster(name="toys", groups=(group,), inter_node=SLOW, source="made up for this test")


def profile(rows, sizes, recompute):
    """Layers from (F, B, W, parameters, M_B, temporary) rows; costs grow with the micro-batch size."""
    variants = [
        Variant(micro_batch_size=size, sequence_length=8, dtype="float32", recompute=mode)
        for size in sizes
        for mode in recompute
    ]
    groups = []
    for index, (forward, backward, weight, parameters, held, temporary) in enumerate(rows):
        costs = []
        for variant in variants:
            n, again = variant.micro_batch_size, forward if variant.recompute == "full" else 0
            costs.append(
                LayerProfile(
                    variant=variant,
                    forward_us=float(n * forward),
                    backward_input_us=float(n * (backward + again)),
                    backward_weight_us=float(n * weight),
                    fused_backward_us=float(n * (backward + weight + again)),
                    optimizer_us=float(parameters),
                    parameter_bytes=4 * parameters,
                    activation_bytes=n * (1 if again else held),
                    weight_activation_bytes=n * (held // 2),
                    output_bytes=0 if index == len(rows) - 1 else 7 * n,
                    temporary_bytes=n * temporary,
                )
            )
        kind = "embedding" if index == 0 else "head" if index == len(rows) - 1 else "block"
        groups.append(LayerGroup(name=f"layer {index}", kind=kind, profiles=tuple(costs)))
    spec = ModelSpec(
        name="toy",
        num_layers=len(rows) - 2,
        hidden_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        ffn_size=8,
        gated_mlp=False,
        vocab_size=16,
        sequence_length=8,
        tied_embeddings=False,
        source="made up for this test",
    )
    origin = Origin(kind="analytic", device="toy", when="", how="made up")
    return ModelProfile(model=spec, layers=tuple(groups), origin=origin)


def job_of(model_profile, machines, batch, *, overlaps=False):
    return Job((model_profile,), machines, batch, 8, Precision.of("float32"), overlaps)


def orders(pricer, candidate, family_name):
    """Step times of all cuts and recomputations of one candidate under all families, if they fit: (splits, µs)."""
    options = pricer.options(candidate)
    layers = range(len(options.base))
    for family in FAMILIES.values():
        if not (family.in_layout_search if family_name == "auto" else family.name == family_name):
            continue
        if family.supports(candidate.pp, candidate.num_microbatches, candidate.virtual_stages) is not None:
            continue
        if family.splits_backward and candidate.pp == 1:
            continue
        schedule = family.generate(candidate.pp, candidate.num_microbatches, candidate.virtual_stages)
        placement = family.placement(candidate.pp, candidate.virtual_stages)
        for cuts in combinations(range(1, len(layers)), candidate.num_stages - 1):
            for choices in product(*[range(len(options.choices))] * len(layers)):
                cut = pricer.cut(candidate, cuts, placement, choices)
                priced = pricer.price(cut, keep_together(schedule, cut.splits), family.name, "test")
                if priced.fits:
                    yield family.splits_backward, priced.step_us


rows = st.lists(
    st.tuples(*[st.integers(1, 9)] * 2, st.integers(0, 9), st.integers(1, 5), st.integers(1, 40), st.integers(0, 40)),
    min_size=4,
    max_size=5,
)


@given(
    rows,
    st.sampled_from([(1, 2), (2, 2)]),
    st.integers(60, 600),
    st.sampled_from(["auto", "1f1b", "zb-v"]),
    st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_nothing_that_fits_is_under_its_floor_or_the_bound_and_the_answer_is_near_the_best(
    layers, shape, memory, family, overlaps
):
    machines = cluster(*shape, memory)
    job = job_of(profile(layers, (1, 2), ("none", "full")), machines, 4, overlaps=overlaps)
    pins = Pins(family=family, cp=1)
    space = enumerate_space(Dimensions(job.profile.model, machines, 4, 8, len(layers), (1, 2)), pins)
    pricer, best = Pricer(job), None
    for candidate in space.candidates:
        floor = pricer.floor(candidate)
        floors = {splits: floor.step_us(splits_backward=splits) for splits in (False, True)}
        assert floors[True] <= floors[False] * (1 + 1e-3)
        for splits, step_us in orders(pricer, candidate, family):
            assert step_us >= floors[splits] * (1 - 1e-9), f"{candidate} takes {step_us}, its floor is {floors[splits]}"
            assert step_us >= floor.quick_us * (1 - 1e-9)
            best = step_us if best is None else min(best, step_us)
    try:
        found = search(job, space, pins, time_limit_s=20, seed=0)
    except InfeasibleError:
        assert best is None, f"a layout of {best} µs fits"
        return
    answer = found.ranked[0]
    assert answer.fits
    assert found.lower_bound_us <= answer.step_us
    if best is not None:
        assert found.lower_bound_us <= best * (1 + 1e-9), f"bound {found.lower_bound_us} over the real {best}"
    outcomes = found.num_evaluated + found.num_pruned + found.num_unreached + sum(found.refused.values())
    assert outcomes == found.num_candidates


NASTY = {  # name: (layers, cluster, batch, bytes per µs of the links, memory)
    "traffic of the embedding hides behind blocks": (
        [(1, 1, 0, 40, 1, 0), (30, 30, 30, 1, 10, 0), (30, 30, 30, 1, 10, 0), (1, 1, 0, 1, 1, 0)],
        (2, 2),
        2,
        1,
        [10**6],
    ),
    "an embedding that computes much and keeps little": (
        [(40, 1, 1, 1, 1, 0), (5, 5, 5, 1, 40, 0), (5, 5, 5, 1, 40, 0), (1, 1, 1, 1, 1, 0)],
        (1, 2),
        4,
        10**6,
        range(160, 280, 20),
    ),
}


@pytest.mark.parametrize("name", NASTY)
def test_the_floor_holds_where_the_ends_of_the_model_are_unlike_its_blocks(name, monkeypatch):
    layers, shape, batch, bytes_per_us, memories = NASTY[name]
    link = Link(bandwidth_bytes_per_s=1e6 * bytes_per_us, latency_us=0.0)
    for constant in ("FAST", "SLOW"):
        monkeypatch.setitem(cluster.__globals__, constant, link)
    compared = 0
    for memory in memories:
        machines = cluster(*shape, memory)
        job = job_of(profile(layers, (1,), ("none",)), machines, batch, overlaps=True)
        pricer = Pricer(job)
        space = enumerate_space(Dimensions(job.profile.model, machines, batch, 8, len(layers), (1,)), Pins(cp=1))
        for candidate in space.candidates:
            floor = pricer.floor(candidate)
            for splits, step_us in orders(pricer, candidate, "auto"):
                compared += 1
                assert step_us >= floor.step_us(splits_backward=splits) * (1 - 1e-9), f"{candidate} takes {step_us}"
    assert compared > 20


def test_bounds_on_orders_count_no_copied_gradients_while_activations_are_there():
    layers = [(1, 1, 1, 5, 4, 0), *[(5, 6, 4, 5, 30, 3)] * 2, (3, 3, 3, 5, 8, 4)]
    precision = Precision(compute="float32", gradients="float32", master_weights="float64", optimizer="float64")
    compared = 0
    for memory in range(300, 700, 10):
        machines = cluster(1, 2, memory)
        job = Job((profile(layers, (1,), ("none",)),), machines, 8, 8, precision)
        pricer = Pricer(job)
        space = enumerate_space(Dimensions(job.profile.model, machines, 8, 8, 4, (1,)), Pins(pp=2, cp=1))
        for candidate in space.candidates:
            if candidate.virtual_stages > 1:
                continue
            cut = pricer.cut(candidate, (2,), (0, 1))
            for family in ("gpipe", "1f1b", "zb-h1"):
                priced = pricer.price_order(cut, FAMILIES[family])
                if priced.fits:
                    compared += 1
                    assert pricer.least_step_us(cut) <= priced.step_us * (1 + 1e-9), (memory, candidate, family)
    assert compared > 20


def test_orders_made_by_solvers_are_not_under_the_floor_of_tight_memory():
    layers = [(1, 1, 1, 2, 4, 0), *[(5, 6, 4, 5, 30, 9)] * 6, (3, 3, 3, 2, 8, 4)]
    for memory in (250, 300, 400, 800):
        machines = cluster(1, 2, memory)
        job = job_of(profile(layers, (1,), ("none", "full")), machines, 8)
        space = enumerate_space(Dimensions(job.profile.model, machines, 8, 8, 8, (1,)), Pins(pp=2, cp=1))
        pricer = Pricer(job)
        for candidate in space.candidates:
            floor_us = pricer.floor(candidate).step_us(splits_backward=True)
            placement = tuple(range(2)) * candidate.virtual_stages
            cuts = pricer.even_cuts(candidate, placement, splits_backward=True)
            cut = pricer.cut(candidate, cuts, placement)
            priced, _ = pricer.solve_order(cut, solver="list-scheduling", time_limit_s=5, seed=0)
            assert priced is None or priced.step_us >= floor_us * (1 - 1e-9)


def test_the_next_best_layouts_are_as_sure_as_the_best():
    machines = cluster(2, 2, 5_000)
    job = job_of(profile([(2, 3, 2, 9, 20, 5)] * 6, (1, 2), ("none",)), machines, 8)
    space = enumerate_space(Dimensions(job.profile.model, machines, 8, 8, 6, (1, 2)), Pins(cp=1))
    pins = Pins(cp=1, excluded=(("family", "auto"),))

    def best_of_each(found):
        best = {}
        for priced in found.ranked:
            c = priced.candidate
            best.setdefault((*c.degrees, c.virtual_stages, c.micro_batch_size), priced.step_us)
        return sorted(best.values())

    few = best_of_each(search(job, space, pins, time_limit_s=20, seed=0, num_best=4))
    everything = best_of_each(search(job, space, pins, time_limit_s=20, seed=0, num_best=10**6))
    assert few[:4] == pytest.approx(everything[:4])
    families = {p.family for p in search(job, space, pins, time_limit_s=20, seed=0, num_best=10**6).ranked}
    assert "auto" not in families
    without = Pins(cp=1, excluded=(("family", "auto"), ("family", "1f1b")))
    assert "1f1b" not in {p.family for p in search(job, space, without, time_limit_s=20, seed=0, num_best=99).ranked}


def test_a_larger_device_never_makes_the_answer_worse():
    layers = [(1, 1, 1, 2, 4, 0), *[(5, 6, 4, 5, 30, 9)] * 3, (3, 3, 3, 2, 8, 40)]
    previous = float("inf")
    for memory in (150, 200, 400, 2000):
        machines = cluster(1, 2, memory)
        job = job_of(profile(layers, (1,), ("none", "full")), machines, 4)
        space = enumerate_space(Dimensions(job.profile.model, machines, 4, 8, 5, (1,)), Pins())
        try:
            step = search(job, space, Pins(), time_limit_s=20, seed=0).ranked[0].step_us
        except InfeasibleError:
            step = float("inf")
        assert step <= previous
        previous = step
    assert previous < float("inf")


def test_a_search_that_is_cut_short_says_so():
    machines = cluster(2, 4, 100_000)
    job = job_of(profile([(2, 2, 2, 2, 2, 2)] * 6, (1, 2), ("none", "full")), machines, 64)
    space = enumerate_space(Dimensions(job.profile.model, machines, 64, 8, 6, (1, 2)), Pins())
    found = search(job, space, Pins(), time_limit_s=20, seed=0)
    with_time = found.lower_bound_us / found.ranked[0].step_us
    known = found.ranked[-1:]
    hurried = search(job, space, Pins(), time_limit_s=1e-6, seed=0, known=known)
    assert hurried.limited_by_time
    assert hurried.num_unreached > 0
    assert hurried.lower_bound_us / hurried.ranked[0].step_us <= with_time
    assert search(job, space, Pins(), time_limit_s=1e-6, seed=0).ranked[0].fits  # any layout is better than none


@pytest.mark.parametrize("family", ["1f1b", "zb-h1", "gpipe", "afp", "zb-h2", "zb-v", "dualpipev", "hanayo"])
def test_a_pinned_family_is_what_comes_out(family):
    machines = cluster(1, 2, 100_000)
    job = job_of(profile([(2, 2, 2, 2, 2, 2)] * 5, (1,), ("none",)), machines, 4)
    pins = Pins(pp=2, family=family)
    space = enumerate_space(Dimensions(job.profile.model, machines, 4, 8, 5, (1,)), pins)
    assert {priced.family for priced in search(job, space, pins, time_limit_s=20, seed=0).ranked} == {family}
