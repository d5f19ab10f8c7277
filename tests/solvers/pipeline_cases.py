"""Pipeline problems that tests share: a zoo with optima checkable in the head, published instances, and drawn ones."""

from dataclasses import replace

from hypothesis import strategies as st

from solvers.pipeline import Op, PipelineProblem


def even(
    num_ranks,
    num_microbatches,
    forward=1,
    backward=1,
    weight=1,
    transfer=0,
    *,
    memory=None,
    held=2,
    kept=1,
    split=True,
    objective="span",
    rank_of_stage=None,
    fixed=None,
    in_flight=None,
    recompute=None,
    checkpoint=1,
):
    """Equal stages, one per rank unless placed otherwise; every rank has `memory`, of which it holds `fixed` always."""
    rank_of_stage = tuple(range(num_ranks)) if rank_of_stage is None else rank_of_stage
    stages = len(rank_of_stage)
    return PipelineProblem(
        forward_us=(forward,) * stages,
        backward_us=(backward,) * stages,
        weight_us=(weight,) * stages,
        split=(split,) * stages,
        transfer_us=(transfer,) * (stages - 1),
        rank_of_stage=rank_of_stage,
        num_microbatches=num_microbatches,
        activation_bytes=(held,) * stages,
        weight_activation_bytes=(kept,) * stages,
        capacity_bytes=None if memory is None else (memory,) * num_ranks,
        objective=objective,
        fixed_bytes=None if fixed is None else (fixed,) * num_ranks,
        max_in_flight=None if in_flight is None else (in_flight,) * stages,
        recompute_us=None if recompute is None else (recompute,) * stages,
        checkpoint_bytes=None if recompute is None else (checkpoint,) * stages,
    )


def zero_bubble_profile(setting="1.5b-m24", *, memory=16, objective="span", split=True):
    """Measured profiles of Qi et al., ICLR 2024, Table 5; memory in units of M_W, M_B = 2."""
    forward, backward, weight, transfer, m = {
        "1.5b-m24": (18522, 18086, 9337, 601, 24),
        "1.5b-m64": (18546, 18097, 9321, 762, 64),
        "6.2b-m24": (29718, 29444, 19927, 527, 24),
        "6.2b-m32": (29802, 29428, 19530, 577, 32),
    }[setting]
    return even(8, m, forward, backward, weight, transfer, memory=memory, objective=objective, split=split)


def one_f_one_b(num_ranks, num_microbatches):
    """The order of 1F1B with fused backwards: rank r runs p - 1 - r forwards ahead (arXiv 2006.09503)."""
    ranks = []
    for rank in range(num_ranks):
        warm_up = min(num_microbatches, num_ranks - 1 - rank)
        ops = [Op("F", rank, j) for j in range(warm_up)]
        for j in range(num_microbatches):
            if warm_up + j < num_microbatches:
                ops.append(Op("F", rank, warm_up + j))
            ops.append(Op("BW", rank, j))
        ranks.append(tuple(ops))
    return tuple(ranks)


_TWO_STAGES = PipelineProblem((2, 3), (3, 2), (1, 1), (True, True), (1,), (0, 1), 1, (1, 1), (1, 1))

