"""Plans, schedules and runs as terminal tables."""

from collections.abc import Iterable
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.plans import Plan
from planner.schedule.answer import ScheduleAnswer
from profiles.model import ModelProfile

if TYPE_CHECKING:
    from planner.executor.run_report import RunReport

GIB = 2**30
_SHOWN_RANKS = 16


def render(*parts: RenderableType, width: int = 110) -> str:
    """The text of these renderables, without colour, at a fixed width."""
    stream = StringIO()
    Console(file=stream, width=width, highlight=False, color_system=None).print(Group(*parts))
    return stream.getvalue().rstrip("\n")


def duration(microseconds: float) -> str:
    """A time with the unit that suits it."""
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.3f} s"
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.0f} µs"


def size(num_bytes: float) -> str:
    """Bytes with the binary unit that suits them."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def render_plan(plan: Plan, width: int = 110) -> str:
    """Everything `pipewright plan` prints for people."""
    return render(*plan_parts(plan), width=width)


def plan_parts(plan: Plan) -> Iterable[RenderableType]:
    """The tables of a plan, one after the other."""
    yield _summary(plan)
    yield _stages_and_memory(plan)
    yield schedule_excerpt(plan.schedule, title=f"Schedule: {plan.family}")
    if plan.alternatives:
        yield _alternatives(plan)
    yield Text("Assumed: " + " ".join(plan.provenance.assumptions))


def _facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def _summary(plan: Plan) -> Table:
    layout, guess, proof = plan.layout, plan.prediction, plan.certificate
    certainty = (
        f"{proof.gap:.2%}: no layout and schedule of the space searched is faster than "
        f"{duration(proof.lower_bound_us)} ({proof.lower_bound_kind})"
    )
    rows = [
        ("model", f"{plan.model.name}, {plan.model.num_parameters / 1e9:.2f} B parameters, {plan.dtype}"),
        ("cluster", f"{plan.provenance.cluster}: {layout.num_devices} × {plan.provenance.device}"),
        (
            "batch",
            f"{plan.global_batch_size} sequences of {plan.sequence_length} = "
            f"{plan.global_batch_size * plan.sequence_length:,} tokens per step",
        ),
        (
            "layout",
            f"{layout.degrees}: tensor {layout.tp} × pipeline {layout.pp} × data {layout.dp}, "
            f"{layout.num_microbatches} microbatches of {layout.micro_batch_size}",
        ),
        ("schedule", f"{plan.family}, made by {proof.schedule_solver}"),
        (
            "step time",
            f"{duration(guess.step_time_us)} = pipeline {duration(guess.pipeline_us)} + exposed data-parallel "
            f"{duration(guess.exposed_data_parallel_us)} + optimizer {duration(guess.optimizer_us)}",
        ),
        ("bubble", f"{guess.bubble_rate_makespan:.2%} of makespan, {guess.bubble_rate_span:.2%} of span"),
        ("rate", f"{guess.tokens_per_s:,.0f} tokens/s, MFU {guess.mfu:.1%}"),
        ("gap", certainty),
        (
            "searched",
            f"{proof.num_candidates} layouts: {proof.num_evaluated} evaluated, {proof.num_pruned} pruned by bound, "
            f"{proof.num_infeasible} infeasible; {proof.seconds:.1f} s of {proof.time_limit_s:g} s, seed {proof.seed}"
            + (" (interrupted)" if proof.interrupted else ""),
        ),
    ]
    if proof.infeasible_reasons:
        reasons = "; ".join(f"{count} {reason}" for reason, count in proof.infeasible_reasons.items())
        rows.append(("dropped", reasons))
    return _facts("", rows)


def _stages_and_memory(plan: Plan) -> Table:
    table = _grid("Per pipeline rank (times of one microbatch in ms, memory of one device in GiB)")
    columns = "rank layers F B W weights gradients optimizer activations other total usable"
    for name in columns.split():
        table.add_column(name, justify="right", no_wrap=True)
    for rank, memory in enumerate(plan.prediction.memory):
        hosted = [s for s, host in enumerate(plan.layout.rank_of_stage) if host == rank]
        costs = [plan.stages[s] for s in hosted]
        times_us = (
            sum(c.forward_us for c in costs),
            sum(c.backward_input_us for c in costs),
            sum(c.backward_weight_us for c in costs),
        )
        parts_bytes = (
            memory.weight_bytes,
            memory.gradient_bytes,
            memory.optimizer_bytes,
            memory.activation_bytes,
            memory.temporary_bytes + memory.buffer_bytes,
            memory.total_bytes,
            memory.capacity_bytes,
        )
        table.add_row(
            str(rank),
            "+".join(str(plan.layout.layers_per_stage[s]) for s in hosted),
            *(f"{us / 1e3:.2f}" for us in times_us),
            *(f"{part / GIB:.2f}" for part in parts_bytes),
        )
    return table


def _grid(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))


def schedule_excerpt(lines: tuple[str, ...], *, title: str, width: int = 104) -> Table:
    """The start of every rank's line."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    for rank, line in enumerate(lines[:_SHOWN_RANKS]):
        label = f"r{rank}: "
        room = width - len(label)
        shown = line if len(line) <= room else line[: line.rfind(" ", 0, room - 2)] + " …"
        table.add_row(label + shown)
    if len(lines) > _SHOWN_RANKS:
        table.add_row(f"… and {len(lines) - _SHOWN_RANKS} more ranks")
    return table


