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
