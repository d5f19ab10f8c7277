"""GEMS: two replicas in opposite directions take turns, one microbatch of activations per rank.

Replica 0 has stage s on rank s, replica 1 on rank p − 1 − s. Even microbatches take replica 0, odd ones replica 1;
every rank runs F and BW of one microbatch, then those of the next. The forward of a microbatch follows the backward of
the one before through the ranks. Any p ≥ 2 and m ≥ 2 are valid.

With equal stages, T_F forward and T_BW backward: makespan p T_F + m p T_BW + (m − 1) T_F where T_BW ≥ T_F, else
m p T_F + (m − 1) T_BW + p T_BW; the span is (p − 1) T_F less for even m where T_BW ≥ T_F, and the same for odd m. Peak
activations: one microbatch. Every rank holds two stages' weights, gradients and optimizer state; ranks r and p − 1 − r
sum the gradients of both.
"""

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family, only_two_directions


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    return Schedule(
        tuple(
            tuple(
                Action(kind, num_ranks - 1 - rank if j % 2 else rank, j)
                for j in range(num_microbatches)
                for kind in (Kind.F, Kind.BW)
            )
            for rank in range(num_ranks)
        )
    )


FAMILY = Family(
    name="gems",
    title="GEMS",
    source="Jain et al., GEMS, SC 2020, doi 10.1109/SC41405.2020.00049",
    splits_backward=False,
    build=_build,
    refuse=only_two_directions,
    num_replicas=2,
)
