"""How many microbatches each stage holds at once, from the order alone."""

import math

from planner.schedule.actions import Kind, Schedule


def peak_in_flight(schedule: Schedule, weight_ratio: float) -> tuple[int, ...]:
    """Most microbatches each stage holds at any time, shape (S,), rounded up.

    A microbatch counts 1 from its F to its B (or BW), and `weight_ratio` = M_W / M_B from its B to its W.
    """
    peaks = [0.0] * schedule.num_stages
    for actions in schedule.ranks:
        held = dict.fromkeys({action.stage for action in actions}, 0.0)
        for kind, stage, _ in actions:
            if kind is Kind.F:
                held[stage] += 1
                peaks[stage] = max(peaks[stage], held[stage])
            elif kind is Kind.B:
                held[stage] -= 1 - weight_ratio
                peaks[stage] = max(peaks[stage], held[stage])
            else:
                held[stage] -= weight_ratio if kind is Kind.W else 1
    return tuple(math.ceil(peak - 1e-9) for peak in peaks)


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
            elif kind is not Kind.W:
                held[stage] -= 1
        peaks.append((total, common))
    return tuple(peaks)
