"""How long a schedule takes and how much it holds: every action as soon as its rank and its inputs are ready.

Transfers delay what waits for them and occupy nobody. This code shares nothing with the solvers' own scoring,
so each can be checked against the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
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

    ranks: tuple[tuple[TimedAction, ...], ...]  # in the order of the schedule, shape (p, actions of the rank)
    makespan_us: float  # end of the last action, every action as soon as possible
    span_us: float  # least possible max over ranks of (last end − first start), see `simulate`
    busy_us: tuple[float, ...]  # shape (p,)
    peak_activation_bytes: tuple[int, ...]  # shape (p,)

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
            value = getattr(stage, name, 0.0)
            if not 0 <= value < math.inf:
                raise ValueError(f"stage {index}: {name} is {value}, not a finite time of at least 0")
    order = run_order(schedule, num_stages=len(stages))
    starts_us, reach_us = _propagate(schedule, stages, order)
    durations_us = _durations_us(stages)
    ranks = tuple(
        tuple(
            [
                TimedAction(action, start_us, start_us + durations_us[action[0]][action[1]])
                for action, start_us in zip(actions, rank_starts_us, strict=True)
            ]
        )
        for actions, rank_starts_us in zip(schedule.ranks, starts_us, strict=True)
    )
    busy_us = tuple(sum([durations_us[kind][stage] for kind, stage, _ in actions]) for actions in schedule.ranks)
    makespan_us = max(actions[-1].end_us for actions in ranks)
    return Timeline(
        ranks=ranks,
        makespan_us=makespan_us,
        span_us=min(makespan_us, max(_largest_cycle_mean(reach_us), max(busy_us))),
        busy_us=busy_us,
        peak_activation_bytes=tuple(_peak_bytes(actions, stages) for actions in schedule.ranks),
    )


def _durations_us(stages: Sequence[StageLike]) -> dict[str, list[float]]:
    return {
        Kind.F: [stage.forward_us for stage in stages],
        Kind.B: [stage.backward_input_us for stage in stages],
        Kind.W: [stage.backward_weight_us for stage in stages],
        Kind.BW: [stage.fused_backward_us for stage in stages],
        Kind.R: [getattr(stage, "recompute_us", 0.0) for stage in stages],
    }


def _propagate(
    schedule: Schedule, stages: Sequence[StageLike], order: Sequence[tuple[int, int]]
) -> tuple[list[list[float]], NDArray[np.float64]]:
    """The earliest start of every action, and the longest path between the ends of the ranks.

    Entry [a, b] of the matrix, shape (p, p), is the longest path from the start of rank a's first action to
    the end of rank b's last one, −inf where there is none.
    """
    p, m = schedule.num_ranks, schedule.num_microbatches
    home = schedule.rank_of_stage
    last = len(stages) - 1
    durations_us = _durations_us(stages)
    crosses = [home[stage] != home[stage + 1] for stage in range(last)] + [False]  # from stage s to s + 1
    hop_us = [stage.transfer_us for stage in stages]
    starts_us: list[list[float]] = [[0.0] * len(actions) for actions in schedule.ranks]
    free_us = [0.0] * p
    # row b while the sweep goes on: the longest paths from every rank's first start to where rank b is now
    reach_us = np.full((p, p), -np.inf)
    rows = list(reach_us)
    for rank in range(p):
        reach_us[rank, rank] = 0.0  # joined by what the first action waits for, before it starts
    # what is on its way to another rank: when it arrives, and the longest paths to that moment
    activations: dict[int, tuple[float, NDArray[np.float64]]] = {}
    gradients: dict[int, tuple[float, NDArray[np.float64]]] = {}
    for rank, step in order:
        kind, stage, microbatch = schedule.ranks[rank][step]
        start_us = free_us[rank]
        row = rows[rank]
        arrived = None
        if kind == "F":
            if stage > 0 and crosses[stage - 1]:
                arrived = activations.pop((stage - 1) * m + microbatch)
        elif crosses[stage] and (kind == "B" or kind == "BW"):
            arrived = gradients.pop((stage + 1) * m + microbatch)
        if arrived is not None:
            start_us = max(start_us, arrived[0])
            np.maximum(row, arrived[1], out=row)
        duration_us = durations_us[kind][stage]
        starts_us[rank][step] = start_us
        end_us = free_us[rank] = start_us + duration_us
        row += duration_us
        if kind == "F":
            if crosses[stage]:
                activations[stage * m + microbatch] = (end_us + hop_us[stage], row + hop_us[stage])
        elif stage > 0 and crosses[stage - 1] and (kind == "B" or kind == "BW"):
            gradients[stage * m + microbatch] = (end_us + hop_us[stage - 1], row + hop_us[stage - 1])
    return starts_us, reach_us.T


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
    return stage.activation_bytes - getattr(stage, "checkpoint_bytes", stage.activation_bytes)
