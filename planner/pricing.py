"""One candidate, priced in full: cut, scheduled, simulated, accounted for in memory.

A `Pricer` knows the job and its machines; it holds no search state, so equal questions get equal answers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from planner.cost import after_us, least_work_us, slowest_group, smallest_device, stage_costs
from planner.errors import LayoutError
from planner.floor import LayerFloor, StepFloor, total
from planner.layout import Candidate
from planner.memory import buffer_bytes, capacity_bytes, model_state_bytes, num_neighbours, rank_memory
from planner.plans import Precision, RankMemory, StageCosts
from planner.problems import pipeline_problem
from planner.schedule.actions import Schedule, keep_together
from planner.schedule.families import Family
from planner.schedule.residency import held_at_fullest, peak_in_flight, peak_per_rank
from planner.schedule.simulation import Timeline, simulate
from planner.traffic import (
    Spans,
    StepTraffic,
    boundary_us,
    optimizer_us,
    sharded_layers,
    step_overhead_us,
    step_traffic,
)
from profiles.cluster import Cluster
from profiles.collectives import Fabric
from profiles.model import BYTES_PER_ELEMENT, Dtype, LayerProfile, ModelProfile, Recompute
from solvers.bounds import best_bound
from solvers.partition import LayerChoice, PartitionSolution, StagePartition, solve_partition
from solvers.pipeline import PipelineSolution
from solvers.registry import solve_pipeline


@dataclass(frozen=True)
class Job:
    """What is to be trained where.

    `profiles` are of every node group of the cluster in turn, or one for all of them.
    """

    profiles: tuple[ModelProfile, ...]
    cluster: Cluster
    global_batch_size: int
    sequence_length: int
    precision: Precision
    overlaps: bool = True  # data-parallel traffic with the pipeline's last backward

    def __post_init__(self) -> None:
        if len(self.profiles) not in (1, len(self.cluster.groups)):
            raise ValueError(f"{len(self.profiles)} profiles for {len(self.cluster.groups)} node groups")

    @property
    def profile(self) -> ModelProfile:
        """The profile of the slowest devices."""
        if len(self.profiles) == 1:
            return self.profiles[0]
        return self.profiles[self.cluster.groups.index(slowest_group(self.cluster, self.dtype))]

    @property
    def dtype(self) -> Dtype:
        """What it computes in."""
        return self.precision.compute


@dataclass(frozen=True)
class LayerOptions:
    """Every layer of a candidate under each choice of recomputation; the first choice takes the least time."""

    choices: tuple[Recompute, ...]
    layers: tuple[tuple[LayerProfile, ...], ...]  # shape (choices, L)

    @property
    def base(self) -> tuple[LayerProfile, ...]:
        """The layers under the first choice."""
        return self.layers[0]

    def chosen(self, choices: Sequence[int] | None) -> tuple[LayerProfile, ...]:
        """Each layer under its choice; None is the first for all."""
        if choices is None:
            return self.base
        return tuple(self.layers[choice][index] for index, choice in enumerate(choices))


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

    @property
    def recompute_of_layer(self) -> tuple[Recompute, ...]:
        """What every layer recomputes, shape (L,)."""
        return tuple(layer.variant.recompute for layer in self.layers)

    @property
    def splits(self) -> tuple[bool, ...]:
        """Whether each stage may run B and W apart, shape (S,)."""
        return tuple(stage.splits_backward for stage in self.stages)

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


class Pricer:
    """Prices candidates of one job."""

    def __init__(self, job: Job, spans: Mapping[tuple[int, ...], Spans] | None = None) -> None:
        """`spans`: how the groups of some candidates lie, by `span_key`, where that is not the usual order."""
        self.job = job
        links = job.profile.links if job.cluster.num_nodes == 1 else None
        self.fabric = (
            Fabric.of(job.cluster)
            if links is None
            else Fabric((job.cluster.num_devices, 1), (links.all_reduce, links.all_reduce))
        )
        self._point_to_point = None if links is None else links.point_to_point
        self.capacity_bytes = capacity_bytes(smallest_device(job.cluster))
        self._group_of_device = [
            index for index, group in enumerate(job.cluster.groups) for _ in range(group.num_devices)
        ]
        self._ranks: dict[int, tuple[int, ...]] = {}
        self.known_variants = frozenset(job.profile.variants)
        self._options: dict[tuple[Candidate, int | None, bool], LayerOptions] = {}
        self._floors: dict[tuple[int, ...], tuple[tuple[LayerFloor, ...], LayerFloor]] = {}
        self._traffic: dict[tuple[object, ...], StepTraffic] = {}
        self._spans: dict[tuple[int, ...], Spans] = dict(spans or {})

    # what a candidate is made of

    def group_of_rank(self, pp: int) -> tuple[int, ...]:
        """The node group of every pipeline rank, devices taken in order, shape (pp,); of several, the slowest."""
        if len(self.job.cluster.groups) == 1:
            return (0,) * pp
        if pp not in self._ranks:
            each, groups = len(self._group_of_device) // pp, self.job.cluster.groups
            rates = [g.device.peak_flops.get(self.job.dtype, 0.0) * g.device.matmul_efficiency for g in groups]
            self._ranks[pp] = tuple(
                min(set(self._group_of_device[rank * each : (rank + 1) * each]), key=lambda index: rates[index])
                for rank in range(pp)
            )
        return self._ranks[pp]

    def capacities(self, candidate: Candidate) -> list[int]:
        """What a process of each pipeline rank may use, in bytes, shape (pp,)."""
        groups = self.job.cluster.groups
        if len(groups) == 1:
            return [self.capacity_bytes] * candidate.pp
        each, rooms = len(self._group_of_device) // candidate.pp, [capacity_bytes(g.device) for g in groups]
        ranks = range(candidate.pp)
        return [min(rooms[i] for i in set(self._group_of_device[r * each : (r + 1) * each])) for r in ranks]

    def _speeds(self, candidate: Candidate) -> tuple[tuple[float, ...], int]:
        """How fast the devices of each rank are against the fastest group (at most 1), and which group that is."""
        if len(self.job.profiles) == 1:
            return (1.0,) * candidate.pp, 0
        all_options = [self.options(candidate, group).base for group in range(len(self.job.profiles))]
        fastest = min(range(len(all_options)), key=lambda group: sum(map(least_work_us, all_options[group])))
        speed = [
            min(1.0, max(least_work_us(f) / least_work_us(o) for f, o in zip(all_options[fastest], own, strict=True)))
            for own in all_options
        ]
        return tuple(speed[group] for group in self.group_of_rank(candidate.pp)), fastest

    def choices(self, candidate: Candidate) -> tuple[Recompute, ...]:
        """What its layers may recompute, as far as the profile knows."""
        return tuple(
            choice
            for choice in candidate.recompute_choices()
            if candidate.variant(self.job.sequence_length, self.job.dtype, choice) in self.known_variants
        )

    def options(self, candidate: Candidate, group: int | None = None) -> LayerOptions:
        """The costs of every layer, in order, under each choice, on the slowest devices or those of one node group."""
        shared = self.job.profile.model.tied_embeddings and (candidate.pp == 1 or candidate.virtual_stages > 1)
        alike = candidate._replace(virtual_stages=1, num_microbatches=1)
        if candidate.zero_stage < 2 and candidate.ep == candidate.cp == 1:  # nothing is sent that depends on the rest
            alike = alike._replace(pp=1, dp=1, zero_stage=0, shard_degree=1)
        key = alike, group, shared
        if key not in self._options:
            job, spans = self.job, self.spans(candidate)
            profile = job.profile if group is None else job.profiles[group]
            names = self.choices(candidate)
            layers = []
            for name in names:
                own = profile.at(candidate.variant(job.sequence_length, job.dtype, name))
                if shared:
                    own[-1] = self._without_matrix(own[-1])
                layers.append(sharded_layers(own, candidate, self.fabric, spans, job.precision))
            self._options[key] = LayerOptions(names, tuple(layers))
        return self._options[key]

    def _without_matrix(self, head: LayerProfile) -> LayerProfile:
        """A tied head beside the embedding, on the same device: the matrix is there already."""
        spec = self.job.profile.model
        norm = spec.hidden_size * BYTES_PER_ELEMENT[self.job.dtype] * (2 if spec.norm == "layernorm" else 1)
        left = min(norm, head.parameter_bytes)
        share = left / head.parameter_bytes if head.parameter_bytes else 1.0
        return head.model_copy(update={"parameter_bytes": left, "optimizer_us": head.optimizer_us * share})

    def spans(self, candidate: Candidate) -> Spans:
        """How its groups lie: devices in order, unless told otherwise."""
        key = span_key(candidate)
        if key not in self._spans:
            self._spans[key] = Spans.packed(candidate, self.fabric)
        return self._spans[key]

    def traffic(self, candidate: Candidate) -> StepTraffic:
        """What it sends once per step."""
        key = (*candidate.degrees, candidate.zero_stage, candidate.shard_degree)
        if key not in self._traffic:
            self._traffic[key] = step_traffic(
                candidate,
                self.fabric,
                self.spans(candidate),
                self.job.precision,
                overlaps=self.job.overlaps,
                overhead_us=self.overhead_us(candidate),
            )
        return self._traffic[key]

    def transfer_us(self, candidate: Candidate, num_bytes: int) -> float:
        """From one pipeline rank to the next."""
        if self._point_to_point is not None:
            return self._point_to_point.transfer_us(num_bytes)
        return boundary_us(num_bytes, candidate, self.fabric, self.spans(candidate))

    def overhead_us(self, candidate: Candidate) -> float:
        """What every step takes beside all that is priced; nothing where costs were measured on the machine itself."""
        return 0.0 if self.job.profile.origin.kind == "measured" else step_overhead_us(candidate)

    # bounds

    def floor(self, candidate: Candidate) -> StepFloor:
        """A lower bound on every step time of this candidate."""
        speeds, fastest = self._speeds(candidate)
        options = self.options(candidate, fastest if len(self.job.profiles) > 1 else None)
        room = sum(self.capacities(candidate)) - self.states_bytes(candidate, options.base)
        hop_us = self.transfer_us(candidate, min((layer.output_bytes for layer in options.base[:-1]), default=0))
        layers, totals = self._layer_floors(candidate, options)
        return StepFloor(
            layers=layers,
            totals=totals,
            candidate=candidate,
            traffic=self.traffic(candidate),
            speeds=speeds,
            hop_us=hop_us if candidate.pp > 1 else 0.0,
            capacity_bytes=max(self.capacities(candidate)),
            room_bytes=max(1, room),
        )

    def _layer_floors(self, candidate: Candidate, options: LayerOptions) -> tuple[tuple[LayerFloor, ...], LayerFloor]:
        key = id(options), candidate.zero_stage, candidate.shard_degree, candidate.dp * candidate.cp
        if key not in self._floors:  # options are kept as long as this pricer
            states: dict[int, int] = {}
            for layer in options.base:
                if id(layer) not in states:
                    states[id(layer)] = self.states_bytes(candidate, [layer])
            layers = _layer_floors(options, self.job.dtype, states)
            self._floors[key] = layers, total(layers)
        return self._floors[key]

    def states_bytes(self, candidate: Candidate, layers: Sequence[LayerProfile]) -> int:
        """Weights, gradients and optimizer state of these layers on one device."""
        parameters = sum(layer.parameter_bytes for layer in layers)
        experts = sum(layer.expert_parameter_bytes for layer in layers)
        weights, gradients, optimizer = model_state_bytes(parameters, experts, candidate, self.job.precision)
        return weights + gradients + optimizer

    def least_bytes(self, candidate: Candidate) -> int:
        """What all ranks of a replica together hold at least: model states and one microbatch."""
        options = self.options(candidate)
        held: int = sum(min(layer.activation_bytes for layer in same) for same in zip(*options.layers, strict=True))
        return self.states_bytes(candidate, options.base) + held

    # cuts

    def partition(
        self,
        candidate: Candidate,
        placement: tuple[int, ...],
        held: Sequence[tuple[int, int]],
        *,
        splits_backward: bool,
        shares_ranks: bool = False,
        time_limit_s: float = 10.0,
        seed: int = 0,
    ) -> PartitionSolution:
        """Cut the layers into stages and choose what they recompute by integer program, least bottleneck first.

        `held[s]` is how many microbatches stage s holds between F and B, and between B and W, at its fullest. With
        `shares_ranks` the chunks of a rank share its memory as they like; else each gets a part by what it holds. A
        layer's time is what it adds to its rank's step: all microbatches, traffic and optimizer.
        """
        options, chunks = self.options(candidate), candidate.virtual_stages
        boundary = max((layer.output_bytes for layer in options.base[:-1]), default=0)
        room = [
            capacity - buffer_bytes(boundary, num_neighbours(placement, rank))
            for rank, capacity in enumerate(self.capacities(candidate))
        ]
        separate = chunks > 1 and not shares_ranks
        if separate:
            largest = max(layer.temporary_bytes for layers in options.layers for layer in layers)
            shares = self._shares(candidate, options.base, placement, held)
            room = [int((room[rank] - largest) * share) for rank, share in zip(placement, shares, strict=True)]
        columns = [
            _columns(self, candidate, index, splits_backward, placement if separate else None)
            for index in range(len(options.choices))
        ]
        problem = StagePartition(
            times_us=columns[0].times_us,
            times_by_rank=columns[0].times_by_rank,
            num_stages=candidate.num_stages,
            static_bytes=tuple(self.states_bytes(candidate, [layer]) for layer in options.base),
            activation_bytes=columns[0].activation_bytes,
            in_flight=tuple(forwards for forwards, _ in held),
            weight_activation_bytes=columns[0].weight_activation_bytes,
            weights_in_flight=tuple(weights for _, weights in held),
            temporary_bytes=columns[0].temporary_bytes,
            capacity_bytes=tuple(room),
            rank_of_stage=None if separate else placement,
            choices=tuple(columns[1:]),
        )
        return solve_partition(problem, time_limit_s=time_limit_s, seed=seed)

    def _shares(
        self,
        candidate: Candidate,
        layers: Sequence[LayerProfile],
        placement: Sequence[int],
        held: Sequence[tuple[int, int]],
    ) -> list[float]:
        """What part of its rank's memory each stage gets, by what average layers would take there, shape (S,)."""
        states = self.states_bytes(candidate, layers)
        activations = sum(layer.activation_bytes for layer in layers)
        weights = sum(layer.weight_activation_bytes for layer in layers)
        needs = [states + forwards * activations + waiting * weights for forwards, waiting in held]
        totals = [0.0] * candidate.pp
        for rank, need in zip(placement, needs, strict=True):
            totals[rank] += need
        return [need / totals[rank] for rank, need in zip(placement, needs, strict=True)]

    def step_times_us(
        self, candidate: Candidate, layers: Sequence[LayerProfile], splits_backward: bool
    ) -> tuple[int, ...]:
        """What every layer adds to its rank's step: all microbatches, traffic that shows, optimizer; whole µs."""
        m, traffic, size = candidate.num_microbatches, self.traffic(candidate), BYTES_PER_ELEMENT[self.job.dtype]
        made: dict[int, int] = {}
        for layer in layers:
            if id(layer) not in made:
                experts = layer.expert_parameter_bytes / size
                busy = traffic.busy_us(layer.parameter_bytes / size - experts, experts)
                hidden = traffic.hidden_us(layer.forward_us, layer.fused_backward_us)
                after = max(0.0, busy - hidden) + optimizer_us(layer.optimizer_us, candidate)
                made[id(layer)] = round(m * _work_us(layer, splits_backward) + after)
        return tuple(made[id(layer)] for layer in layers)

    def cut(
        self,
        candidate: Candidate,
        cuts: Sequence[int],
        placement: tuple[int, ...],
        choices: Sequence[int] | None = None,
    ) -> Cut:
        """These cuts, priced stage by stage; `choices` says what each layer recomputes, by index."""
        layers = self.options(candidate).chosen(choices)
        tied = self.job.profile.model.tied_embeddings
        if tied and candidate.virtual_stages > 1 and placement[0] != placement[-1]:
            layers = (*layers[:-1], self.options(candidate._replace(virtual_stages=1)).base[-1])
        if len(self.job.profiles) > 1:
            groups, ends = self.group_of_rank(candidate.pp), (0, *cuts, len(layers))
            own = [self.options(candidate, group).chosen(choices) for group in range(len(self.job.profiles))]
            layers = tuple(
                layer
                for rank, (first, last) in zip(placement, pairwise(ends), strict=True)
                for layer in own[groups[rank]][first:last]
            )
        stages = stage_costs(layers, cuts, placement, lambda size: self.transfer_us(candidate, size))
        return Cut(candidate, layers, tuple(cuts), placement, stages)

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

    def even_cuts(self, candidate: Candidate, placement: tuple[int, ...], *, splits_backward: bool) -> tuple[int, ...]:
        """The cuts that are best by time alone, every stage for itself."""
        layers = self.options(candidate).base
        problem = StagePartition(
            times_us=self.step_times_us(candidate, layers, splits_backward),
            times_by_rank=_columns(self, candidate, 0, splits_backward, placement).times_by_rank,
            num_stages=candidate.num_stages,
        )
        cuts = solve_partition(problem).cuts
        assert cuts is not None  # a candidate has at least as many layers as stages
        return cuts

    def _price_even_chunks(
        self, candidate: Candidate, family: Family, placement: tuple[int, ...]
    ) -> PricedLayout | None:
        """Cut by time alone; then every rank recomputes just as much as it must. None where that is not enough."""
        cuts = self.even_cuts(candidate, placement, splits_backward=family.splits_backward)
        held = _held_at_fullest(family, candidate.pp, candidate.num_microbatches, candidate.virtual_stages)
        choices = self._just_enough_recompute(candidate, cuts, placement, held, family.splits_backward)
        return None if choices is None else self.price_order(self.cut(candidate, cuts, placement, choices), family)

    def _just_enough_recompute(
        self,
        candidate: Candidate,
        cuts: Sequence[int],
        placement: Sequence[int],
        held: Sequence[tuple[int, int]],
        splits_backward: bool,
    ) -> list[int] | None:
        """What every layer recomputes, on each rank the layers that save most memory for their time first."""
        options, bounds = self.options(candidate), (0, *cuts, len(self.options(candidate).base))
        boundary = max((layer.output_bytes for layer in options.base[:-1]), default=0)
        choices = [0] * len(options.base)
        for rank, capacity in enumerate(self.capacities(candidate)):
            hosted = [stage for stage, host in enumerate(placement) if host == rank]
            mine = [(index, stage) for stage in hosted for index in range(bounds[stage], bounds[stage + 1])]
            used = self.states_bytes(candidate, [options.base[index] for index, _ in mine])
            used += buffer_bytes(boundary, num_neighbours(placement, rank))
            used += max(layers[index].temporary_bytes for layers in options.layers for index, _ in mine)
            moves = []
            for index, stage in mine:
                taken = [held[stage][0] * layers[index].activation_bytes for layers in options.layers]
                waits = options.base[index].weight_activation_bytes * held[stage][1]
                used += taken[0] + waits
                for choice in range(1, len(taken)):
                    saved = taken[0] + waits - taken[choice]
                    more_us = _work_us(options.layers[choice][index], splits_backward) - _work_us(
                        options.base[index], splits_backward
                    )
                    if saved > 0:
                        moves.append((more_us / saved, index, choice, saved))
            saved_of: dict[int, int] = {}
            for _, index, choice, saved in sorted(moves):
                if used <= capacity:
                    break
                if saved > saved_of.get(index, 0):
                    used -= saved - saved_of.get(index, 0)
                    saved_of[index], choices[index] = saved, choice
            if used > capacity:
                return None
        return choices

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
        """Bytes that every rank has left for activations, shape (p,); negative where the model states overflow."""
        empty = self.memory(cut, [0.0] * cut.candidate.pp)
        return [fixed.capacity_bytes - fixed.total_bytes for fixed in empty]

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
            splits_backward=cut.splits,
            capacity_bytes=room,
        )
        solution = solve_pipeline(problem, solver=solver, time_limit_s=time_limit_s, seed=seed)
        if solution.order is None:
            return None, solution
        schedule = Schedule.from_orders(solution.order)
        return self.price(cut, schedule, "auto", solution.solver), solution

    def schedule_bound_us(self, cut: Cut) -> float:
        """A lower bound on the pipeline time of this cut under any order that splits all backwards it can, or none."""
        whole = (False,) * len(cut.stages)
        bounds = []
        for splits_backward in {cut.splits, whole}:
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


