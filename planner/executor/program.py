"""What one rank does in a step: its actions, and around each the tensor it waits for and the tensor it sends.

Derived once from the schedule, without torch, so that the loop that runs it decides nothing.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

from planner.executor.cut import unvalidated_cut
from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.transfers import Transfer, transfers

Channel = tuple[int, int, Literal["activation", "gradient"]]  # from rank, to rank, what


@dataclass(frozen=True, slots=True)
class Step:
    """One action and its transfers."""

    action: Action
    receive: Transfer | None  # must have arrived before the action runs
    send: Transfer | None  # leaves when the action has run
    delivered: tuple[Transfer, ...]  # earlier sends of this rank that `receive` proves to have been received


@dataclass(frozen=True)
class RankProgram:
    """All steps of one rank, and its stages."""

    rank: int
    num_stages: int
    num_microbatches: int
    steps: tuple[Step, ...]
    stages: tuple[int, ...]  # ascending
    split: frozenset[tuple[int, int]]  # (stage, microbatch) whose backward is B and W, not BW
    recomputed: frozenset[tuple[int, int]]  # (stage, microbatch) that has an R
    incoming: tuple[Transfer, ...]  # in the order this rank needs them
    sent_to_me: tuple[Transfer, ...]  # the same transfers; on each channel, in the order the other end sends them
    channels: tuple[Channel, ...]  # of the whole pipeline, sorted
    num_unvalidated: int  # leading steps that may run on parameters not yet validated: `planner.executor.cut`
    sent_unvalidated: frozenset[Transfer]  # to this rank, by such steps of the others


def rank_program(schedule: Schedule, rank: int) -> RankProgram:
    """The program of `rank`, from 0; ScheduleError as `planner.schedule.validation.check` raises it."""
    every = transfers(schedule)
    index = {(_is_forward(a), a.stage, a.microbatch): n for ac in schedule.ranks for n, a in _produced(ac)}
    mine = schedule.ranks[rank]
    receives = {_consumer(t): t for t in every if t.to_rank == rank}
    sends = {_producer(t): t for t in every if t.from_rank == rank}
    undelivered: defaultdict[int, list[tuple[int, Transfer]]] = defaultdict(list)  # by receiver; heap by its step
    steps = []
    for action in mine:
        key = (_is_forward(action), action.stage, action.microbatch)
        receive = send = None
        delivered: list[Transfer] = []
        if action.kind not in _LOCAL:
            receive, send = receives.get(key), sends.get(key)
        if receive is not None:
            # Its sender made it at this step of its own list, so it has finished all receives up to there.
            reached = index[_producer(receive)]
            waiting = undelivered[receive.from_rank]
            while waiting and waiting[0][0] <= reached:
                delivered.append(heappop(waiting)[1])
        if send is not None:
            heappush(undelivered[send.to_rank], (index[_consumer(send)], send))
        steps.append(Step(action, receive, send, tuple(delivered)))
    cut = unvalidated_cut(schedule)
    early = {(a.stage, a.microbatch) for actions, end in zip(schedule.ranks, cut, strict=True) for a in actions[:end]}
    return RankProgram(
        rank=rank,
        num_stages=schedule.num_stages,
        num_microbatches=schedule.num_microbatches,
        steps=tuple(steps),
        stages=tuple(sorted({action.stage for action in mine})),
        recomputed=frozenset((a.stage, a.microbatch) for a in mine if a.kind is Kind.R),
        split=frozenset((a.stage, a.microbatch) for a in mine if a.kind is Kind.B),
        incoming=tuple(step.receive for step in steps if step.receive is not None),
        sent_to_me=tuple(t for t in every if t.to_rank == rank),
        channels=tuple(sorted({channel_of(t) for t in every})),
        num_unvalidated=cut[rank],
        sent_unvalidated=frozenset(
            t for t in every if t.to_rank == rank and t.kind == "activation" and (t.from_stage, t.microbatch) in early
        ),
    )


def channel_of(transfer: Transfer) -> Channel:
    """The channel a transfer takes."""
    return transfer.from_rank, transfer.to_rank, transfer.kind


_LOCAL = (Kind.W, Kind.R)  # they neither wait for a tensor of another rank nor make one
_Key = tuple[bool, int, int]  # is a forward, stage, microbatch: the actions that transfer, B and BW alike


def _is_forward(action: Action) -> bool:
    return action.kind is Kind.F


def _produced(actions: Sequence[Action]) -> list[tuple[int, Action]]:
    return [(n, action) for n, action in enumerate(actions) if action.kind not in _LOCAL]


def _producer(transfer: Transfer) -> _Key:
    return transfer.kind == "activation", transfer.from_stage, transfer.microbatch


def _consumer(transfer: Transfer) -> _Key:
    return transfer.kind == "activation", transfer.to_stage, transfer.microbatch
