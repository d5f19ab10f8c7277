"""Advance forward propagation: 1F1B with forwards run ahead, so that slow transfers hide behind them.

Rank r runs min(m, 2(p − r) − 1) forwards, then BW and F in turn, then the backwards that are left. AvgPipe tunes how
far each rank runs ahead; the depths here are those of its overview figure. DAPPLE has the same depths as policy B. Any
m is valid.

With equal stages and no transfers: makespan bubble (p − 1)(T_F + T_BW), span the same, as 1F1B; where every hop takes
time it stays as fast as GPipe. Peak activations: min(m, 2(p − r) − 1) microbatches on rank r.
"""

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    ranks = []
    for rank in range(num_ranks):
        warm_up = min(num_microbatches, 2 * (num_ranks - rank) - 1)
        order = [Action(Kind.F, rank, j) for j in range(warm_up)]
        for j in range(num_microbatches):
            order.append(Action(Kind.BW, rank, j))
            if warm_up + j < num_microbatches:
                order.append(Action(Kind.F, rank, warm_up + j))
        ranks.append(tuple(order))
    return Schedule(tuple(ranks))


FAMILY = Family(
    name="afp",
    title="Advance forward propagation",
    source="Chen et al., AvgPipe, PPoPP 2023, doi 10.1145/3572848.3577484",
    splits_backward=False,
    build=_build,
)