def span_key(candidate: Candidate) -> tuple[int, ...]:
    """What decides how a candidate's groups may lie."""
    return (*candidate.degrees, candidate.shard_degree)


def _columns(
    pricer: Pricer, candidate: Candidate, choice: int, splits_backward: bool, separate: tuple[int, ...] | None
) -> LayerChoice:
    """What the partition asks of the layers under one choice; `separate`: the rank of stages that share no memory."""
    layers = pricer.options(candidate).layers[choice]
    by_rank = None
    if len(pricer.job.profiles) > 1:
        by_group = [
            pricer.step_times_us(candidate, pricer.options(candidate, group).layers[choice], splits_backward)
            for group in range(len(pricer.job.profiles))
        ]
        ranks = pricer.group_of_rank(candidate.pp)
        by_rank = tuple(by_group[ranks[rank]] for rank in separate or range(candidate.pp))
    return LayerChoice(
        times_us=pricer.step_times_us(candidate, layers, splits_backward),
        times_by_rank=by_rank,
        activation_bytes=tuple(layer.activation_bytes for layer in layers),
        weight_activation_bytes=tuple(layer.weight_activation_bytes for layer in layers),
        temporary_bytes=None if separate else tuple(layer.temporary_bytes for layer in layers),
    )


def _layer_floors(options: LayerOptions, dtype: Dtype, states: Mapping[int, int]) -> tuple[LayerFloor, ...]:
    """What each layer costs at least; layers that repeat are worked out once. `states`: bytes by id of a base layer."""
    size, made, floors = BYTES_PER_ELEMENT[dtype], {}, []
    below = 0.0  # F and B of the layers behind, which a microbatch passes while this one holds it
    for same in reversed(list(zip(*options.layers, strict=True))):
        base = same[0]
        below += base.forward_us + min(base.backward_input_us, base.fused_backward_us)
        key = tuple(map(id, same))
        if key not in made:
            experts = base.expert_parameter_bytes / size
            made[key] = (
                LayerFloor(
                    forward_us=min(layer.forward_us for layer in same),
                    backward_us=min(min(layer.backward_input_us, layer.fused_backward_us) for layer in same),
                    fused_us=min(layer.fused_backward_us for layer in same),
                    work_us=min(map(least_work_us, same)),
                    dense_parameters=base.parameter_bytes / size - experts,
                    expert_parameters=experts,
                    optimizer_us=base.optimizer_us,
                    state_bytes=states[id(base)],
                    kept_bytes=_kept_bytes(same),
                    hull=(),
                ),
                _hull([(least_work_us(layer), float(layer.activation_bytes)) for layer in same]),
            )
        floor, hull = made[key]
        floors.append(floor._replace(hull=tuple((work, held * below) for work, held in hull)))
    return tuple(reversed(floors))


