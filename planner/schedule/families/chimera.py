"""Chimera: two replicas in opposite directions, merged slot by slot without collisions; by direct concatenation, and
with forward doubling.

Replica 0 has stage s on rank s, replica 1 on rank p − 1 − s. In a unit of p microbatches each direction has half of
them; the i-th of a direction runs F of stage s in slot 2i + s and its BW in slot 2i + 2p − 1 − s, and every rank runs
what it has in the order of the slots. With p even no rank ever has two in one slot. In unit k microbatches
kp .. kp + p/2 − 1 take replica 0, the others replica 1.

`chimera`, direct concatenation: units follow each other every 2p slots, so that forwards of the next begin before the
backwards of the last have ended on the outer ranks. What m leaves over p is a last unit, with one microbatch more for
replica 0 where it is odd (as defined in Pipewright; the paper divides it as evenly as possible).

`chimera-doubling` has units of 2p microbatches: the i-th pair of a direction runs its two F in slot 2i + s, the i-th
microbatch its BW in slot 2i + 2p − 1 − s; pairs take replicas 0 and 1 in turn; units follow every 3p slots. It suits
T_BW = 2 T_F, as with recomputation. 2p divides m.

With equal stages: `chimera` where p divides m, makespan bubble (p − 2) max(T_F, T_BW) + (m/p − 1)(p − 2) |T_BW − T_F|,
span the same, peak activations p/2 + 1 microbatches on the outer ranks to p in the middle; `chimera-doubling` where
T_F ≤ T_BW ≤ 2 T_F and m = 2p, 4p, 6p, bubble (p/2 − 1)(T_F + T_BW), peak 3p/2 + 1 to 2p. Every rank holds two stages'
weights, gradients and optimizer state; ranks r and p − 1 − r sum the gradients of both.
"""

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family, only_two_directions


def _refuse(num_ranks: int, num_microbatches: int, virtual_stages: int) -> str | None:
    if num_ranks % 2:
        return f"its two directions meet without collisions on an even number of ranks only, not {num_ranks}; use gems"
    return only_two_directions(num_ranks, num_microbatches, virtual_stages)


def _refuse_doubling(num_ranks: int, num_microbatches: int, virtual_stages: int) -> str | None:
    if num_microbatches % (2 * num_ranks):
        return (
            f"it takes units of 2p = {2 * num_ranks} microbatches, and {num_microbatches} are not a whole number of "
            "them; use such, or the family chimera"
        )
    return _refuse(num_ranks, num_microbatches, virtual_stages)


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    slots = _Slots(num_ranks)
    for first in range(0, num_microbatches, num_ranks):
        unit = range(first, min(first + num_ranks, num_microbatches))
        down = (len(unit) + 1) // 2
        for replica, part in enumerate((unit[:down], unit[down:])):
            for i, microbatch in enumerate(part):
                slots.add(replica, microbatch, forward=2 * first + 2 * i, backward=2 * first + 2 * i)
    return slots.schedule()


def _build_doubling(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    slots = _Slots(num_ranks)
    for first in range(0, num_microbatches, 2 * num_ranks):
        start = first // 2 * 3
        for i in range(num_ranks):  # of each direction
            for replica in (0, 1):
                microbatch = first + 4 * (i // 2) + 2 * replica + i % 2
                slots.add(replica, microbatch, forward=start + i // 2 * 2, backward=start + 2 * i)
    return slots.schedule()


class _Slots:
    """What every rank runs in which slot; ties go to the lower microbatch."""

    def __init__(self, num_ranks: int) -> None:
        self._ranks: list[list[tuple[int, int, Action]]] = [[] for _ in range(num_ranks)]

    def add(self, replica: int, microbatch: int, *, forward: int, backward: int) -> None:
        """A microbatch whose pattern of forwards and of backwards begins in these slots."""
        p = len(self._ranks)
        for stage in range(p):
            order = self._ranks[p - 1 - stage if replica else stage]
            order.append((forward + stage, microbatch, Action(Kind.F, stage, microbatch)))
            order.append((backward + 2 * p - 1 - stage, microbatch, Action(Kind.BW, stage, microbatch)))

    def schedule(self) -> Schedule:
        """Every rank's actions in the order of their slots."""
        return Schedule(tuple(tuple(action for _, _, action in sorted(order)) for order in self._ranks))


_SOURCE = "Li and Hoefler, Chimera, SC 2021, arXiv 2107.06925, sections 3.1 to 3.5"

FAMILY = Family(
    name="chimera",
    title="Chimera",
    source=_SOURCE,
    splits_backward=False,
    build=_build,
    refuse=_refuse,
    num_replicas=2,
)

DOUBLING = Family(
    name="chimera-doubling",
    title="Chimera, forward doubling",
    source=_SOURCE,
    splits_backward=False,
    build=_build_doubling,
    refuse=_refuse_doubling,
    num_replicas=2,
)
