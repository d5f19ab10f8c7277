"""The search over layouts, best bound first, with a certificate over the whole space.

Every candidate first gets a provable floor under its step time (`planner.cost.StepFloor`). Candidates are priced in
full in the order of their floors, and dropped once the floor reaches the best step time found; so the smallest floor
among all that are left, or the best time itself, bounds the whole space from below. The best few then get a
solver-made schedule.
"""

import heapq
import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from planner.cost import (
    Network,
    StepFloor,
    data_parallel_us,
    optimizer_us,
    smallest_device,
    stage_costs,
)
from planner.errors import InfeasibleError
from planner.layout import Candidate, Pins, Space
from planner.memory import capacity_bytes, model_state_bytes, rank_memory
from planner.plans import RankMemory, StageCosts
from planner.schedule.actions import Schedule
from planner.schedule.families import FAMILIES, Family
from planner.schedule.residency import peak_in_flight, peak_per_rank
from planner.schedule.simulation import Timeline, simulate
from planner.scheduling import pipeline_problem
from profiles.cluster import Cluster
from profiles.model import Dtype, LayerProfile, ModelProfile
from solvers.partition import StagePartition, solve_partition
from solvers.pipeline import Status
from solvers.registry import solve_pipeline

SOLVER_ACTION_LIMIT = 40_000  # beyond this many actions only the fixed families are tried
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Job:
    """What is to be trained where."""

    profile: ModelProfile
    cluster: Cluster
    global_batch_size: int
    sequence_length: int
    dtype: Dtype


@dataclass(frozen=True)
class PricedLayout:
    """A candidate with its cut, schedule, memory and price."""

    candidate: Candidate
    family: str
    solver: str
    layers_per_stage: tuple[int, ...]
    rank_of_stage: tuple[int, ...]
    stages: tuple[StageCosts, ...]
    schedule: Schedule
    timeline: Timeline
    memory: tuple[RankMemory, ...]
    data_parallel_us: float
    optimizer_us: float
    schedule_lower_bound_us: float

    @property
    def step_us(self) -> float:
        """Predicted step time."""
        return self.timeline.makespan_us + self.data_parallel_us + self.optimizer_us

    @property
    def peak_memory_bytes(self) -> int:
        """Largest total over the ranks."""
        return max(memory.total_bytes for memory in self.memory)


@dataclass(frozen=True)
class SearchProgress:
    """How far a search is."""

    phase: str
    done: int
    total: int
    best_us: float
    lower_bound_us: float


@dataclass
class SearchResult:
    """The best layouts found, best first, and what is proven about the rest."""

    ranked: list[PricedLayout] = field(default_factory=list)
    lower_bound_us: float = 0.0
    num_candidates: int = 0
    num_pruned: int = 0
    num_evaluated: int = 0
    infeasible: Counter[str] = field(default_factory=Counter)
    closest: str = ""  # the nearest miss of a search that found nothing
    interrupted: bool = False
    limited_by_time: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class _Node:
    """A candidate that passed the memory floor, with its floors."""

    candidate: Candidate
    layers: tuple[LayerProfile, ...]
    floor_us: dict[bool, float]  # by "splits the backward"

    def family_floor_us(self, families: Sequence[Family]) -> float:
        return min(self.floor_us[family.splits_backward] for family in families)


def search(
    job: Job,
    space: Space,
    pins: Pins,
    *,
    time_limit_s: float,
    seed: int,
    num_polished: int = 2,
    on_progress: Callable[[SearchProgress], None] | None = None,
) -> SearchResult:
    """Search `space`; InfeasibleError if nothing in it fits. Ctrl-C gives the best so far."""
    return _Search(job, space, pins, time_limit_s, seed, num_polished, on_progress).run()


