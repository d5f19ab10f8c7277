"""Memory of one rank in CP-SAT: a cumulative of what every op takes, from its start to the end that frees it."""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

from solvers.pipeline import PipelineProblem
from solvers.searched_ops import Key


def add_memory(
    model: Any, problem: PipelineProblem, rank: int, starts: Mapping[Key, Any], length: Mapping[Key, int], horizon: int
) -> None:
    """Keep the rank within its capacity; ops without a start variable never run, and free nothing they would free.

    `starts` and `length` in one unit of time. An F whose backward never runs counts while it runs.
    """
    if problem.room_bytes is None:
        return
    room = problem.room_bytes[rank]
    held: list[tuple[Any, Any, int]] = []
    for s in problem.stages_of_rank[rank]:
        first, rest = problem.taken_by_forward_bytes[s], problem.restored_bytes[s]
        kept = problem.kept_bytes[s] if problem.has_weight_op[s] else 0
        for j in range(problem.num_microbatches):
            forward, back, weight = ("F", s, j), ("B", s, j), ("W", s, j)
            if forward not in starts:
                continue
            if back not in starts:
                held.append((starts[forward], starts[forward] + length[forward], first))
                continue
            back_end = starts[back] + length[back]
            last_end = starts[weight] + length[weight] if weight in starts else back_end
            held.append((starts[forward], back_end, max(0, first - kept)))
            held.append((starts[forward], last_end, min(first, kept)))
            if rest:
                kept_of_rest = min(rest, max(0, kept - first))
                held.append((starts["R", s, j], back_end, rest - kept_of_rest))
                held.append((starts["R", s, j], last_end, kept_of_rest))
            held.append((starts[back], last_end, problem.extra_bytes[s]))
    add_held(model, held, room, horizon)


def add_held(model: Any, held: Sequence[tuple[Any, Any, int]], room: int, longest: int) -> None:
    """Bytes held from a start to an end never exceed the room; nothing is held for more than `longest`."""
    held = [(start, end, size) for start, end, size in held if size]
    if sum(size for _, _, size in held) <= room:
        return
    unit = gcd(*(size for _, _, size in held))
    rows = [model.new_interval_var(start, model.new_int_var(0, longest, ""), end, "") for start, end, _ in held]
    model.add_cumulative(rows, [size // unit for _, _, size in held], room // unit)
