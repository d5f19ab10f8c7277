"""ZB-H1: 1F1B with the backward split, W filling what would be bubbles, in the memory of 1F1B.

Rank r runs min(m, p − r) forwards; then for every microbatch i: B i, the oldest pending W once i ≥ r, and the
next F while there is one; then the W that are left. Any m is valid. This is the form the paper draws; its
figures may permute W inside the drain.

With equal stages and m ≥ p: makespan bubble (p − 1) max(T_F, T_B, T_F + T_B − T_W), span bubble
(p − 1) max(T_B, T_F + T_B − T_W), both found by simulation. The paper states T_F + T_B − T_W alone, which is
right where T_W ≤ min(T_F, T_B). Peak activations on rank r, for M_B held from F to B
and M_W ≤ M_B of it on to W: at most (p − r) M_B + r M_W, reached when m ≥ p.
"""

from planner.schedule.actions import Schedule
from planner.schedule.families.base import Family
from planner.schedule.families.zero_bubble import handcrafted


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    return Schedule(
        tuple(
            handcrafted(rank, num_microbatches, warm_up=min(num_microbatches, num_ranks - rank), weight_lag=rank)
            for rank in range(num_ranks)
        )
    )


FAMILY = Family(
    name="zb-h1",
    title="ZB-H1",
    source="Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, arXiv 2401.10241, section 2",
    splits_backward=True,
    build=_build,
    in_layout_search=True,
)
