"""One candidate, priced in full: cut, scheduled, simulated, accounted for in memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from planner.cost import after_us
from planner.cutting import Cut, Cutter
from planner.errors import LayoutError
from planner.layout import Candidate
from planner.memory import rank_memory
from planner.plans import RankMemory
from planner.problems import pipeline_problem
from planner.schedule.actions import Schedule, keep_together
from planner.schedule.families import Family
from planner.schedule.residency import held_at_fullest, peak_in_flight, peak_per_rank
from planner.schedule.simulation import Timeline, simulate
from profiles.model import LayerProfile
from solvers.bounds import best_bound
from solvers.mixed_backwards import MAX_OPS, gains_by_mixing, mix_backwards, relaxed
from solvers.pipeline import PipelineProblem, PipelineSolution
from solvers.registry import solve_pipeline

_MIXING_SHARE = 1 / 3  # of the time for an order


@dataclass(frozen=True)
class PricedLayout:
    """A cut with its schedule, memory and price."""

    cut: Cut
    family: str
    solver: str
    schedule: Schedule
    timeline: Timeline
    memory: tuple[RankMemory, ...]
    exposed_us: tuple[float, ...]  # data-parallel traffic that shows on every rank, shape (p,)
    optimizer_us: float

    @property
    def candidate(self) -> Candidate:
        """The point of the outer layout space."""
        return self.cut.candidate

    @cached_property
    def _reduced_us(self) -> float:
        """When the last rank has reduced its gradients."""
        return max(map(sum, zip(self.timeline.rank_end_us, self.exposed_us, strict=True)))

    @property
    def data_parallel_us(self) -> float:
        """What data-parallel traffic adds to the pipeline's makespan."""
        return self._reduced_us - self.timeline.makespan_us

    @property
    def step_us(self) -> float:
        """Predicted step time."""
        return self._reduced_us + self.optimizer_us

    @property
    def peak_memory_bytes(self) -> int:
        """Largest total over the ranks."""
        return max(memory.total_bytes for memory in self.memory)

    @property
    def fits(self) -> bool:
        """Whether no rank is over its capacity."""
        return all(memory.total_bytes <= memory.capacity_bytes for memory in self.memory)


