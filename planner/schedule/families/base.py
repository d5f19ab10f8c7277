"""What a schedule family is: a rule that orders F, B and W for any pipeline, and where it puts the stages.

A family lives in a file of its own, which ends in one `Family`; the registry in `planner.schedule.families`
names it. Placements that several families share are here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from planner.errors import ScheduleError
from planner.schedule.actions import Schedule


def linear(num_ranks: int, virtual_stages: int) -> tuple[int, ...]:
    """Stage s on rank s // v, so consecutive stages share a rank. Shape (p · v,)."""
    return tuple(stage // virtual_stages for stage in range(num_ranks * virtual_stages))


def round_robin(num_ranks: int, virtual_stages: int) -> tuple[int, ...]:
    """Stage s on rank s mod p, so chunk c of rank r is stage c · p + r. Shape (p · v,)."""
    return tuple(stage % num_ranks for stage in range(num_ranks * virtual_stages))


def vee(num_ranks: int, virtual_stages: int) -> tuple[int, ...]:
    """Stages down the ranks, then up, then down again: turning points stay on one rank. Shape (p · v,).

    With two chunks per rank it is the letter V: chunk 0 of rank r is stage r, chunk 1 stage 2p − 1 − r.
    """
    down = tuple(range(num_ranks))
    return tuple(rank for chunk in range(virtual_stages) for rank in (down[::-1] if chunk % 2 else down))


def only_one_stage_per_rank(num_ranks: int, num_microbatches: int, virtual_stages: int) -> str | None:
    """The refusal of families that know no chunks: a reason unless v is 1."""
    del num_ranks, num_microbatches
    if virtual_stages == 1:
        return None
    return f"it runs one stage per rank, not {virtual_stages}; choose 1, or an interleaved family"


def only_two_directions(num_ranks: int, num_microbatches: int, virtual_stages: int) -> str | None:
    """The refusal of bidirectional families: a reason unless v is 1 and both directions have a microbatch."""
    if virtual_stages != 1:
        return f"each of its replicas runs one stage per rank, not {virtual_stages}; choose 1"
    if num_ranks < 2:
        return "its two replicas go through the ranks in opposite directions, so it needs at least 2 ranks, not 1"
    if num_microbatches < 2:
        return "its two replicas need a microbatch each, so at least 2, not 1; use more, or the family naive"
    return None


def only_two_stages_per_rank(num_ranks: int, num_microbatches: int, virtual_stages: int) -> str | None:
    """The refusal of families that are drawn for a V: a reason unless v is 2."""
    del num_ranks, num_microbatches
    if virtual_stages == 2:
        return None
    return f"it runs two stages per rank, in a V, not {virtual_stages}; choose virtual_stages=2"


@dataclass(frozen=True)
class Family:
    """One rule that orders a pipeline's actions.

    The three callables take (num_ranks, num_microbatches, virtual_stages), `place` without the microbatches;
    they are called with numbers of at least one, and `build` only where `refuse` gave no reason.
    """

    name: str  # what users type
    title: str
    source: str  # paper, arXiv number, section
    splits_backward: bool  # B and W apart, of some microbatches at least; False: always one BW
    build: Callable[[int, int, int], Schedule]
    place: Callable[[int, int], tuple[int, ...]] = linear
    refuse: Callable[[int, int, int], str | None] = only_one_stage_per_rank
    num_replicas: int = 1  # 2: bidirectional, the ranks also hold the mirror of `place`
    in_layout_search: bool = False  # whether `plan` tries it unasked; pinned by name, every family is tried

    def supports(self, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> str | None:
        """Why this family has no schedule for these numbers; None when it has one."""
        for name, value in (
            ("num_ranks", num_ranks),
            ("num_microbatches", num_microbatches),
            ("virtual_stages", virtual_stages),
        ):
            if value < 1:
                return f"{name} is {value}, it must be at least 1"
        return self.refuse(num_ranks, num_microbatches, virtual_stages)

    def generate(self, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
        """The order of every rank; ScheduleError with the reason of `supports` where there is none."""
        reason = self.supports(num_ranks, num_microbatches, virtual_stages)
        if reason is not None:
            numbers = f"p={num_ranks} m={num_microbatches} v={virtual_stages}"
            raise ScheduleError(f"{self.name} has no schedule for {numbers}: {reason}")
        return self.build(num_ranks, num_microbatches, virtual_stages)

    def placement(self, num_ranks: int, virtual_stages: int = 1) -> tuple[int, ...]:
        """The rank of every stage, shape (p · v,); of replica 0."""
        return self.place(num_ranks, virtual_stages)
