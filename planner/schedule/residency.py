"""How many microbatches each stage holds at once, from the order alone."""

from planner.schedule.actions import Kind, Schedule

_TAKEN = {Kind.F: (1, 0), Kind.B: (-1, 1), Kind.BW: (-1, 0), Kind.W: (0, -1), Kind.R: (0, 0)}
"""How the microbatches between F and the backward, and those between B and W, grow with an action."""


def peak_in_flight(schedule: Schedule, weight_ratio: float) -> tuple[tuple[int, int], ...]:
    """What each stage holds at its fullest moment: (microbatches between F and B or BW, those between B and W).

    Fullest by the first count plus `weight_ratio` = M_W / M_B times the second. Of a stage that two ranks hold, on the
    one that holds more. Shape (S, 2).
    """
    fullest = [(0, 0)] * schedule.num_stages
    weight = [0.0] * schedule.num_stages
    for actions in schedule.ranks:
        held = {action.stage: [0, 0] for action in actions}
        for action in actions:
            counts = held[action.stage]
            forwards, weights = _TAKEN[action.kind]
            counts[0] += forwards
            counts[1] += weights
            now = counts[0] + weight_ratio * counts[1]
            if now > weight[action.stage]:
                weight[action.stage], fullest[action.stage] = now, (counts[0], counts[1])
    return tuple(fullest)


def peak_per_rank(schedule: Schedule) -> tuple[tuple[int, int], ...]:
    """For every rank, (most microbatch-chunks held at one time, most that each of its chunks holds at one same time).

    Counts run from F to B or BW. The second is max over time of min over chunks: however a rank's layers are cut
    into its chunks, at that moment it holds every layer at least that often. Shape (p, 2).
    """
    peaks = []
    for actions in schedule.ranks:
        held = dict.fromkeys({action.stage for action in actions}, 0)
        total = common = 0
        for kind, stage, _ in actions:
            if kind is Kind.F:
                held[stage] += 1
                total = max(total, sum(held.values()))
                common = max(common, min(held.values()))
            elif kind in (Kind.B, Kind.BW):
                held[stage] -= 1
        peaks.append((total, common))
    return tuple(peaks)


def held_at_fullest(schedule: Schedule) -> tuple[tuple[int, int], ...]:
    """What each stage holds when its rank holds most: (microbatches between F and B or BW, those between B and W).

    Fullest by the first count, summed over the rank's stages; of equal moments the one with more of the second.
    Shape (S, 2).
    """
    at_fullest = [(0, 0)] * schedule.num_stages
    for actions in schedule.ranks:
        held = {action.stage: [0, 0] for action in actions}
        now = most = (0, 0)
        for action in actions:
            forwards, weights = _TAKEN[action.kind]
            held[action.stage][0] += forwards
            held[action.stage][1] += weights
            now = now[0] + forwards, now[1] + weights
            if now > most:
                most = now
                for stage, counts in held.items():
                    at_fullest[stage] = counts[0], counts[1]
    return tuple(at_fullest)
