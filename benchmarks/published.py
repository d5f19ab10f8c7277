"""Predicted against measured step time and memory of published training runs.

    python benchmarks/published.py                  # all shipped files: errors per source, groups, small tables
    python benchmarks/published.py FILE             # that file, row by row; the last line sums it up
    python benchmarks/published.py --rows           # the shipped ones row by row, too

FILE has the row schema of the files in `benchmarks/published`. A row that cannot be priced is listed with the reason.
Rows that ran out of memory count in memory agreement, not in step time; rows whose own numbers disagree, or that are
there for context only, are listed apart. How rows become layouts is said in `published_rows` and its neighbours, what
the model assumes and was fitted on in docs/price_model.md.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from published_fields import Row, UnpricedError
from published_files import (
    Group,
    PublishedFile,
    groups_of,
    groups_of_columns,
    is_compared,
    measured_s,
    read,
    shapes,
    shipped,
)
from published_pricing import Predicted, predict
from published_ranking import Ranked, rank
from published_tables import layer_table, schedule_table
from rich.console import Console
from rich.table import Table

from profiles.errors import PipewrightError


@dataclass
class Errors:
    """What one file's rows say about the model."""

    steps: list[tuple[float, str]] = field(default_factory=list)  # (predicted / measured − 1, row)
    memory: list[tuple[float, str]] = field(default_factory=list)
    fitting: int = 0  # rows known to fit or not
    misjudged: list[str] = field(default_factory=list)
    unpriced: list[tuple[str, str]] = field(default_factory=list)
    apart: list[tuple[str, str]] = field(default_factory=list)

    def last_line(self) -> str:
        """Mean and worst error of step time, as every file's output ends."""
        if not self.steps:
            return "mean |error| of step time - over 0 rows"
        worst, name = max(self.steps, key=lambda step: abs(step[0]))
        return (
            f"mean |error| of step time {100 * _mean_size(self.steps):.1f} % over {len(self.steps)} rows, "
            f"worst {100 * worst:+.1f} % ({name})"
        )


