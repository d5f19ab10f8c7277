"""How pins and exclusions are written: a value, a comma list of allowed ones, or not: and a list of those left out."""

from typing import Any

from planner.cli.shell import fail
from planner.layout import COUNTED
from planner.plans import RECOMPUTE_PLANS
from planner.schedule.families import FAMILIES, get_family

_NOT = "not:"
_OPTIONS = {"zero_stage": "--zero"}


def read_pins(*, family: str, recompute: str | None, **degrees: str | None) -> dict[str, Any]:
    """Keyword arguments of `planner.plan` for what the options say; exit 2 if one cannot be read."""
    pins: dict[str, Any] = {}
    excluded: list[tuple[str, int | str]] = []
    for name, text in degrees.items():
        if text is None:
            continue
        option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
        numbers = _numbers(text, option, least=1 if name in COUNTED else 0)
        if text.startswith(_NOT):
            excluded += [(name, number) for number in numbers]
        else:
            pins[name] = numbers[0] if len(numbers) == 1 else numbers
    if recompute is not None:
        names = _recompute(recompute)
        if recompute.startswith(_NOT):
            excluded += [("recompute", name) for name in names]
        else:
            pins["recompute"] = names[0] if len(names) == 1 else tuple(names)
    pins["family"], left_out = _family(family)
    return {**pins, "excluded": (*excluded, *(("family", name) for name in left_out))}


def _numbers(text: str, option: str, least: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.removeprefix(_NOT).split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < least or max(numbers) > 10**9:
        fail(
            f"{option} {text!r}: give a whole number from {least}, a comma list like 4,8, or not: and a list of what "
            "to leave out, like not:16",
            2,
        )
    return numbers


def _recompute(text: str) -> list[str]:
    names = text.removeprefix(_NOT).split(",")
    if not set(names) <= set(RECOMPUTE_PLANS):
        fail(f"--recompute {text!r}: give of {', '.join(RECOMPUTE_PLANS)}, a comma list, or not: and a list", 2)
    return names


def _family(text: str) -> tuple[str, list[str]]:
    """The family to use, or auto with the families that are left out; "auto" in a list is a solver's own order."""
    names = text.removeprefix(_NOT).split(",")
    for name in names:
        if name != "auto":
            get_family(name)
    every = [*FAMILIES, "auto"]
    if text.startswith(_NOT):
        if set(names) >= set(every):
            fail(f"--family {text!r} leaves nothing; leave out less", 2)
        return "auto", [name for name in every if name in names]
    return (names[0], []) if len(names) == 1 else ("auto", [name for name in every if name not in names])
