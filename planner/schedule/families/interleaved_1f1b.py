"""Interleaved 1F1B: every rank hosts v chunks of the model, which shortens the ramp by v.

Chunk c of rank r is stage c · p + r. Microbatches go in groups of G: within a group, chunk 0 for all of them,
then chunk 1, and so on; backwards the same groups, from the last chunk down. Rank r runs
min(m · v, 2(p − 1 − r) + (v − 1) · G) forwards, then pairs (F, BW), then the backwards that are left.

The paper has G = p and needs p to divide m. Here, as in torch.distributed.pipelining, the rounds are
R = max(1, ⌊m / p⌋) and G = m / R, so every m is accepted that R divides: multiples of p as in the paper
(G = p), any m below 2p (one group). A shorter last group leaves bubbles of its own, and is refused.

With equal stages, T_F and T_BW through a whole rank, m ≥ p: makespan bubble (p − 1)(T_F + T_BW) / v; with m <
p, (p − m)(v − 1)(T_F + T_BW) / v more; span the same. Peak activations on rank r, in microbatches through a
whole rank: min(m · v, 2(p − 1 − r) + (v − 1) · G + 1) / v.
"""

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family, round_robin


def _refuse(num_ranks: int, num_microbatches: int, virtual_stages: int) -> str | None:
    if virtual_stages == 1:
        return "it needs at least 2 stages per rank; choose virtual_stages=2 or more, or the family 1f1b"
    rounds = max(1, num_microbatches // num_ranks)
    if num_microbatches % rounds:
        multiple = num_microbatches - num_microbatches % num_ranks
        return (
            f"{num_microbatches} microbatches do not go into {rounds} equal groups of at least {num_ranks}; "
            f"choose a multiple of the {num_ranks} ranks, such as {multiple} or {multiple + num_ranks}"
        )
    return None


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    group = num_microbatches // max(1, num_microbatches // num_ranks)
    # (chunk, microbatch) of a rank's k-th forward; its k-th backward mirrors the chunk
    sequence = [
        (chunk, j)
        for first in range(0, num_microbatches, group)
        for chunk in range(virtual_stages)
        for j in range(first, first + group)
    ]
    ranks = []
    for rank in range(num_ranks):
        forwards = [Action(Kind.F, chunk * num_ranks + rank, j) for chunk, j in sequence]
        backwards = [Action(Kind.BW, (virtual_stages - 1 - chunk) * num_ranks + rank, j) for chunk, j in sequence]
        warm_up = min(len(forwards), 2 * (num_ranks - 1 - rank) + (virtual_stages - 1) * group)
        order = forwards[:warm_up]
        for k, backward in enumerate(backwards):
            order += forwards[warm_up + k : warm_up + k + 1]
            order.append(backward)
        ranks.append(tuple(order))
    return Schedule(tuple(ranks))


FAMILY = Family(
    name="interleaved-1f1b",
    title="Interleaved 1F1B",
    source="Narayanan et al., SC 2021, arXiv 2104.04473, section 2.2",
    splits_backward=False,
    build=_build,
    place=round_robin,
    refuse=_refuse,
    in_layout_search=True,
)
