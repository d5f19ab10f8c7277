"""What the commands share: streams and exit codes, options, and how options are read."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from planner.schedule.families import FAMILIES
from profiles.facts import Facts

if TYPE_CHECKING:
    from planner.search import SearchProgress

talk = Console(stderr=True, highlight=False)
T = TypeVar("T")
FactsT = TypeVar("FactsT", bound=Facts)


class DtypeName(StrEnum):
    """Precisions."""

    float8 = "float8"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float64 = "float64"


FAMILY_NAMES = ", ".join(FAMILIES)
Json = Annotated[bool, typer.Option("--json", help="Print the machine-readable answer on stdout.")]
TimeLimit = Annotated[float, typer.Option(min=0.01, help="Seconds of search.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]

SaveAnswer = Annotated[Path | None, typer.Option("-o", "--output", help="Save the machine-readable answer here.")]


def fail(message: str, code: int) -> NoReturn:
    """One message on stderr, and this exit code."""
    print(f"pipewright: {message}", file=sys.stderr)
    raise SystemExit(code)


def torch_part(module: str) -> Any:
    """A module that needs torch; exit 2 with what to install where there is none."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        fail("this command needs torch; install it with: pip install 'pipewright[torch]'", 2)


def numbers(text: str, option: str) -> tuple[float, ...]:
    """A comma list of numbers; exit 2 if it is none."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        fail(f"{option} {text!r}: give one number, or a comma list of numbers", 2)


def wholes(text: str, option: str) -> tuple[int, ...]:
    """A comma list of whole numbers; exit 2 if it is none."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        fail(f"{option} {text!r}: give one whole number, or a comma list of whole numbers", 2)


def maybe(read: Callable[[str, str], T], text: str | None, option: str) -> T | None:
    """What was given, read; None where nothing was."""
    return None if text is None else read(text, option)


def hand_over(answer: FactsT, output: Path | None, as_json: bool, render: Callable[[FactsT], str]) -> None:
    """Save the answer where that is asked for, and print it."""
    if output is not None:
        answer.save(output)
        talk.print(f"saved {output}")
    print(answer.model_dump_json(indent=1) if as_json else render(answer))


def positive_integers(text: str, option: str) -> tuple[int, ...]:
    """A comma list of whole numbers from 1; exit 2 if it is none."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        fail(f"{option} {text!r}: give a comma list of whole numbers from 1", 2)
    return values


@contextmanager
def _shown(*columns: ProgressColumn) -> Iterator[Progress]:
    """A progress display on stderr; Ctrl-C inside it, where nobody had an answer yet, ends with one message."""
    try:
        with Progress(SpinnerColumn(), *columns, TimeElapsedColumn(), console=talk, transient=True) as progress:
            yield progress
    except KeyboardInterrupt:
        fail("interrupted before there was an answer", 130)


@contextmanager
def spinner(what: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is going on; the function it gives changes the line."""
    with _shown(TextColumn("{task.description}")) as progress:
        task = progress.add_task(what, total=None)
        yield lambda text: progress.update(task, description=text)


@contextmanager
def search_progress() -> Iterator[Callable[["SearchProgress"], None]]:
    """A line on stderr that says how far a search is."""
    with spinner("reading the layout space") as say:

        def on_progress(state: "SearchProgress") -> None:
            say(
                f"{state.phase}: {state.done} of {state.total} priced, best {state.best_us / 1e6:.3f} s, "
                f"bound {state.lower_bound_us / 1e6:.3f} s"
            )

        yield on_progress


@contextmanager
def steps_progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr: text, done, total."""
    with _shown(TextColumn("{task.description}"), BarColumn()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda text, done, total: progress.update(task, description=text, completed=done, total=total)
