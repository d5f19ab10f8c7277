"""Stage partition with choices, ranks of their own speed and layers kept together: known optima, and enumeration."""

import random
from itertools import combinations, pairwise, product

import pytest

from solvers.partition import (
    PARTITION_BACKENDS,
    LayerChoice,
    StagePartition,
    partition_backend,
    rescored,
    solve_partition,
)
from solvers.partition_knapsack import Option, StageKnapsack
from solvers.status import SolverError, Status

RECOMPUTE = LayerChoice((2, 2, 2, 2), (0, 0, 0, 0))
CASES = {  # name: (problem, least bottleneck in us, least total time; None is infeasible)
    "memory_left_alone_recomputes_nothing": (StagePartition((1,) * 4, 2, choices=(RECOMPUTE,)), 2, 4),
    "one_layer_of_the_first_stage_recomputes": (  # held twice on stage 0: 2·2 > 3, so one of its two layers
        StagePartition((1,) * 4, 2, None, (1,) * 4, (2, 1), capacity_bytes=(3, 2), choices=(RECOMPUTE,)),
        3,  # 2+1 | 1+1, or 1 | 1+1+1 where stage 1 has no room
        5,
    ),
    "the_whole_first_stage_recomputes": (
        StagePartition(
            (1,) * 4, 2, None, (1,) * 4, (2, 1), capacity_bytes=(3, 2), choices=(RECOMPUTE,), choose_per="stage"
        ),
        4,  # 2+2 | 1+1
        6,
    ),
    "a_temporary_forbids_recomputation": (
        StagePartition(
            (1, 1), 1, None, (2, 2), capacity_bytes=(3,), choices=(LayerChoice((2, 2), (0, 0), None, (4, 4)),)
        ),
        None,
        None,
    ),
    "the_fast_rank_takes_more": (  # 3 · 1 | 1 · 3
        StagePartition((9,) * 4, 2, times_by_rank=((1,) * 4, (3,) * 4)),
        3,
        6,
    ),
    "what_belongs_together_stays": (StagePartition((1, 1, 1, 1), 2, together=((1, 4),)), 3, 4),
    "overlapping_ranges_are_one": (StagePartition((1, 1, 1, 1), 2, together=((0, 2), (1, 4))), None, None),
    "touching_ranges_may_part": (StagePartition((1, 1, 1, 1), 2, together=((0, 2), (2, 4))), 2, 4),
    "dense_and_expert_layers_in_turn": (StagePartition((1, 3) * 6, 3), 8, 24),
}


def takers(problem):
    return [name for name in PARTITION_BACKENDS if partition_backend(name).why_not(problem) is None]


def check(backend, problem, want_us, want_total_us):
    got = solve_partition(problem, solver=backend, time_limit_s=20)
    message = f"{backend}: {got}, want {want_us} us, in total {want_total_us} us: {problem}"
    assert got.status is (Status.INFEASIBLE if want_us is None else Status.OPTIMAL), message
    assert got.bottleneck_us == want_us, message
    if want_us is not None and problem.choices:
        assert sum(problem.rank_times_us(got.cuts, got.choices)) == want_total_us, message


@pytest.mark.parametrize("name", CASES)
def test_every_backend_proves_the_known_optimum(name):
    problem, want_us, want_total_us = CASES[name]
    assert enumerated(problem) == (want_us, want_total_us)
    for backend in takers(problem):
        check(backend, problem, want_us, want_total_us)


