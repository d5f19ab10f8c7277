"""The search over layouts, best bound first, with a certificate over the whole space.

Every candidate first gets a provable floor under its step time (`planner.floor.StepFloor`), and candidates are priced
in the order of their floors until the floor reaches the best step time found. Open candidates get solver-made orders;
what no fixed family fits, though it might fit, is tried again; then the best few are ordered for longer. A candidate is
out of the certificate only if its floor is no better than the answer or if it is proven not to fit: the smallest floor
of all others bounds the space from below. The space is what at least one fixed family can run; solvers order those
candidates, too.
"""

import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from itertools import islice

from planner.candidate_costs import Job
from planner.cutting import Cut
from planner.errors import InfeasibleError
from planner.floor import StepFloor
from planner.layout import Candidate, Pins, Space
from planner.pricing import PricedLayout, Pricer, held_per_rank
from planner.schedule.families import FAMILIES, Family
from planner.schedule.families.base import round_robin, vee
from solvers.pipeline import PipelineSolution
from solvers.status import Status

SOLVER_ACTION_LIMIT = 40_000  # beyond this many actions only the fixed families are tried
NUM_RUNNERS_UP = 5  # other layouts that are priced, if there are any, though they cannot win
NUM_POLISHED = 2  # best candidates that get a solver-made schedule
_PRICING_SHARE = 0.6  # of the time limit; what is left goes to solver-made orders, second tries, then the best few
_ORDERING_SHARE = 0.72
_SECOND_TRY_SHARE = 0.75
_POLISH_SHARE = 0.93
_NUM_FIRST = 6  # candidates that are priced before anything else
_NUM_WITHOUT_PIPELINE = 50  # these, too: they are priced in no time
_ORDER_S = 2.0  # for one solver-made order of an open candidate, but no more than
_ORDER_SHARE = 0.04  # of the time limit
_EARLY_ORDERING_SHARE = 0.25  # of the time limit may go to orders of candidates as soon as they are priced
_QUICK_MIXING_OPS = 500_000
_GRACE_S = 10.0  # beyond the limit, to find any layout at all
_TOLERANCE = 1e-9


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
    """The layouts found, best first, and what is proven about the rest.

    candidates = refused + evaluated + pruned + unreached; what is found not to fit when it is evaluated is counted in
    `num_overflowing`.
    """

    ranked: list[PricedLayout] = field(default_factory=list)
    lower_bound_us: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)
    num_candidates: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    num_evaluated: int = 0
    num_overflowing: int = 0
    num_pruned: int = 0
    num_unreached: int = 0
    runners_up: list[tuple[int, ...]] = field(default_factory=list)  # (tp, pp, dp) whose best layout was looked for
    interrupted: bool = False
    limited_by_time: bool = False
    seconds: float = 0.0


class _Outcome(Enum):
    SETTLED = auto()  # it is priced, or need not be
    UNDECIDED = auto()  # no family fits as it was cut
    IMPOSSIBLE = auto()  # proven: nothing fits


class _Node:
    """A candidate whose memory might suffice, the families that can run it, and its floors."""

    def __init__(self, candidate: Candidate, families: tuple[Family, ...], floor: StepFloor, solvers: bool) -> None:
        self.candidate, self.families, self._floor = candidate, families, floor
        self._splits = {family.splits_backward for family in families}
        self.solvers_may_order = solvers
        if solvers and candidate.can_split_backward:
            self._splits.add(True)

    @property
    def quick_us(self) -> float:
        """A floor in no time."""
        return self._floor.quick_us

    @cached_property
    def floor_of_us(self) -> dict[bool, float]:
        """The floor by whether the backward may be split."""
        return {split: self._floor.step_us(splits_backward=split) for split in (False, True)}

    @cached_property
    def floor_us(self) -> float:
        """The floor under all orders this candidate may have."""
        return min(self.floor_of_us[split] for split in self._splits)


