"""A plan for people: the answer, its certificate, every rank's time and memory, and what stands beside it."""

from collections.abc import Iterable

from rich.console import RenderableType
from rich.text import Text

from planner.plans import Plan
from planner.report.text import GIB, duration, facts, grid, render, schedule_excerpt, size


def render_plan(plan: Plan, width: int = 110) -> str:
    """Everything `pipewright plan` prints for people."""
    return render(*_parts(plan), width=width)


def _parts(plan: Plan) -> Iterable[RenderableType]:
    yield _summary(plan)
    yield _stages_and_memory(plan)
    yield schedule_excerpt(plan.schedule, title=f"Schedule: {plan.family}")
    if plan.alternatives:
        yield _alternatives(plan)
    yield Text("\nAssumed: " + " ".join(plan.provenance.assumptions))


def _summary(plan: Plan) -> RenderableType:
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
            f"{proof.num_candidates} layouts: {proof.num_evaluated} evaluated ({proof.num_overflowing} of them cannot "
            f"fit), {proof.num_pruned} pruned by bound, {proof.num_unreached} not reached, "
            f"{sum(proof.refused.values())} refused; "
            f"{proof.seconds:.1f} s of {proof.time_limit_s:g} s, seed {proof.seed}"
            + ("; interrupted" if proof.interrupted else "")
            + (
                "; parts of it ended on their share of the time limit, another run may differ"
                if proof.limited_by_time
                else ""
            ),
        ),
    ]
    for name, reasons in (("refused", proof.refused), ("outside", proof.dropped)):
        if reasons:
            rows.append((name, "; ".join(f"{count} {reason}" for reason, count in reasons.items())))
    return facts(rows)


def _stages_and_memory(plan: Plan) -> RenderableType:
    rows = []
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
        layers = "+".join(str(plan.layout.layers_per_stage[s]) for s in hosted)
        times = [f"{us / 1e3:.2f}" for us in times_us]
        rows.append([str(rank), layers, *times, *(f"{part / GIB:.2f}" for part in parts_bytes)])
    rows = _folded(rows)
    title = "Per pipeline rank (times of one microbatch in ms, memory of one device in GiB)"
    columns = "rank layers F B W weights gradients optimizer activations other total usable"
    return grid(title, columns.split(), rows)


def _folded(rows: list[list[str]]) -> list[list[str]]:
    """Neighbouring rows that differ in their first cell only, as one row: `3`, `4`, `5` become `3–5`."""
    folded: list[list[str]] = []
    for first, *rest in rows:
        if folded and folded[-1][1:] == rest:
            folded[-1][0] = f"{folded[-1][0].split('–')[0]}–{first}"
        else:
            folded.append([first, *rest])
    return folded


def _alternatives(plan: Plan) -> RenderableType:
    own = (
        "this plan",
        plan.layout.degrees,
        plan.family,
        plan.prediction.step_time_us,
        plan.prediction.mfu,
        max(m.total_bytes for m in plan.prediction.memory),
    )
    others = [(a.label, a.layout, a.family, a.step_time_us, a.mfu, a.peak_memory_bytes) for a in plan.alternatives]
    rows = []
    for label, layout, family, step_us, mfu, peak in (own, *others):
        change = step_us / plan.prediction.step_time_us - 1
        rows.append([label, layout, family, duration(step_us), f"{change:+.1%}", f"{mfu:.1%}", size(peak)])
    columns = ("", "layout", "schedule", "step time", "vs plan", "MFU", "memory")
    return grid("Beside it", columns, rows, left=columns[:3])