class Pricer(Cutter):
    """Prices candidates of one job."""

    def price_family(self, candidate: Candidate, family: Family) -> PricedLayout | None:
        """The candidate under a fixed family, which may yet overflow a rank; None if no cut fits.

        With one chunk per rank, None is a proof that none does (where all boundary tensors have one size, as they do
        in a transformer): the counts are those of one moment of the order.
        """
        shape = (family, candidate.pp, candidate.num_microbatches, candidate.virtual_stages)
        placement = family.placement(candidate.pp, candidate.virtual_stages)
        if candidate.virtual_stages > 1:
            priced = self._price_even_chunks(candidate, family, placement)
            if priced is not None and priced.fits:
                return priced
        if candidate.virtual_stages == 1:
            held = _held_per_stage(*shape, weight_ratio=_weight_ratio(self.options(candidate).base))
        else:
            held = _held_at_fullest(*shape)
        solution = self.partition(candidate, placement, held, splits_backward=family.splits_backward)
        if solution.cuts is None:
            return None
        return self.price_order(self.cut(candidate, solution.cuts, placement, solution.choices), family)

    def price_least(self, candidate: Candidate, family: Family) -> PricedLayout:
        """Cut by time alone, everything recomputed that can be: what memory it takes when nothing fits."""
        placement = family.placement(candidate.pp, candidate.virtual_stages)
        cuts = self.even_cuts(candidate, placement, splits_backward=family.splits_backward)
        choices = [len(self.choices(candidate)) - 1] * len(self.options(candidate).base)
        return self.price_order(self.cut(candidate, cuts, placement, choices), family)

    def _price_even_chunks(
        self, candidate: Candidate, family: Family, placement: tuple[int, ...]
    ) -> PricedLayout | None:
        """Cut by time alone; then every rank recomputes just as much as it must. None where that is not enough."""
        cuts = self.even_cuts(candidate, placement, splits_backward=family.splits_backward)
        held = _held_at_fullest(family, candidate.pp, candidate.num_microbatches, candidate.virtual_stages)
        choices = self._just_enough_recompute(candidate, cuts, placement, held, family.splits_backward)
        return None if choices is None else self.price_order(self.cut(candidate, cuts, placement, choices), family)

    def price_fixed(self, candidate: Candidate, layers_per_stage: Sequence[int], family: Family) -> PricedLayout:
        """A complete layout as somebody ran it: these layers per stage, embedding and head counted, this family.

        LayoutError when the numbers do not agree.
        """
        layers = self.options(candidate).base
        if len(layers_per_stage) != candidate.num_stages or sum(layers_per_stage) != len(layers):
            raise LayoutError(
                f"layers_per_stage {list(layers_per_stage)} does not put {len(layers)} layers on "
                f"{candidate.num_stages} stages; give one number per stage that add up"
            )
        cuts = [sum(layers_per_stage[:stage]) for stage in range(1, candidate.num_stages)]
        placement = family.placement(candidate.pp, candidate.virtual_stages)
        return self.price_order(self.cut(candidate, cuts, placement), family)

    # orders

    def price_order(self, cut: Cut, family: Family) -> PricedLayout:
        """A cut under a fixed family; stages that recompute keep its backwards in one piece."""
        c = cut.candidate
        schedule = family_schedule(family, c.pp, c.num_microbatches, c.virtual_stages)
        return self.price(cut, keep_together(schedule, cut.splits), family.name, "family")

    def price(self, cut: Cut, schedule: Schedule, family: str, solver: str) -> PricedLayout:
        """Simulate an order on a cut, account for its memory and price what follows the pipeline."""
        candidate, traffic = cut.candidate, self.traffic(cut.candidate)
        timeline = simulate(schedule, cut.stages)
        after = [after_us(cut.hosted(rank), candidate, traffic, self.job.dtype) for rank in range(candidate.pp)]
        return PricedLayout(
            cut=cut,
            family=family,
            solver=solver,
            schedule=schedule,
            timeline=timeline,
            memory=self.memory(cut, timeline.peak_activation_bytes),
            exposed_us=tuple(exposed for exposed, _ in after),
            optimizer_us=max(update for _, update in after),
        )

    def memory(self, cut: Cut, peak_activation_bytes: Sequence[float]) -> tuple[RankMemory, ...]:
        """Memory of every rank when its activations peak at these bytes, shape (p,)."""
        return tuple(
            rank_memory(
                cut.stages,
                cut.rank_of_stage,
                rank,
                candidate=cut.candidate,
                precision=self.job.precision,
                peak_activation_bytes=math.ceil(peak),
                capacity=capacity,
            )
            for rank, (peak, capacity) in enumerate(
                zip(peak_activation_bytes, self.capacities(cut.candidate), strict=True)
            )
        )

    def activation_room(self, cut: Cut) -> list[int]:
        """Bytes that every rank has left for activations, shape (p,); negative where it overflows without any.

        Gradients that the optimizer copies take none of it: by then activations are gone.
        """
        rooms = []
        for rank, empty in enumerate(self.memory(cut, [0.0] * cut.candidate.pp)):
            room = empty.capacity_bytes - empty.total_bytes
            if room >= 0:
                room += empty.temporary_bytes - max(stage.temporary_bytes for stage in cut.hosted(rank))
            rooms.append(room)
        return rooms

    def solve_order(
        self, cut: Cut, *, solver: str, time_limit_s: float, seed: int, mixing_ops: int = MAX_OPS
    ) -> tuple[PricedLayout | None, PipelineSolution | None]:
        """A solver's order for this cut within the memory that is left, and what the solver said.

        Where backwards take less in one piece, orders that split only some are tried too, for `mixing_ops` simulated
        ops and a third of the time. Recomputing layers keep their backward in one piece. (None, None) if the model
        states alone overflow a rank.
        """
        room = self.activation_room(cut)
        if min(room) < 0:
            return None, None
        problem = pipeline_problem(
            cut.stages,
            cut.rank_of_stage,
            cut.candidate.num_microbatches,
            splits_backward=cut.splits,
            capacity_bytes=room,
        )
        whole_us = _whole_us(cut, problem)
        mixes = gains_by_mixing(problem, whole_us)
        solver_s = time_limit_s * (1 - _MIXING_SHARE) if mixes else time_limit_s
        solution = solve_pipeline(problem, solver=solver, time_limit_s=solver_s, seed=seed)
        if solution.order is None:
            return None, solution
        priced = self.price(cut, Schedule.from_orders(solution.order), "auto", solution.solver)
        if mixes and not solution.interrupted:
            mixing_s = max(0.05, time_limit_s - solution.seconds)
            mixed = mix_backwards(problem, whole_us, time_limit_s=mixing_s, seed=seed, max_ops=mixing_ops)
            other = self.price(cut, Schedule.from_orders(mixed.order), "auto", "mixed-backwards")
            if other.step_us < priced.step_us:
                priced = other
            limited, interrupted = mixed.limited_by_time, mixed.interrupted
            solution = replace(solution, limited_by_time=solution.limited_by_time or limited, interrupted=interrupted)
        return priced, solution

    def schedule_bound_us(self, cut: Cut) -> float:
        """A lower bound on the pipeline time of this cut under any order, backwards split or whole."""
        problem = pipeline_problem(
            cut.stages,
            cut.rank_of_stage,
            cut.candidate.num_microbatches,
            splits_backward=cut.splits,
            capacity_bytes=self.activation_room(cut),
            rounding=math.floor,
        )
        return float(best_bound(relaxed(problem, _whole_us(cut, problem, math.floor))).value_us)

    def least_step_us(self, cut: Cut) -> float:
        """No step with this cut takes less than this, whatever the order; infinite if its model states do not fit."""
        if min(self.activation_room(cut)) < 0:
            return math.inf
        candidate, traffic = cut.candidate, self.traffic(cut.candidate)
        after = [after_us(cut.hosted(rank), candidate, traffic, self.job.dtype) for rank in range(candidate.pp)]
        least = min(exposed for exposed, _ in after) + max(update for _, update in after)
        return self.schedule_bound_us(cut) + least


