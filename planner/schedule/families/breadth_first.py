"""Breadth first: all microbatches through a rank's first chunk, then through the next; back in the mirrored order.

Chunk c of rank r is stage c · p + r. Backwards go from the last chunk down, microbatches in ascending order (the paper
leaves that open; descending order has the same bubble and peak where m ≥ p). Weights of a chunk are needed once per
direction and step, which is what it is for when they are sharded. Any m is valid.

With equal stages, T_F and T_BW through a whole rank, m ≥ p: makespan bubble (p − 1)(T_F + T_BW) / v; with m < p,
(p − m)(v − 1)(T_F + T_BW) / v more; span the same. Peak activations: m microbatches on every rank.
"""

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family, round_robin


def _refuse(num_ranks: int, num_microbatches: int, virtual_stages: int) -> str | None:
    del num_ranks, num_microbatches
    if virtual_stages == 1:
        return "it needs at least 2 stages per rank; choose virtual_stages=2 or more, or the family gpipe"
    return None


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    ranks = []
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * virtual_stages, num_ranks)
        order = [Action(Kind.F, stage, j) for stage in stages for j in range(num_microbatches)]
        order += [Action(Kind.BW, stage, j) for stage in reversed(stages) for j in range(num_microbatches)]
        ranks.append(tuple(order))
    return Schedule(tuple(ranks))


FAMILY = Family(
    name="breadth-first",
    title="Breadth first",
    source="Lamy-Poirier, Breadth-First Pipeline Parallelism, MLSys 2023, arXiv 2211.05953",
    splits_backward=False,
    build=_build,
    place=round_robin,
    refuse=_refuse,
)
