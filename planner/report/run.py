"""A run for people: losses, how exact the training was, and measured beside predicted."""

from typing import TYPE_CHECKING

from rich.console import RenderableType

from planner.report.text import duration, facts, grid, render

if TYPE_CHECKING:
    from planner.executor.run_report import RunReport


def render_run(report: "RunReport") -> str:
    """What `pipewright run` prints for people."""
    engine = "torch's runtime, " if report.engine == "torch" else ""
    rows = [
        ("ran", f"{report.layout}, {report.family}, {report.num_processes} processes on {report.device}"),
        (
            "with",
            f"{engine}torch {report.torch_version}, {report.backend}, {report.dtype}, "
            f"{report.threads_per_process} threads",
        ),
    ]
    if report.dtype != report.planned_dtype:
        rows.append(("note", f"predictions are for {report.planned_dtype} and say little about these times"))
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
    rows.append(("updates", _updates(report)))
    return render(facts(rows), _losses(report), _measured_and_predicted(report), _actions(report))


def _updates(report: "RunReport") -> str:
    done = report.updates
    norms = [norm for norm in done.gradient_norms if norm is not None]
    parts = [f"gradient norm {min(norms):.4g} to {max(norms):.4g}"] if norms else []
    if done.max_grad_norm is not None:
        parts.append(f"clipped to {done.max_grad_norm:g} in {done.num_clipped} of {len(done.gradient_norms)} steps")
    parts.append(f"{done.num_skipped} skipped")
    if done.post_validation:
        back = ", ".join(map(str, done.num_rolled_back))
        parts.append(f"post-validated: {done.num_restarted} begun again, rolled back by rank {back}")
    return "; ".join(parts)


def _losses(report: "RunReport") -> RenderableType:
    exact = report.exactness
    rows = []
    for step, (loss, step_us) in enumerate(zip(report.losses, report.step_times_us, strict=True)):
        compared = (
            []
            if exact is None
            else [f"{exact.reference_losses[step]:.9f}", f"{exact.loss_relative_differences[step]:.1e}"]
        )
        rows.append([str(step + 1), f"{loss:.9f}", *compared, duration(step_us)])
    beside = () if exact is None else ("in one process", "difference")
    return grid("Steps", ("step", "loss", *beside, "time"), rows)


def _measured_and_predicted(report: "RunReport") -> RenderableType:
    measured, guess = report.measured, report.predicted
    rows = []
    for name, real_us, guess_us in (
        ("step", measured.step_us, guess.step_us),
        ("pipeline", measured.pipeline_us, guess.pipeline_us),
        ("data parallel", measured.data_parallel_us, guess.data_parallel_us),
        ("optimizer", measured.optimizer_us, guess.optimizer_us),
    ):
        error = f"{guess_us / real_us - 1:+.1%}" if real_us > 0 and guess_us > 0 else ""
        rows.append([name, duration(real_us), duration(guess_us), error])
    title = f"Measured (median, without the first {report.num_skipped_steps} steps) and predicted"
    return grid(title, ("part", "measured", "predicted", "error"), rows, left=("part",))


def _actions(report: "RunReport") -> RenderableType:
    rows = []
    for row in report.actions:
        error = f"{row.predicted_us / row.occupied_us - 1:+.1%}" if row.occupied_us > 0 else ""
        times = (duration(row.occupied_us), duration(row.predicted_us), error, duration(row.waited_us))
        rows.append([row.kind, str(row.stage), str(row.count), *times])
    columns = ("action", "stage", "count", "measured", "predicted", "error", "waited before")
    return grid("Actions (mean, with handing over what they made)", columns, rows, left=("action",))
