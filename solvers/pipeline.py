"""The pipeline problem: in which order does every rank run its forwards and backwards?

minimise   span      max over ranks of (end of its last op − start of its first), ranks may start late, or
           makespan  end of the last op anywhere − start of the first
over       one sequence of ops per rank (`Order`), every op once, on the rank that hosts its stage
such that  F(s, j) starts transfer_us[s-1] or more after F(s-1, j) ends;
           B(s, j) starts after F(s, j) ends and transfer_us[s] or more after B(s+1, j) ends; W(s, j) after B(s, j);
           R(s, j), where the stage recomputes, runs after F(s, j) and before B(s, j), and waits for nothing else;
           a rank runs one op at a time, and never holds more than its capacity_bytes, fixed_bytes among them;
           from the start of F to the end of B, no stage has more than its max_in_flight microbatches.

A stage that is not split runs backward and weight as one op, BW, of backward + weight µs. The *back op* of a stage is
its B or BW, whichever it runs.

Memory: F takes activation_bytes (M_B) when it starts. B gives back M_B − M_W when it ends, W gives back M_W
(weight_activation_bytes) when it ends, BW gives back M_B when it ends. Where M_W > M_B, B takes the difference when
it starts and gives nothing back. Where the stage recomputes, F takes only checkpoint_bytes, and R takes the rest of
M_B when it starts. A rank is sequential, so its order alone determines how much it holds.

Microbatches are interchangeable. In any schedule, call the k-th F to start on a stage microbatch k, likewise the
k-th R, the k-th B and the k-th W: if k ops of a stage have started then k distinct producers of each kind they wait
for had ended, so the first k of that kind had, and every precedence still holds at the same times; memory and the
limit in flight only count ops. So without loss F, R, B and W each run in microbatch order on every stage, and all
backends search only such orders. `PipelineProblem.canonical` renames.

Everything is whole µs and whole bytes. Nothing here reads a file, a clock or a solver.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

from solvers.status import SolverError, Status
from solvers.timing import NO_NODE, DeadlockError, TimingGraph

__all__ = [
    "Objective",
    "Op",
    "Order",
    "PipelineProblem",
    "PipelineScore",
    "PipelineSolution",
    "SolverError",
    "Status",
]

Objective = Literal["span", "makespan"]
_MAX_TIME_US = 10**15  # sums of everything stay far inside 64 bits
_MAX_BYTES = 10**18


class Op(NamedTuple):
    """One op of one stage for one microbatch."""

    kind: str  # "F", "B", "W", or "BW" on a stage that is not split; "R" on one that recomputes
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


Order = tuple[tuple[Op, ...], ...]  # the ops of every rank, in the order it runs them


@dataclass(frozen=True)
class PipelineScore:
    """What an order costs, found without a solver."""

    objective_us: int  # span_us or makespan_us, as the problem asks
    span_us: int  # least over all timings of the order (a rank may start late)
    makespan_us: int  # every op as soon as possible
    bubble_rate_span: float  # (span − work) / span, work = the busiest rank's ops
    bubble_rate_makespan: float
    peak_bytes: tuple[int, ...]  # shape (p,), fixed_bytes among them
    fits: bool  # no rank above its capacity, and no stage with more microbatches in flight than it may have
    starts_us: tuple[tuple[int, ...], ...]  # per rank, parallel to the order, of a timing that attains the objective


@dataclass(frozen=True)
class PipelineProblem:
    """Times, delays and memory of one pipeline; see the module's docstring for what they mean. S stages, p ranks.

    ValueError if shapes disagree, a number is negative or not whole, a forward or backward takes no time, a rank
    hosts nothing, or a checkpoint is larger than what is recomputed from it. Integers of numpy are not accepted:
    convert, so that nothing overflows silently.
    """

    forward_us: tuple[int, ...]  # shape (S,), at least 1
    backward_us: tuple[int, ...]  # shape (S,), gradient of the input, at least 1
    weight_us: tuple[int, ...]  # shape (S,), gradient of the weights, may be 0
    split: tuple[bool, ...]  # shape (S,)
    transfer_us: tuple[int, ...]  # shape (S-1,), between stage s and s+1, either direction; occupies nobody
    rank_of_stage: tuple[int, ...]  # shape (S,)
    num_microbatches: int
    activation_bytes: tuple[int, ...]  # shape (S,), M_B
    weight_activation_bytes: tuple[int, ...]  # shape (S,), M_W; not read where the stage is not split
    capacity_bytes: tuple[int, ...] | None = None  # shape (p,); None is no limit
    objective: Objective = "span"
    fixed_bytes: tuple[int, ...] | None = None  # shape (p,), held all the time: weights, gradients, buffers
    max_in_flight: tuple[int, ...] | None = None  # shape (S,), at least 1: microbatches from F start to back op end
    recompute_us: tuple[int, ...] | None = None  # shape (S,), time of R; 0: the stage does not recompute
    checkpoint_bytes: tuple[int, ...] | None = None  # shape (S,), what F takes where the stage recomputes

    def __post_init__(self) -> None:
        num_stages = len(self.forward_us)
        if num_stages == 0:
            raise ValueError("a pipeline needs at least one stage, forward_us is empty")
        for name, want in (
            ("backward_us", num_stages),
            ("weight_us", num_stages),
            ("split", num_stages),
            ("transfer_us", num_stages - 1),
            ("rank_of_stage", num_stages),
            ("activation_bytes", num_stages),
            ("weight_activation_bytes", num_stages),
            ("max_in_flight", num_stages),
            ("recompute_us", num_stages),
            ("checkpoint_bytes", num_stages),
        ):
            if getattr(self, name) is not None and len(getattr(self, name)) != want:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, {num_stages} stages need {want}")
        for name, least, most in (
            ("forward_us", 1, _MAX_TIME_US),
            ("backward_us", 1, _MAX_TIME_US),
            ("weight_us", 0, _MAX_TIME_US),
            ("transfer_us", 0, _MAX_TIME_US),
            ("rank_of_stage", 0, num_stages - 1),
            ("activation_bytes", 0, _MAX_BYTES),
            ("weight_activation_bytes", 0, _MAX_BYTES),
            ("max_in_flight", 1, 10**9),
            ("recompute_us", 0, _MAX_TIME_US),
            ("checkpoint_bytes", 0, _MAX_BYTES),
        ):
            for stage, value in enumerate(getattr(self, name) or ()):
                _check_whole(f"{name}[{stage}]", value, least, most)
        _check_whole("num_microbatches", self.num_microbatches, 1, 10**9)
        missing = set(range(max(self.rank_of_stage) + 1)) - set(self.rank_of_stage)
        if missing:
            raise ValueError(f"rank_of_stage {self.rank_of_stage} leaves rank {min(missing)} without a stage")
        for name, per_rank in (("capacity_bytes", self.capacity_bytes), ("fixed_bytes", self.fixed_bytes)):
            if per_rank is not None:
                if len(per_rank) != self.num_ranks:
                    raise ValueError(f"{name} has {len(per_rank)} entries, there are {self.num_ranks} ranks")
                for rank, value in enumerate(per_rank):
                    _check_whole(f"{name}[{rank}]", value, 0, _MAX_BYTES)
        if (self.recompute_us is None) != (self.checkpoint_bytes is None):
            given, absent = ("recompute_us", "checkpoint_bytes")[:: 1 if self.checkpoint_bytes is None else -1]
            raise ValueError(f"{given} is given without {absent}: a stage that recomputes needs both")
        for stage, taken in enumerate(self.taken_by_forward_bytes):
            if taken > self.activation_bytes[stage]:
                raise ValueError(
                    f"checkpoint_bytes[{stage}] is {taken}, more than the activation_bytes of the stage, "
                    f"{self.activation_bytes[stage]}, which recomputing brings back"
                )
        if self.objective not in ("span", "makespan"):
            raise ValueError(f"objective is {self.objective!r}, choose 'span' or 'makespan'")

    @property
    def num_stages(self) -> int:
        """Stages, S."""
        return len(self.forward_us)

    @cached_property
    def num_ranks(self) -> int:
        """Ranks, p."""
        return max(self.rank_of_stage) + 1

    @cached_property
    def stages_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """The stages every rank hosts, ascending; shape (p, chunks of the rank)."""
        return tuple(
            tuple(s for s, host in enumerate(self.rank_of_stage) if host == rank) for rank in range(self.num_ranks)
        )

    @cached_property
    def has_recompute(self) -> tuple[bool, ...]:
        """Stages that run R; shape (S,)."""
        return (False,) * self.num_stages if self.recompute_us is None else tuple(us > 0 for us in self.recompute_us)

    @cached_property
    def rerun_us(self) -> tuple[int, ...]:
        """How long R runs, 0 where the stage does not recompute; shape (S,)."""
        return (0,) * self.num_stages if self.recompute_us is None else self.recompute_us

    @cached_property
    def taken_by_forward_bytes(self) -> tuple[int, ...]:
        """What F takes when it starts: the checkpoint where the stage recomputes, else M_B; shape (S,)."""
        if self.checkpoint_bytes is None:
            return self.activation_bytes
        return tuple(
            checkpoint if recomputes else whole
            for checkpoint, whole, recomputes in zip(
                self.checkpoint_bytes, self.activation_bytes, self.has_recompute, strict=True
            )
        )

    @cached_property
    def restored_bytes(self) -> tuple[int, ...]:
        """What R takes when it starts, M_B less the checkpoint; 0 where the stage does not recompute; shape (S,)."""
        return tuple(map(int.__sub__, self.activation_bytes, self.taken_by_forward_bytes))

    @cached_property
    def room_bytes(self) -> tuple[int, ...] | None:
        """What the capacity leaves beside what is fixed, negative where that is too much; shape (p,)."""
        if self.capacity_bytes is None or self.fixed_bytes is None:
            return self.capacity_bytes
        return tuple(map(int.__sub__, self.capacity_bytes, self.fixed_bytes))

    @cached_property
    def in_flight_limit(self) -> tuple[int, ...]:
        """max_in_flight, but never more than there are microbatches; shape (S,)."""
        m = self.num_microbatches
        return (m,) * self.num_stages if self.max_in_flight is None else tuple(min(m, n) for n in self.max_in_flight)

    @cached_property
    def back_us(self) -> tuple[int, ...]:
        """What a stage runs before its predecessor can go on backwards: B where split, else BW; shape (S,)."""
        return tuple(
            b if split else b + w for b, w, split in zip(self.backward_us, self.weight_us, self.split, strict=True)
        )

    @cached_property
    def has_weight_op(self) -> tuple[bool, ...]:
        """Stages with a W that takes time; shape (S,).

        A W of 0 µs can run right after its B without loss: it delays nothing and only gives memory back. Searches
        therefore treat such a stage as one backward op and write the W behind its B.
        """
        return tuple(split and w > 0 for split, w in zip(self.split, self.weight_us, strict=True))

    @cached_property
    def extra_bytes(self) -> tuple[int, ...]:
        """What a backward takes when it starts, max(0, M_W − M_B) where split; shape (S,)."""
        return tuple(
            max(0, mw - mb) if split else 0
            for mb, mw, split in zip(self.activation_bytes, self.weight_activation_bytes, self.split, strict=True)
        )

    @cached_property
    def kept_bytes(self) -> tuple[int, ...]:
        """What is held from the end of a backward to the end of its W: M_W where split, else 0; shape (S,)."""
        return tuple(mw if split else 0 for mw, split in zip(self.weight_activation_bytes, self.split, strict=True))

    @cached_property
    def work_us(self) -> tuple[int, ...]:
        """Time every rank is busy, all microbatches; shape (p,)."""
        return tuple(
            self.num_microbatches
            * sum(self.forward_us[s] + self.rerun_us[s] + self.backward_us[s] + self.weight_us[s] for s in stages)
            for stages in self.stages_of_rank
        )

    @property
    def num_ops(self) -> int:
        """Ops of a complete order, all ranks together."""
        return self.num_microbatches * sum(map(len, self._kinds))

    @cached_property
    def _kinds(self) -> tuple[tuple[str, ...], ...]:
        """The kinds of op that every stage runs."""
        return tuple(
            ("F", *(("R",) if recomputes else ()), *(("B", "W") if split else ("BW",)))
            for recomputes, split in zip(self.has_recompute, self.split, strict=True)
        )

    def duration_us(self, kind: str, stage: int) -> int:
        """How long an op of this kind runs on this stage."""
        return {
            "F": self.forward_us[stage],
            "R": self.rerun_us[stage],
            "B": self.backward_us[stage],
            "W": self.weight_us[stage],
            "BW": self.backward_us[stage] + self.weight_us[stage],
        }[kind]

    @cached_property
    def least_room_bytes(self) -> tuple[int, ...]:
        """The least room beside what is fixed with which every rank can run at all; shape (p,).

        When B(s, j) of a rank's i-th chunk starts, microbatch j still holds M_B on that chunk, B's extra, and on the
        chunks below it what their F took at least. Every schedule holds that at some time, and running one
        microbatch after the other, each R right in front of its back op and each W right behind its B, never holds
        more, nor has more than one microbatch in flight: so a problem is feasible iff no rank has less than this.
        """
        least = []
        for stages in self.stages_of_rank:
            below = peak = 0
            for stage in stages:
                peak = max(peak, below + self.activation_bytes[stage] + self.extra_bytes[stage])
                below += self.taken_by_forward_bytes[stage]
            least.append(peak)
        return tuple(least)

    def single_microbatch_bytes(self) -> tuple[int, ...]:
        """The least capacity with which every rank can run at all, what is fixed included; shape (p,)."""
        return tuple(map(int.__add__, self.least_room_bytes, self.fixed_bytes or (0,) * self.num_ranks))

    def is_feasible(self) -> bool:
        """Whether any order fits the capacities; exact, see `least_room_bytes`."""
        return self.capacity_bytes is None or all(
            need <= there for need, there in zip(self.single_microbatch_bytes(), self.capacity_bytes, strict=True)
        )

    def canonical(self, order: Order) -> Order:
        """The same schedule with the ops of each stage and kind numbered in the order they run; costs nothing."""
        renamed = []
        for ops in order:
            counts: dict[tuple[str, int], int] = {}
            row = []
            for op in ops:
                index = counts.get((op.kind, op.stage), 0)
                counts[op.kind, op.stage] = index + 1
                row.append(Op(op.kind, op.stage, index))
            renamed.append(tuple(row))
        return tuple(renamed)

    def evaluate(self, order: Order) -> PipelineScore:
        """Time and memory of an order, exactly and without a solver.

        ValueError if an op is missing, repeated, unknown or on the wrong rank, or if the order deadlocks; the text
        names rank, step and op. An order that holds more memory than there is, or has more microbatches in flight than
        a stage may have, gets a score with `fits` false.
        """
        fixed_bytes = self.fixed_bytes or (0,) * self.num_ranks
        graph = self.timing_graph(order)
        peak_bytes = tuple(fixed + self._peak_bytes(ops) for fixed, ops in zip(fixed_bytes, order, strict=True))
        return self.timed(order, graph, peak_bytes, max(self.work_us))

    def timed(self, order: Order, graph: TimingGraph, peak_bytes: tuple[int, ...], work_us: int) -> PipelineScore:
        """The score of an order from its timing graph, its peaks and the busiest rank's work.

        ValueError if the order deadlocks.
        """
        try:
            topological = graph.topological_order()
        except DeadlockError as error:
            raise ValueError(self._deadlock_text(order, graph, error.node)) from None
        asap_us = graph.earliest_starts_us(topological, [0] * self.num_ranks)
        lasts = [graph.first[r + 1] - 1 for r in range(self.num_ranks)]
        makespan_us = max(asap_us[n] + graph.duration_us[n] for n in lasts)
        span_us, span_starts_us = graph.least_span(topological)
        starts_us = asap_us if self.objective == "makespan" else span_starts_us
        fits = self.capacity_bytes is None or all(map(int.__le__, peak_bytes, self.capacity_bytes))
        if self.max_in_flight is not None:
            fits = fits and all(self._keeps_in_flight_limit(ops) for ops in order)
        return PipelineScore(
            objective_us=makespan_us if self.objective == "makespan" else span_us,
            span_us=span_us,
            makespan_us=makespan_us,
            bubble_rate_span=(span_us - work_us) / span_us,
            bubble_rate_makespan=(makespan_us - work_us) / makespan_us,
            peak_bytes=peak_bytes,
            fits=fits,
            starts_us=tuple(tuple(starts_us[a:b]) for a, b in pairwise(graph.first)),
        )

    def _peak_bytes(self, ops: Sequence[Op]) -> int:
        """The most that a rank running these ops holds beside what is fixed."""
        held = peak = 0
        whole, extra, kept = self.activation_bytes, self.extra_bytes, self.kept_bytes
        take_f, take_r = self.taken_by_forward_bytes, self.restored_bytes
        for kind, stage, _ in ops:
            if kind == "F":
                held += take_f[stage]
            elif kind == "R":
                held += take_r[stage]
            elif kind == "B":
                held += extra[stage]
            peak = max(peak, held)
            if kind == "B":
                held += kept[stage] - extra[stage] - whole[stage]
            elif kind == "W":
                held -= kept[stage]
            elif kind == "BW":
                held -= whole[stage]
        return peak

    def _keeps_in_flight_limit(self, ops: Sequence[Op]) -> bool:
        """Whether no F of a rank running these ops starts while its stage has as many in flight as it may have."""
        left = list(self.in_flight_limit)
        for kind, stage, _ in ops:
            if kind == "F":
                left[stage] -= 1
                if left[stage] < 0:
                    return False
            elif kind in ("B", "BW"):
                left[stage] += 1
        return True

    def timing_graph(self, order: Order) -> TimingGraph:
        """The timing graph of a complete order; ValueError if it is not one."""
        num_stages, num_microbatches = self.num_stages, self.num_microbatches
        if len(order) != self.num_ranks:
            raise ValueError(f"the order has {len(order)} ranks, the problem {self.num_ranks}")
        node_of: dict[tuple[str, int, int], int] = {}
        first = [0]
        duration_us: list[int] = []
        times = {
            "F": self.forward_us,
            "R": self.rerun_us,
            "B": self.backward_us,
            "W": self.weight_us,
            "BW": self.back_us,
        }
        kinds_of = self._kinds
        for rank, ops in enumerate(order):
            for step, op in enumerate(ops):
                kind, stage, microbatch = op
                if not (0 <= stage < num_stages and 0 <= microbatch < num_microbatches):
                    raise ValueError(
                        f"rank {rank}, step {step}: {Op(*op)} does not exist, there are {num_stages} stages and "
                        f"{num_microbatches} microbatches"
                    )
                if kind not in kinds_of[stage]:
                    raise ValueError(
                        f"rank {rank}, step {step}: stage {stage} runs {', '.join(kinds_of[stage])}, not {kind}"
                    )
                if self.rank_of_stage[stage] != rank:
                    raise ValueError(
                        f"rank {rank}, step {step}: {Op(*op)} belongs to rank {self.rank_of_stage[stage]}, "
                        f"which hosts stage {stage}"
                    )
                if op in node_of:
                    raise ValueError(f"rank {rank}, step {step}: {Op(*op)} runs a second time")
                node_of[op] = len(duration_us)
                duration_us.append(times[kind][stage])
            first.append(len(duration_us))
        if len(duration_us) != self.num_ops:
            for stage in range(num_stages):
                for kind in kinds_of[stage]:
                    for microbatch in range(num_microbatches):
                        if (kind, stage, microbatch) not in node_of:
                            raise ValueError(
                                f"rank {self.rank_of_stage[stage]} never runs {Op(kind, stage, microbatch)}"
                            )
        back = ["B" if split else "BW" for split in self.split]
        before_back = ["R" if recomputes else "F" for recomputes in self.has_recompute]
        wait_for = [NO_NODE] * len(duration_us)
        delay_us = [0] * len(duration_us)
        node = 0
        for ops in order:
            for kind, stage, microbatch in ops:
                if kind == "F":
                    if stage:
                        wait_for[node] = node_of["F", stage - 1, microbatch]
                        delay_us[node] = self.transfer_us[stage - 1]
                elif kind == "W":
                    wait_for[node] = node_of["B", stage, microbatch]
                elif kind == "R":
                    wait_for[node] = node_of["F", stage, microbatch]
                else:
                    own = node_of[before_back[stage], stage, microbatch]
                    # it runs on the same rank: waiting for it is a matter of order only, unless it comes later
                    if stage == num_stages - 1 or own > node:
                        wait_for[node] = own
                    else:
                        wait_for[node] = node_of[back[stage + 1], stage + 1, microbatch]
                        delay_us[node] = self.transfer_us[stage]
                node += 1
        return TimingGraph(first, duration_us, wait_for, delay_us)

    def _deadlock_text(self, order: Order, graph: TimingGraph, node: int) -> str:
        flat = [(rank, step, op) for rank, ops in enumerate(order) for step, op in enumerate(ops)]
        rank, step, op = flat[node]
        other_rank, other_step, other = flat[graph.wait_for[node]]
        return (
            f"the order deadlocks: rank {rank}, step {step}: {Op(*op)} waits for {Op(*other)}, which is step "
            f"{other_step} of rank {other_rank} and never runs"
        )


@dataclass(frozen=True)
class PipelineSolution:
    """What one backend answers; `score` is the problem's own, not the solver's word."""

    status: Status
    order: Order | None
    score: PipelineScore | None
    lower_bound_us: int  # proven: no order of this problem costs less (0 if infeasible)
    lower_bound_kind: str  # which argument proved it: work, chain, head-tail, memory-energy, or a solver's name
    solver: str
    seconds: float
    seed: int
    interrupted: bool = False  # Ctrl-C ended the search; the answer is the best until then
    limited_by_time: bool = False  # the clock ended the search, so a second run may differ
    note: str = ""  # why a backend did not do more, in words

    @property
    def objective_us(self) -> int | None:
        """Cost of the order, None without one."""
        return None if self.score is None else self.score.objective_us

    @property
    def gap(self) -> float | None:
        """(objective − lower bound) / objective, None without an order."""
        if self.score is None:
            return None
        return (self.score.objective_us - self.lower_bound_us) / self.score.objective_us


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}, a whole number is needed")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, it must be between {least} and {most}")