def _alternatives(plan: Plan) -> Table:
    table = _grid("Beside it")
    for name in ("", "layout", "schedule", "step time", "against plan", "MFU", "peak memory"):
        table.add_column(name, justify="left" if name in ("", "layout", "schedule") else "right", no_wrap=True)
    rows = [
        (
            "this plan",
            plan.layout.degrees,
            plan.family,
            plan.prediction.step_time_us,
            plan.prediction.mfu,
            max(m.total_bytes for m in plan.prediction.memory),
        ),
        *((a.label, a.layout, a.family, a.step_time_us, a.mfu, a.peak_memory_bytes) for a in plan.alternatives),
    ]
    for label, layout, family, step_us, mfu, peak in rows:
        change = step_us / plan.prediction.step_time_us - 1
        table.add_row(label, layout, family, duration(step_us), f"{change:+.1%}", f"{mfu:.1%}", size(peak))
    return table


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
    return render(_facts("", rows), schedule_excerpt(answer.schedule, title=""))


def render_profile(profile: ModelProfile) -> str:
    """What `pipewright profile` prints for people: one row per layer and variant."""
    origin = profile.origin
    rows = [
        ("model", f"{profile.model.name}, {profile.num_layers} layers with embedding and head"),
        ("measured on", f"{origin.device}, {origin.when}"),
        ("how", origin.how),
    ]
    if profile.links is not None:
        p2p, reduce = profile.links.point_to_point, profile.links.all_reduce
        rows.append(("point to point", f"{p2p.bandwidth_bytes_per_s / 1e9:.2f} GB/s, {p2p.latency_us:.0f} µs"))
        rows.append(("all-reduce", f"{reduce.bandwidth_bytes_per_s / 1e9:.2f} GB/s, {reduce.latency_us:.0f} µs"))
    table = _grid("\nPer layer (times in ms, sizes in MiB)")
    for name in ("layer", "count", "variant", "F", "B", "W", "BW", "optimizer", "spread", "held F–B", "held B–W"):
        table.add_column(name, justify="left" if name in ("layer", "variant") else "right", no_wrap=name != "variant")
    for group in profile.layers:
        for costs in group.profiles:
            variant = costs.variant
            table.add_row(
                group.name,
                str(group.count),
                f"mbs{variant.micro_batch_size}" + ("" if variant.recompute == "none" else f" {variant.recompute}"),
                f"{costs.forward_us / 1e3:.2f}",
                f"{costs.backward_input_us / 1e3:.2f}",
                f"{costs.backward_weight_us / 1e3:.2f}",
                f"{costs.fused_backward_us / 1e3:.2f}",
                f"{costs.optimizer_us / 1e3:.2f}",
                f"{costs.spread:.0%}",
                f"{costs.activation_bytes / 2**20:.1f}",
                f"{costs.weight_activation_bytes / 2**20:.1f}",
            )
    return render(_facts("", rows), table)


def render_run(report: "RunReport") -> str:
    """What `pipewright run` prints for people."""
    rows = [
        ("ran", f"{report.layout}, {report.family}, {report.num_processes} processes on {report.device}"),
        (
            "with",
            f"torch {report.torch_version}, {report.backend}, {report.dtype}, {report.threads_per_process} threads",
        ),
    ]
    exact = report.exactness
    if exact is not None:
        rows.append(("losses", f"within {exact.worst_loss_relative_difference:.1e} of one process, relative"))
        rows.append(
            (
                "gradients",
                f"within {exact.gradient_relative_difference:.1e} of one process, relative "
                f"(first step, worst parameter: {exact.worst_parameter})",
            )
        )
    return render(_facts("", rows), _losses(report), _measured_and_predicted(report), _actions(report))


def _losses(report: "RunReport") -> Table:
    exact = report.exactness
    table = _grid("\nSteps")
    names = ("step", "loss", "time") if exact is None else ("step", "loss", "in one process", "difference", "time")
    for name in names:
        table.add_column(name, justify="right")
    for step, (loss, step_us) in enumerate(zip(report.losses, report.step_times_us, strict=True)):
        compared = (
            ()
            if exact is None
            else (f"{exact.reference_losses[step]:.9f}", f"{exact.loss_relative_differences[step]:.1e}")
        )
        table.add_row(str(step + 1), f"{loss:.9f}", *compared, duration(step_us))
    return table


def _measured_and_predicted(report: "RunReport") -> Table:
    measured, guess = report.measured, report.predicted
    table = _grid(f"\nMeasured (median, without the first {report.num_skipped_steps} steps) and predicted")
    for name in ("part", "measured", "predicted", "error"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, real_us, guess_us in (
        ("step", measured.step_us, guess.step_us),
        ("pipeline", measured.pipeline_us, guess.pipeline_us),
        ("data parallel", measured.data_parallel_us, guess.data_parallel_us),
        ("optimizer", measured.optimizer_us, guess.optimizer_us),
    ):
        error = f"{guess_us / real_us - 1:+.1%}" if real_us > 0 and guess_us > 0 else ""
        table.add_row(name, duration(real_us), duration(guess_us), error)
    return table


def _actions(report: "RunReport") -> Table:
    table = _grid("\nActions (mean)")
    for name in ("action", "stage", "count", "measured", "predicted", "error", "waited before"):
        table.add_column(name, justify="left" if name == "action" else "right")
    for row in report.actions:
        error = f"{row.predicted_us / row.measured_us - 1:+.1%}" if row.measured_us > 0 else ""
        table.add_row(
            row.kind,
            str(row.stage),
            str(row.count),
            duration(row.measured_us),
            duration(row.predicted_us),
            error,
            duration(row.waited_us),
        )
    return table
