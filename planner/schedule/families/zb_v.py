"""ZB-V: two chunks per rank in a V and a split backward; no bubble with F, B and W alike, in the memory of 1F1B.

Rank r hosts stages a = r and b = 2p − 1 − r, so loss and embedding share rank 0. With M = max(m, 2p − 1) microbatches,
rank r runs
1. 2(p − r) − 1 times F a;  2. r times F b, F a;  3. p − r times F b, B b, W b;
4. until every F has run: F a while there is one, B a, W a, F b, B b, W b;
5. r times B a, B b;  6. p − r times B a and the oldest pending W of a;  7. the pending W of b, then of a;
and what belongs to microbatches beyond m is left out. Any m is valid.

With equal chunks, T_F, T_B, T_W of a whole rank, m ≥ 2p − 1, T_F ≤ T_B and T_W ≤ T_B: makespan bubble
(p − 1) max(T_B / 2, T_B − T_W), span bubble (p − 1)(T_B − T_W). Peak activations: p microbatches on every rank.
"""

from collections import Counter

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family, only_two_stages_per_rank, vee


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    return Schedule(tuple(_order(rank, num_ranks, num_microbatches) for rank in range(num_ranks)))


def _order(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    a, b = rank, 2 * num_ranks - 1 - rank
    forward_a, back_a, weight_a = (Kind.F, a), (Kind.B, a), (Kind.W, a)
    forward_b, back_b, weight_b = (Kind.F, b), (Kind.B, b), (Kind.W, b)
    total = max(num_microbatches, 2 * num_ranks - 1)
    steps = [forward_a] * (2 * (num_ranks - rank) - 1)
    steps += [forward_b, forward_a] * rank
    steps += [forward_b, back_b, weight_b] * (num_ranks - rank)
    forwards_left = total - (2 * num_ranks - 1 - rank)
    for turn in range(total - num_ranks):
        steps += [forward_a] * (turn < forwards_left) + [back_a, weight_a, forward_b, back_b, weight_b]
    steps += [back_a, back_b] * rank
    steps += [back_a, weight_a] * (num_ranks - rank)
    steps += [weight_b] * rank + [weight_a] * rank
    order = []
    done: Counter[tuple[Kind, int]] = Counter()
    for kind, stage in steps:
        if done[kind, stage] < num_microbatches:
            order.append(Action(kind, stage, done[kind, stage]))
        done[kind, stage] += 1
    return tuple(order)


FAMILY = Family(
    name="zb-v",
    title="ZB-V",
    source="Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, arXiv 2401.10241; arXiv 2405.15362",
    splits_backward=True,
    build=_build,
    place=vee,
    refuse=only_two_stages_per_rank,
    in_layout_search=True,
)
