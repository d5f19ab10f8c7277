"""1F1B with flush (PipeDream-Flush, DAPPLE's early backward): each rank soon alternates one F and one BW.

Rank r runs min(m, p − 1 − r) forwards, then pairs (F, BW), then the backwards that are left. Any m is valid.

With equal stages, T_F forward and T_BW backward: makespan bubble (p − 1)(T_F + T_BW), bubble rate
(p − 1) / (m + p − 1), span the same. Peak activations: min(m, p − r) microbatches on rank r.
"""

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    ranks = []
    for rank in range(num_ranks):
        warm_up = min(num_microbatches, num_ranks - 1 - rank)
        order = [Action(Kind.F, rank, j) for j in range(warm_up)]
        for j in range(num_microbatches):
            if warm_up + j < num_microbatches:
                order.append(Action(Kind.F, rank, warm_up + j))
            order.append(Action(Kind.BW, rank, j))
        ranks.append(tuple(order))
    return Schedule(tuple(ranks))


FAMILY = Family(
    name="1f1b",
    title="1F1B",
    source="Narayanan et al., PipeDream-Flush, ICML 2021, arXiv 2006.09503; DAPPLE, arXiv 2007.01045",
    splits_backward=False,
    build=_build,
    in_layout_search=True,
)
