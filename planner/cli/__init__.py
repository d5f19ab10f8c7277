"""The command line: parse, call one public function, print.

The answer goes to stdout, talk to stderr. Exit 0 found, 1 no feasible answer, 2 wrong usage or bad input. Everything
that loads a solver or torch is imported inside the command that needs it. One module per group of commands.
"""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from planner.cli.files import catalog, validate
from planner.cli.measure import profile, run
from planner.cli.plan import plan
from planner.cli.schedule import compare, schedule
from planner.cli.shell import fail
from profiles.errors import PipewrightError

__all__ = ["app", "main"]

app = typer.Typer(
    name="pipewright",
    help="Plans how to train a large network on a cluster: layout, pipeline schedule, and how far from optimal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _command in (plan, profile, schedule, compare, run, validate, catalog):
    app.command()(_command)


def main() -> None:
    """Entry point: user errors become one message and an exit code; Ctrl-C ends with 130."""
    try:
        app()
    except PipewrightError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(1) from None
    except OSError as error:  # of stdout: files that are read and written have their own message
        fail(f"the answer cannot be written ({error.strerror})", 2)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version("pipewright"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass
