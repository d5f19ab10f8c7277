"""A floor under the step time of every cut, choice of recomputation and order of one candidate.

The argument is about one rank r with the layers it hosts, whichever they are. Let m microbatches take work_r each, let
head_r be the time before rank r can start, and M the step time.

- *Load.* Rank r ends with exposed traffic e_r and an optimizer step o_r: head_r + m · work_r + e_r + o_r ≤ M. Both e_r
  ≥ fixed + busy_r − hidden_r and e_r ≥ fixed + share · busy_r are sums over the rank's layers; the better one is taken.
- *Way back.* Between a rank's first F and last B lie all its F and B, and the gradient then has to go back through all
  layers before: head_r + m · (F + B)_r + tail_r ≤ M. Where the backward is in one piece, W is part of B.
- *First gradient.* No B runs on rank r before one microbatch has passed all layers and come back to the rank: at
  wait_r = all F + the B of the layers behind. Until then only F can run, no more than memory holds: wait_r + m · work_r
  − min(m · F_r, ρ · room_r) + e_r + o_r ≤ M with ρ the most F time per byte that a block keeps; F of embedding and head
  may all run, since they may keep next to nothing. Recomputing a layer frees its memory
  for other F, but adds as much work as F time that it lets in; a choice that costs less than it frees counts as not
  recomputed, with its smaller memory (`LayerFloor.kept_bytes`).
- *Chain*, *turn* and *memory × time*: see `StepFloor._chain_us`, `_turn_us` and `_memory_us`.

`StepFloor.step_us` is the least M for which the layers can be dealt to the ranks within these limits. With one chunk
per rank, ranks take consecutive layers, and giving each as many as fit is best: a later cut never hurts those behind,
as a layer adds more where it is than the ranks behind wait for it. Where e_r hides so much that this may not be so (one
microbatch), e_r and o_r are left out.
With several chunks, the k-th rank that is entered waits for at least k layers, the k-th that gets a gradient likewise,
and ranks are only asked to hold all blocks between them, in whole ones; pairing both orders is the best case, as
Σ min(a_k, b_k) is largest when both are sorted alike. A microbatch crosses between ranks v · (p − 1) times at least on
its way up, as chunks lie round robin or in zigzag.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from planner.layout import Candidate
from planner.traffic import StepTraffic, optimizer_us


class LayerFloor(NamedTuple):
    """The least a layer can cost, over its choices of recomputation and over devices; or the sum over layers."""

    forward_us: float
    most_forward_us: float  # the largest, over the same
    backward_us: float  # until the gradient leaves it: B, or the fused backward if that is less
    fused_us: float  # fused backward
    back_us: float  # backward, split or fused, whichever is less
    work_us: float  # F and that
    dense_parameters: float
    expert_parameters: float
    optimizer_us: float
    state_bytes: int  # weights, gradients and optimizer on one device
    kept_bytes: float  # of one microbatch from F to B, where it is not recomputed
    hull: tuple[tuple[float, float], ...]  # (work µs, bytes held) of one microbatch, more work for less memory


@dataclass(frozen=True)
class StepFloor:
    """The floor of one candidate; the module says why it holds."""

    layers: tuple[LayerFloor, ...]
    totals: LayerFloor
    candidate: Candidate
    traffic: StepTraffic
    speeds: tuple[float, ...]  # of every rank's devices relative to the fastest, as `layers` are costed; shape (p,)
    hop_us: float  # least transfer to the next rank
    capacity_bytes: float = math.inf  # of the roomiest rank, for model states and activations
    room_bytes: float = math.inf  # what all ranks of one replica together have for activations

    @cached_property
    def quick_us(self) -> float:
        """A weaker bound in no time: the load of the average rank."""
        plain = self._m * self.totals.work_us / sum(self.speeds)
        if not self._alike:
            return plain + self.traffic.fixed_us
        return plain + self._after_us(self.totals) / self.candidate.pp + self.traffic.fixed_us

    def step_us(self, *, splits_backward: bool) -> float:
        """The bound on the whole step; `splits_backward` if any order may run B and W apart."""
        low = max(self.quick_us, max(self._turn_us(), self._memory_us()) + self.traffic.fixed_us)
        if self.candidate.pp == 1:
            return low
        low = max(low, self._chain_us(splits_backward) + self.traffic.fixed_us)
        fits = self._deals_chunks if self.candidate.virtual_stages > 1 else self._deals_chain
        high = low
        while not fits(high - self.traffic.fixed_us, splits_backward):
            low, high = high, high * 1.05
        while high - low > 1e-4 * low:
            middle = (low + high) / 2
            if fits(middle - self.traffic.fixed_us, splits_backward):
                high = middle
            else:
                low = middle
        return low

    # what layers add up to

    @property
    def _m(self) -> int:
        return self.candidate.num_microbatches

    @cached_property
    def _alike(self) -> bool:
        return min(self.speeds) == 1.0

    @property
    def _hops_us(self) -> float:
        """Least transfers of a microbatch on its way through all stages."""
        return self.candidate.virtual_stages * (self.candidate.pp - 1) * self.hop_us

    def _after_us(self, layer: LayerFloor) -> float:
        """What follows a rank's last backward, by layer: the linear bound that is better for all layers together."""
        busy = self.traffic.busy_us(layer.dense_parameters, layer.expert_parameters)
        update = optimizer_us(layer.optimizer_us, self.candidate)
        if self._mostly_hidden:
            return self.traffic.shown_share * busy + update
        return busy - self.traffic.hidden_us(layer.forward_us, layer.fused_us) + update

    @cached_property
    def _mostly_hidden(self) -> bool:
        busy = self.traffic.busy_us(self.totals.dense_parameters, self.totals.expert_parameters)
        hidden = self.traffic.hidden_us(self.totals.forward_us, self.totals.fused_us)
        return self.traffic.shown_share * busy >= busy - hidden

    def _sums(self, of_layer: Callable[[LayerFloor], float]) -> list[float]:
        return _running(map(of_layer, self.layers))

    @cached_property
    def _forward(self) -> list[float]:
        return self._sums(lambda layer: layer.forward_us)

    @cached_property
    def _inward(self) -> list[float]:
        return self._sums(lambda layer: layer.backward_us)

    @cached_property
    def _fused(self) -> list[float]:
        return self._sums(lambda layer: layer.fused_us)

    @cached_property
    def _work(self) -> list[float]:
        return self._sums(lambda layer: self._m * layer.work_us)

    @cached_property
    def _load(self) -> list[float] | None:
        """m · work + what follows; None where a layer may hide more than it adds, for then fewer may not be better."""
        if not self._alike or any(self._m * x.back_us + self._after_us(x) < x.backward_us for x in self.layers):
            return None
        return self._sums(lambda layer: self._m * layer.work_us + self._after_us(layer))

    @cached_property
    def _passing(self) -> list[float]:
        return self._sums(lambda layer: self._m * (layer.forward_us + layer.backward_us))

    @cached_property
    def _passing_fused(self) -> list[float]:
        return self._sums(lambda layer: self._m * (layer.forward_us + layer.fused_us))

    @cached_property
    def _states(self) -> list[float]:
        return self._sums(lambda layer: layer.state_bytes)

    @cached_property
    def _forward_us_per_byte(self) -> float:
        """ρ: the most F time that a byte of memory lets in before the first B; infinite where nothing is kept."""
        blocks = self.layers[1:-1]
        rates = (layer.most_forward_us / layer.kept_bytes if layer.kept_bytes else math.inf for layer in blocks)
        return max(rates, default=math.inf)

    # bounds of all ranks together

    def _chain_us(self, splits_backward: bool) -> float:
        """One microbatch passes all layers forth and back; and all of them pass each layer.

        Between the first F and the last B of a layer lie all its F and B, before that the F of the layers before it,
        after that their B.
        """
        back = self._inward if splits_backward else self._fused
        through_us = self._forward[-1] + back[-1] + 2 * self._hops_us
        ends = zip(pairwise(self._forward), pairwise(back), strict=True)
        passing = (f0 + b0 + self._m * (f1 - f0 + b1 - b0) for (f0, f1), (b0, b1) in ends)
        return max(through_us, *passing)

    def _turn_us(self) -> float:
        """When one microbatch has passed all layers and is about to come back, every layer holds it.

        So all layers together keep no more than the room, at the cost of recomputing: the layers that free most memory
        for their time first, the last one in part. What the last microbatch repeats may hide traffic.
        """
        work, again = self.totals.work_us, 0.0
        over = sum(layer.hull[0][1] for layer in self.layers) - self.room_bytes
        pieces = [
            ((more - work_us) / (held - less), held - less)
            for layer in self.layers
            for (work_us, held), (more, less) in pairwise(layer.hull)
        ]
        for us_per_byte, saved in sorted(pieces):
            if over <= 0:
                break
            again += us_per_byte * min(over, saved)
            over -= saved
        in_all_us = self._m * (work + again)
        if self._alike:
            hiding = 0.0 if self._mostly_hidden else self.traffic.hidden_backward_share
            in_all_us += self._after_us(self.totals) - hiding * again
        return in_all_us / sum(self.speeds)

    def _memory_us(self) -> float:
        """Bytes × lifetime of all microbatches fit in the room × makespan, at the cost of recomputing what does not.

        A layer holds a microbatch from the start of its F to the end of its B; in between the microbatch passes every
        later layer, forward and back. Each layer may choose any point of its hull: taking the steepest pieces first,
        M ≥ max(m · work(x) / p, m · held(x) / room) is least where the two meet.
        """
        m, pp = self._m, sum(self.speeds)
        work, held, pieces = 0.0, 0.0, []
        for index, layer in enumerate(self.layers):
            held_us = self._forward[-1] - self._forward[index] + self._inward[-1] - self._inward[index]
            work += layer.hull[0][0]
            held += layer.hull[0][1] * held_us
            pieces += [
                (more - work_us, (held_bytes - less) * held_us)
                for (work_us, held_bytes), (more, less) in pairwise(layer.hull)
            ]
        if math.isinf(self.room_bytes) or held / self.room_bytes <= work / pp:
            return m * work / pp
        for more_work, less_held in sorted(pieces, key=lambda piece: piece[0] / piece[1]):
            if (held - less_held) / self.room_bytes <= (work + more_work) / pp:
                share = (held / self.room_bytes - work / pp) / (more_work / pp + less_held / self.room_bytes)
                return m * (work + share * more_work) / pp
            work, held = work + more_work, held - less_held
        return m * held / self.room_bytes

    # dealing layers to ranks before a deadline, less what is fixed

    def _deals_chain(self, left: float, splits_backward: bool) -> bool:
        cut, last = 0, len(self.layers)
        back, passing = (self._inward, self._passing) if splits_backward else (self._fused, self._passing_fused)
        for rank, speed in enumerate(self.speeds):
            hops = rank * self.hop_us
            head, tail = self._forward[cut] + hops, back[cut] + hops
            ends = [bisect_right(passing, passing[cut] + (left - head - tail) * speed)]
            ends.append(bisect_right(self._work, self._work[cut] + (left - head) * speed))
            if self._load is not None:
                ends.append(bisect_right(self._load, self._load[cut] + left - head))
            if self._alike:
                ends += self._ends_by_first_gradient(left, cut)
            cut = max(cut, min(ends) - 1)
            if cut >= last:
                return True
        return False

    def _ends_by_first_gradient(self, left: float, cut: int) -> list[int]:
        """How far a rank that starts at `cut` may reach, plus one: wait + work − F before the first B ≤ left."""
        whole, held = self._gradient_sums
        given = left - self._forward[-1] - self._hops_us - self._inward[-1]
        ends = [bisect_right(whole, given + whole[cut] + self._inward[cut])]
        if held is not None:
            room = self._forward_us_per_byte * self.capacity_bytes
            ends.append(bisect_right(held, given + room + held[cut] + self._inward[cut]))
        return ends

    @cached_property
    def _gradient_sums(self) -> tuple[list[float], list[float] | None]:
        """m · back + after − B, m · work + after + ρ · states − B: summed from the front; neither descends.

        Of embedding and head the second is without F, as all of it may run before the first B.
        """
        m, rate = self._m, self._forward_us_per_byte
        after_us = self._after_us if self._load is not None else _nothing

        def whole_us(layer: LayerFloor) -> float:
            return m * layer.back_us + after_us(layer) - layer.backward_us

        def held_us(layer: LayerFloor) -> float:
            return m * layer.work_us + after_us(layer) + rate * layer.state_bytes - layer.backward_us

        whole = list(map(whole_us, self.layers))
        held = [whole[0], *map(held_us, self.layers[1:-1]), whole[-1]]
        in_memory = math.isfinite(rate) and math.isfinite(self.capacity_bytes)
        return _running(whole), _running(held) if in_memory else None

    @cached_property
    def _least_block(self) -> tuple[LayerFloor, float]:
        """The least of everything over the blocks, and of what follows their last backward."""
        blocks = self.layers[1:-1]
        return _least(blocks), 0.0 if self._load is None else max(0.0, min(map(self._after_us, blocks)))

    def _deals_chunks(self, left: float, splits_backward: bool) -> bool:
        """Whether the ranks can hold all blocks between them, each as many whole ones as its time allows."""
        m, num_blocks = self._m, len(self.layers) - 2
        if num_blocks < 1:
            return True
        least, after_us = self._least_block
        each_us = m * least.work_us + after_us
        head_us = least.forward_us + self.hop_us
        tail_us = (least.backward_us if splits_backward else least.fused_us) + self.hop_us
        passed_us = m * (least.forward_us + (least.backward_us if splits_backward else least.fused_us))
        wait_us = self.totals.forward_us + self._hops_us
        rate = self._forward_us_per_byte
        in_memory = self._alike and math.isfinite(rate) and math.isfinite(self.capacity_bytes)
        held, total = 0, 0.0
        for rank, speed in enumerate(sorted(self.speeds, reverse=True)):
            before = max(0, rank - 1)  # one of the ranks before may hold the embedding, or the head, alone
            room = (left - before * head_us) * speed
            most = min(room / each_us, (left - before * (head_us + tail_us)) * speed / passed_us)
            if self._alike:
                waited = left - wait_us - before * tail_us
                after_wait_us = m * least.back_us + after_us
                most = min(most, waited / after_wait_us if after_wait_us > 0 else math.inf)
                if in_memory:
                    kept = waited + rate * self.capacity_bytes
                    most = min(most, kept / (each_us + rate * least.state_bytes))
            held += max(0, math.floor(most + 1e-9))
            total += max(0.0, room)
        return held >= num_blocks and total >= max(self._work[-1], 0.0 if self._load is None else self._load[-1])


def _nothing(_layer: LayerFloor) -> float:
    return 0.0


def total(layers: Sequence[LayerFloor]) -> LayerFloor:
    """Sums over all layers."""
    return _combined(layers, sum)


def _least(layers: Sequence[LayerFloor]) -> LayerFloor:
    """The least of everything over some layers."""
    return _combined(layers, min)


def _combined(layers: Sequence[LayerFloor], combine: Callable[[list[float]], float]) -> LayerFloor:
    names = LayerFloor._fields[:-1]
    values: dict[str, Any] = {name: combine([getattr(layer, name) for layer in layers]) for name in names}
    return LayerFloor(**values, hull=())


def _running(values: Iterable[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))
