"""What the pipeline scheduler reaches, against published schedules and known optima: all tables in one run.

    python benchmarks/schedules.py                               # everything, under two hours on two cores
    python benchmarks/schedules.py --only paper,peer --time-limit 10 --json result.json
    python benchmarks/schedules.py --quick                       # a few cells of every table, to see that all works

Every cell is printed as it finishes, a missed one with what it misses. Ctrl-C ends with what there is. Published
numbers and where they come from are in `schedules.json`, the tables and their targets in `schedule_tables.py`.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from schedule_instances import FACTS
from schedule_tables import TABLES, Column, Row, Settings, Table, Value

from profiles.errors import PipewrightError
from profiles.facts import check_writable, write_atomically

_MARK = "MISSED"


def main(
    only: Annotated[str | None, typer.Option(help=f"Tables, separated by commas: {', '.join(TABLES)}.")] = None,
    time_limit: Annotated[float, typer.Option(min=0.1, help="Seconds per cell, but for table scale.")] = 30.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the solvers, and of what is drawn.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Threads of CP-SAT.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all cells there, after every table.")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Search without the best fixed family to start from.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few cells, at most 2 s each.")] = False,
) -> None:
    """Run the tables and print every cell, then a summary."""
    out = Console(highlight=False, soft_wrap=True)
    chosen = _chosen(only)
    if json_path is not None:
        try:
            check_writable(json_path)
        except PipewrightError as error:
            raise typer.BadParameter(str(error), param_hint="--json") from None
    settings = Settings(time_limit, seed, workers, quick, cold)
    facts = protocol(settings)
    for name, value in facts.items():
        out.print(f"{name:<12} {value}")
    results: list[tuple[Table, list[Row]]] = []
    interrupted = False
    for table in chosen:
        rows: list[Row] = []
        results.append((table, rows))
        interrupted = _run(table, settings, rows, out)
        if json_path is not None:
            write_atomically(json_path, as_json(facts, results, interrupted))
        if interrupted:
            break
    _print_summary(results, interrupted, out)
    if interrupted:
        raise typer.Exit(130)


def _chosen(only: str | None) -> list[Table]:
    names = list(TABLES) if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in TABLES:
            raise typer.BadParameter(f"no table is called {name!r}; known: {', '.join(TABLES)}", param_hint="--only")
    return [TABLES[name] for name in dict.fromkeys(names)]


def protocol(settings: Settings) -> dict[str, str]:
    """On what, with what and how the numbers are made."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB",
        "load": f"{os.getloadavg()[0]:.1f} before the run",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("ortools", "pulp", "pipewright")},
        "seed": f"{settings.seed}; instance i of what is drawn has the seed {1000 * settings.seed} + i",
        "time limit": f"{settings.limit_s():g} s per cell unless its table says more, {settings.workers} CP-SAT threads"
        + (", quick run: few cells, numbers mean nothing" if settings.quick else ""),
        "search": "solver auto, from " + ("nothing" if settings.cold else "the best fixed family that fits"),
        "peer": FACTS["sources"]["peer"],
        "paper": FACTS["sources"]["paper"],
        "gap": "(answer - proven lower bound) / answer; rates are bubble rates, (cost - busiest rank's work) / cost",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _run(table: Table, settings: Settings, rows: list[Row], out: Console) -> bool:
    """Fill in and print the rows of one table; whether Ctrl-C ended it."""
    out.print()
    out.print(f"{table.name}: {table.title}", style="bold")
    out.print(f"target: {table.targets}")
    for note in table.notes:
        out.print(note)
    out.print("  ".join(_aligned(column, column.name) for column in table.columns), style="bold")
    interrupted = False
    with Console(stderr=True).status(table.name) as status:
        told = replace(settings, talk=lambda text: status.update(Text(f"{table.name}, row {len(rows) + 1}: {text}")))
        try:
            for row in table.rows(told):
                rows.append(row)
                out.print(Text(line_of(table, row), style="red" if row.missed else ""))
                if row.interrupted:
                    interrupted = True
                    break
        except KeyboardInterrupt:
            interrupted = True
    out.print(summary_of(table, rows), style="bold")
    return interrupted


def line_of(table: Table, row: Row) -> str:
    """A row as text; what it misses stands at its end."""
    line = "  ".join(_aligned(column, row.values.get(column.name)) for column in table.columns)
    if row.missed:
        line += f"  {_MARK}: {'; '.join(row.missed)}"
    return line + ("  (interrupted)" if row.interrupted else "")


def _aligned(column: Column, value: Value) -> str:
    if isinstance(value, str):
        return value.ljust(column.width) if not column.format else value.rjust(column.width)
    if value is None:
        return "-".rjust(column.width) if column.format else "-".ljust(column.width)
    return format(value, column.format).rjust(column.width)


def summary_of(table: Table, rows: Sequence[Row]) -> str:
    """One line: how many cells meet their targets, median and worst gap, and what the table as a whole misses."""
    text = f"{table.name}: {sum(not row.missed for row in rows)} of {len(rows)} cells meet the target"
    gaps = [(row.gap, row) for row in rows if row.gap is not None]
    if gaps:
        worst, where = max(gaps, key=lambda pair: pair[0])
        cell = ", ".join(_aligned(column, where.values[column.name]).strip() for column in table.columns[:2])
        text += f"; gap median {median(gap for gap, _ in gaps):.2%}, worst {worst:.2%} ({cell})"
    for miss in table.overall(rows):
        text += f"; {_MARK}: {miss}"
    return text


def _print_summary(results: Sequence[tuple[Table, list[Row]]], interrupted: bool, out: Console) -> None:
    summary = RichTable(title="Summary", box=None, title_justify="left")
    summary.add_column("table")
    for name in ("cells", "met", "missed", "median gap", "worst gap", "seconds"):
        summary.add_column(name, justify="right")
    for table, rows in results:
        gaps = [row.gap for row in rows if row.gap is not None]
        seconds = (value for row in rows if isinstance(value := row.values.get("seconds"), float))
        missed = sum(bool(row.missed) for row in rows)
        summary.add_row(
            table.name,
            str(len(rows)),
            str(len(rows) - missed),
            str(missed) + " and the table's" * bool(table.overall(rows)),
            f"{median(gaps):.2%}" if gaps else "-",
            f"{max(gaps):.2%}" if gaps else "-",
            f"{sum(seconds):.0f}",
        )
    out.print()
    out.print(summary)
    if interrupted:
        out.print("interrupted: tables and cells that are not shown did not run", style="red")


def as_json(facts: dict[str, str], results: Sequence[tuple[Table, list[Row]]], interrupted: bool) -> str:
    """All cells, with what is not shown on the terminal: objectives, bounds, every drawn instance."""
    tables: list[dict[str, Any]] = [
        {
            "name": table.name,
            "title": table.title,
            "targets": table.targets,
            "summary": summary_of(table, rows),
            "missed": table.overall(rows),
            "rows": [asdict(row) for row in rows],
        }
        for table, rows in results
    ]
    document = {
        "schema": "pipewright.benchmark.schedules/1",
        "protocol": facts,
        "interrupted": interrupted,
        "tables": tables,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


if __name__ == "__main__":
    typer.run(main)
