"""Which tensors go from rank to rank, in one order that both ends derive from the schedule.

Transfers are not actions: F of stage s sends its output to stage s + 1, the backward of stage s sends its
gradient to stage s − 1, where those live on another rank for this microbatch.
"""

from typing import Literal, NamedTuple

from planner.schedule.actions import Schedule
from planner.schedule.validation import run_order


class Transfer(NamedTuple):
    """One tensor that crosses from one rank to another."""

    kind: Literal["activation", "gradient"]
    from_stage: int
    to_stage: int
    from_rank: int
    to_rank: int
    microbatch: int

    def __str__(self) -> str:
        return (
            f"{self.kind} of microbatch {self.microbatch}, stage {self.from_stage} → {self.to_stage}, "
            f"rank {self.from_rank} → {self.to_rank}"
        )


def transfers(schedule: Schedule) -> tuple[Transfer, ...]:
    """Every transfer of the schedule, in the order of one topological order of the actions that produce them.

    Stages that share a rank hand over in memory and do not appear. ScheduleError as `validation.check` raises
    it.

    Cut down to one channel (an ordered pair of ranks, activations and gradients together), this is the order
    in which the sending rank's list produces them, because a topological order keeps the order within each
    rank.

    No deadlock can follow, whatever the valid schedule, if on every channel tensors arrive in the order sent,
    sends do not block the sender, and receives are posted in this order without blocking: before a rank waits
    for a tensor it has posted the receives of that tensor and of all before it on the channel. Proof: suppose
    the ranks stand still, and let A be the unfinished action that is first in the topological order. All
    actions before A have run: those before it in its rank's list, so its rank has reached it, and those that
    produce what it needs. A tensor it needs has therefore been sent, and so has every earlier tensor of that
    channel, being produced by earlier actions of the same rank. The receives up to it are posted in the same
    order as the sends and match them one to one, so all of them complete; A can run, which contradicts that
    the ranks stand still.
    """
    order = run_order(schedule)
    home_of = [schedule.placements[replica] for replica in schedule.replica_of_microbatch]
    last = schedule.num_stages - 1
    found: list[Transfer] = []
    for rank, step in order:
        kind, stage, microbatch = schedule.ranks[rank][step]
        home = home_of[microbatch]
        if kind == "F":
            if stage < last and home[stage + 1] != rank:
                found.append(Transfer("activation", stage, stage + 1, rank, home[stage + 1], microbatch))
        elif kind in ("B", "BW") and stage > 0 and home[stage - 1] != rank:
            found.append(Transfer("gradient", stage, stage - 1, rank, home[stage - 1], microbatch))
    return tuple(found)
