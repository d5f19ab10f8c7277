"""The least time of the layers of one stage within its memory, where every layer chooses for itself. Exact.

Layers of equal numbers are counted, not named: how many of each kind take which choice. For each level that the
largest temporary may have, the rest is a knapsack with one choice per layer: from all layers at their fastest, save
`need` bytes at the least extra time.

Relaxed to fractions, a greedy rule solves it: per kind only the choices on the lower convex hull of (saving, extra
time) count, and the steps along all hulls are taken in order of extra time per byte, the last one in part. Its price λ
per byte gives every (kind, choice) a reduced cost rc ≥ 0 above the cheapest choice of its kind, and every whole answer
of extra time c that saves enough has c ≥ relaxed + Σ rc · count (+ λ per byte saved beyond the need). So only counts
with Σ rc · count ≤ best − 1 − relaxed can beat the best answer known, at first the greedy one rounded up. These few are
all enumerated; of the step taken in part, the least count that saves enough is the cheapest. That is the proof.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

Counts = tuple[int, ...]  # layers of every kind in the stage
Chosen = dict[tuple[int, int], int]  # (kind, choice): layers


@dataclass(frozen=True)
class Option:
    """One choice of a kind on one stage."""

    choice: int
    time_us: int
    size_bytes: int
    temporary_bytes: int


@dataclass(frozen=True)
class _Menu:
    """The options of a kind below one level of temporaries, beaten ones left out: savings and costs both ascend."""

    choices: tuple[int, ...]
    savings: tuple[int, ...]  # bytes less than the fastest
    costs: tuple[int, ...]  # us more than the fastest
    time_us: int  # of the fastest
    size_bytes: int  # of the fastest


class StageKnapsack:
    """One stage: `options[kind]` and the bytes it has room for; None is no limit."""

    def __init__(self, options: Sequence[Sequence[Option]], room_bytes: int | None) -> None:
        self.options = options
        self.room_bytes = room_bytes
        self._levels: dict[int, _Level] = {}
        self._known: dict[Counts, tuple[int, Chosen] | None] = {}

    def least(self, counts: Counts) -> tuple[int, Chosen] | None:
        """The least time in us of so many layers of every kind, and their choices; None if none fit."""
        if counts not in self._known:
            self._known[counts] = self._least(counts)
        return self._known[counts]

    def _least(self, counts: Counts) -> tuple[int, Chosen] | None:
        present = [kind for kind, count in enumerate(counts) if count]
        smallest = max((min(o.temporary_bytes for o in self.options[kind]) for kind in present), default=0)
        tops = {o.temporary_bytes for kind in present for o in self.options[kind]}
        best: tuple[int, Chosen] | None = None
        for top in sorted(tops) if self.room_bytes is not None else [max(tops)]:
            if top < smallest:
                continue
            if top not in self._levels:
                self._levels[top] = _Level([_menu(options, top, self.room_bytes) for options in self.options])
            room = None if self.room_bytes is None else self.room_bytes - top
            found = self._levels[top].least(counts, present, room, None if best is None else best[0])
            best = found or best
        return best


class _Level:
    """The menus of all kinds below one level of temporaries; None where a kind has no option there."""

    def __init__(self, menus: Sequence[_Menu | None]) -> None:
        self.menus = menus

    @cached_property
    def steps(self) -> list[tuple[int, int, int, int, int]]:
        """(kind, from, to, saving, cost) of each step along a hull, the cheapest byte first; from and to are rows."""
        steps = []
        for kind, menu in enumerate(self.menus):
            row = 0
            while menu is not None and row + 1 < len(menu.choices):
                here, later = row, range(row + 1, len(menu.choices))
                slopes = [
                    Fraction(menu.costs[k] - menu.costs[here], menu.savings[k] - menu.savings[here]) for k in later
                ]
                row = max(k for k, slope in zip(later, slopes, strict=True) if slope == min(slopes))
                saving, cost = menu.savings[row] - menu.savings[here], menu.costs[row] - menu.costs[here]
                steps.append((kind, here, row, saving, cost))
        return sorted(steps, key=lambda step: Fraction(step[4], step[3]))

    def least(
        self, counts: Counts, present: Sequence[int], room: int | None, below: int | None
    ) -> tuple[int, Chosen] | None:
        """The least time below `below`, and the choices; None if there is none."""
        fastest = used = 0
        for kind in present:
            menu = self.menus[kind]
            assert menu is not None
            fastest += counts[kind] * menu.time_us
            used += counts[kind] * menu.size_bytes
        if below is not None and fastest >= below:
            return None
        rows = {(kind, 0): counts[kind] for kind in present}
        need = 0 if room is None else used - room
        if need > 0:
            answer = self._save(counts, need)
            if answer is None or (below is not None and fastest + answer[0] >= below):
                return None
            fastest, rows = fastest + answer[0], answer[1]
        chosen: Chosen = {}
        for (kind, row), count in rows.items():
            menu = self.menus[kind]
            if count and menu is not None:
                chosen[kind, menu.choices[row]] = count
        return fastest, chosen

    def _save(self, counts: Counts, need: int) -> tuple[int, dict[tuple[int, int], int]] | None:
        """The least extra time that saves so many bytes, and the count of every (kind, row)."""
        at = {kind: 0 for kind, count in enumerate(counts) if count}  # the row all layers of a kind have reached
        saved = spent = 0
        for kind, start, end, saving, cost in self.steps:
            if kind not in at:
                continue
            if saved + counts[kind] * saving >= need:
                part = -(-(need - saved) // saving)
                rows = {(other, row): counts[other] for other, row in at.items()}
                rows |= {(kind, start): counts[kind] - part, (kind, end): part}
                relaxed = spent * saving + (need - saved) * cost  # times `saving`, to stay whole
                search = _Enumeration(self.menus, counts, at, need, (kind, start, end, saving, cost), relaxed)
                return search.best_below(spent + part * cost, rows)
            saved, spent, at[kind] = saved + counts[kind] * saving, spent + counts[kind] * cost, end
        return None


class _Enumeration:
    """All counts whose reduced costs leave room below the best answer known; numbers are times the step's saving."""

    def __init__(
        self,
        menus: Sequence[_Menu | None],
        counts: Counts,
        at: dict[int, int],
        need: int,
        step: tuple[int, int, int, int, int],
        relaxed: int,
    ) -> None:
        self.kind, start, self.end, self.saving, self.cost = step
        self.relaxed = relaxed
        self.left = {kind: counts[kind] for kind in at}
        self.at = at | {self.kind: start}
        self.short, self.extra = need, 0  # bytes still to save and time spent, when all are at their rows `at`
        self.moves: list[tuple[int, int, int, int, int]] = []  # (reduced cost, kind, row, saving, cost)
        for kind, row in self.at.items():
            menu = menus[kind]
            assert menu is not None
            self.short -= counts[kind] * menu.savings[row]
            self.extra += counts[kind] * menu.costs[row]
            for other in range(len(menu.choices)):
                if other == row or (kind, other) == (self.kind, self.end):
                    continue
                saving, cost = menu.savings[other] - menu.savings[row], menu.costs[other] - menu.costs[row]
                self.moves.append((cost * self.saving - self.cost * saving, kind, other, saving, cost))
        self.moves.sort(reverse=True)
        self.taken: dict[tuple[int, int], int] = {}
        self.best, self.rows = 0, self.taken

    def best_below(self, extra_us: int, rows: dict[tuple[int, int], int]) -> tuple[int, dict[tuple[int, int], int]]:
        """The best answer; the one given unless one of less extra time exists."""
        self.best, self.rows = extra_us, rows
        self._try(0, 0, self.short, self.extra)
        return self.best, self.rows

    def _try(self, depth: int, reduced: int, short: int, extra: int) -> None:
        if depth == len(self.moves):
            part = max(0, -(-short // self.saving))
            if part <= self.left[self.kind] and extra + part * self.cost < self.best:
                self.best = extra + part * self.cost
                self.rows = dict(self.taken)
                for kind, row in self.at.items():
                    self.rows[kind, row] = self.left[kind] - (part if kind == self.kind else 0)
                self.rows[self.kind, self.end] = part
            return
        price, kind, row, saving, cost = self.moves[depth]
        most = self.left[kind]
        for count in range(most + 1):
            if reduced + price * count > (self.best - 1) * self.saving - self.relaxed:
                break
            self.left[kind], self.taken[kind, row] = most - count, count
            self._try(depth + 1, reduced + price * count, short - count * saving, extra + count * cost)
        self.left[kind] = most
        self.taken.pop((kind, row), None)


def _menu(options: Sequence[Option], top_bytes: int, room_bytes: int | None) -> _Menu | None:
    """The options at or below this level of temporaries, from the fastest to the smallest; None if there are none."""
    usable = [option for option in options if option.temporary_bytes <= top_bytes]
    if not usable:
        return None
    kept: list[Option] = []
    for option in sorted(usable, key=lambda o: (o.time_us, o.size_bytes, o.choice)):
        if not kept or (room_bytes is not None and option.size_bytes < kept[-1].size_bytes):
            kept.append(option)
    fastest = kept[0]
    return _Menu(
        tuple(option.choice for option in kept),
        tuple(fastest.size_bytes - option.size_bytes for option in kept),
        tuple(option.time_us - fastest.time_us for option in kept),
        fastest.time_us,
        fastest.size_bytes,
    )
