"""Actions, schedules, and their text form.

A schedule is, for every rank, the ordered list of its compute actions. Transfers are not actions: they
follow from the order. In text, an action is kind, stage, microbatch: `F0.3` runs the forward of
microbatch 3 on stage 0. One line per rank, actions separated by blanks. (torch writes `0F3`, and its `B` is our `BW`.)

A stage lives on one rank; in a bidirectional schedule on two. There replica 0 of the model has stage s on rank s,
replica 1, the mirror, on rank p − 1 − s, and a microbatch takes all its stages through one of them.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple, Self

from planner.errors import ScheduleError


class Kind(StrEnum):
    """What an action computes."""

    F = "F"  # forward
    B = "B"  # gradient of the input
    W = "W"  # gradient of the weights
    BW = "BW"  # both in one go
    R = "R"  # the forward again, from its checkpoint


class Action(NamedTuple):
    """One compute action of one rank."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The action written as `text`; ScheduleError unless it is one, whole."""
        match = _ACTION.fullmatch(text)
        if match is None:
            raise ScheduleError(
                f"{text!r} is not an action; write kind, stage, microbatch, like F0.3, B0.3, W0.3, BW0.3 or R0.3"
            )
        return cls(Kind(match[1]), int(match[2]), int(match[3]))


_ACTION = re.compile(r"(F|BW|B|W|R)(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})", re.ASCII)


@dataclass(frozen=True)
class Schedule:
    """The order of actions on every rank. Nothing is checked here: `planner.schedule.validation` does that."""

    ranks: tuple[tuple[Action, ...], ...]

    @classmethod
    def from_orders(cls, orders: Iterable[Iterable[tuple[str, int, int]]]) -> Self:
        """Build from (kind, stage, microbatch) triples, one iterable per rank."""
        return cls(tuple(tuple(Action(Kind(k), s, j) for k, s, j in order) for order in orders))

    @classmethod
    def from_lines(cls, lines: Sequence[str]) -> Self:
        """Read the text form, one string per rank; ScheduleError names rank and step of what it cannot read."""
        ranks = []
        for rank, line in enumerate(lines):
            actions = []
            for step, token in enumerate(line.split()):
                try:
                    actions.append(Action.parse(token))
                except ScheduleError as error:
                    raise ScheduleError(f"rank {rank}, step {step}: {error}") from None
            ranks.append(tuple(actions))
        return cls(tuple(ranks))

    def to_lines(self) -> tuple[str, ...]:
        """The text form, one string per rank."""
        return tuple(" ".join(map(str, actions)) for actions in self.ranks)

    def __str__(self) -> str:
        return "\n".join(self.to_lines())

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline, p."""
        return len(self.ranks)

    @cached_property
    def num_stages(self) -> int:
        """One more than the largest stage index in use; 0 when empty."""
        return 1 + max((action.stage for actions in self.ranks for action in actions), default=-1)

    @cached_property
    def num_microbatches(self) -> int:
        """One more than the largest microbatch index in use; 0 when empty."""
        return 1 + max((action.microbatch for actions in self.ranks for action in actions), default=-1)

    @cached_property
    def num_replicas(self) -> int:
        """2 where the first and the last rank both run the first and the last of S = p stages, else 1.

        No schedule that holds every stage once does that.
        """
        ends = {0, self.num_stages - 1}
        if len(ends) == 1 or self.num_stages != self.num_ranks:
            return 1
        return 1 + all(ends <= {stage for _, stage, _ in actions} for actions in (self.ranks[0], self.ranks[-1]))

    @cached_property
    def replica_of_microbatch(self) -> tuple[int, ...]:
        """Which replica each microbatch takes, by the rank that runs its stage 0; shape (m,)."""
        replicas = [0] * self.num_microbatches
        if self.num_replicas == 2:
            for rank, replica in ((-1, 1), (0, 0)):
                for _, stage, microbatch in self.ranks[rank]:
                    if stage == 0:
                        replicas[microbatch] = replica
        return tuple(replicas)

    @cached_property
    def placements(self) -> tuple[tuple[int, ...], ...]:
        """The rank of every stage, by replica; shape (replicas, S). For schedules that can run."""
        home = self.rank_of_stage
        first = tuple(home[stage] for stage in range(self.num_stages))
        return (first,) if self.num_replicas == 1 else (first, first[::-1])

    def holders(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a stage, ascending."""
        return tuple(sorted({ranks[stage] for ranks in self.placements}))

    @cached_property
    def rank_of_stage(self) -> dict[int, int]:
        """The placement: which rank hosts which stage (the first rank, where a broken schedule names two).

        In a bidirectional schedule it is replica 0's.
        """
        if self.num_replicas == 2:
            return {stage: stage for stage in range(self.num_stages)}
        placement: dict[int, int] = {}
        for rank, actions in enumerate(self.ranks):
            for action in actions:
                placement.setdefault(action.stage, rank)
        return placement


def keep_together(schedule: Schedule, splits: Sequence[bool]) -> Schedule:
    """The schedule with B and W made one BW, in B's place, on stages that do not split their backward."""
    if all(splits):
        return schedule
    together = {Kind.B: Kind.BW}
    return Schedule(
        tuple(
            tuple(
                action if splits[action.stage] else Action(together.get(action.kind, action.kind), *action[1:])
                for action in actions
                if splits[action.stage] or action.kind is not Kind.W
            )
            for actions in schedule.ranks
        )
    )
