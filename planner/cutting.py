"""Layers into stages: where a candidate is cut, and what every layer recomputes.

The integer program of `solvers.partition` decides, with what each layer adds to its rank's step as its time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from planner.candidate_costs import CandidateCosts, work_us
from planner.cost import stage_costs
from planner.layout import Candidate
from planner.memory import buffer_bytes, num_neighbours
from planner.plans import StageCosts
from profiles.model import LayerProfile, Recompute
from solvers.partition import LayerChoice, PartitionSolution, StagePartition, solve_partition


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


class Cutter(CandidateCosts):
    """Cuts candidates of one job."""

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
        room = [
            capacity - buffer_bytes(options.boundary_bytes, num_neighbours(placement, rank))
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
            groups, ends = self.group_of_rank(candidate), (0, *cuts, len(layers))
            own = [self.options(candidate, group).chosen(choices) for group in range(len(self.job.profiles))]
            layers = tuple(
                layer
                for rank, (first, last) in zip(placement, pairwise(ends), strict=True)
                for layer in own[groups[rank]][first:last]
            )
        stages = stage_costs(layers, cuts, placement, lambda size: self.transfer_us(candidate, size))
        return Cut(candidate, layers, tuple(cuts), placement, stages)

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
        choices = [0] * len(options.base)
        for rank, capacity in enumerate(self.capacities(candidate)):
            hosted = [stage for stage, host in enumerate(placement) if host == rank]
            mine = [(index, stage) for stage in hosted for index in range(bounds[stage], bounds[stage + 1])]
            used = self.states_bytes(candidate, [options.base[index] for index, _ in mine])
            used += buffer_bytes(options.boundary_bytes, num_neighbours(placement, rank))
            used += max(layers[index].temporary_bytes for layers in options.layers for index, _ in mine)
            moves = []
            for index, stage in mine:
                taken = [held[stage][0] * layers[index].activation_bytes for layers in options.layers]
                waits = options.base[index].weight_activation_bytes * held[stage][1]
                used += taken[0] + waits
                for choice in range(1, len(taken)):
                    saved = taken[0] + waits - taken[choice]
                    more_us = work_us(options.layers[choice][index], splits_backward) - work_us(
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


def _columns(
    costs: CandidateCosts, candidate: Candidate, choice: int, splits_backward: bool, separate: tuple[int, ...] | None
) -> LayerChoice:
    """What the partition asks of the layers under one choice; `separate`: the rank of stages that share no memory."""
    layers = costs.options(candidate).layers[choice]
    by_rank = None
    if len(costs.job.profiles) > 1:
        by_group = [
            costs.step_times_us(candidate, costs.options(candidate, group).layers[choice], splits_backward)
            for group in range(len(costs.job.profiles))
        ]
        ranks = costs.group_of_rank(candidate)
        by_rank = tuple(by_group[ranks[rank]] for rank in separate or range(candidate.pp))
    return LayerChoice(
        times_us=costs.step_times_us(candidate, layers, splits_backward),
        times_by_rank=by_rank,
        activation_bytes=tuple(layer.activation_bytes for layer in layers),
        weight_activation_bytes=tuple(layer.weight_activation_bytes for layer in layers),
        temporary_bytes=None if separate else tuple(layer.temporary_bytes for layer in layers),
    )
