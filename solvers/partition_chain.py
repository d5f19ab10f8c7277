"""Stage partition with one stage per rank, exactly and without a solver.

The least bottleneck by bisection: for a deadline M, give each stage in turn as many layers as time and memory allow,
but leave one for every stage behind it. A stage that starts later reaches at least as far, so no cuts get further than
these, and M is feasible exactly if they reach the end. That holds while every stage can hold any one layer; where some
cannot, a stage may have to start earlier to start at all, and all reachable ends are followed, not only the furthest.
Then, among all cuts with that bottleneck, a dynamic programme takes those with the least sum of squared loads, the
earliest cuts first: the same answer every time, and no lopsided one.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from solvers.partition import PartitionSolution, StagePartition, rescored
from solvers.status import Status

NAME = "chain"


def why_not(problem: StagePartition) -> str | None:
    """Only one stage per rank."""
    return None if problem.is_chain else f"{problem.num_stages} stages share {problem.num_ranks} ranks"


def solve(problem: StagePartition, *, time_limit_s: float, seed: int) -> PartitionSolution:
    """The optimum, always; neither limit nor seed has anything to decide here."""
    del time_limit_s, seed
    reaches = _memory_reaches(problem)
    times = list(accumulate(problem.times_us, initial=0))
    low, high = max(problem.times_us), times[-1]
    if not _feasible(times, reaches, high):
        return PartitionSolution(Status.INFEASIBLE, None, None, 0, NAME)
    while low < high:
        middle = (low + high) // 2
        if _feasible(times, reaches, middle):
            high = middle
        else:
            low = middle + 1
    return rescored(problem, _most_even_cuts(times, reaches, high), Status.OPTIMAL, high, NAME)


def _memory_reaches(problem: StagePartition) -> list[list[int]]:
    """reaches[s][i]: the furthest end of a stage s that starts with layer i, by memory alone. Shape (S, L + 1)."""
    ends = problem.num_layers
    if problem.capacity_bytes is None:
        return [[ends] * (ends + 1)] * problem.num_stages
    return [
        _reaches(problem.layer_bytes(stage), problem.temporaries, problem.capacity_bytes[problem.placement[stage]])
        for stage in range(problem.num_stages)
    ]


def _reaches(sizes: Sequence[int], temporaries: Sequence[int], room: int) -> list[int]:
    """For every first layer, the furthest end that fits: the sum of sizes and the largest temporary. Shape (L + 1,)."""
    num_layers, end, used, reaches = len(sizes), 0, 0, []
    for first in range(num_layers):
        end, used = max(end, first), used if end > first else 0
        largest = max(temporaries[first:end], default=0)
        while end < num_layers and used + sizes[end] + max(largest, temporaries[end]) <= room:
            largest = max(largest, temporaries[end])
            used += sizes[end]
            end += 1
        reaches.append(end)
        if end > first:
            used -= sizes[first]
    return [*reaches, num_layers]


def _feasible(times: list[int], reaches: list[list[int]], deadline_us: int) -> bool:
    """Whether some cuts keep every load within the deadline, which no single layer exceeds."""
    num_layers, num_stages, cut = len(times) - 1, len(reaches), 0
    for stage, reach in enumerate(reaches):
        furthest = min(bisect_right(times, times[cut] + deadline_us) - 1, reach[cut])
        cut, start = min(furthest, num_layers - (num_stages - 1 - stage)), cut
        if cut <= start:
            break
    else:
        if cut == num_layers:
            return True
    if all(reach[layer] > layer for reach in reaches for layer in range(num_layers)):
        return False
    starts = [0]
    for reach in reaches:
        ends: list[int] = []
        for start in starts:  # ascending, and so are their furthest ends
            furthest = min(bisect_right(times, times[start] + deadline_us) - 1, reach[start])
            ends.extend(range(max(start, ends[-1] if ends else 0) + 1, furthest + 1))
        starts = ends
    return bool(starts) and starts[-1] == num_layers


def _most_even_cuts(times: list[int], reaches: list[list[int]], deadline_us: int) -> tuple[int, ...]:
    """Among the cuts within the deadline, those of least sum of squared loads; ties go to the earliest cuts."""
    num_layers, num_stages = len(times) - 1, len(reaches)
    best: dict[int, int] = {num_layers: 0}  # start of the stages still to come: least sum from there to the end
    choice: list[dict[int, int]] = []
    for stage in range(num_stages - 1, -1, -1):
        here: dict[int, int] = {}
        chosen: dict[int, int] = {}
        for first in range(stage, num_layers - (num_stages - 1 - stage)) if stage else (0,):
            furthest = min(bisect_right(times, times[first] + deadline_us) - 1, reaches[stage][first])
            for end in range(first + 1, furthest + 1):
                if end in best:
                    cost = best[end] + (times[end] - times[first]) ** 2
                    if first not in here or cost < here[first]:
                        here[first], chosen[first] = cost, end
        best = here
        choice.append(chosen)
    cuts, cut = [], 0
    for chosen in reversed(choice):
        cut = chosen[cut]
        cuts.append(cut)
    return tuple(cuts[:-1])