def drawn(rng):
    """A small instance with few kinds of layers, mostly one that memory binds."""
    num_layers, chunks, big = rng.randint(1, 7), rng.choice((1, 1, 2)), rng.choice((6, 6, 40, 1000))
    num_stages = rng.randint(1, min(4, num_layers + 1))
    num_ranks = -(-num_stages // chunks)
    num_kinds = rng.randint(1, 4)
    kinds = [rng.randrange(num_kinds) for _ in range(num_layers)]

    def column(most=big):
        amounts = [rng.randint(0, most) for _ in range(num_kinds)]
        return tuple(amounts[kind] for kind in kinds)

    speeds = [rng.randint(1, 5) for _ in range(num_ranks)] if rng.random() < 0.35 else None

    def by_rank(times):
        return None if speeds is None else tuple(tuple(time * speed // 2 for time in times) for speed in speeds)

    times, activations, static, temporaries = column(), column(), column(), column()
    choices = []
    for _ in range(rng.choice((0, 1, 2, 2)) if num_layers < 7 else 1):
        slower, smaller = tuple(a + b for a, b in zip(times, column(), strict=True)), rng.choice((2, 3, 9))
        weights, temporary = (column() if rng.random() < 0.3 else None for _ in range(2))
        if rng.random() < 0.2:  # not always what recomputation does
            slower = column()
        held = tuple(size // smaller for size in activations)
        choices.append(LayerChoice(slower, held, weights, temporary, by_rank(slower)))
    share = (sum(static) + 2 * sum(activations)) / num_ranks
    capacity = tuple(round(share * rng.uniform(0.4, 1.6)) + max(temporaries) for _ in range(num_ranks))
    first = rng.randrange(num_layers)
    together = ((first, min(num_layers, first + rng.randint(1, 3))),) if rng.random() < 0.3 else ()
    return StagePartition(
        times_us=times,
        num_stages=num_stages,
        static_bytes=static,
        activation_bytes=activations,
        in_flight=tuple(rng.randint(1, 3) for _ in range(num_stages)),
        weight_activation_bytes=column(big // 3),
        weights_in_flight=tuple(rng.randint(0, 2) for _ in range(num_stages)),
        temporary_bytes=temporaries,
        capacity_bytes=capacity if rng.random() < 0.85 else None,
        rank_of_stage=tuple(stage % num_ranks for stage in range(num_stages)),
        times_by_rank=by_rank(times),
        choices=tuple(choices),
        choose_per=rng.choice(("layer", "stage")),
        together=together,
    )


def enumerated(problem):
    """Least (bottleneck, total time) over all cuts and choices, written down without the problem's own scoring."""
    layers, stages = range(len(problem.times_us)), range(problem.num_stages)
    host = problem.rank_of_stage or tuple(stages)
    zeros = [0] * len(layers)
    best = None
    for cuts in combinations(layers[1:], problem.num_stages - 1):
        if any(first < cut < last for cut in cuts for first, last in problem.together):
            continue
        bounds = (0, *cuts, len(layers))
        stage_of = [stage for stage in stages for _ in range(bounds[stage], bounds[stage + 1])]
        per_stage = problem.choose_per == "stage"
        for picks in product(range(len(problem.choices) + 1), repeat=len(stages if per_stage else layers)):
            loads, used, largest = ([0] * len(set(host)) for _ in range(3))
            for layer, stage in enumerate(stage_of):
                pick, rank = picks[stage if per_stage else layer], host[stage]
                own = (problem, *problem.choices)[pick]
                loads[rank] += own.times_us[layer] if own.times_by_rank is None else own.times_by_rank[rank][layer]
                weights, temporaries = (
                    getattr(problem, name) or zeros if getattr(own, name) is None else getattr(own, name)
                    for name in ("weight_activation_bytes", "temporary_bytes")
                )
                used[rank] += (problem.static_bytes or zeros)[layer]
                used[rank] += (problem.in_flight or [1] * len(stages))[stage] * (own.activation_bytes or zeros)[layer]
                used[rank] += (problem.weights_in_flight or [0] * len(stages))[stage] * weights[layer]
                largest[rank] = max(largest[rank], temporaries[layer])
            rooms = problem.capacity_bytes or [float("inf")] * len(loads)
            if all(a + b <= room for a, b, room in zip(used, largest, rooms, strict=True)):
                best = min(best or (float("inf"), 0), (max(loads), sum(loads)))
    return best or (None, None)


def test_every_backend_agrees_with_enumeration_on_200_drawn_instances():
    rng, seen = random.Random(4), dict.fromkeys(PARTITION_BACKENDS, 0)
    for _ in range(200):
        problem = drawn(rng)
        want = enumerated(problem)
        for backend in takers(problem):
            check(backend, problem, *want)
            seen[backend] += 1
    assert seen["cp-sat"] == seen["cbc"] == 200
    assert seen["chain"] > 100


def test_the_chain_solver_agrees_with_enumeration_on_many_more():
    rng = random.Random(5)
    problems = [problem for problem in (drawn(rng) for _ in range(1000)) if problem.is_chain]
    for problem in problems:
        check("chain", problem, *enumerated(problem))
    assert len(problems) > 500


def test_the_knapsack_of_a_stage_agrees_with_enumerated_counts():
    rng = random.Random(6)
    for _ in range(300):
        options = [
            [Option(choice, rng.randint(0, 99), rng.randint(0, 99), rng.choice((0, 0, 30))) for choice in range(3)]
            for _ in range(2)
        ]
        counts = (rng.randint(0, 7), rng.randint(1, 7))
        room = rng.randint(0, 60 * sum(counts))
        want = None
        splits = [[(a, b, count - a - b) for a in range(count + 1) for b in range(count + 1 - a)] for count in counts]
        for split in product(*splits):
            taken = [(option, split[kind][option.choice]) for kind in range(2) for option in options[kind]]
            largest = max(option.temporary_bytes for option, count in taken if count)
            if sum(option.size_bytes * count for option, count in taken) + largest <= room:
                time_us = sum(option.time_us * count for option, count in taken)
                want = time_us if want is None else min(want, time_us)
        got = StageKnapsack(options, room).least(counts)
        assert (got and got[0]) == want, f"{options} {counts} {room}"


def transformer(**fields):
    """An embedding, 126 equal layers and a head on 16 stages; no, selective and full recomputation."""

    def row(first, layer, last):
        return (first, *[layer] * 126, last)

    chosen = {
        "num_stages": 16,
        "static_bytes": row(800, 3000, 800),
        "activation_bytes": row(10, 1000, 400),
        "in_flight": tuple(range(16, 0, -1)),
        "temporary_bytes": row(50, 300, 900),
        "capacity_bytes": (67_725,) * 16,
        "choices": (
            LayerChoice(row(120, 19_700, 9_500), row(10, 610, 400), None, row(50, 350, 900)),
            LayerChoice(row(120, 25_000, 9_500), row(10, 61, 400), None, row(50, 700, 900)),
        ),
    }
    return StagePartition(row(120, 19_000, 9_500), **(chosen | fields))


@pytest.mark.parametrize("choose_per", ["layer", "stage"])
def test_126_layers_on_16_stages_with_3_choices_are_proven_alike_by_every_backend(choose_per):
    problem = transformer(choose_per=choose_per)
    answers = [solve_partition(problem, solver=backend, time_limit_s=60) for backend in PARTITION_BACKENDS]
    assert {answer.status for answer in answers} == {Status.OPTIMAL}
    assert len({answer.bottleneck_us for answer in answers}) == 1
    assert len({sum(problem.rank_times_us(answer.cuts, answer.choices)) for answer in answers}) == 1


def test_the_first_layers_of_a_stage_recompute_and_the_ends_never_do():
    got = solve_partition(transformer())
    assert got.solver == "chain"
    assert got.choices[0] == got.choices[-1] == 0
    bounds = (1, *got.cuts, 127)
    for first, last in pairwise(bounds):
        inside = got.choices[first:last]
        assert list(inside) == sorted(inside, reverse=True)


def test_many_kinds_that_choose_go_to_cp_sat():
    times = tuple(range(1, 13))
    problem = StagePartition(
        times, 2, None, times, capacity_bytes=(50, 50), choices=(LayerChoice(tuple(2 * t for t in times), (0,) * 12),)
    )
    assert "12 kinds of layers choose" in partition_backend("chain").why_not(problem)
    assert solve_partition(problem).solver == "cp-sat"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"choices": (LayerChoice((1,), (1, 1)),)}, r"choices\[0\].times_us has 1 entries, 2 are needed"),
        ({"choices": (LayerChoice((1, 1), (1, -1)),)}, r"choices\[0\].activation_bytes\[1\] is -1"),
        ({"times_by_rank": ((1, 1), (1, 1))}, "times_by_rank has 2 rows, 1 are needed"),
        ({"times_by_rank": ((1, 2, 3),)}, r"times_by_rank\[0\] has 3 entries, 2 are needed"),
        ({"times_by_rank": ((1, 1),), "choices": (LayerChoice((1, 1), (1, 1)),)}, "has no times_by_rank, but the prob"),
        ({"together": ((1, 3),)}, r"together holds \[1, 3\)"),
        ({"choose_per": "rank"}, "choose_per is 'rank'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StagePartition((1, 1), 1, **arguments)


@pytest.mark.parametrize(
    ("cuts", "choices", "message"),
    [
        ((1,), (0, 0, 0), r"separate layers \[0, 2\)"),
        ((2,), (0, 1, 0), r"different choices in the stage \[0, 2\)"),
        ((2,), (0, 0, 0), "overflow a rank"),
    ],
)
def test_an_answer_that_breaks_a_rule_is_a_bug_of_the_backend(cuts, choices, message):
    room = (1, 9) if message.startswith("over") else None
    choice = LayerChoice((2, 2, 2), (0, 0, 0))
    problem = StagePartition(
        (1, 1, 1), 2, (1, 1, 1), capacity_bytes=room, choices=(choice,), choose_per="stage", together=((0, 2),)
    )
    with pytest.raises(SolverError, match=message):
        rescored(problem, cuts, Status.OPTIMAL, 0, "broken", choices)


def test_choices_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"choices \(0, 1\) are not 2 numbers below 1"):
        StagePartition((1, 1), 1).bottleneck_us((), (0, 1))
