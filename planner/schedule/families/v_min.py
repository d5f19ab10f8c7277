"""V-Min: two chunks per rank in a V, straight down and up, in a third of the memory of 1F1B.

Slots of the building block on rank r, with e = 2 where 3 divides p, else 0: F a r, F b 2p − 1 − r, B b 2p + e + r,
B a 4p + e − 1 − r; see `building_blocks` for what follows from them. Any m is valid.

With equal chunks, T_F = T_B = T_W = T of a whole rank and m ≥ 2p + 2: span bubble (2p − 3/2) T where 3 divides p, else
(2p − 5/2) T. Peak activations: at most ⌊(p + 4) / 3⌋ microbatches of a whole rank. It is drawn for F, B and W alike;
away from that its bubble grows with m.
"""

from planner.schedule.actions import Schedule
from planner.schedule.families.base import Family, only_two_stages_per_rank, vee
from planner.schedule.families.building_blocks import Block, repeated


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    p, extra = num_ranks, 0 if num_ranks % 3 else 2
    blocks = [Block(r, 2 * p - 1 - r, 2 * p + extra + r, 4 * p + extra - 1 - r) for r in range(p)]
    return repeated(blocks, num_microbatches)


FAMILY = Family(
    name="v-min",
    title="V-Min",
    source="Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024, arXiv 2405.15362",
    splits_backward=True,
    build=_build,
    place=vee,
    refuse=only_two_stages_per_rank,
)
