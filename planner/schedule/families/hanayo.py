"""Hanayo: waves. Each rank hosts 2w chunks on a zigzag, so a microbatch goes up and down the ranks w times.

The order is as defined here, since the paper's own lists were not at hand: list scheduling in slots, an F and a BW of a
chunk one slot each, at most p microbatches between their first F and their last BW; a free rank takes a ready BW before
a ready F, the lowest microbatch first, then the deepest stage. Any m is valid; v is 2w, even.

With equal chunks, T_F ≤ T_BW through a whole rank and m = K · p: makespan bubble
(p − 1)(T_BW + (K − 1)(T_BW − T_F)) / w found by simulation for p = 4, 8, w = 1, 2, K = 1, 2; span the same. Peak
activations for m ≥ p: p − (p − 1 − r) / 2w microbatches of a whole rank.
"""

from heapq import heappop, heappush

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family, vee


def _refuse(num_ranks: int, num_microbatches: int, virtual_stages: int) -> str | None:
    del num_ranks, num_microbatches
    if virtual_stages % 2:
        return f"a wave takes two stages per rank, so v must be even, not {virtual_stages}; choose 2 or 4"
    return None


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    home = vee(num_ranks, virtual_stages)
    last = len(home) - 1
    forwards: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]  # heaps of (microbatch, −stage)
    backwards: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    orders: list[list[Action]] = [[] for _ in range(num_ranks)]
    admitted = min(num_ranks, num_microbatches)
    forwards[0] = [(j, 0) for j in range(admitted)]
    left = 2 * num_microbatches * len(home)
    while left:
        ran = []
        for rank in range(num_ranks):
            ready, kind = (backwards[rank], Kind.BW) if backwards[rank] else (forwards[rank], Kind.F)
            if ready:
                microbatch, minus_stage = heappop(ready)
                action = Action(kind, -minus_stage, microbatch)
                orders[rank].append(action)
                ran.append(action)
        left -= len(ran)
        for kind, stage, microbatch in ran:  # what they make ready runs in the next slot at the earliest
            if kind is Kind.F and stage < last:
                heappush(forwards[home[stage + 1]], (microbatch, -stage - 1))
            elif kind is Kind.F:
                heappush(backwards[home[last]], (microbatch, -last))
            elif stage > 0:
                heappush(backwards[home[stage - 1]], (microbatch, 1 - stage))
            elif admitted < num_microbatches:
                heappush(forwards[0], (admitted, 0))
                admitted += 1
    return Schedule(tuple(map(tuple, orders)))


FAMILY = Family(
    name="hanayo",
    title="Hanayo",
    source="Liu et al., Hanayo, SC 2023, arXiv 2308.15762; order as defined in Pipewright",
    splits_backward=False,
    build=_build,
    place=vee,
    refuse=_refuse,
)
