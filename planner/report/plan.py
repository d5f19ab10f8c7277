"""A plan for people: the answer in words, its certificate, every rank's time and memory, and what stands beside it."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.text import Text

from planner.plans import Plan
from planner.report.layout import (
    batch_in_words,
    degrees_in_words,
    layers_in_words,
    precision_in_words,
    recompute_in_words,
    sharding_in_words,
)
from planner.report.text import GIB, WIDTH, duration, facts, grid, render, schedule_excerpt, size

_MOST_ROWS = 20  # of the table of ranks
_FIRST_ROWS = 12
_SCHEDULE_RANKS = 6


def render_plan(plan: Plan, width: int = WIDTH) -> str:
    """Everything `pipewright plan` prints for people about the plan alone."""
    return render(*plan_parts(plan), width=width)


def plan_parts(plan: Plan, *, with_alternatives: bool = True) -> Iterable[RenderableType]:
    """The parts of the report, in order."""
    yield _summary(plan)
    yield _times(plan)
    yield _ranks(plan)
    yield schedule_excerpt(plan.schedule, title=f"Schedule: {plan.family}", width=WIDTH - 4, ranks=_SCHEDULE_RANKS)
    if plan.alternatives and with_alternatives:
        yield _alternatives(plan)
    yield _certificate(plan)
    yield _provenance(plan)


def _summary(plan: Plan) -> RenderableType:
    layout, guess, proof = plan.layout, plan.prediction, plan.certificate
    rows = [
        ("model", f"{plan.model.name}, {plan.model.num_parameters / 1e9:.2f} B parameters"),
        ("cluster", f"{plan.provenance.cluster}: {layout.num_devices:,} × {plan.provenance.device}"),
        (
            "batch",
            f"{plan.global_batch_size:,} sequences of {plan.sequence_length:,} = "
            f"{plan.global_batch_size * plan.sequence_length:,} tokens per step",
        ),
        ("layout", layout.degrees),
        ("", degrees_in_words(layout)),
        ("", batch_in_words(layout)),
        ("sharding", sharding_in_words(layout)),
        ("layers", layers_in_words(layout)),
        ("recompute", recompute_in_words(layout)),
        ("precision", precision_in_words(plan.precision)),
        ("schedule", f"{plan.family}, made by {proof.schedule_solver}"),
        *(("placement" if index == 0 else "", note) for index, note in enumerate(plan.placement_notes)),
        (
            "step time",
            f"{duration(guess.step_time_us)}: {guess.tokens_per_s:,.0f} tokens/s, MFU {guess.mfu:.1%}"
            + (f", HFU {guess.hfu:.1%}" if guess.hfu else ""),
        ),
        (
            "gap",
            f"{proof.gap:.2%}: nothing in the space searched is faster than {duration(proof.lower_bound_us)} "
            f"({proof.lower_bound_kind})",
        ),
    ]
    return facts(rows)


def _times(plan: Plan) -> RenderableType:
    guess = plan.prediction
    if guess.parts is None:
        parts = {
            "pipeline": guess.pipeline_us,
            "exposed data parallel": guess.exposed_data_parallel_us,
            "optimizer": guess.optimizer_us,
        }
    else:
        parts = {name: us for name, us in guess.parts.by_name.items() if us}
    rows = [[name, duration(us), f"{us / guess.step_time_us:.1%}"] for name, us in parts.items()]
    rows.append(["step", duration(guess.step_time_us), ""])
    title = (
        f"Where the step goes, on the busiest rank (bubble {guess.bubble_rate_makespan:.2%} of makespan, "
        f"{guess.bubble_rate_span:.2%} of span)"
    )
    return grid(title, ("part", "time", "share"), rows, left=("part",))


def _ranks(plan: Plan) -> RenderableType:
    rows, totals = [], []
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
        times = [f"{us / 1e3:.2f}" for us in times_us]
        layers = _layers([plan.layout.layers_per_stage[s] for s in hosted])
        digits = 1 if memory.capacity_bytes >= 10 * GIB else 3
        rows.append([str(rank), layers, *times, *(f"{part / GIB:.{digits}f}" for part in parts_bytes)])
        totals.append(memory.total_bytes)
    fullest = totals.index(max(totals))
    folded = _folded(rows)
    if len(folded) > _MOST_ROWS:
        left_out = len(folded) - _MOST_ROWS
        folded = [
            *folded[:_FIRST_ROWS],
            ["…", *[""] * (len(folded[0]) - 1)],
            *folded[_FIRST_ROWS + left_out :],
        ]
    title = f"Per pipeline rank: ms of one microbatch, GiB of one device (fullest: rank {fullest})"
    columns = "rank layers F B W weights grads optim. activ. other total usable"
    return grid(title, columns.split(), folded)


def _layers(counts: list[int]) -> str:
    """Layers of a rank's chunks, in as few characters as say it."""
    return "+".join(map(str, counts)) if len(counts) <= 3 else f"{sum(counts)} in {len(counts)}"


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
        named = f"{layout} ({label})" if label else layout
        rows.append([named, family, duration(step_us), f"{change:+.1%}", f"{mfu:.1%}", size(peak)])
    columns = ("layout", "schedule", "step time", "vs plan", "MFU", "memory")
    return grid("Beside it", columns, rows, left=("layout", "schedule"), folds=("layout",))


def _certificate(plan: Plan) -> RenderableType:
    proof = plan.certificate
    notes = ["interrupted"] if proof.interrupted else []
    if proof.limited_by_time:
        notes.append("cut short by the time limit in parts: another run may differ")
    rows = [
        ("bound", f"{duration(proof.lower_bound_us)}; {_refined(plan)}"),
        (
            "searched",
            f"{proof.num_candidates:,} layouts: {proof.num_evaluated:,} evaluated ({proof.num_overflowing:,} of them "
            f"cannot fit), {proof.num_pruned:,} pruned by bound, {proof.num_unreached:,} not reached, "
            f"{sum(proof.refused.values()):,} refused",
        ),
        ("limits", "; ".join([f"{proof.seconds:.1f} s of {proof.time_limit_s:g} s, seed {proof.seed}", *notes])),
    ]
    for name, reasons in (("refused", proof.refused), ("outside", proof.dropped)):
        shown = [f"{count:,} {reason}" for reason, count in reasons.items() if count]
        if shown:
            rows.append((name, "; ".join(shown)))
    return _titled("Certificate", rows)


def _refined(plan: Plan) -> str:
    bound_us, pipeline_us = plan.certificate.schedule_lower_bound_us, plan.prediction.pipeline_us
    return f"this cut's pipeline takes {duration(pipeline_us)}, and in no order less than {duration(bound_us)}"


def _provenance(plan: Plan) -> RenderableType:
    origin = plan.provenance
    rows = [
        ("costs", origin.profile_origin),
        ("assumed", " ".join(origin.assumptions)),
        ("hashes", f"profile {origin.profile_sha256[:12]}, cluster {origin.cluster_sha256[:12]}"),
        ("made by", f"pipewright {origin.pipewright_version}" + (f": {origin.command}" if origin.command else "")),
    ]
    return _titled("Made from", rows)


def _titled(title: str, rows: list[tuple[str, str]]) -> RenderableType:
    return Group(Text(f"\n{title}", style="bold"), facts(rows))
