"""Where stages run: the placements users can name, or give rank by rank."""

from dataclasses import dataclass

from planner.errors import LayoutError
from planner.schedule.families import Family
from planner.schedule.families.base import linear, round_robin, vee

PLACEMENTS = {"linear": linear, "interleaved": round_robin, "vee": vee}
MAX_STAGES = 100_000


@dataclass(frozen=True)
class Placement:
    """The rank of every stage, and what to call it."""

    name: str  # one of `PLACEMENTS`, or "given"
    rank_of_stage: tuple[int, ...]  # shape (S,)

    @property
    def num_ranks(self) -> int:
        """Ranks, p."""
        return max(self.rank_of_stage) + 1

    @property
    def virtual_stages(self) -> int:
        """The most stages any rank hosts, v."""
        return max(map(self.rank_of_stage.count, set(self.rank_of_stage)))


def read_placement(text: str, num_ranks: int, virtual_stages: int | None) -> Placement:
    """A placement by name, or from a comma list with the rank of every stage; LayoutError where it is neither."""
    if text in PLACEMENTS:
        return named_placement(text, num_ranks, virtual_stages or 1)
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError:
        known = ", ".join(PLACEMENTS)
        raise LayoutError(
            f"placement {text!r} is not known; choose {known} or auto, or list the rank of every stage, like 0,1,1,0"
        ) from None
    for stage, rank in enumerate(ranks):
        if not 0 <= rank < num_ranks:
            raise LayoutError(f"the placement puts stage {stage} on rank {rank}; the ranks are 0 to {num_ranks - 1}")
    idle = set(range(num_ranks)) - set(ranks)
    if idle:
        raise LayoutError(f"the placement leaves rank {min(idle)} of {num_ranks} without a stage; give it one")
    if virtual_stages is not None and len(ranks) != num_ranks * virtual_stages:
        raise LayoutError(
            f"the placement lists {len(ranks)} stages, but {num_ranks} ranks with {virtual_stages} stages each make "
            f"{num_ranks * virtual_stages}; leave one of them out"
        )
    return Placement("given", ranks)


def named_placement(name: str, num_ranks: int, virtual_stages: int) -> Placement:
    """One of `PLACEMENTS`."""
    return Placement(name, PLACEMENTS[name](num_ranks, virtual_stages))


def placement_of_family(family: Family, num_ranks: int, virtual_stages: int) -> Placement:
    """Where a family puts its stages."""
    rank_of_stage = family.placement(num_ranks, virtual_stages)
    fitting = [name for name, place in PLACEMENTS.items() if place(num_ranks, virtual_stages) == rank_of_stage]
    return Placement(fitting[0] if fitting else "given", rank_of_stage)
