"""A schedule made from costs alone, for people."""

from planner.report.text import facts, render, schedule_excerpt
from planner.schedule.answer import ScheduleAnswer


def render_schedule(answer: ScheduleAnswer) -> str:
    """What `pipewright schedule` prints for people."""
    rows = [
        ("schedule", f"{answer.family}, made by {answer.solver} in {answer.solve_seconds:.2f} s, {answer.status}"),
        ("span", f"{answer.span_us} µs, bubble rate {answer.bubble_rate_span:.4f}"),
        ("makespan", f"{answer.makespan_us} µs, bubble rate {answer.bubble_rate_makespan:.4f}"),
        (
            "gap",
            f"{answer.gap:.2%}: no {answer.objective} is under {answer.lower_bound_us} µs ({answer.lower_bound_kind})",
        ),
        ("peak memory", " ".join(map(str, answer.peak_memory))),
        (
            "limits",
            f"{answer.time_limit_s:g} s, seed {answer.seed}"
            + (", cut short by the time limit: another run may differ" if answer.limited_by_time else "")
            + (", interrupted" if answer.interrupted else ""),
        ),
    ]
    return render(facts(rows), schedule_excerpt(answer.schedule, title="Schedule"))