# name: (problem, optimum in µs; None is infeasible)
ZOO = {
    "one_rank_one_microbatch": (even(1, 1, 3, 2, 1), 6),
    "one_rank_has_no_bubble": (even(1, 3, 3, 2, 1), 18),
    "one_rank_two_chunks": (even(1, 2, 1, 1, 1, rank_of_stage=(0, 0)), 12),
    "one_microbatch_up_and_down": (_TWO_STAGES, 13),  # 2 + 1 + 3 + 2 + 1 + 3, then W of 1
    "fused_bubble_is_p_minus_1": (even(2, 2, split=False), 9),  # (m + p - 1) · (F + BW)
    "fused_bubble_by_makespan": (even(2, 2, split=False, objective="makespan"), 9),
    "split_leaves_one_idle": (even(2, 2), 7),  # rank 0: F F . B W B W, as B0.0 cannot start before 3
    "split_leaves_one_idle_by_makespan": (even(2, 2, objective="makespan"), 7),
    "memory_for_one_microbatch": (even(2, 2, memory=2), 10),  # rank 0: F . . B W, twice
    "memory_for_one_and_a_half": (even(2, 2, memory=3), 9),  # rank 0: F . . B F W . B W
    "not_even_one_fits": (even(2, 2, memory=1), None),
    "weights_keep_more": (even(1, 2, memory=3, held=1, kept=3), 6),
    "weights_keep_too_much": (even(1, 2, memory=2, held=1, kept=3), None),
    "chunks_need_room_together": (even(1, 2, memory=3, rank_of_stage=(0, 0)), None),
    "vee_of_two": (even(2, 1, rank_of_stage=(0, 1, 1, 0)), 9),  # F F F F B B B B, then W of stage 0
    "free_weights": (even(1, 2, 1, 1, 0), 4),
    "free_weights_release_memory": (even(2, 2, 1, 1, 0, memory=2), 8),  # rank 0: F . . B, twice
    "a_late_first_forward_saves_time": (  # rank 1 must not run F1.0 at 5 and then wait for F1.1
        PipelineProblem((5, 1), (1, 1), (1, 20), (True, True), (0,), (0, 1), 2, (1, 1), (1, 1)),
        44,
    ),
    "what_is_fixed_takes_room": (even(2, 2, memory=12, fixed=10), 10),  # as memory_for_one_microbatch
    "what_is_fixed_takes_all_room": (even(2, 2, memory=12, fixed=11), None),
    "what_is_fixed_exceeds_the_capacity": (even(1, 1, memory=1, fixed=2, held=0, kept=0), None),
    "one_in_flight": (even(2, 2, in_flight=1), 9),  # rank 0: F . . B F W . B W
    "one_in_flight_by_makespan": (even(2, 2, in_flight=1, objective="makespan"), 9),
    "two_in_flight_are_all": (even(2, 2, in_flight=2), 7),
    "one_in_flight_per_chunk": (even(1, 2, in_flight=1, rank_of_stage=(0, 0)), 12),
    "recompute_is_work": (even(1, 3, 3, 2, 1, recompute=2), 24),
    "recompute_is_on_the_way_only_at_the_turn": (even(2, 1, recompute=1), 6),  # rank 0: F R . . B W
    "recompute_fills_the_wait": (even(2, 2, recompute=1), 9),  # rank 0: F F R R B W . B W; rank 1: F R B F R B W W
    "recompute_waits_for_no_gradient": (  # rank 1: F R B W; rank 0: F, R at leisure, B at 14
        PipelineProblem(
            (1, 1),
            (1, 2),
            (1, 1),
            (True, True),
            (0,),
            (0, 1),
            1,
            (2, 2),
            (1, 1),
            None,
            "makespan",
            recompute_us=(7, 10),
            checkpoint_bytes=(1, 1),
        ),
        16,
    ),
    "recompute_of_one_stage": (  # rank 1: F R R R B from 1 to 6
        PipelineProblem(
            (1, 1),
            (1, 1),
            (1, 1),
            (True, True),
            (0,),
            (0, 1),
            1,
            (2, 2),
            (1, 1),
            (2, 2),
            recompute_us=(0, 3),
            checkpoint_bytes=(9, 0),
        ),
        8,  # rank 0: F, B and W from 6
    ),
    "a_checkpoint_lets_more_in": (even(1, 2, memory=3, recompute=1, rank_of_stage=(0, 0), held=2, checkpoint=1), 16),
    "a_checkpoint_of_one_chunk_and_all_of_the_next_is_too_much": (
        even(1, 2, memory=2, recompute=1, rank_of_stage=(0, 0), held=2, checkpoint=1),
        None,
    ),
    "all_of_it_is_back_before_the_backward": (even(1, 1, memory=1, recompute=1, held=2, checkpoint=0), None),
    "transfers_count_both_ways": (even(2, 1, 1, 1, 1, 10), 25),  # 1 + 10 + 1 + 1 + 10 + 1, then W
}


