"""Stage partition with one stage per rank, exactly and without a solver.

The least bottleneck by bisection: for a deadline M, give each stage in turn as many items as time and memory allow,
but leave one for every stage behind it. What a stage can hold, it can hold less of in no more time (numbers are not
negative, and every layer may keep its choice), so a stage that starts later reaches at least as far, no cuts get
further than these, and M is feasible exactly if they reach the end. That holds while every stage can hold any one item
within M; where some cannot, a stage may have to start earlier to start at all, and all reachable ends are followed, not
only the furthest. Stages share no memory, so each takes the choices of least time that fit (`partition_segments`),
whatever M is.
Then, among all cuts with that bottleneck, a dynamic programme takes those of least total time, of these the least sum
of squared loads, the earliest cuts first: the same answer every time, no lopsided one, and nothing recomputed that the
memory does not ask for.
"""

from solvers.partition import PartitionSolution, StagePartition, rescored
from solvers.partition_kinds import Kinds
from solvers.partition_segments import Segments, segments_of
from solvers.status import Status

NAME = "chain"

MOST_KINDS = 8  # that choose: with many, the counts to be enumerated could become too many


def why_not(problem: StagePartition) -> str | None:
    """Only one stage per rank, and few kinds of layers that choose for themselves."""
    if not problem.is_chain:
        return f"{problem.num_stages} stages share {problem.num_ranks} ranks"
    if problem.choices and problem.choose_per == "layer":
        choosing = sum(len(options) > 1 for options in Kinds(problem).options)
        if choosing > MOST_KINDS:
            return f"{choosing} kinds of layers choose for themselves, it counts at most {MOST_KINDS}"
    return None


def solve(problem: StagePartition, *, time_limit_s: float, seed: int) -> PartitionSolution:
    """The optimum, always; neither limit nor seed has anything to decide here."""
    del time_limit_s, seed
    segments = segments_of(problem)
    ranks, choices, layers = range(problem.num_ranks), range(problem.num_choices), range(problem.num_layers)
    times = [problem.layer_times_us(rank, choice) for rank in ranks for choice in choices]
    low = -(-sum(min(column) for column in zip(*times, strict=True)) // problem.num_stages)
    high = sum(max(times[row][layer] for row in range(len(times))) for layer in layers)
    search = _Search(segments, len(problem.items), problem.num_stages)
    if not search.is_feasible(high):
        return PartitionSolution(Status.INFEASIBLE, None, None, 0, NAME)
    low = max(low, search.least_single_us)
    step = max(1, low // 64)  # the optimum is mostly close to the lower bound: try there first
    while low + step < high and not search.is_feasible(low + step):
        low, step = low + step + 1, 2 * step
    high = min(high, low + step)
    while low < high:
        middle = (low + high) // 2
        if search.is_feasible(middle):
            high = middle
        else:
            low = middle + 1
    bounds = search.most_even(high)
    cuts = [problem.items[bound][0] for bound in bounds[1:-1]]
    return rescored(problem, cuts, Status.OPTIMAL, high, NAME, segments.choices(bounds))


class _Search:
    """Ends that S stages reach over N items; `least_single_us` is below no deadline that is feasible."""

    def __init__(self, segments: Segments, num_items: int, num_stages: int) -> None:
        self._segments, self._num_items, self._num_stages = segments, num_items, num_stages
        columns = list(zip(*(segments.singles_us(stage) for stage in range(num_stages)), strict=True))
        held = [[time for time in column if time is not None] for column in columns]
        self.least_single_us = max(min(times, default=0) for times in held)
        # from this deadline on, every stage can hold any one item; None if never
        self._any_single_us = None if any(None in column for column in columns) else max(map(max, held))

    def is_feasible(self, deadline_us: int) -> bool:
        """Whether some cuts keep every load within the deadline."""
        end = 0
        for stage in range(self._num_stages):
            start, furthest = end, self._segments.furthest(stage, end, deadline_us)
            end = min(furthest, self._num_items - (self._num_stages - 1 - stage))
            if end <= start:
                break
        else:
            if end == self._num_items:
                return True
        if self._any_single_us is not None and deadline_us >= self._any_single_us:
            return False
        return bool(self._starts(deadline_us))

    def _starts(self, deadline_us: int) -> list[dict[int, int]]:
        """For every stage, the items it can start with and how far it gets from there; [] if the end is not reached."""
        reached, ends = [], [0]
        for stage in range(self._num_stages):
            starts: dict[int, int] = {}
            following: list[int] = []
            for start in ends:  # ascending, and so are their furthest ends
                furthest = self._segments.furthest(stage, start, deadline_us)
                furthest = min(furthest, self._num_items - (self._num_stages - 1 - stage))
                starts[start] = furthest
                following.extend(range(max(start, following[-1] if following else 0) + 1, furthest + 1))
            reached.append(starts)
            ends = following
        return reached if ends and ends[-1] == self._num_items else []

    def most_even(self, deadline_us: int) -> list[int]:
        """S + 1 bounds within the deadline, of least total time, then least sum of squared loads, then the earliest."""
        weight = self._num_stages * deadline_us**2 + 1  # one µs of total time counts more than all squares
        best: dict[int, int] = {self._num_items: 0}  # start of the stages still to come: least cost from there on
        chosen: list[dict[int, int]] = []
        for stage, starts in reversed(list(enumerate(self._starts(deadline_us)))):
            here: dict[int, int] = {}
            choice: dict[int, int] = {}
            for first, furthest in starts.items():
                for end in range(first + 1, furthest + 1):
                    if end in best:
                        time = self._segments.least_us(stage, first, end)
                        assert time is not None
                        cost = best[end] + time * weight + time * time
                        if first not in here or cost < here[first]:
                            here[first], choice[first] = cost, end
            best = here
            chosen.append(choice)
        bounds = [0]
        for choice in reversed(chosen):
            bounds.append(choice[bounds[-1]])
        return bounds
