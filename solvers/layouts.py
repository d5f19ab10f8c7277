"""Steady states of long pipelines: the best layouts of all ranks together, by dynamic programming over the ranks.

A *layout* of a rank is the offsets of its ops within a period. Given the layouts x and y of two neighbouring ranks and
the phase between them, every arc between the two waits a known time: the least that its residue modulo the period
allows. Waiting costs memory: a hop of F or B at stage s prolongs the life of every microbatch on all stages up to s.
Weighted by the bytes held there that is a cost per pair of layouts, least for a phase at which some arc does not wait.
So the cheapest choice of layouts is a shortest path through one layer per rank, whatever the number of ranks; a period
then fits if what the ranks hold does.

Layouts are all orders of the rank's ops, or a sample where those are too many, with its idle time spread in a few
ways; and then the neighbours of the layouts found. The ranks should talk to their neighbours only, as in linear and
vee placements; arcs between other ranks are obeyed but not priced.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from solvers.modulo import Arc, Pattern, SteadyState
from solvers.searched_ops import Key

_MAX_OPS = 6  # per rank: 120 orders; of more a sample
_SAMPLED_ORDERS = 250
_MAX_CELLS = 16_000_000  # waits computed for one period

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class LayoutPaths:
    """All layouts of all ranks for one period, to be searched with several prices of memory."""

    def __init__(self, state: SteadyState, period: int, layouts: Sequence[Ints], kind: Sequence[object]) -> None:
        """`layouts` of shape (layouts, ops) per rank; ranks of one `kind` have the same layouts and ops alike."""
        self.state, self.period = state, period
        self._layouts, self._kind = layouts, kind
        self._index = [{key: index for index, key in enumerate(keys)} for keys in state.ops_of_rank]
        self._rank = {key: rank for rank, keys in enumerate(state.ops_of_rank) for key in keys}
        self._waits: dict[Any, list[tuple[Ints, list[Ints]]]] = {}  # per alike pair of neighbours
        self._across: list[list[Arc]] = [[] for _ in state.ops_of_rank]
        self._inside: list[list[Arc]] = [[] for _ in state.ops_of_rank]
        for arc in state.arcs:
            one, other = self._rank[arc.before], self._rank[arc.after]
            if arc.before[:2] == arc.after[:2] or (arc.before[0] == "B" and arc.after[0] == "F"):
                continue  # microbatch order and limits are no waiting
            if one == other:
                self._inside[one].append(arc)
            elif abs(one - other) == 1:
                self._across[min(one, other)].append(arc)

    @property
    def work(self) -> float:
        """What a search costs, in units of about a second: the waits it computes, counted."""
        cells = {
            name: len(x) * len(y)
            for name, x, y in zip(pairwise(self._kind), self._layouts, self._layouts[1:], strict=False)
        }
        return 0.002 + 2e-8 * _num_arcs(self.state) ** 2 * sum(cells.values())

    @classmethod
    def of_all(cls, state: SteadyState, period: int) -> "LayoutPaths":
        """All orders of every rank, or a sample, with its idle time spread in as many ways as is quick."""
        kind = [
            tuple((key[0], key[2], state.length[key], state.take[key], state.give[key]) for key in keys)
            for keys in state.ops_of_rank
        ]
        num_pairs = max(1, len(set(pairwise(kind))))
        most_orders = max(len(_orders(keys)) for keys in state.ops_of_rank)
        spreads = max(1, int((_MAX_CELLS / num_pairs) ** 0.5) // (most_orders * _num_arcs(state)))
        listed: dict[object, Ints] = {}
        for name, keys in zip(kind, state.ops_of_rank, strict=True):
            if name not in listed:
                listed[name] = _layouts(state, keys, period, spreads)
        return cls(state, period, [listed[name] for name in kind], kind)

    @classmethod
    def like(cls, state: SteadyState, pattern: Pattern, period: int) -> "LayoutPaths":
        """On every rank one layout, the orders of a pattern of as many k or fewer."""
        layouts = []
        for keys in state.ops_of_rank:
            begin = pattern.start(keys[0])
            round_us = pattern.period * state.k // pattern.num_microbatches
            order = sorted(range(len(keys)), key=lambda index: (pattern.start(keys[index]) - begin) % round_us)
            layouts.append(_spread_out(state, keys, order, period))
        return cls(state, period, layouts, range(len(layouts)))

    @classmethod
    def plain(cls, state: SteadyState, period: int) -> "LayoutPaths":
        """On every rank one layout: stage by stage and kind by kind, idle time after every op."""
        layouts = [_spread_out(state, keys, list(range(len(keys))), period) for keys in state.ops_of_rank]
        return cls(state, period, layouts, range(len(layouts)))

    @classmethod
    def near(cls, state: SteadyState, pattern: Pattern) -> "LayoutPaths":
        """On every rank the layout of a pattern, and those that move one op or some of its idle time."""
        num_pairs = max(1, len(state.ops_of_rank) - 1)
        most = max(2, int((_MAX_CELLS / num_pairs) ** 0.5) // _num_arcs(state))
        layouts = [_near(state, keys, pattern, most) for keys in state.ops_of_rank]
        return cls(state, pattern.period, layouts, range(len(layouts)))

    def cheapest(self, shares: tuple[float, ...]) -> Pattern:
        """The pattern whose ranks hold least, weighted by their shares; it may hold more than there is room."""
        last = len(self._layouts) - 1
        cost, back = self._node(0, shares), list[tuple[Ints, Ints]]()
        kept: dict[Any, tuple[Floats, Ints]] = {}
        for rank in range(last):
            prices = tuple(self._price(arc, shares) for arc in self._across[rank])
            ends = tuple((self._end(arc.before), self._end(arc.after), arc.distance) for arc in self._across[rank])
            upward = tuple(self._rank[arc.before] == rank for arc in self._across[rank])
            alike = self._kind[rank], self._kind[rank + 1], ends, upward
            if (alike, prices) not in kept:
                kept[alike, prices] = self._pair(rank, prices, alike)
            wait, phase = kept[alike, prices]
            total = cost[:, None] + wait
            choice = total.argmin(axis=0)
            back.append((choice, phase))
            cost = total[choice, np.arange(total.shape[1])] + self._node(rank + 1, shares)
        here = int(cost.argmin())
        path, steps = [here], list[int]()
        for choice, phase in reversed(back):
            there, here = here, int(choice[here])
            steps.append(int(phase[here, there]))
            path.append(here)
        begin, residues = 0, dict[Key, int]()
        for rank, (row, step) in enumerate(zip(reversed(path), [0, *reversed(steps)], strict=True)):
            begin += step
            for key, offset in zip(self.state.ops_of_rank[rank], self._layouts[rank][row], strict=True):
                residues[key] = begin + int(offset)
        return self._lifted(residues)

    def _end(self, key: Key) -> int:
        return self._index[self._rank[key]][key]

    def _price(self, arc: Arc, shares: tuple[float, ...]) -> float:
        """Bytes that wait with an arc."""
        problem = self.state.problem
        (kind, s, _), (after, t, _) = arc.before, arc.after
        mean = sum(shares) / len(shares)
        if after == "W":
            return mean * problem.kept_bytes[s]
        price = mean * problem.restored_bytes[s] if kind == "R" else 0.0
        if s != t or s == problem.num_stages - 1:
            for r, share in enumerate(shares):
                if share:
                    below = sum(problem.taken_by_forward_bytes[u] for u in problem.stages_of_rank[r] if u <= min(s, t))
                    price += share * below
        return price

    def _node(self, rank: int, shares: tuple[float, ...]) -> Floats:
        layouts, index = self._layouts[rank], self._index[rank]
        cost = np.zeros(len(layouts))
        for arc in self._inside[rank]:
            wait = layouts[:, index[arc.after]] - layouts[:, index[arc.before]] - arc.distance
            cost += self._price(arc, shares) * (wait % self.period)
        return cost

    def _pair(self, rank: int, prices: tuple[float, ...], alike: Any) -> tuple[Floats, Ints]:
        """(cost of waiting, phase of the next rank after this one) per pair of layouts."""
        if alike not in self._waits:
            self._waits[alike] = self._all_waits(rank)
        best: Any = None
        for phase, waits in self._waits[alike]:
            cost = sum((price * wait for price, wait in zip(prices, waits, strict=True)), np.zeros(phase.shape))
            if best is None:
                best, best_phase = cost, phase.copy()
            else:
                better = cost < best - 1e-9
                np.copyto(best, cost, where=better)
                np.copyto(best_phase, phase, where=better)
        if best is None:  # ranks that do not talk
            shape = len(self._layouts[rank]), len(self._layouts[rank + 1])
            return np.zeros(shape), np.zeros(shape, dtype=np.int64)
        return best, best_phase

    def _all_waits(self, rank: int) -> list[tuple[Ints, list[Ints]]]:
        """For every arc to the next rank, the phases at which it does not wait, and how long every arc then does."""
        x, y, period = self._layouts[rank], self._layouts[rank + 1], self.period
        at_phase_0, sign = [], []
        for arc in self._across[rank]:
            before, after = self._end(arc.before), self._end(arc.after)
            if self._rank[arc.before] == rank:
                at_phase_0.append((y[None, :, after] - x[:, before, None] - arc.distance) % period)
                sign.append(1)
            else:
                at_phase_0.append((x[:, after, None] - y[None, :, before] - arc.distance) % period)
                sign.append(-1)
        found = []
        for tight, tight_sign in zip(at_phase_0, sign, strict=True):
            waits = []
            for wait, wait_sign in zip(at_phase_0, sign, strict=True):
                if wait_sign == tight_sign:
                    later = wait - tight
                    later[later < 0] += period
                else:
                    later = wait + tight
                    later[later >= period] -= period
                waits.append(later)
            found.append((-tight_sign * tight, waits))
        return found

    def _lifted(self, residues: dict[Key, int]) -> Pattern:
        """The pattern whose ops start as early as arcs and residues allow, limits in flight left out."""
        period = self.period
        starts = {key: (value - residues["F", 0, 0]) % period for key, value in residues.items()}
        arcs = [arc for arc in self.state.arcs if (arc.before[0], arc.after[0]) != ("B", "F")]
        moved = True
        while moved:
            moved = False
            for arc in arcs:
                short = starts[arc.before] + arc.distance - arc.laps * period - starts[arc.after]
                if short > 0:
                    starts[arc.after] += -(-short // period) * period
                    moved = True
        return Pattern(self.state.k, period, self.state.tick_us, starts)


def _orders(keys: list[Key]) -> list[list[int]]:
    """Orders of a rank's ops in the window, the anchor first, each kind in microbatch order round the circle.

    All of them, or a sample where there are too many.
    """
    if len(keys) <= _MAX_OPS:
        orders = ([0, *rest] for rest in permutations(range(1, len(keys))))
        return [order for order in orders if _keeps_microbatch_order(keys, order)]
    rng = random.Random(len(keys))
    of_name: dict[tuple[str, int], list[int]] = {}
    for index, key in enumerate(keys):
        of_name.setdefault(key[:2], []).append(index)
    found = [list(range(len(keys)))]
    while len(found) < _SAMPLED_ORDERS:
        order = list(range(1, len(keys)))
        rng.shuffle(order)
        turn = {name: rng.randrange(len(indices)) for name, indices in of_name.items()}
        turn[keys[0][:2]] = 0
        row = []
        for index in [0, *order]:
            name = keys[index][:2]
            indices = of_name[name]
            row.append(indices[turn[name] % len(indices)])
            turn[name] += 1
        found.append(row)
    return found


def _keeps_microbatch_order(keys: list[Key], order: list[int]) -> bool:
    """Whether every kind of a stage runs in microbatch order round the circle."""
    last: dict[tuple[str, int], int] = {}
    first: dict[tuple[str, int], int] = {}
    turns: dict[tuple[str, int], int] = {}
    for index in order:
        kind, s, i = keys[index]
        name = kind, s
        first.setdefault(name, i)
        turns[name] = turns.get(name, 0) + (i < last.get(name, -1))
        last[name] = i
    return all(turn + (first[name] < last[name]) <= 1 for name, turn in turns.items())


def _layouts(state: SteadyState, keys: list[Key], period: int, spreads: int) -> Ints:
    """Offsets of all layouts; shape (layouts, ops). Where only W and R differ, those that hold least."""
    orders = np.array(_orders(keys))
    length = np.array([state.length[key] for key in keys], dtype=np.int64)
    found = []
    for gaps in _spreads(keys, [int(value) for value in length], period, spreads):
        ends = np.cumsum((length + np.array(gaps))[orders], axis=1)
        offsets = np.zeros_like(ends)
        np.put_along_axis(offsets, orders[:, 1:], ends[:, :-1], axis=1)
        found.append(offsets)
    layouts = np.unique(np.concatenate(found), axis=0)
    held = np.zeros(len(layouts), dtype=np.int64)
    for index, key in enumerate(keys):
        held += state.give[key] * layouts[:, index] - state.take[key] * layouts[:, index]
        if key[0] in "WR":  # the lap that its B before or after it makes necessary
            other = keys.index(("B", *key[1:]))
            sign = 1 if key[0] == "W" else -1
            late = (layouts[:, index] - layouts[:, other]) * sign < 0
            held += late * period * max(state.give[key], state.take[key])
    outward = [index for index, key in enumerate(keys) if key[0] in "FB"]
    by_price = layouts[np.argsort(held, kind="stable")]
    _, first = np.unique(by_price[:, outward], axis=0, return_index=True)
    return np.asarray(by_price[np.sort(first)])


def _spread_out(state: SteadyState, keys: list[Key], order: list[int], period: int) -> Ints:
    """One layout with this order and the idle time evenly behind all ops; shape (1, ops)."""
    length = [state.length[key] for key in keys]
    gaps = _evenly(order, len(keys), period - sum(length))
    at, row = 0, [0] * len(keys)
    for index in order:
        row[index] = at
        at += length[index] + gaps[index]
    return np.array([row], dtype=np.int64)


def _num_arcs(state: SteadyState) -> int:
    """Arcs between two neighbouring ranks, at most."""
    return 2 * max(map(len, state.problem.stages_of_rank)) * state.k


def _near(state: SteadyState, keys: list[Key], pattern: Pattern, most: int) -> Ints:
    """The layout of a pattern's rank and its neighbours, or a sample of `most`; shape (layouts, ops)."""
    begin, period = pattern.starts[keys[0]], pattern.period
    offsets = [(pattern.starts[key] - begin) % period for key in keys]
    order = sorted(range(len(keys)), key=offsets.__getitem__)
    length = [state.length[key] for key in keys]
    gaps = [0] * len(keys)
    for one, other in pairwise([*order, order[0]]):
        gaps[one] = (offsets[other] - offsets[one]) % period - length[one] if len(keys) > 1 else period - length[one]
    found = {tuple(offsets)}

    def add(new_order: list[int], new_gaps: list[int]) -> None:
        at, row = 0, [0] * len(keys)
        for index in new_order:
            row[index] = at
            at += length[index] + new_gaps[index]
        found.add(tuple(row))

    for place in range(1, len(order)):
        rest = order[:place] + order[place + 1 :]
        for other in range(1, len(order)):
            new_order = [*rest[:other], order[place], *rest[other:]]
            if _keeps_microbatch_order(keys, new_order):
                add(new_order, gaps)
                # the op goes without its gap, which stays where it was
                left = gaps.copy()
                left[order[place - 1]] += left[order[place]]
                left[order[place]] = 0
                add(new_order, left)
    for one, gap in enumerate(gaps):
        for part in {gap, gap // 2}:
            for other in range(len(keys)):
                if part and other != one:
                    moved = gaps.copy()
                    moved[one] -= part
                    moved[other] += part
                    add(order, moved)
    if len(found) > most:
        neighbours = sorted(found - {tuple(offsets)})
        found = {tuple(offsets), *random.Random(repr(offsets)).sample(neighbours, most - 1)}
    return np.array(sorted(found), dtype=np.int64)


def _spreads(keys: list[Key], length: list[int], period: int, most: int) -> Iterator[list[int]]:
    """Ways to spread the idle time of a period over the ops, as gaps behind them; at most `most`, best first."""
    idle = period - sum(length)
    if idle == 0:
        yield [0] * len(keys)
        return
    groups = [
        [i for i, key in enumerate(keys) if key[0] == "W"],
        list(range(len(keys))),
        [i for i, key in enumerate(keys) if key[0] == "F"],
        [i for i, key in enumerate(keys) if key[0] == "B"],
        [i for i, key in enumerate(keys) if key[0] in "FB"],
        *([i] for i in range(len(keys))),
    ]
    seen = set[tuple[int, ...]]()
    for group in filter(None, groups):
        for level in (True, False):
            gaps = _levelled(group, length, idle) if level else _evenly(group, len(keys), idle)
            if tuple(gaps) not in seen and len(seen) < most:
                seen.add(tuple(gaps))
                yield gaps


def _evenly(group: list[int], count: int, idle: int) -> list[int]:
    gaps = [0] * count
    for place, index in enumerate(group):
        gaps[index] = idle * (place + 1) // len(group) - idle * place // len(group)
    return gaps


def _levelled(group: list[int], length: list[int], idle: int) -> list[int]:
    """Gaps that make the ops of a group last as equally long as they can."""
    gaps = [0] * len(length)
    left = idle
    for place, index in enumerate(sorted(group, key=lambda index: -length[index])):
        rest = len(group) - place
        total = left + sum(length[i] for i in sorted(group, key=lambda i: -length[i])[place:])
        gaps[index] = min(left, max(0, total // rest - length[index])) if rest > 1 else left
        left -= gaps[index]
    return gaps
