"""The registry of schedule families. A new family is one file here and one row in `FAMILIES`."""

from difflib import get_close_matches

from planner.errors import ScheduleError
from planner.schedule.families import (
    afp,
    breadth_first,
    chimera,
    dualpipe,
    dualpipe_v,
    gems,
    gpipe,
    hanayo,
    interleaved_1f1b,
    naive,
    one_f_one_b,
    v_half,
    v_min,
    zb_h1,
    zb_h2,
    zb_v,
)
from planner.schedule.families.base import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        naive.FAMILY,
        gpipe.FAMILY,
        one_f_one_b.FAMILY,
        afp.FAMILY,
        interleaved_1f1b.FAMILY,
        breadth_first.FAMILY,
        hanayo.FAMILY,
        zb_h1.FAMILY,
        zb_h2.FAMILY,
        zb_v.FAMILY,
        v_half.FAMILY,
        v_min.FAMILY,
        dualpipe_v.FAMILY,
        dualpipe.FAMILY,
        chimera.FAMILY,
        chimera.DOUBLING,
        gems.FAMILY,
    )
}


def get_family(name: str) -> Family:
    """The family called `name`; ScheduleError naming the known ones, and the nearest, when there is none."""
    family = FAMILIES.get(name)
    if family is None:
        near = get_close_matches(name.lower().replace("_", "-"), FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ScheduleError(f"no schedule family is called {name!r}{hint} Known: {', '.join(FAMILIES)}")
    return family


__all__ = ["FAMILIES", "Family", "get_family"]
