"""GPipe: all forwards, then all backwards, both in the order of the microbatches.

The paper draws the backwards in reverse order, with recomputation; bubble and peak memory are the same in
either order, and this one lets the first gradients leave first.

With equal stages, T_F forward and T_BW backward: makespan bubble (p − 1)(T_F + T_BW), bubble rate
(p − 1) / (m + p − 1), span the same. Peak activations: m microbatches on every rank.
"""

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    return Schedule(
        tuple(
            tuple(Action(kind, rank, j) for kind in (Kind.F, Kind.BW) for j in range(num_microbatches))
            for rank in range(num_ranks)
        )
    )


FAMILY = Family(
    name="gpipe",
    title="GPipe",
    source="Huang et al., GPipe, NeurIPS 2019, arXiv 1811.06965, section 2.3",
    splits_backward=False,
    build=_build,
    in_layout_search=True,
)
