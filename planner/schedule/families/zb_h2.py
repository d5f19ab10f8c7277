"""ZB-H2: twice the forwards of ZB-H1 up front, so that with F, B and W alike no rank is ever idle once it has begun.

Rank r runs min(m, 2(p − r) − 1) forwards; then for every microbatch i: B i, the oldest pending W once i ≥ 2r, and the
next F while there is one; then the W that are left. Any m is valid. This is the form the paper draws; its figures may
permute W inside the drain.

With equal stages and m ≥ 2p − 1: makespan bubble (p − 1) max(T_F, T_F + T_B − 2 T_W); span bubble
(p − 1)(T_F + T_B − 2 T_W) where T_W ≤ (T_F + T_B) / 2, which the paper states. The makespan keeps (p − 1) T_F: only
steps without a barrier in between see the zero. Peak activations on rank r, for M_W ≤ M_B: at most
(2(p − r) − 1) M_B + 2r M_W, reached when m ≥ 2p − 1.
"""

from planner.schedule.actions import Schedule
from planner.schedule.families.base import Family
from planner.schedule.families.zero_bubble import handcrafted


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    return Schedule(
        tuple(
            handcrafted(
                rank,
                num_microbatches,
                warm_up=min(num_microbatches, 2 * (num_ranks - rank) - 1),
                weight_lag=2 * rank,
            )
            for rank in range(num_ranks)
        )
    )


FAMILY = Family(
    name="zb-h2",
    title="ZB-H2",
    source="Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, arXiv 2401.10241, section 2",
    splits_backward=True,
    build=_build,
)