def search(
    job: Job,
    space: Space,
    pins: Pins,
    *,
    time_limit_s: float,
    seed: int,
    known: Sequence[PricedLayout] = (),
    num_best: int = 1,
    pricer: Pricer | None = None,
    on_progress: Callable[[SearchProgress], None] | None = None,
) -> SearchResult:
    """Search `space`; InfeasibleError if nothing in it fits. Ctrl-C gives the best so far.

    `known`: layouts of this space that were priced already, to prune with. `num_best`: how many layouts of different
    degrees, chunks or micro-batch size are wanted; pricing goes on until the floors reach the last of them.
    `pricer`: one of this job that has worked already.
    """
    running = _Search(pricer or Pricer(job), space, pins, time_limit_s, seed, num_best, on_progress)
    running.best = {priced.candidate: priced for priced in known}
    return running.run()


class _Search:
    def __init__(
        self,
        pricer: Pricer,
        space: Space,
        pins: Pins,
        time_limit_s: float,
        seed: int,
        num_best: int,
        on_progress: Callable[[SearchProgress], None] | None,
    ) -> None:
        self.pricer, self.job = pricer, pricer.job
        self.space, self.seed, self.num_best = space, seed, num_best
        self.pins, self.family = pins, None if pins.family in (None, "auto") else pins.family
        self.solvers_may_order = self.family is None and ("family", "auto") not in pins.excluded
        self.time_limit_s, self.on_progress = time_limit_s, on_progress
        self.started = time.monotonic()
        self.result = SearchResult(dropped=space.dropped, num_candidates=len(space.candidates))
        self.best: dict[Candidate, PricedLayout] = {}
        self._families_of: dict[tuple[int, int, int, bool], tuple[Family, ...]] = {}
        self.queue: list[tuple[float, int, int, _Node]] = []  # floor, chunks (more first), index
        self.ordered: set[Candidate] = set()  # what solvers have ordered, cut evenly
        self.ordering_s = 0.0
        self.open: dict[Candidate, float] = {}  # floors of what was taken from the queue and may be feasible
        self.nearest_miss: tuple[float, str] = (math.inf, "")

    def run(self) -> SearchResult:
        result = self.result
        try:
            for index, node in enumerate(self._nodes()):
                self.queue.append((node.quick_us, -node.candidate.virtual_stages, index, node))
            heapq.heapify(self.queue)
            self._price()
            self._polish()
            self._price_runners_up()
        except KeyboardInterrupt:
            if not self.best:
                raise
            result.interrupted = True
        if not self.best:
            self._refuse()
        cutoff_us = self._cutoff_us()
        result.num_pruned = sum(floor >= cutoff_us * (1 - _TOLERANCE) for floor, *_ in self.queue)
        result.num_unreached = len(self.queue) - result.num_pruned
        result.ranked = self._ranked()
        result.lower_bound_us = self._lower_bound_us()
        result.seconds = self._elapsed_s()
        return result

    # what is in the queue

    def _nodes(self) -> Iterator[_Node]:
        for done, candidate in enumerate(self.space.candidates):
            if done % 1000 == 0:
                self._report("bounding layouts")
            families = self._families(candidate)
            if not families:
                self.result.refused["no schedule family runs it"] += 1
            elif not self.pricer.choices(candidate):
                self.result.refused["not profiled"] += 1
            elif self._overflows_everywhere(candidate):
                self.result.refused["does not fit in memory"] += 1
            else:
                solvers = self.solvers_may_order and candidate.pp > 1
                yield _Node(candidate, families, self.pricer.floor(candidate), solvers)

    def _families(self, candidate: Candidate) -> tuple[Family, ...]:
        """Fixed families that can run this candidate; without a pipeline there is nothing to split a backward for."""
        key = (candidate.pp, candidate.num_microbatches, candidate.virtual_stages, candidate.can_split_backward)
        if key not in self._families_of:
            families = [
                family
                for family in FAMILIES.values()
                if family.supports(*key[:3]) is None
                and not (family.splits_backward and not (candidate.can_split_backward and candidate.pp > 1))
                and (family.in_layout_search if self.family is None else family.name == self.family)
                and ("family", family.name) not in self.pins.excluded
            ]
            self._families_of[key] = tuple(sorted(families, key=lambda f: (not f.splits_backward, f.name)))
        return self._families_of[key]

    def _overflows_everywhere(self, candidate: Candidate) -> bool:
        """All ranks together cannot hold the model states and one microbatch: a proof that no cut fits."""
        need = self.pricer.least_bytes(candidate)
        if need <= sum(self.pricer.capacities(candidate)):
            return False
        share = need / candidate.pp
        miss = f"{_named(candidate)} needs at least {_gib(share)} per device, on average over its pipeline ranks"
        self._note_miss(share, miss)
        return True

    # pricing

    def _price(self) -> None:
        """Price candidates in the order of their floors, order what may still win by solver, try the rest again."""
        first = self._price_a_few()
        priced: list[_Node] = []
        undecided: list[_Node] = []
        while self.queue and self.queue[0][0] < self._cutoff_us() * (1 - _TOLERANCE):
            late_s = self._elapsed_s() - self.time_limit_s * (_PRICING_SHARE if self.best else 1)
            if late_s > (0 if self.best else _GRACE_S):
                self.result.limited_by_time = True
                break
            quick, chunks, index, node = self.queue[0]
            if node.floor_us > quick:  # not yet known when it was queued
                heapq.heapreplace(self.queue, (node.floor_us, chunks, index, node))
                continue
            self.open[node.candidate] = node.floor_us  # first, so that Ctrl-C in between loses no floor
            heapq.heappop(self.queue)
            self.result.num_evaluated += 1
            outcome = first[node] if node in first else self._price_families(node)
            if outcome is _Outcome.IMPOSSIBLE:
                self._close(node)
            else:
                priced.append(node)
                if outcome is _Outcome.UNDECIDED:
                    undecided.append(node)
                if self.best and self._has_time_to_order():
                    self._order_one(node)
            self._report("pricing layouts")
        self._order(priced)
        self._try_all_again(undecided)

    def _price_a_few(self) -> dict[_Node, _Outcome]:
        """A first answer, so that most candidates need no floor but the quick one.

        Of each (tp, cp, pp) what people would take: most microbatches, ZeRO 1, most chunks; of these, least floors.
        Then what has no pipeline.
        """
        usual: dict[tuple[int, int, int], _Node] = {}
        for *_, node in sorted(self.queue, key=lambda entry: (_unusual(entry[-1].candidate), entry[2])):
            c = node.candidate
            usual.setdefault((c.tp, c.cp, c.pp), node)
        first = sorted(usual.values(), key=lambda node: node.floor_us)[:_NUM_FIRST]
        without_pipeline = (node for *_, node in sorted(self.queue, key=lambda e: e[:3]) if node.candidate.pp == 1)
        first += [node for node in islice(without_pipeline, _NUM_WITHOUT_PIPELINE) if node not in first]
        outcomes = {}
        for node in first:
            outcomes[node] = self._price_families(node)
            self._report("pricing layouts")
        return outcomes

    def _order(self, nodes: Sequence[_Node]) -> None:
        """Order what is still open, least floor first."""
        for node in sorted(nodes, key=lambda node: (node.floor_us, -node.candidate.virtual_stages)):
            if self.result.interrupted or node.floor_us >= self._cutoff_us():
                return
            if self._elapsed_s() > self.time_limit_s * _ORDERING_SHARE:
                self.result.limited_by_time = True
                return
            self._order_one(node)
            self._report("ordering open layouts")

    def _has_time_to_order(self) -> bool:
        """Not yet so much has gone into early orders that prices would have to wait."""
        beside_s = self._elapsed_s() - self.ordering_s
        return self.ordering_s < min(_EARLY_ORDERING_SHARE * self.time_limit_s, 0.5 * beside_s)

    def _order_one(self, node: _Node) -> None:
        """Solver-made orders of a candidate that may still win: cut evenly, nothing recomputed if that can be."""
        candidate = node.candidate
        if candidate in self.ordered or self.result.interrupted or node.floor_us >= self._cutoff_us():
            return
        if not node.solvers_may_order or self._num_actions(candidate) > SOLVER_ACTION_LIMIT:
            return
        began = time.monotonic()
        self.ordered.add(candidate)
        for placement in _placements(candidate):
            cuts = self.pricer.even_cuts(candidate, placement, splits_backward=candidate.can_split_backward)
            cut = self.pricer.cut(candidate, cuts, placement)
            if self.pricer.least_step_us(cut) < self._cutoff_us():
                self._list_schedule(cut)
        self.ordering_s += time.monotonic() - began

    def _try_all_again(self, nodes: Sequence[_Node]) -> None:
        for node in nodes:
            if self.result.interrupted:
                return
            if node.floor_us >= self._cutoff_us():
                continue
            if self._elapsed_s() > self.time_limit_s * _SECOND_TRY_SHARE:
                self.result.limited_by_time = True
                break
            if not self._try_again(node):
                self._close(node)
            self._report("trying tight layouts again")

    def _close(self, node: _Node) -> None:
        """Take a candidate that is proven not to fit out of the certificate."""
        del self.open[node.candidate]
        self.result.num_overflowing += 1

    def _price_families(self, node: _Node) -> _Outcome:
        """Price a candidate under every family that may still win."""
        settled, impossible = False, node.candidate.virtual_stages == 1
        for family in node.families:
            if node.floor_of_us[family.splits_backward] >= self._cutoff_us():
                settled = True
                continue
            priced = self.pricer.price_family(node.candidate, family)
            settled |= self._keep(priced)
            impossible &= priced is None
            if priced is None and not self.best:
                self._keep(self.pricer.price_least(node.candidate, family))  # to name the rank that overflows
        if settled:
            return _Outcome.SETTLED
        return _Outcome.IMPOSSIBLE if impossible and not node.solvers_may_order else _Outcome.UNDECIDED

    def _try_again(self, node: _Node) -> bool:
        """What no family fits as it was cut; False only if it is proven that nothing fits."""
        if node.candidate.virtual_stages > 1:
            return self._share_memory_unevenly(node)
        if not node.solvers_may_order:
            return True
        return self._hold_fewer_microbatches(node)

    def _hold_fewer_microbatches(self, node: _Node) -> bool:
        """Let list scheduling make an order within the memory there is; a rank holds one microbatch at least."""
        candidate, placement = node.candidate, tuple(range(node.candidate.pp))
        one_each = [(1, 0)] * candidate.pp
        found = self.pricer.partition(candidate, placement, one_each, splits_backward=candidate.can_split_backward)
        if found.cuts is None:
            return found.status is not Status.INFEASIBLE
        self._list_schedule(self.pricer.cut(candidate, found.cuts, placement, found.choices))
        return True

    def _share_memory_unevenly(self, node: _Node) -> bool:
        """Cut chunks that share a rank's memory as they like, by integer program.

        While B of a rank's last chunk runs, all its chunks hold that microbatch; and under a fixed family a rank holds
        each of its layers at least `common` times at one moment, however they are cut into chunks (`held_per_rank`).
        If no cut fits at those counts, none fits: that is what the program may prove.
        """
        candidate, possible = node.candidate, False
        for family in node.families:
            shape = (family, candidate.pp, candidate.num_microbatches, candidate.virtual_stages)
            placement = family.placement(candidate.pp, candidate.virtual_stages)
            common = [held for _, held in held_per_rank(*shape)]
            cut, fits_once = self._shared_cut(node, family, placement, common)
            if cut is not None:
                if not self._keep(self.pricer.price_order(cut, family)):
                    self._list_schedule(cut)
            elif node.solvers_may_order:
                cut, fits_once = self._shared_cut(node, family, placement, [1] * candidate.pp)
                if cut is not None:
                    self._list_schedule(cut)
            possible |= fits_once
        return possible

    def _shared_cut(
        self, node: _Node, family: Family, placement: tuple[int, ...], held: Sequence[int]
    ) -> tuple[Cut | None, bool]:
        """A cut at these in-flight counts per rank, and whether there may be any."""
        found = self.pricer.partition(
            node.candidate,
            placement,
            [(held[rank], 0) for rank in placement],
            splits_backward=family.splits_backward,
            shares_ranks=True,
            time_limit_s=1.0,
            seed=self.seed,
        )
        if found.cuts is None:
            return None, found.status is not Status.INFEASIBLE
        return self.pricer.cut(node.candidate, found.cuts, placement, found.choices), True

    def _list_schedule(self, cut: Cut) -> None:
        if self.solvers_may_order and self._num_actions(cut.candidate) <= SOLVER_ACTION_LIMIT:
            left_s = self.time_limit_s - self._elapsed_s()
            limit_s = min(_ORDER_S, _ORDER_SHARE * self.time_limit_s, max(0.05, left_s))
            priced, solution = self.pricer.solve_order(
                cut,
                solver="list-scheduling",
                time_limit_s=limit_s,
                seed=self.seed,
                mixing_ops=_QUICK_MIXING_OPS,
            )
            self._keep(priced)
            self._note_end(solution)

    def _polish(self) -> None:
        """Give the best few candidates a solver-made schedule."""
        if not self.solvers_may_order:
            return
        cutoff_us = self._cutoff_us()
        ranked = [one for one in self._ranked() if self.open.get(one.candidate, 0.0) < cutoff_us]
        chosen = ranked[:NUM_POLISHED]
        for position, priced in enumerate(chosen):
            share = (self.time_limit_s * _POLISH_SHARE - self._elapsed_s()) / (len(chosen) - position)
            if self.result.interrupted:
                return
            if priced.candidate.pp == 1 or self._num_actions(priced.candidate) > SOLVER_ACTION_LIMIT or share < 0.1:
                continue
            self._report(f"scheduling {priced.cut.candidate.pp} ranks")
            better, solution = self.pricer.solve_order(priced.cut, solver="auto", time_limit_s=share, seed=self.seed)
            self._keep(better)
            self._note_end(solution)

    def _price_runners_up(self) -> None:
        """Find the best layout of a few more (tp, pp, dp) under the fixed families, for readers to compare with."""
        if not self.best:
            return
        answer = self._ranked()[0].candidate.degrees
        of_degrees: dict[tuple[int, ...], list[tuple[float, _Node]]] = {}
        for quick, _, _, node in sorted(self.queue, key=lambda entry: entry[:3]):
            of_degrees.setdefault(node.candidate.degrees, []).append((quick, node))
        others = [degrees for degrees in of_degrees if degrees != answer]  # in the order of their least floors
        for degrees in others[:NUM_RUNNERS_UP]:
            for quick, node in of_degrees[degrees]:
                known = [priced.step_us for candidate, priced in self.best.items() if candidate.degrees == degrees]
                if quick >= min(known, default=math.inf):
                    break
                if node.floor_us >= min(known, default=math.inf):
                    continue
                if self._elapsed_s() > self.time_limit_s or self.result.interrupted:
                    return
                for family in node.families:
                    self._keep(self.pricer.price_family(node.candidate, family))
            self.result.runners_up.append(degrees)

    def _keep(self, priced: PricedLayout | None) -> bool:
        """Remember a priced layout if it fits and is the best of its candidate; whether it fits."""
        if priced is None:
            return False
        if not priced.fits:
            worst = max(range(len(priced.memory)), key=lambda rank: priced.memory[rank].total_bytes)
            need = priced.memory[worst].total_bytes
            text = f"{_named(priced.candidate)} with {priced.family} needs {_gib(need)} on pipeline rank {worst}"
            self._note_miss(need, text)
            return False
        known = self.best.get(priced.candidate)
        if known is None or priced.step_us < known.step_us * (1 - _TOLERANCE):
            self.best[priced.candidate] = priced
        return True

    # bookkeeping

    def _num_actions(self, candidate: Candidate) -> int:
        return 3 * candidate.num_stages * candidate.num_microbatches

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def _ranked(self) -> list[PricedLayout]:
        return sorted(self.best.values(), key=lambda priced: (priced.step_us, priced.candidate))

    def _best_us(self) -> float:
        return min((priced.step_us for priced in self.best.values()), default=math.inf)

    def _cutoff_us(self) -> float:
        """The step time that a candidate has to beat: of the last of the `num_best` wanted."""
        if self.num_best == 1:
            return self._best_us()
        best: dict[tuple[object, ...], float] = {}
        for c, priced in self.best.items():
            key = (*c.degrees, c.virtual_stages, c.micro_batch_size)
            best[key] = min(priced.step_us, best.get(key, math.inf))
        return sorted(best.values())[self.num_best - 1] if len(best) >= self.num_best else math.inf

    def _lower_bound_us(self) -> float:
        unpriced = self.queue[0][0] if self.queue else math.inf
        return min(self._best_us(), unpriced, *self.open.values())

    def _report(self, phase: str) -> None:
        if self.on_progress is not None:
            done, total = self.result.num_evaluated, self.result.num_candidates
            self.on_progress(SearchProgress(phase, done, total, self._best_us(), self._lower_bound_us()))

    def _note_end(self, solution: PipelineSolution | None) -> None:
        if solution is not None:
            self.result.interrupted |= solution.interrupted
            self.result.limited_by_time |= solution.limited_by_time

    def _note_miss(self, need_bytes: float, text: str) -> None:
        if need_bytes < self.nearest_miss[0]:
            self.nearest_miss = (need_bytes, text)

    def _refuse(self) -> None:
        cluster, result = self.job.cluster, self.result
        usable = _gib(self.pricer.capacity_bytes)
        reasons = [f"{count} {reason}" for reason, count in (self.space.dropped | result.refused).items() if count]
        if result.num_overflowing:
            reasons.append(f"{result.num_overflowing} do not fit in memory however they are cut")
        if self.open or self.queue:
            reasons.append(f"{len(self.open) + len(self.queue)} might fit, but nothing was found that does")
        miss = f" Closest: {self.nearest_miss[1]}, {usable} are usable." if self.nearest_miss[1] else ""
        more = "raise the time limit, " if result.limited_by_time else ""
        raise InfeasibleError(
            f"no layout of {self.job.profile.model.name!r} found that fits cluster {cluster.name!r} "
            f"({cluster.num_devices} devices, {usable} usable each) with global batch size "
            f"{self.job.global_batch_size}: {'; '.join(reasons) or 'no candidates'}.{miss} To mend it, {more}use more "
            "or larger devices, or free what is pinned",
            proven=not (self.open or self.queue),
        )


def _placements(candidate: Candidate) -> tuple[tuple[int, ...], ...]:
    """Where solvers may put the stages."""
    if candidate.virtual_stages == 1:
        return (tuple(range(candidate.pp)),)
    return round_robin(candidate.pp, candidate.virtual_stages), vee(candidate.pp, candidate.virtual_stages)


def _unusual(candidate: Candidate) -> tuple[int, int, int]:
    """How far a candidate is from what people would try first."""
    return -candidate.num_microbatches, abs(candidate.zero_stage - 1), -candidate.virtual_stages


def _named(candidate: Candidate) -> str:
    recompute = "" if candidate.recompute in ("none", "mixed") else f" recompute={candidate.recompute}"
    more = "".join(f" {name}={getattr(candidate, name)}" for name in ("cp", "ep") if getattr(candidate, name) > 1)
    return (
        f"tp={candidate.tp} pp={candidate.pp} dp={candidate.dp}{more} v={candidate.virtual_stages} "
        f"micro_batch_size={candidate.micro_batch_size} zero={candidate.zero_stage}{recompute}"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