class _Search:
    def __init__(
        self,
        job: Job,
        space: Space,
        pins: Pins,
        time_limit_s: float,
        seed: int,
        num_polished: int,
        on_progress: Callable[[SearchProgress], None] | None,
    ) -> None:
        self.job, self.space, self.pins, self.seed = job, space, pins, seed
        self.time_limit_s, self.num_polished, self.on_progress = time_limit_s, num_polished, on_progress
        self.started = time.monotonic()
        self.network = Network(job.cluster, job.profile.links)
        self.capacity = capacity_bytes(smallest_device(job.cluster))
        self.result = SearchResult(num_candidates=len(space.candidates), infeasible=Counter(space.dropped))
        self.best: dict[Candidate, PricedLayout] = {}
        self.nearest_miss: tuple[float, str] = (math.inf, "")

    def run(self) -> SearchResult:
        result = self.result
        queue: list[tuple[float, int, _Node]] = []
        floor_of_expanded = math.inf
        try:
            for index, node in enumerate(self._nodes()):
                heapq.heappush(queue, (node.family_floor_us(self._families(node.candidate)), index, node))
            while queue and queue[0][0] < self._best_us() * (1 - _TOLERANCE):
                if self._elapsed_s() > self.time_limit_s * 0.7:
                    result.limited_by_time = True
                    break
                floor, _, node = heapq.heappop(queue)
                if self._evaluate(node):
                    floor_of_expanded = min(floor_of_expanded, floor)
                result.num_evaluated += 1
                self._report("layouts", floor if not queue else min(floor_of_expanded, queue[0][0]))
        except KeyboardInterrupt:
            if not self.best:
                raise
            result.interrupted = True
        result.num_pruned = len(queue)
        if not self.best:
            result.seconds = self._elapsed_s()
            self._nothing_fits()
        result.lower_bound_us = min(floor_of_expanded, queue[0][0] if queue else math.inf, self._best_us())
        if not result.interrupted:
            self._polish()
        result.ranked = sorted(self.best.values(), key=lambda priced: (priced.step_us, priced.candidate))
        result.lower_bound_us = min(result.lower_bound_us, result.ranked[0].step_us)
        result.seconds = self._elapsed_s()
        return result

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def _best_us(self) -> float:
        return min((priced.step_us for priced in self.best.values()), default=math.inf)

    def _report(self, phase: str, lower_bound_us: float) -> None:
        if self.on_progress is not None:
            done = self.result.num_evaluated
            total = self.result.num_candidates
            self.on_progress(SearchProgress(phase, done, total, self._best_us(), min(lower_bound_us, self._best_us())))

    def _families(self, candidate: Candidate) -> list[Family]:
        """Fixed families that can run this candidate. Recomputing layers keep their backward in one piece."""
        pinned = None if self.pins.family in (None, "auto") else self.pins.family
        families = [
            family
            for family in FAMILIES.values()
            if family.supports(candidate.pp, candidate.num_microbatches, candidate.virtual_stages) is None
            and not (family.splits_backward and (candidate.recompute != "none" or candidate.pp == 1))
            and pinned in (None, family.name)
        ]
        return sorted(families, key=lambda family: (not family.splits_backward, family.name))

    def _nodes(self) -> Iterator[_Node]:
        variants = set(self.job.profile.variants)
        cache: dict[object, tuple[LayerProfile, ...]] = {}
        for candidate in self.space.candidates:
            if not self._families(candidate):
                self.result.infeasible["no schedule family runs it"] += 1
                continue
            variant = candidate.variant(self.job.sequence_length, self.job.dtype)
            if variant not in variants:
                self.result.infeasible["not profiled"] += 1
                continue
            if variant not in cache:
                cache[variant] = tuple(self.job.profile.at(variant))
            layers = cache[variant]
            if self._misses_memory_floor(candidate, layers):
                self.result.infeasible["does not fit in memory"] += 1
                continue
            floor = StepFloor(
                layers,
                candidate,
                self.job.dtype,
                self.network.pipeline(candidate),
                self.network.data_parallel(candidate),
            )
            yield _Node(
                candidate, layers, {split: floor.step_us(splits_backward=split) for split in (False, True)}
            )

    def _misses_memory_floor(self, candidate: Candidate, layers: Sequence[LayerProfile]) -> bool:
        """All ranks together cannot hold the model states and one microbatch each: a proof that no cut fits."""
        need = self._states_bytes(candidate, layers) + sum(layer.activation_bytes for layer in layers)
        if need <= candidate.pp * self.capacity:
            return False
        self._note_miss(need / candidate.pp, f"{_named(candidate)} needs at least {_gib(need / candidate.pp)} per device")
        return True

    def _states_bytes(self, candidate: Candidate, layers: Sequence[LayerProfile]) -> int:
        parameters = sum(layer.parameter_bytes for layer in layers)
        return sum(model_state_bytes(parameters, self.job.dtype, candidate.zero_stage, candidate.dp))

    def _note_miss(self, need_bytes: float, text: str) -> None:
        if need_bytes < self.nearest_miss[0]:
            self.nearest_miss = (need_bytes, text)

    def _nothing_fits(self) -> None:
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.result.infeasible.items()) or "no candidates"
        miss = f" Closest: {self.nearest_miss[1]}, of {_gib(self.capacity)} usable." if self.nearest_miss[1] else ""
        if self.result.limited_by_time:
            raise InfeasibleError(
                f"no layout found for {self.job.profile.model.name!r} on {self.job.cluster.name!r} within "
                f"{self.time_limit_s:g} s ({reasons}).{miss} Raise --time-limit"
            )
        raise InfeasibleError(
            f"no layout of {self.job.profile.model.name!r} fits cluster {self.job.cluster.name!r} "
            f"({self.job.cluster.num_devices} devices, {_gib(self.capacity)} usable each) with global batch size "
            f"{self.job.global_batch_size}: {reasons}.{miss} Use more or larger devices, or free the pinned degrees"
        )

    def _evaluate(self, node: _Node) -> bool:
        """Price a candidate under every family; whether it may still be feasible."""
        possible = False
        for family in self._families(node.candidate):
            if node.floor_us[family.splits_backward] >= self._best_us():
                possible = True
                continue
            schedule = family.generate(
                node.candidate.pp, node.candidate.num_microbatches, node.candidate.virtual_stages
            )
            placement = family.placement(node.candidate.pp, node.candidate.virtual_stages)
            priced = self._price(node, family, schedule, placement)
            if priced is not None:
                self._keep(priced)
                possible = True
        if not possible:
            possible = self._schedule_in_tight_memory(node)
        if not possible:
            self.result.infeasible["does not fit in memory"] += 1
        return possible

    def _keep(self, priced: PricedLayout) -> None:
        known = self.best.get(priced.candidate)
        if known is None or priced.step_us < known.step_us * (1 - _TOLERANCE):
            self.best[priced.candidate] = priced

    def _schedule_in_tight_memory(self, node: _Node) -> bool:
        """No fixed family fits: let list scheduling hold fewer microbatches. False only when no cut can fit."""
        candidate = node.candidate
        if candidate.pp == 1 or self.pins.family not in (None, "auto"):
            return False
        if candidate.virtual_stages > 1:
            return not self._chunks_overflow(node)
        rank_of_stage = tuple(range(candidate.pp))
        cuts, proven = self._cuts(node, [1] * candidate.pp, rank_of_stage, splits_backward=True)
        if cuts is None:
            return not proven
        if 3 * candidate.num_stages * candidate.num_microbatches > SOLVER_ACTION_LIMIT:
            return True
        self._solve(node, cuts, rank_of_stage, solver="list", time_limit_s=2.0)
        return True

    def _chunks_overflow(self, node: _Node) -> bool:
        """A proof that no cut fits: rank by rank, count the layers it could hold at the family's in-flight counts.

        A rank that holds each of its layers at least n times at one moment fits at most as many layers as the lightest
        ones do; if all ranks together fit fewer than the model has, nothing fits.
        """
        candidate = node.candidate
        for family in self._families(candidate):
            schedule = family.generate(candidate.pp, candidate.num_microbatches, candidate.virtual_stages)
            room = 0
            for _, common in peak_per_rank(schedule):
                needs = sorted(
                    self._states_bytes(candidate, [layer]) + common * layer.activation_bytes for layer in node.layers
                )
                room += bisect_right(list(accumulate(needs)), self.capacity)
            if room >= len(node.layers):
                return False
        return True

    def _price(
        self, node: _Node, family: Family, schedule: Schedule, rank_of_stage: tuple[int, ...]
    ) -> PricedLayout | None:
        chunks = node.candidate.virtual_stages
        if chunks == 1:
            held = peak_in_flight(schedule, _weight_ratio(node.layers))
        else:
            per_rank = peak_per_rank(schedule)
            held = tuple(-(-per_rank[rank][0] // chunks) for rank in rank_of_stage)
        cuts, _ = self._cuts(node, held, rank_of_stage, splits_backward=family.splits_backward)
        if cuts is None:
            return None
        link = self.network.pipeline(node.candidate)
        stages = stage_costs(node.layers, cuts, rank_of_stage, link)
        return self._finish(node, stages, cuts, rank_of_stage, schedule, family.name, "family", 0.0)

    def _finish(
        self,
        node: _Node,
        stages: tuple[StageCosts, ...],
        cuts: Sequence[int],
        rank_of_stage: tuple[int, ...],
        schedule: Schedule,
        family: str,
        solver: str,
        schedule_lower_bound_us: float,
    ) -> PricedLayout | None:
        """Simulate, account for memory and price; None if a rank is over its memory."""
        candidate, dtype = node.candidate, self.job.dtype
        timeline = simulate(schedule, stages)
        hosted = [
            [stage for stage, host in zip(stages, rank_of_stage, strict=True) if host == rank]
            for rank in range(candidate.pp)
        ]
        memory = tuple(
            rank_memory(
                hosted[rank],
                dtype=dtype,
                zero_stage=candidate.zero_stage,
                dp=candidate.dp,
                num_ranks=candidate.pp,
                peak_activation_bytes=math.ceil(timeline.peak_activation_bytes[rank]),
                capacity=self.capacity,
            )
            for rank in range(candidate.pp)
        )
        worst = max(range(candidate.pp), key=lambda rank: memory[rank].total_bytes)
        if memory[worst].total_bytes > self.capacity:
            need = memory[worst].total_bytes
            self._note_miss(need, f"{_named(candidate)} with {family} needs {_gib(need)} on pipeline rank {worst}")
            return None
        link = self.network.data_parallel(candidate)
        after = [
            (
                data_parallel_us(sum(stage.parameter_bytes for stage in stages_here), dtype, candidate, link),
                optimizer_us(sum(stage.optimizer_us for stage in stages_here), candidate),
            )
            for stages_here in hosted
        ]
        traffic_us, update_us = max(after, key=sum)
        bounds = (0, *cuts, len(node.layers))
        return PricedLayout(
            candidate=candidate,
            family=family,
            solver=solver,
            layers_per_stage=tuple(b - a for a, b in zip(bounds, bounds[1:], strict=False)),
            rank_of_stage=rank_of_stage,
            stages=stages,
            schedule=schedule,
            timeline=timeline,
            memory=memory,
            data_parallel_us=traffic_us,
            optimizer_us=update_us,
            schedule_lower_bound_us=schedule_lower_bound_us,
        )

    def _cuts(
        self,
        node: _Node,
        held: Sequence[int],
        rank_of_stage: tuple[int, ...],
        *,
        splits_backward: bool,
    ) -> tuple[tuple[int, ...] | None, bool]:
        """Inner bounds of the stages, least bottleneck first; (None, proven) when there are none.

        `held[s]` is the most microbatches that stage s holds at one time. The chunks of a rank share its memory in
        equal parts.
        """
        candidate, layers = node.candidate, node.layers
        per_rank = Counter(rank_of_stage)
        overhead = max(layer.temporary_bytes for layer in layers) + 4 * max(layer.output_bytes for layer in layers)
        partition = StagePartition(
            times_us=tuple(round(_work_us(layer, splits_backward)) for layer in layers),
            num_stages=candidate.num_stages,
            static_bytes=tuple(self._states_bytes(candidate, [layer]) for layer in layers),
            activation_bytes=tuple(layer.activation_bytes for layer in layers),
            in_flight=tuple(held),
            capacity_bytes=tuple((self.capacity - overhead) // per_rank[rank] for rank in rank_of_stage),
        )
        solution = solve_partition(partition, time_limit_s=max(1.0, self.time_limit_s - self._elapsed_s()), seed=self.seed)
        return solution.cuts, solution.status is Status.INFEASIBLE and candidate.virtual_stages == 1

    def _polish(self) -> None:
        """Give the best few candidates a solver-made schedule."""
        if self.pins.family not in (None, "auto"):
            return
        chosen = sorted(self.best.values(), key=lambda priced: (priced.step_us, priced.candidate))[: self.num_polished]
        for position, priced in enumerate(chosen):
            left = self.time_limit_s - self._elapsed_s()
            share = left / (len(chosen) - position)
            node = self._node_of(priced)
            if priced.candidate.pp == 1 or share < 0.2:
                continue
            if priced.schedule.num_microbatches * priced.candidate.num_stages * 3 > SOLVER_ACTION_LIMIT:
                continue
            self._report("schedule", self.result.lower_bound_us)
            cuts = [sum(priced.layers_per_stage[: i + 1]) for i in range(len(priced.layers_per_stage) - 1)]
            if self._solve(node, cuts, priced.rank_of_stage, solver="auto", time_limit_s=share):
                return

    def _node_of(self, priced: PricedLayout) -> _Node:
        variant = priced.candidate.variant(self.job.sequence_length, self.job.dtype)
        return _Node(priced.candidate, tuple(self.job.profile.at(variant)), {})

    def _solve(
        self, node: _Node, cuts: Sequence[int], rank_of_stage: tuple[int, ...], *, solver: str, time_limit_s: float
    ) -> bool:
        """Schedule with a solver and keep the result if it is better; whether Ctrl-C came meanwhile."""
        candidate = node.candidate
        stages = stage_costs(node.layers, cuts, rank_of_stage, self.network.pipeline(candidate))
        splits = candidate.recompute == "none"
        room = []
        for rank in range(candidate.pp):
            hosted = [stage for stage, host in zip(stages, rank_of_stage, strict=True) if host == rank]
            fixed = rank_memory(
                hosted,
                dtype=self.job.dtype,
                zero_stage=candidate.zero_stage,
                dp=candidate.dp,
                num_ranks=candidate.pp,
                peak_activation_bytes=0,
                capacity=self.capacity,
            )
            room.append(self.capacity - fixed.total_bytes)
        if min(room) < 0:
            return False
        problem = pipeline_problem(
            stages, rank_of_stage, candidate.num_microbatches, splits_backward=splits, capacity_bytes=room
        )
        solution = solve_pipeline(problem, solver=solver, time_limit_s=time_limit_s, seed=self.seed)
        self.result.interrupted |= solution.interrupted
        self.result.limited_by_time |= solution.limited_by_time
        if solution.order is not None:
            schedule = Schedule.from_orders(solution.order)
            bound = float(solution.lower_bound_us)
            priced = self._finish(
                node, stages, cuts, rank_of_stage, schedule, "auto", solution.solver, bound
            )
            if priced is not None:
                self._keep(priced)
        return solution.interrupted


def _work_us(layer: LayerProfile, splits_backward: bool) -> float:
    if splits_backward:
        return layer.forward_us + layer.backward_input_us + layer.backward_weight_us
    return layer.forward_us + layer.fused_backward_us


def _weight_ratio(layers: Sequence[LayerProfile]) -> float:
    ratios = [layer.weight_activation_bytes / layer.activation_bytes for layer in layers if layer.activation_bytes]
    return max(ratios, default=0.0)


def _named(candidate: Candidate) -> str:
    recompute = "" if candidate.recompute == "none" else f" recompute={candidate.recompute}"
    return (
        f"tp={candidate.tp} pp={candidate.pp} dp={candidate.dp} v={candidate.virtual_stages} "
        f"micro_batch_size={candidate.micro_batch_size} zero={candidate.zero_stage}{recompute}"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
