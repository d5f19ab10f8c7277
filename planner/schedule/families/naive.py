"""Naive model parallelism: one microbatch at a time goes all the way up and back; all ranks but one are idle.

With equal stages: makespan bubble (p − 1) · m · (T_F + T_BW), span the same. Peak activations: one microbatch on every
rank, the least there is. Useful as what others are compared with.
"""

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    return Schedule(
        tuple(
            tuple(Action(kind, rank, j) for j in range(num_microbatches) for kind in (Kind.F, Kind.BW))
            for rank in range(num_ranks)
        )
    )


FAMILY = Family(
    name="naive",
    title="Naive",
    source="drawn in Huang et al., GPipe, NeurIPS 2019, arXiv 1811.06965, figure 2",
    splits_backward=False,
    build=_build,
)
