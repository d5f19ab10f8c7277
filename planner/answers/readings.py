"""What can be read off a plan: its best layouts side by side, the parts of a difference, the cost of a token budget."""

import math
import re
from typing import Annotated

from pydantic import Field

from planner.errors import LayoutError, PlanError
from planner.plans import WITHOUT_PINS, Plan, TimeParts
from profiles.facts import Bytes, Count, Facts, Microseconds, NonNegative

Difference = Annotated[float, Field(ge=-1e14, le=1e14, allow_inf_nan=False)]  # µs, either way

MAX_TOKENS = 10**18
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TOKENS = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([KMBT]?)", re.IGNORECASE | re.ASCII)
_WORTH_SAYING = 0.001  # of the step time
_MOST_WORDS = 3


class PartDifference(Facts):
    """One part of the step time, compared."""

    part: str
    difference_us: Difference  # what this layout takes longer than the other


class LayoutRow(Facts):
    """One priced layout beside others."""

    label: str
    layout: str
    family: str
    step_time_us: Microseconds
    tokens_per_s: NonNegative
    mfu: NonNegative
    peak_memory_bytes: Bytes
    gap_to_best: Difference  # (step time − best) / best
    parts: TimeParts | None = None
    differences: tuple[PartDifference, ...] = ()  # to the best; they add up to the difference of step times

    @property
    def separated_by(self) -> str:
        """What separates it from the best, in a few words."""
        return difference_words(self.differences, self.step_time_us / (1 + self.gap_to_best))


class TopLayouts(Facts):
    """The best layouts that were priced, fastest first, and a bound that none of the space is under."""

    rows: tuple[LayoutRow, ...]
    lower_bound_us: NonNegative


class LayoutComparison(Facts):
    """Why not this layout: it beside a better (or worse) one, with the difference of their step times in parts."""

    layout: LayoutRow
    other: LayoutRow
    other_gap: NonNegative | None = None  # how far `other` may be from the best of its own space
    difference_us: Difference  # positive where `other` is faster
    parts: tuple[PartDifference, ...]  # they add up to it

    @property
    def is_same(self) -> bool:
        """Whether both are one layout, under one schedule."""
        return _is_same(self.layout, self.other)

    @property
    def words(self) -> str:
        """The difference in one line."""
        ratio = self.difference_us / self.other.step_time_us
        if not self.parts or abs(ratio) < _WORTH_SAYING / 10:
            return "as fast"
        way = "slower" if ratio > 0 else "faster"
        return f"{abs(ratio):.2%} {way}: {difference_words(self.parts, self.other.step_time_us)}"


class Budget(Facts):
    """What training on so many tokens takes, without failures and restarts."""

    tokens: Count | int
    tokens_per_step: Count
    num_steps: int
    days: NonNegative
    num_devices: Count
    gpu_hours: NonNegative


def top_layouts(plan: Plan, count: int = 10) -> TopLayouts:
    """The plan's own layout and its alternatives, fastest first, with what separates each from the fastest.

    They are the proven best of the space if the plan was made with `top` at least as large, and if its search ended by
    itself.
    """
    own, *others = _rows(plan)
    same = [row for row in others if row.label and _is_same(row, own)]
    if same:
        own = own.model_copy(update={"label": f"{own.label}, also {same[0].label}"})
    kept = [own, *(row for row in others if row not in same)]
    rows = sorted(kept, key=lambda row: row.step_time_us)[: max(1, count)]
    return TopLayouts(rows=tuple(_beside(row, rows[0]) for row in rows), lower_bound_us=plan.certificate.lower_bound_us)


def compare_layouts(plan: Plan, label: str = WITHOUT_PINS) -> LayoutComparison:
    """The plan's layout beside the alternative with this label: by default the best without its pins.

    PlanError if there is none, or if the plan does not say what its step time is made of.
    """
    own, *others = _rows(plan)
    other = next((row for row in others if row.label == label), None)
    if other is None:
        raise PlanError(f"the plan has no alternative labelled {label!r}; plan with pins, or add one")
    if own.parts is None or other.parts is None:
        raise PlanError("the plan does not say what its step times are made of; plan again")
    own = _beside(own, other)
    return LayoutComparison(
        layout=own,
        other=_beside(other, other),
        other_gap=next(beside.gap for beside in plan.alternatives if beside.label == label),
        difference_us=math.fsum(part.difference_us for part in own.differences),
        parts=own.differences,
    )


