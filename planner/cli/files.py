"""`pipewright validate` and `pipewright catalog`: what is in files, and what can be named."""

from pathlib import Path
from typing import Annotated

import typer

from planner.cli.shell import Json


def validate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    as_json: Json = False,
) -> None:
    """Check that a plan file is whole, that its parts agree and that its schedule can run."""
    from planner.api import validate as check_plan

    loaded = check_plan(plan_file)
    if as_json:
        print(loaded.model_dump_json(indent=1))
    else:
        print(
            f"{plan_file}: valid; {loaded.model.name} as {loaded.layout.degrees}, {loaded.family}, "
            f"{sum(map(len, loaded.parsed_schedule.ranks))} actions on {loaded.layout.pp} ranks"
        )


def catalog(
    name: Annotated[str | None, typer.Argument(help="Show one entry whole.")] = None,
    as_json: Json = False,
) -> None:
    """List the models, devices, clusters and schedule families there are."""
    from planner.report.catalog import catalog_entry, catalog_names, render_catalog

    if name is not None:
        print(catalog_entry(name).model_dump_json(indent=1))
    elif as_json:
        import json

        print(json.dumps(catalog_names(), indent=1))
    else:
        print(render_catalog())
