"""How long a schedule takes and how much it holds: every action as soon as its rank and its inputs are ready.

Transfers delay what waits for them and occupy nobody. This code shares nothing with the solvers' own scoring,
so each can be checked against the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.validation import run_order


class StageLike(Protocol):
    """What the simulation asks of a stage; `planner.plans.StageCosts` and `StageTimes` have it."""

    @property
    def forward_us(self) -> float:
        """F of one microbatch."""

    @property
    def backward_input_us(self) -> float:
        """B of one microbatch."""

    @property
    def backward_weight_us(self) -> float:
        """W of one microbatch."""

    @property
    def fused_backward_us(self) -> float:
        """BW of one microbatch."""

    @property
    def transfer_us(self) -> float:
        """Of its output to the next stage, and of that gradient back, where they are on different ranks."""

    @property
    def activation_bytes(self) -> int:
        """Held from F to the end of the backward, M_B."""

    @property
    def weight_activation_bytes(self) -> int:
        """Held from B to the end of W, M_W."""


@dataclass(frozen=True)
class StageTimes:
    """A stage given by bare numbers: times of one microbatch in µs, what it holds in bytes."""

    forward_us: float
    backward_input_us: float
    backward_weight_us: float
    fused_backward_us: float
    transfer_us: float = 0.0
    activation_bytes: int = 0
    weight_activation_bytes: int = 0
    recompute_us: float = 0.0
    checkpoint_bytes: int = 0  # what F takes of a microbatch that is recomputed


class TimedAction(NamedTuple):
    """One action and when it ran."""

    action: Action
    start_us: float
    end_us: float


@dataclass(frozen=True)
class Timeline:
    """What became of a schedule. Times count from the start of the step."""

    schedule: Schedule
    starts_us: tuple[tuple[float, ...], ...]  # of every action, in the order of the schedule
    durations_us: dict[str, list[float]]  # by kind, then stage
    makespan_us: float  # end of the last action, every action as soon as possible
    span_us: float  # least possible max over ranks of (last end − first start), see `simulate`
    busy_us: tuple[float, ...]  # shape (p,)
    peak_activation_bytes: tuple[int, ...]  # shape (p,)

    @cached_property
    def ranks(self) -> tuple[tuple[TimedAction, ...], ...]:
        """Every action with its times, in the order of the schedule, shape (p, actions of the rank)."""
        return tuple(
            tuple(
                TimedAction(action, start_us, start_us + self.durations_us[action.kind][action.stage])
                for action, start_us in zip(actions, starts_us, strict=True)
            )
            for actions, starts_us in zip(self.schedule.ranks, self.starts_us, strict=True)
        )

    @property
    def rank_end_us(self) -> tuple[float, ...]:
        """When every rank's last action ends, all as soon as possible, shape (p,)."""
        return tuple(
            starts_us[-1] + self.durations_us[actions[-1].kind][actions[-1].stage]
            for actions, starts_us in zip(self.schedule.ranks, self.starts_us, strict=True)
        )

    @property
    def work_us(self) -> float:
        """The heaviest rank's work: no order of these actions on these ranks takes less."""
        return max(self.busy_us)

    @property
    def bubble_rate_makespan(self) -> float:
        """(makespan − work) / makespan; what a synchronous step loses."""
        return _rate(self.makespan_us, self.work_us)

    @property
    def bubble_rate_span(self) -> float:
        """(span − work) / span; what is lost when no barrier separates the steps."""
        return _rate(self.span_us, self.work_us)


_TIMES = ("forward_us", "backward_input_us", "backward_weight_us", "fused_backward_us", "transfer_us", "recompute_us")


def _rate(cost_us: float, work_us: float) -> float:
    return (cost_us - work_us) / cost_us if cost_us > 0 else 0.0