def main(
    file: Annotated[Path | None, typer.Argument(help="A file of published runs; without it, the shipped ones.")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Print every row of the shipped files.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write rows and errors there.")] = None,
) -> None:
    """Predicted against measured step time and memory of published training runs."""
    console = Console(width=150, soft_wrap=True, highlight=False)
    try:
        files = shipped() if file is None else [read(file)]
    except PipewrightError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    known, total = shapes(), Errors()
    record: list[dict[str, Any]] = []
    summary: list[tuple[str, Errors]] = []
    for each in files:
        if each.facts.get("groups") and not each.rows:
            _show_groups(console, each.path.name, groups_of(each), known, quiet=file is None)
            continue
        console.rule(each.path.name)
        errors = _price_rows(console, each, known, record, show=rows or file is not None)
        for table in (layer_table(each.facts, known), schedule_table(each.facts)):
            if table is not None:
                console.print(table)
        _show_groups(console, each.path.name, groups_of_columns(each), known, quiet=True)
        if each.rows:
            console.print(errors.last_line())
            summary.append((each.path.stem, errors))
            for name in ("steps", "memory", "misjudged", "unpriced", "apart"):
                getattr(total, name).extend(getattr(errors, name))
            total.fitting += errors.fitting
    if json_path is not None:
        json_path.write_text(json.dumps({"rows": record}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if file is None:
        console.print(_summary(summary))
        console.print(total.last_line())


def _price_rows(
    console: Console, file: PublishedFile, known: dict[str, Row], record: list[dict[str, Any]], *, show: bool
) -> Errors:
    errors = Errors()
    for row in file.rows:
        name, measured = str(row.get("id")), measured_s(row, known)
        try:
            predicted = predict(row, file.facts, known)
        except UnpricedError as error:
            errors.unpriced.append((name, str(error)))
            continue
        line = _row_line(row, measured, predicted)
        record.append(line)
        if not is_compared(row):
            errors.apart.append((name, _said(line)))
            continue
        if measured is not None:
            errors.steps.append((line["step_error"], name))
        if line.get("memory_error") is not None:
            errors.memory.append((line["memory_error"], name))
        fits = row.get("fits", True if measured is not None else None)
        if fits is not None:
            errors.fitting += 1
            if predicted.fits != fits:
                errors.misjudged.append(f"{name} ({'fits' if fits else 'runs out'})")
        if show:
            console.print(_said(line))
    for title, listed in (("not priced", errors.unpriced), ("apart (context, or numbers that disagree)", errors.apart)):
        for name, why in listed:
            console.print(f"{title}: {name}: {why}", markup=False)
    if errors.memory:
        worst, name = max(errors.memory, key=lambda entry: abs(entry[0]))
        console.print(
            f"memory: mean |error| {100 * _mean_size(errors.memory):.1f} % over {len(errors.memory)} rows, "
            f"worst {100 * worst:+.1f} % ({name})"
        )
    if errors.fitting:
        wrong = f"; misjudged: {', '.join(errors.misjudged)}" if errors.misjudged else ""
        console.print(f"fits or not: {errors.fitting - len(errors.misjudged)} of {errors.fitting} agree{wrong}")
    return errors


def _row_line(row: Row, measured: float | None, predicted: Predicted) -> dict[str, Any]:
    spec, run = predicted.run.spec, predicted.run
    flops = spec.step_flops(run.global_batch, run.sequence_length)
    peak = run.cluster.groups[0].device.peak_flops[run.precision.compute]
    line: dict[str, Any] = {
        "id": row.get("id"),
        "measured_s": measured,
        "predicted_s": predicted.step_s,
        "step_error": None if measured is None else predicted.step_s / measured - 1,
        "predicted_mfu": flops / predicted.step_s / run.num_devices / peak,
        "fits": predicted.fits,
        "filled": run.filled,
    }
    if row.get("peak_memory_gb"):
        line["measured_memory_gb"] = row["peak_memory_gb"]
        line["predicted_memory_gb"] = predicted.memory_gb(str(row.get("memory_kind") or ""))
        line["memory_error"] = line["predicted_memory_gb"] / row["peak_memory_gb"] - 1
    return line


def _said(line: dict[str, Any]) -> str:
    if line["measured_s"] is None:
        text = f"{line['id']}: predicted {line['predicted_s']:.3f} s"
    else:
        text = (
            f"{line['id']}: measured {line['measured_s']:.3f} s, predicted {line['predicted_s']:.3f} s, "
            f"{100 * line['step_error']:+.1f} %"
        )
    if "memory_error" in line:
        text += f"; memory {line['measured_memory_gb']:g}, predicted {line['predicted_memory_gb']:.1f}"
    text += "" if line["fits"] else "; predicted to run out of memory"
    return text + (f"; filled: {', '.join(line['filled'])}" if line["filled"] else "")


def _show_groups(console: Console, title: str, groups: Sequence[Group], known: dict[str, Row], *, quiet: bool) -> None:
    if not groups:
        return
    ranked: list[Ranked] = []
    console.rule(f"layouts of {title}")
    for group in groups:
        result = rank(group, known)
        ranked.append(result)
        if not quiet or len(groups) < 30:
            console.print(result.line(), markup=False)
        for why in result.unpriced:
            console.print(f"not priced: {why}", markup=False)
    regrets = [each.regret for each in ranked if each.regret is not None]
    correlations = [each.spearman for each in ranked if each.spearman is not None]
    judged = sum(each.judged for each in ranked)
    wrong = [name for each in ranked for name in each.misjudged]
    console.print(
        f"fits or not: {judged - len(wrong)} of {judged} agree" + (f"; misjudged: {', '.join(wrong)}" if wrong else "")
    )
    console.print(
        f"mean regret {100 * _mean(regrets):.1f} %, worst {100 * max(regrets, default=0.0):.1f} %, "
        f"mean Spearman {_mean(correlations):.2f} over {len(ranked)} groups"
    )


def _summary(summary: Sequence[tuple[str, Errors]]) -> Table:
    table = Table("source", "rows", "mean |error|", "bias", "worst", "memory rows", "memory |error|", "fits agree")
    for name, errors in summary:
        worst = max(errors.steps, key=lambda step: abs(step[0]), default=(0.0, ""))
        memory = f"{100 * _mean_size(errors.memory):.1f} %" if errors.memory else ""
        table.add_row(
            name,
            str(len(errors.steps)),
            f"{100 * _mean_size(errors.steps):.1f} %",
            f"{100 * _mean([error for error, _ in errors.steps]):+.1f} %",
            f"{100 * worst[0]:+.1f} % ({worst[1]})",
            str(len(errors.memory)) if errors.memory else "",
            memory,
            f"{errors.fitting - len(errors.misjudged)}/{errors.fitting}",
        )
    return table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _mean_size(entries: Sequence[tuple[float, str]]) -> float:
    return _mean([abs(error) for error, _ in entries])


if __name__ == "__main__":
    typer.run(main)