def budget(plan: Plan, tokens: int) -> Budget:
    """Steps, days and GPU-hours to train on `tokens` tokens at the predicted step time; the last step may be partial.

    LayoutError unless 1 ≤ tokens ≤ 10^18.
    """
    if not 1 <= tokens <= MAX_TOKENS:
        raise LayoutError(f"token budget {tokens}: give 1 to {MAX_TOKENS:.0e} tokens")
    per_step = plan.global_batch_size * plan.sequence_length
    steps = -(-tokens // per_step)
    hours = steps * plan.prediction.step_time_us / 3.6e9
    devices = plan.layout.num_devices
    return Budget(
        tokens=tokens,
        tokens_per_step=per_step,
        num_steps=steps,
        days=hours / 24,
        num_devices=devices,
        gpu_hours=hours * devices,
    )


def parse_tokens(text: str) -> int:
    """Tokens as people write them: 15T, 300B, 1.5e12; LayoutError if it is no number or out of range."""
    match = _TOKENS.fullmatch(text.strip())
    tokens = 0 if match is None else round(float(match[1]) * _SUFFIXES[match[2].upper()])
    if not 1 <= tokens <= MAX_TOKENS:
        raise LayoutError(f"token budget {text!r}: write a number of tokens like 300B, 15T or 1.5e12")
    return tokens


def part_differences(parts: TimeParts, other: TimeParts) -> tuple[PartDifference, ...]:
    """What each part takes longer than in the other; parts that neither has are left out."""
    reference = other.by_name
    return tuple(
        PartDifference(part=name, difference_us=value - reference[name])
        for name, value in parts.by_name.items()
        if value or reference[name]
    )


def difference_words(parts: tuple[PartDifference, ...], reference_us: float) -> str:
    """The largest differences as shares of a step time: `bubble +4.1%, recompute −0.5%`."""
    shares = sorted(((part.difference_us / reference_us, part.part) for part in parts), key=lambda s: -abs(s[0]))
    shown = [f"{name} {share:+.1%}" for share, name in shares[:_MOST_WORDS] if abs(share) >= _WORTH_SAYING]
    return ", ".join(shown) or ("nothing over 0.1%" if parts else "")


def _rows(plan: Plan) -> list[LayoutRow]:
    tokens, guess = plan.global_batch_size * plan.sequence_length, plan.prediction
    own = LayoutRow(
        label="this plan",
        layout=plan.layout.degrees,
        family=plan.family,
        step_time_us=guess.step_time_us,
        tokens_per_s=guess.tokens_per_s,
        mfu=guess.mfu,
        peak_memory_bytes=max(memory.total_bytes for memory in guess.memory),
        gap_to_best=0.0,
        parts=guess.parts,
    )
    return [
        own,
        *(
            LayoutRow(
                label=other.label,
                layout=other.layout,
                family=other.family,
                step_time_us=other.step_time_us,
                tokens_per_s=tokens / (other.step_time_us / 1e6),
                mfu=other.mfu,
                peak_memory_bytes=other.peak_memory_bytes,
                gap_to_best=0.0,
                parts=other.parts,
            )
            for other in plan.alternatives
        ),
    ]


def _is_same(row: LayoutRow, other: LayoutRow) -> bool:
    return (row.layout, row.family, row.step_time_us) == (other.layout, other.family, other.step_time_us)


def _beside(row: LayoutRow, best: LayoutRow) -> LayoutRow:
    known = row.parts is not None and best.parts is not None
    return row.model_copy(
        update={
            "gap_to_best": row.step_time_us / best.step_time_us - 1,
            "differences": part_differences(row.parts, best.parts) if known else (),  # type: ignore[arg-type]
        }
    )