def simulate(schedule: Schedule, stages: Sequence[StageLike]) -> Timeline:
    """Time every action and add up what every rank holds; `stages` has shape (S,).

    The makespan runs every action as soon as possible. The span lets ranks wait before their first action,
    since nothing but a barrier makes them start together: it is the least D for which some timing of the same
    orders has (end of the last − start of the first action) ≤ D on every rank.

    F takes M_B at its start. The end of B leaves M_W of it, the end of W nothing; where M_W > M_B the
    difference is taken when B starts. The end of BW gives M_B back. A rank's peak is of its own stages alone. Of a
    microbatch that has an R, F takes the stage's checkpoint only, and R the rest of M_B when it starts; stages without
    `recompute_us` and `checkpoint_bytes` run R in no time and save nothing by it.

    ScheduleError when the schedule cannot run or is not for these stages; ValueError for a negative or
    non-finite time.
    """
    for index, stage in enumerate(stages):
        for name in _TIMES:
            value = getattr(stage, name, None) or 0.0
            if not 0 <= value < math.inf:
                raise ValueError(f"stage {index}: {name} is {value}, not a finite time of at least 0")
    order = run_order(schedule, num_stages=len(stages))
    durations_us = _durations_us(stages)
    paths = _Paths(schedule, stages, order)
    busy_us = tuple(sum([durations_us[kind][stage] for kind, stage, _ in actions]) for actions in schedule.ranks)
    return Timeline(
        schedule=schedule,
        starts_us=paths.starts_us,
        durations_us=durations_us,
        makespan_us=paths.makespan_us,
        span_us=max(paths.least_span_us(), max(busy_us)),
        busy_us=busy_us,
        peak_activation_bytes=tuple(_peak_bytes(actions, stages) for actions in schedule.ranks),
    )


def _durations_us(stages: Sequence[StageLike]) -> dict[str, list[float]]:
    return {
        Kind.F: [stage.forward_us for stage in stages],
        Kind.B: [stage.backward_input_us for stage in stages],
        Kind.W: [stage.backward_weight_us for stage in stages],
        Kind.BW: [stage.fused_backward_us for stage in stages],
        Kind.R: [getattr(stage, "recompute_us", None) or 0.0 for stage in stages],
    }


class _Paths:
    """Longest paths through a schedule that can run. Actions are numbered rank by rank, in order."""

    def __init__(self, schedule: Schedule, stages: Sequence[StageLike], order: Sequence[tuple[int, int]]) -> None:
        p, m = schedule.num_ranks, schedule.num_microbatches
        home = schedule.rank_of_stage  # a mirror of it crosses at the same boundaries
        last = len(stages) - 1
        durations_us = _durations_us(stages)
        crosses = [home[stage] != home[stage + 1] for stage in range(last)] + [False]  # from stage s to s + 1
        hop_us = [stage.transfer_us for stage in stages]
        self._first = list(accumulate(map(len, schedule.ranks), initial=0))
        total = self._first[-1]
        self._order = [0] * total
        self._duration_us = [0.0] * total
        self._waits_for = [-1] * total  # the action on another rank whose output it needs
        self._delay_us = [0.0] * total
        starts_us = [0.0] * total
        free_us = [0.0] * p
        # what is on its way to another rank: which action sent it, and when it arrives
        activations: dict[int, tuple[int, float]] = {}
        gradients: dict[int, tuple[int, float]] = {}
        for position, (rank, step) in enumerate(order):
            kind, stage, microbatch = schedule.ranks[rank][step]
            action = self._first[rank] + step
            start_us = free_us[rank]
            if kind == "F":
                if stage and crosses[stage - 1]:
                    sender, arrival_us = activations.pop((stage - 1) * m + microbatch)
                    self._waits_for[action] = sender
                    self._delay_us[action] = hop_us[stage - 1]
                    if arrival_us > start_us:
                        start_us = arrival_us
            elif crosses[stage] and (kind == "B" or kind == "BW"):
                sender, arrival_us = gradients.pop((stage + 1) * m + microbatch)
                self._waits_for[action] = sender
                self._delay_us[action] = hop_us[stage]
                if arrival_us > start_us:
                    start_us = arrival_us
            duration_us = durations_us[kind][stage]
            self._order[position] = action
            self._duration_us[action] = duration_us
            starts_us[action] = start_us
            end_us = free_us[rank] = start_us + duration_us
            if kind == "F":
                if crosses[stage]:
                    activations[stage * m + microbatch] = action, end_us + hop_us[stage]
            elif stage and crosses[stage - 1] and (kind == "B" or kind == "BW"):
                gradients[stage * m + microbatch] = action, end_us + hop_us[stage - 1]
        self.starts_us = tuple(tuple(starts_us[a:b]) for a, b in pairwise(self._first))
        self.makespan_us = max(free_us)
        self._end_us = free_us

    def least_span_us(self) -> float:
        """The span: see `simulate` for what it is, `_largest_cycle_mean` for how.

        With every action as soon as possible, the longest span of a rank is the answer already where a path inside
        that rank is as long, since no rank can then do with less. Else all pairs of ranks are looked at.
        """
        spans_us = [end_us - starts_us[0] for end_us, starts_us in zip(self._end_us, self.starts_us, strict=True)]
        longest_us = max(spans_us)
        rank = spans_us.index(longest_us)
        if self._longest_inside_us(rank) >= longest_us * (1 - 1e-12):
            return longest_us
        return min(longest_us, _largest_cycle_mean(self._between_ranks_us()))

    def _longest_inside_us(self, rank: int) -> float:
        """The longest path from the start of a rank's first action to the end of its last."""
        first, duration_us, waits_for, delay_us = self._first, self._duration_us, self._waits_for, self._delay_us
        heads = set(first[:-1])
        end_us = [-math.inf] * len(duration_us)
        source = first[rank]
        for action in self._order:
            start_us = end_us[action - 1] if action not in heads else -math.inf
            sender = waits_for[action]
            if sender >= 0:
                arrival_us = end_us[sender] + delay_us[action]
                if arrival_us > start_us:
                    start_us = arrival_us
            if action == source and start_us < 0:
                start_us = 0.0
            end_us[action] = start_us + duration_us[action]
        return end_us[first[rank + 1] - 1]

    def _between_ranks_us(self) -> NDArray[np.float64]:
        """[a, b]: longest path from the start of rank a's first action to the end of rank b's last. Shape (p, p).

        −inf where there is none.
        """
        first, duration_us, waits_for, delay_us = self._first, self._duration_us, self._waits_for, self._delay_us
        p = len(first) - 1
        ranks = np.repeat(np.arange(p), np.diff(first)).tolist()
        is_sender = bytearray(len(duration_us))
        for sender in waits_for:
            if sender >= 0:
                is_sender[sender] = 1
        reach_us = np.full((p, p), -np.inf)  # row b: the longest paths from every rank's start to where rank b is now
        np.fill_diagonal(reach_us, 0.0)  # joined by what the first action waits for, before it starts
        rows = list(reach_us)
        on_the_way: dict[int, NDArray[np.float64]] = {}
        for action in self._order:
            row = rows[ranks[action]]
            sender = waits_for[action]
            if sender >= 0:
                np.maximum(row, on_the_way.pop(sender) + delay_us[action], out=row)
            row += duration_us[action]
            if is_sender[action]:
                on_the_way[action] = row.copy()
        return reach_us.T