def _kept_bytes(same: Sequence[LayerProfile]) -> float:
    """The least a layer keeps under choices that save a larger share of its memory than of its F they repeat."""
    base = same[0]
    least = float(base.activation_bytes)
    for layer in same[1:]:
        saved = 1 - layer.activation_bytes / base.activation_bytes if base.activation_bytes else 0.0
        more_us = least_work_us(layer) - least_work_us(base)
        if more_us < saved * base.forward_us * (1 - 1e-9):
            least = min(least, layer.activation_bytes)
    return least


def _hull(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The lower left hull of (work, bytes): from the least work on, each step saving less memory per work."""
    hull: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - point[1]) * (hull[-1][0] - hull[-2][0]) >= (
            hull[-2][1] - hull[-1][1]
        ) * (point[0] - hull[-1][0]):
            hull.pop()
        hull.append(point)
    return tuple(hull)


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


def _work_us(layer: LayerProfile, splits_backward: bool) -> float:
    if splits_backward and layer.variant.recompute == "none":
        return layer.forward_us + layer.backward_input_us + layer.backward_weight_us
    return layer.forward_us + layer.fused_backward_us


def _weight_ratio(layers: Sequence[LayerProfile]) -> float:
    """M_W / M_B of the whole model, rounded so that neighbouring candidates share what depends on it."""
    activations = sum(layer.activation_bytes for layer in layers)
    return round(sum(layer.weight_activation_bytes for layer in layers) / activations, 2) if activations else 0.0
