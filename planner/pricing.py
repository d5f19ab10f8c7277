"""One candidate, priced in full: cut, scheduled, simulated, accounted for in memory.

A `Pricer` knows the job and its machines; it holds no search state, so equal questions get equal answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from planner.cost import Network, StepFloor, data_parallel_us, optimizer_us, smallest_device, stage_costs
from planner.layout import Candidate
from planner.memory import buffer_bytes, capacity_bytes, model_state_bytes, num_neighbours, rank_memory
from planner.plans import RankMemory, StageCosts
from planner.problems import pipeline_problem
from planner.schedule.actions import Schedule
from planner.schedule.families import Family
from planner.schedule.residency import peak_in_flight, peak_per_rank
from planner.schedule.simulation import Timeline, simulate
from profiles.cluster import Cluster
from profiles.model import Dtype, LayerProfile, ModelProfile
from solvers.bounds import best_bound
from solvers.partition import PartitionSolution, StagePartition, solve_partition
from solvers.pipeline import PipelineSolution
from solvers.registry import solve_pipeline


@dataclass(frozen=True)
class Job:
    """What is to be trained where."""

    profile: ModelProfile
    cluster: Cluster
    global_batch_size: int
    sequence_length: int
    dtype: Dtype


@dataclass(frozen=True)
class Cut:
    """A candidate's layers in stages, and where the stages run."""

    candidate: Candidate
    layers: tuple[LayerProfile, ...]
    cuts: tuple[int, ...]
    rank_of_stage: tuple[int, ...]
    stages: tuple[StageCosts, ...]

    @cached_property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Layers of every stage, shape (S,)."""
        return tuple(b - a for a, b in pairwise((0, *self.cuts, len(self.layers))))

    def hosted(self, rank: int) -> list[StageCosts]:
        """The stages of one pipeline rank."""
        return [stage for stage, host in zip(self.stages, self.rank_of_stage, strict=True) if host == rank]


@dataclass(frozen=True)
class PricedLayout:
    """A cut with its schedule, memory and price."""

    cut: Cut
    family: str
    solver: str
    schedule: Schedule
    timeline: Timeline
    memory: tuple[RankMemory, ...]
    data_parallel_us: float
    optimizer_us: float

    @property
    def candidate(self) -> Candidate:
        """The point of the outer layout space."""
        return self.cut.candidate

    @property
    def step_us(self) -> float:
        """Predicted step time."""
        return self.timeline.makespan_us + self.data_parallel_us + self.optimizer_us

    @property
    def peak_memory_bytes(self) -> int:
        """Largest total over the ranks."""
        return max(memory.total_bytes for memory in self.memory)

    @property
    def fits(self) -> bool:
        """Whether no rank is over its capacity."""
        return all(memory.total_bytes <= memory.capacity_bytes for memory in self.memory)


class Pricer:
    """Prices candidates of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.network = Network(job.cluster, job.profile.links if job.cluster.num_nodes == 1 else None)
        self.capacity_bytes = capacity_bytes(smallest_device(job.cluster))

    def layers(self, candidate: Candidate) -> tuple[LayerProfile, ...]:
        """The costs of every layer, in order; ProfileError where the profile lacks the candidate's variant."""
        return tuple(self.job.profile.at(candidate.variant(self.job.sequence_length, self.job.dtype)))

    def floor(self, candidate: Candidate, layers: tuple[LayerProfile, ...]) -> StepFloor:
        """A lower bound on every step time of this candidate."""
        room = candidate.pp * self.capacity_bytes - self.states_bytes(candidate, layers)
        links = self.network.pipeline(candidate), self.network.data_parallel(candidate)
        return StepFloor(layers, candidate, self.job.dtype, *links, max(1, room))

    def states_bytes(self, candidate: Candidate, layers: Sequence[LayerProfile]) -> int:
        """Weights, gradients and optimizer state of these layers on one device."""
        parameters = sum(layer.parameter_bytes for layer in layers)
        return sum(model_state_bytes(parameters, self.job.dtype, candidate.zero_stage, candidate.dp))

    def partition(
        self,
        candidate: Candidate,
        layers: Sequence[LayerProfile],
        placement: tuple[int, ...],
        held: Sequence[tuple[int, int]],
        *,
        splits_backward: bool,
        shares_ranks: bool = False,
        time_limit_s: float = 10.0,
        seed: int = 0,
    ) -> PartitionSolution:
        """Cut the layers into stages by integer program, least bottleneck first.

        `held[s]` is how many microbatches stage s holds between F and B, and between B and W, at its fullest. With
        `shares_ranks` the chunks of a rank share its memory as they like; else each chunk gets an equal part.
        """
        chunks = candidate.virtual_stages
        temporaries = tuple(layer.temporary_bytes for layer in layers)
        boundary = max((layer.output_bytes for layer in layers[:-1]), default=0)
        room = [
            self.capacity_bytes - buffer_bytes(boundary, num_neighbours(placement, rank))
            for rank in range(candidate.pp)
        ]
        separate = chunks > 1 and not shares_ranks
        if separate:
            room = [(room[rank] - max(temporaries)) // chunks for rank in placement]
        problem = StagePartition(
            times_us=tuple(round(_work_us(layer, splits_backward)) for layer in layers),
            num_stages=candidate.num_stages,
            static_bytes=tuple(self.states_bytes(candidate, [layer]) for layer in layers),
            activation_bytes=tuple(layer.activation_bytes for layer in layers),
            in_flight=tuple(forwards for forwards, _ in held),
            weight_activation_bytes=tuple(layer.weight_activation_bytes for layer in layers),
            weights_in_flight=tuple(weights for _, weights in held),
            temporary_bytes=None if separate else temporaries,
            capacity_bytes=tuple(room),
            rank_of_stage=None if separate else placement,
        )
        return solve_partition(problem, time_limit_s=time_limit_s, seed=seed)

    def cut(
        self, candidate: Candidate, layers: tuple[LayerProfile, ...], cuts: Sequence[int], placement: tuple[int, ...]
    ) -> Cut:
        """These cuts, priced stage by stage."""
        stages = stage_costs(layers, cuts, placement, self.network.pipeline(candidate))
        return Cut(candidate, layers, tuple(cuts), placement, stages)

    def price_family(
        self, candidate: Candidate, layers: tuple[LayerProfile, ...], family: Family
    ) -> PricedLayout | None:
        """The candidate under a fixed family, which may yet overflow a rank; None if no cut fits.

        With one chunk per rank, None is a proof that none does (where all boundary tensors have one size, as they do
        in a transformer): the counts are those of one moment of the order.
        """
        shape = (family, candidate.pp, candidate.num_microbatches, candidate.virtual_stages)
        placement = family.placement(candidate.pp, candidate.virtual_stages)
        if candidate.virtual_stages == 1:
            held = _held_per_stage(*shape, weight_ratio=_weight_ratio(layers))
        else:
            most = held_per_rank(*shape)
            held = tuple((-(-most[rank][0] // candidate.virtual_stages), 0) for rank in placement)
        solution = self.partition(candidate, layers, placement, held, splits_backward=family.splits_backward)
        if solution.cuts is None:
            return None
        schedule = family_schedule(*shape)
        return self.price(self.cut(candidate, layers, solution.cuts, placement), schedule, family.name, "family")

    def price(self, cut: Cut, schedule: Schedule, family: str, solver: str) -> PricedLayout:
        """Simulate an order on a cut, account for its memory and price what follows the pipeline."""
        candidate, dtype = cut.candidate, self.job.dtype
        timeline = simulate(schedule, cut.stages)
        link = self.network.data_parallel(candidate)
        after = [
            (
                data_parallel_us(sum(stage.parameter_bytes for stage in cut.hosted(rank)), dtype, candidate, link),
                optimizer_us(sum(stage.optimizer_us for stage in cut.hosted(rank)), candidate),
            )
            for rank in range(candidate.pp)
        ]
        traffic_us, update_us = max(after, key=sum)
        return PricedLayout(
            cut=cut,
            family=family,
            solver=solver,
            schedule=schedule,
            timeline=timeline,
            memory=self.memory(cut, timeline.peak_activation_bytes),
            data_parallel_us=traffic_us,
            optimizer_us=update_us,
        )

    def memory(self, cut: Cut, peak_activation_bytes: Sequence[float]) -> tuple[RankMemory, ...]:
        """Memory of every rank when its activations peak at these bytes, shape (p,)."""
        return tuple(
            rank_memory(
                cut.stages,
                cut.rank_of_stage,
                rank,
                dtype=self.job.dtype,
                zero_stage=cut.candidate.zero_stage,
                dp=cut.candidate.dp,
                peak_activation_bytes=math.ceil(peak),
                capacity=self.capacity_bytes,
            )
            for rank, peak in enumerate(peak_activation_bytes)
        )

    def activation_room(self, cut: Cut) -> list[int]:
        """Bytes that every rank has left for activations, shape (p,); negative where the model states overflow."""
        empty = self.memory(cut, [0.0] * cut.candidate.pp)
        return [self.capacity_bytes - fixed.total_bytes for fixed in empty]

    def solve_order(
        self, cut: Cut, *, solver: str, time_limit_s: float, seed: int
    ) -> tuple[PricedLayout | None, PipelineSolution | None]:
        """A solver's order for this cut within the memory that is left, and what the solver said.

        Recomputing layers keep their backward in one piece. (None, None) if the model states alone overflow a rank.
        """
        room = self.activation_room(cut)
        if min(room) < 0:
            return None, None
        problem = pipeline_problem(
            cut.stages,
            cut.rank_of_stage,
            cut.candidate.num_microbatches,
            splits_backward=cut.candidate.can_split_backward,
            capacity_bytes=room,
        )
        solution = solve_pipeline(problem, solver=solver, time_limit_s=time_limit_s, seed=seed)
        if solution.order is None:
            return None, solution
        schedule = Schedule.from_orders(solution.order)
        return self.price(cut, schedule, "auto", solution.solver), solution

    def schedule_bound_us(self, cut: Cut) -> float:
        """A lower bound on the pipeline time of this cut under any order that splits all backwards, or none."""
        bounds = []
        for splits_backward in (False, True) if cut.candidate.can_split_backward else (False,):
            problem = pipeline_problem(
                cut.stages,
                cut.rank_of_stage,
                cut.candidate.num_microbatches,
                splits_backward=splits_backward,
                capacity_bytes=self.activation_room(cut),
                rounding=math.floor,
            )
            bounds.append(float(best_bound(problem).value_us))
        return min(bounds)


@lru_cache(maxsize=16)
def family_schedule(family: Family, num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    """The family's schedule; candidates that differ in tp, ZeRO or recompute only share it."""
    return family.generate(num_ranks, num_microbatches, virtual_stages)


@lru_cache(maxsize=4096)
def held_per_rank(
    family: Family, num_ranks: int, num_microbatches: int, virtual_stages: int
) -> tuple[tuple[int, int], ...]:
    """`peak_per_rank` of the family's schedule, shape (p, 2)."""
    return peak_per_rank(family_schedule(family, num_ranks, num_microbatches, virtual_stages))


@lru_cache(maxsize=4096)
def _held_per_stage(
    family: Family, num_ranks: int, num_microbatches: int, virtual_stages: int, *, weight_ratio: float
) -> tuple[tuple[int, int], ...]:
    return peak_in_flight(family_schedule(family, num_ranks, num_microbatches, virtual_stages), weight_ratio)


def _work_us(layer: LayerProfile, splits_backward: bool) -> float:
    if splits_backward:
        return layer.forward_us + layer.backward_input_us + layer.backward_weight_us
    return layer.forward_us + layer.fused_backward_us


def _weight_ratio(layers: Sequence[LayerProfile]) -> float:
    """M_W / M_B of the whole model, rounded so that neighbouring candidates share what depends on it."""
    activations = sum(layer.activation_bytes for layer in layers)
    return round(sum(layer.weight_activation_bytes for layer in layers) / activations, 2) if activations else 0.0