def _largest_cycle_mean(weights: NDArray[np.float64]) -> float:
    """The largest mean weight of a cycle in the complete digraph with these `weights`, shape (p, p).

    Why this is the span: with x_a the first start of rank a, the ranks' orders allow span D iff x_b + D ≥ x_a
    + w_ab for all a, b, w_ab being the longest path from a's first start to b's last end. Such x exist iff no
    cycle has a mean above D. Source: Karp 1978, doi 10.1016/0012-365X(78)90011-0; all nodes are sources here.
    """
    p = len(weights)
    walks = np.zeros((p + 1, p))  # [k, b]: heaviest walk of k edges that ends in b
    for k in range(p):
        walks[k + 1] = np.max(walks[k][:, None] + weights, axis=0)
    edges_left = p - np.arange(p)
    return float(np.max(np.min((walks[p] - walks[:p]) / edges_left[:, None], axis=0)))


def _peak_bytes(actions: Sequence[Action], stages: Sequence[StageLike]) -> int:
    held = peak = 0
    recomputed = {(index, microbatch) for kind, index, microbatch in actions if kind == "R"}
    for kind, index, microbatch in actions:
        stage = stages[index]
        if kind == "F":
            held += stage.activation_bytes
            if (index, microbatch) in recomputed:
                held -= _saved_bytes(stage)
        elif kind == "R":
            held += _saved_bytes(stage)
        elif kind == "BW":
            held -= stage.activation_bytes
        elif kind == "W":
            held -= stage.weight_activation_bytes
        else:
            change = stage.weight_activation_bytes - stage.activation_bytes
            held += change  # at the start of B when it grows, at its end when it shrinks: no peak in between
        peak = max(peak, held)
    return peak


def _saved_bytes(stage: StageLike) -> int:
    """What a microbatch that is recomputed need not hold before R."""
    kept = getattr(stage, "checkpoint_bytes", None)
    return 0 if kept is None else stage.activation_bytes - kept