@st.composite
def problems(draw, *, max_time=4, general=False):
    """Tiny problems of every kind: placements, fused and split stages, uneven costs, transfers, tight memory.

    With `general`, also the optional fields, and two microbatches at most where three would be too many to enumerate.
    """
    placement, most = draw(
        st.sampled_from(
            [
                ((0,), 3),
                ((0, 1), 3),
                ((0, 1, 2), 2),
                ((0, 0), 2),
                ((0, 1, 0), 1),
                ((0, 1, 1, 0), 1),
                ((0, 1, 0, 1), 1),
                ((0, 1, 0), 2),
            ]
        )
    )
    num_stages, num_ranks = len(placement), max(placement) + 1
    if general and num_ranks > 1:
        most = min(most, 2)
    m = draw(st.integers(1, most))
    time = st.integers(1, max_time)
    size = st.integers(0, 3)

    def column(values):
        return tuple(draw(values) for _ in range(num_stages))

    may_split = num_stages == num_ranks or m == 1
    problem = PipelineProblem(
        forward_us=column(time),
        backward_us=column(time),
        weight_us=column(st.integers(0, max_time)),
        split=column(st.booleans()) if may_split else (False,) * num_stages,
        transfer_us=tuple(draw(st.integers(0, 3)) for _ in range(num_stages - 1)),
        rank_of_stage=placement,
        num_microbatches=m,
        activation_bytes=column(size),
        weight_activation_bytes=column(size),
        objective=draw(st.sampled_from(["span", "makespan"])),
    )
    if general:
        problem = replace(problem, **draw(_general_fields(problem)))
    if not draw(st.integers(0, 2)):
        return problem
    capacity = tuple(need + draw(st.sampled_from([0, 0, 1, 2, 3, 5])) for need in problem.single_microbatch_bytes())
    if not draw(st.integers(0, 9)):
        capacity = tuple(max(0, room - 1) for room in capacity)
    return replace(problem, capacity_bytes=capacity)


@st.composite
def _general_fields(draw, problem):
    """Any of the optional fields: what is fixed, limits in flight, recomputation of some stages."""
    fields = {}
    if draw(st.booleans()):
        fields["fixed_bytes"] = tuple(draw(st.integers(0, 3)) for _ in range(problem.num_ranks))
    if draw(st.booleans()):
        fields["max_in_flight"] = tuple(draw(st.integers(1, 3)) for _ in problem.forward_us)
    if draw(st.integers(0, 3)):
        fields["recompute_us"] = tuple(draw(st.sampled_from([0, 1, 1, 2, 3, 5])) for _ in problem.forward_us)
        fields["checkpoint_bytes"] = tuple(draw(st.integers(0, most)) for most in problem.activation_bytes)
    return fields


@st.composite
def larger_problems(draw):
    """Problems too large for brute force: up to 6 ranks, 3 chunks, 10 microbatches, any of the optional fields."""
    num_ranks, num_chunks = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    ranks = list(range(num_ranks))
    placement = draw(
        st.sampled_from(
            [
                tuple(ranks * num_chunks),
                tuple(rank for chunk in range(num_chunks) for rank in ranks[:: -1 if chunk % 2 else 1]),
                tuple(rank for rank in ranks for _ in range(num_chunks)),
            ]
        )
    )

    def column(least, most):
        return tuple(draw(st.integers(least, most)) for _ in placement)

    problem = PipelineProblem(
        forward_us=column(1, 6),
        backward_us=column(1, 6),
        weight_us=column(0, 6),
        split=tuple(draw(st.integers(0, 3)) > 0 for _ in placement),
        transfer_us=column(0, 3)[1:],
        rank_of_stage=placement,
        num_microbatches=draw(st.integers(1, 10)),
        activation_bytes=column(0, 6),
        weight_activation_bytes=column(0, 6),
        objective=draw(st.sampled_from(["span", "makespan"])),
    )
    problem = replace(problem, **draw(_general_fields(problem)))
    if not draw(st.integers(0, 3)):
        return problem
    slack = draw(st.sampled_from([0, 1, 4, 20]))
    return replace(
        problem,
        capacity_bytes=tuple(need + draw(st.integers(0, slack)) for need in problem.single_microbatch_bytes()),
    )