def _whole_us(cut: Cut, problem: PipelineProblem, rounding: Callable[[float], int] = round) -> list[int]:
    """What BW takes on every stage; at least B takes a µs more than nothing."""
    return [
        max(1, rounding(stage.fused_backward_us)) if split else whole
        for stage, split, whole in zip(cut.stages, problem.split, problem.back_us, strict=True)
    ]


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


@lru_cache(maxsize=1024)
def _held_at_fullest(
    family: Family, num_ranks: int, num_microbatches: int, virtual_stages: int
) -> tuple[tuple[int, int], ...]:
    return held_at_fullest(family_schedule(family, num_ranks, num_microbatches, virtual_stages))


@lru_cache(maxsize=4096)
def _held_per_stage(
    family: Family, num_ranks: int, num_microbatches: int, virtual_stages: int, *, weight_ratio: float
) -> tuple[tuple[int, int], ...]:
    return peak_in_flight(family_schedule(family, num_ranks, num_microbatches, virtual_stages), weight_ratio)


def _weight_ratio(layers: Sequence[LayerProfile]) -> float:
    """M_W / M_B of the whole model, rounded so that neighbouring candidates share what depends on it."""
    activations = sum(layer.activation_bytes for layer in layers)
    return round(sum(layer.weight_activation_bytes for layer in layers) / activations, 2) if activations else 0.0
