"""V-Half: two chunks per rank in a V, slower on the way up than down, in half the memory of 1F1B.

Slots of the building block on rank r, with e = 3 for even p, else 0: F a 2r, F b 3p − 2 − r, B b 3p + e − 1 + 2r,
B a 6p + e − 2 − r; see `building_blocks` for what follows from them. Any m is valid.

With equal chunks, T_F = T_B = T_W = T of a whole rank and m ≥ 2p + 2: span bubble (7p − 4) T / 4 for even p,
7(p − 1) T / 4 for odd p. Peak activations: ⌊p / 2⌋ + 1 microbatches of a whole rank. It is drawn for F, B and W alike:
the authors ask for T_W + 2 T_B ≥ 2 T_F and T_W + 2 T_F ≥ 2 T_B.
"""

from planner.schedule.actions import Schedule
from planner.schedule.families.base import Family, only_two_stages_per_rank, vee
from planner.schedule.families.building_blocks import Block, repeated


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    p, extra = num_ranks, 0 if num_ranks % 2 else 3
    blocks = [Block(2 * r, 3 * p - 2 - r, 3 * p + extra - 1 + 2 * r, 6 * p + extra - 2 - r) for r in range(p)]
    return repeated(blocks, num_microbatches)


FAMILY = Family(
    name="v-half",
    title="V-Half",
    source="Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024, arXiv 2405.15362",
    splits_backward=True,
    build=_build,
    place=vee,
    refuse=only_two_stages_per_rank,
    in_layout_search=True,
)
