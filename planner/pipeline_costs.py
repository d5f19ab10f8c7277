"""What a schedule is asked for from: costs of every stage, or of every rank's piece of the model, and room per rank.

Times may be any float µs here and become whole µs once, per stage; sizes are whole, in any one unit. Pieces are read as
a constant density over their part of the model, so a chunk of 1/v of a rank costs 1/v of it and totals are kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

from planner.errors import LayoutError
from solvers.pipeline import Objective, PipelineProblem

MAX_BYTES = 10**15
MAX_TIME_US = 1e12  # eleven days for one action; more is a mistake in the unit
MAX_LIMIT = 10**9  # microbatches, in a limit
MAX_SCALE = 1000
UNIT = 12  # in it, sizes that nobody gave can be cut into 2, 3 and 4 chunks

_TIMES = {"forward_us": 1, "backward_us": 1, "weight_us": 0, "p2p_us": 0, "recompute_us": 0}
_SIZES = {"activation_bytes": 1, "weight_activation_bytes": 0, "checkpoint_bytes": 0, "max_in_flight": 1}


@dataclass(frozen=True)
class PipelineCosts:
    """Costs of one microbatch. Every field is one number, for all stages alike, or has one entry per stage.

    LayoutError where a number is no time or no size; how many entries there have to be is asked when stages are known.
    """

    forward_us: float | Sequence[float]
    backward_us: float | Sequence[float]  # gradient of the input
    weight_us: float | Sequence[float]  # gradient of the weights
    p2p_us: float | Sequence[float] = 0.0  # S − 1 entries; nothing is sent between stages of one rank
    activation_bytes: int | Sequence[int] | None = None  # M_B, from F to the backward; None: two units, of any size
    weight_activation_bytes: int | Sequence[int] | None = None  # M_W, from B to W; None: one unit
    fused_stages: Literal["all"] | Sequence[int] = ()  # stages whose backward stays in one piece, BW
    max_in_flight: int | Sequence[int] | None = None  # microbatches between the start of F and the end of B or BW
    recompute_us: float | Sequence[float] | None = None  # R; 0: the stage does not recompute
    checkpoint_bytes: int | Sequence[int] | None = None  # what F takes where the stage recomputes
    microbatch_scale: Sequence[float] | None = None  # m entries: microbatch j takes scale j of all times and sizes

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "fused_stages":
                continue
            entries = _as_tuple(value)
            if not entries:
                raise LayoutError(f"{field.name} is empty; give one number, or one for each stage")
            for entry in entries:
                _check_entry(field.name, entry)
        if (self.recompute_us is None) != (self.checkpoint_bytes is None):
            given, absent = ("recompute_us", "checkpoint_bytes")[:: 1 if self.checkpoint_bytes is None else -1]
            raise LayoutError(f"{given} is given without {absent}; a stage that recomputes needs both")
        if self.microbatch_scale is not None and self.recompute_us is not None:
            raise LayoutError("microbatch_scale and recompute_us do not go together; leave one of them out")

    @property
    def largest_activation_bytes(self) -> int:
        """The unit of memory limits that count microbatches."""
        return max(int(size) for size in self._entries("activation_bytes", None))

    def sized(self, unit: int = 1) -> "PipelineCosts":
        """These costs with sizes: where none are given, M_B is two of these units and M_W one."""
        units = unit if self.activation_bytes is None else 1
        return replace(
            self,
            activation_bytes=2 * unit if self.activation_bytes is None else self.activation_bytes,
            weight_activation_bytes=units if self.weight_activation_bytes is None else self.weight_activation_bytes,
        )

    def problem(
        self,
        rank_of_stage: Sequence[int],
        num_microbatches: int,
        *,
        objective: Objective,
        capacity_bytes: Sequence[int] | None = None,
        fixed_bytes: Sequence[int] | None = None,
    ) -> PipelineProblem:
        """The scheduling problem in whole µs, entries being of stages; LayoutError where their number is wrong."""
        if self.activation_bytes is None or self.weight_activation_bytes is None:
            return self.sized().problem(
                rank_of_stage,
                num_microbatches,
                objective=objective,
                capacity_bytes=capacity_bytes,
                fixed_bytes=fixed_bytes,
            )
        count = len(rank_of_stage)
        hops = self._entries("p2p_us", count - 1, "transfer between stages") if count > 1 else ()
        optional: dict[str, Any] = {}
        if fixed_bytes is not None:
            optional["fixed_bytes"] = tuple(fixed_bytes)
        if self.max_in_flight is not None:
            optional["max_in_flight"] = self._entries("max_in_flight", count)
        if self.recompute_us is not None:
            optional["recompute_us"] = tuple(map(round, self._entries("recompute_us", count)))
            optional["checkpoint_bytes"] = self._entries("checkpoint_bytes", count)
            self._check_checkpoints(count)
        return PipelineProblem(
            forward_us=tuple(map(round, self._entries("forward_us", count))),
            backward_us=tuple(map(round, self._entries("backward_us", count))),
            weight_us=tuple(map(round, self._entries("weight_us", count))),
            split=tuple(not fused for fused in self._fused(count)),
            transfer_us=tuple(
                0 if here == there else round(hop)
                for (here, there), hop in zip(pairwise(rank_of_stage), hops, strict=True)
            ),
            rank_of_stage=tuple(rank_of_stage),
            num_microbatches=num_microbatches,
            activation_bytes=self._entries("activation_bytes", count),
            weight_activation_bytes=self._entries("weight_activation_bytes", count),
            capacity_bytes=None if capacity_bytes is None else tuple(capacity_bytes),
            objective=objective,
            **optional,
        )

    def percent_of_microbatch(self, num_microbatches: int) -> tuple[int, ...] | None:
        """What every microbatch takes of the costs, in whole percent, shape (m,); None where all take the same."""
        if self.microbatch_scale is None:
            return None
        if len(self.microbatch_scale) != num_microbatches:
            raise LayoutError(
                f"microbatch_scale has {len(self.microbatch_scale)} entries; give one for each of the "
                f"{num_microbatches} microbatches"
            )
        return tuple(round(100 * scale) for scale in self.microbatch_scale)

    def chunked(self, num_ranks: int, rank_of_stage: Sequence[int]) -> "PipelineCosts":
        """These costs, of the `num_ranks` pieces of a model, as the costs of the S = p · v stages of this placement.

        Stage s is the s-th part of S of the model, so part of piece s // v. Times and sizes of a piece go to its
        stages in whole numbers that add up to it. `p2p_us` is one number, or the hops between neighbouring ranks;
        ranks that are no neighbours are as far apart as the slowest of those. LayoutError where a stage would get less
        than 1 µs.
        """
        if self.activation_bytes is None or self.weight_activation_bytes is None:
            return self.sized(UNIT).chunked(num_ranks, rank_of_stage)
        chunks = len(rank_of_stage) // num_ranks
        changes: dict[str, Any] = {}
        for name in ("forward_us", "backward_us", "weight_us", "recompute_us", *_SIZES):
            if getattr(self, name) is None:
                continue
            pieces = self._entries(name, num_ranks, "rank")
            if name == "max_in_flight":
                changes[name] = tuple(most for most in pieces for _ in range(chunks))
                continue
            changes[name] = tuple(part for piece in pieces for part in _parts(round(piece), chunks))
            if min(changes[name]) < {**_TIMES, **_SIZES}[name]:
                raise LayoutError(
                    f"{name} {min(pieces):g} is too little to be cut into {chunks} stages in whole numbers; give all "
                    f"{'times' if name in _TIMES else 'sizes'} in a finer unit"
                )
        fused = self._fused(num_ranks, "rank")
        changes["fused_stages"] = tuple(stage for stage in range(len(rank_of_stage)) if fused[stage // chunks])
        hops = self._entries("p2p_us", num_ranks - 1, "hop between neighbouring ranks") if num_ranks > 1 else (0.0,)
        changes["p2p_us"] = tuple(
            hops[min(here, there)] if abs(here - there) == 1 else max(hops) for here, there in pairwise(rank_of_stage)
        ) or (0.0,)
        return replace(self, **changes)

    def _entries(self, name: str, count: int | None, unit: str = "stage") -> tuple[Any, ...]:
        values = _as_tuple(getattr(self, name))
        if count is None or len(values) == count:
            return values
        if len(values) != 1:
            raise LayoutError(
                f"{name} has {len(values)} entries; give one number, or one for each of the {count} {_plural(unit)}"
            )
        return values * count

    def _fused(self, count: int, unit: str = "stage") -> list[bool]:
        if self.fused_stages == "all":
            return [True] * count
        for stage in self.fused_stages:
            if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage < count:
                raise LayoutError(f"fused_stages: there is no {unit} {stage}; the {_plural(unit)} are 0 to {count - 1}")
        return [stage in set(self.fused_stages) for stage in range(count)]

    def _check_checkpoints(self, count: int) -> None:
        columns = (self._entries(name, count) for name in ("recompute_us", "checkpoint_bytes", "activation_bytes"))
        for stage, (again_us, checkpoint, whole) in enumerate(zip(*columns, strict=True)):
            if round(again_us) and checkpoint > whole:
                raise LayoutError(
                    f"checkpoint_bytes of stage {stage} is {checkpoint}, more than the {whole} it holds without "
                    "recomputing; give at most activation_bytes"
                )


@dataclass(frozen=True)
class MemoryLimits:
    """What every rank may hold. One number for all, or one entry per rank; None is no limit."""

    microbatches: float | Sequence[float] | None = None  # in units of the largest activation_bytes
    capacity_bytes: int | Sequence[int] | None = None
    fixed_bytes: int | Sequence[int] | None = None  # held all the time, counts against the capacity

    def __post_init__(self) -> None:
        if self.microbatches is not None and self.capacity_bytes is not None:
            raise LayoutError("memory_limit and capacity_bytes both limit memory; give one of them")
        if self.fixed_bytes is not None and self.capacity_bytes is None:
            raise LayoutError("fixed_bytes counts against capacity_bytes; give that, too")
        for name, most in (("capacity_bytes", MAX_BYTES), ("fixed_bytes", MAX_BYTES)):
            for value in _as_tuple(getattr(self, name)):
                if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                    raise LayoutError(f"{name}: {value} is no size; give whole bytes from 0 to {most}")
        for limit in _as_tuple(self.microbatches):
            if not 0 < limit <= MAX_LIMIT:
                raise LayoutError(f"memory limit {limit}: give a number of microbatches above 0, at most {MAX_LIMIT}")

    def capacity_per_rank(self, costs: PipelineCosts, num_ranks: int) -> tuple[int, ...] | None:
        """Bytes that every rank may hold, shape (p,), or None; microbatches are those of `costs`."""
        if self.microbatches is not None:
            unit = costs.largest_activation_bytes
            limits = self._per_rank("memory_limit", self.microbatches, num_ranks)
            return tuple(min(MAX_BYTES * 1000, math.floor(limit * unit)) for limit in limits)
        if self.capacity_bytes is None:
            return None
        return self._per_rank("capacity_bytes", self.capacity_bytes, num_ranks)

    def fixed_per_rank(self, num_ranks: int) -> tuple[int, ...] | None:
        """Bytes that every rank holds all the time, shape (p,), or None."""
        return None if self.fixed_bytes is None else self._per_rank("fixed_bytes", self.fixed_bytes, num_ranks)

    def described(self, rank: int, capacity_bytes: int) -> str:
        """The limit of one rank, in words and in the unit it was given in."""
        if self.microbatches is None:
            return f"its capacity is {capacity_bytes}"
        limits = _as_tuple(self.microbatches)
        return f"the memory limit of {limits[rank if len(limits) > 1 else 0]:g} microbatches is {capacity_bytes}"

    def _per_rank(self, name: str, value: Any, num_ranks: int) -> tuple[Any, ...]:
        values = _as_tuple(value)
        if len(values) not in (1, num_ranks):
            raise LayoutError(
                f"{name} has {len(values)} entries; give one number, or one for each of the {num_ranks} ranks"
            )
        return values * num_ranks if len(values) == 1 else values


def _check_entry(name: str, value: Any) -> None:
    if name in _TIMES:
        least = _TIMES[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= MAX_TIME_US:
            raise LayoutError(f"{name}: {value} is not a time; give µs from {least} to {MAX_TIME_US:g}")
        return
    if name == "microbatch_scale":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.01 <= value <= MAX_SCALE:
            raise LayoutError(f"{name}: {value} is no share; give a number from 0.01 to {MAX_SCALE}")
        return
    least = _SIZES[name]
    most = MAX_LIMIT if name == "max_in_flight" else MAX_BYTES
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise LayoutError(f"{name}: {value} is out of range; give a whole number from {least} to {most}")


def _parts(whole: int, count: int) -> list[int]:
    """`count` whole numbers, as equal as can be, that add up to `whole`."""
    return [whole * (n + 1) // count - whole * n // count for n in range(count)]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _plural(unit: str) -> str:
    first, _, rest = unit.partition(" ")
    return f"{first}s {rest}".strip()
