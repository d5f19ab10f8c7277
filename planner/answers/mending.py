"""The nearest change that fits, where nothing does: one pin less, a pair less, all less, or more nodes."""

import time
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from planner.answers.sizing import least_nodes
from planner.answers.variations import with_nodes
from planner.pricing import PricedLayout
from planner.questions import PlanArguments, Question, ask
from planner.schedule.families import get_family
from profiles.cluster import MAX_DEVICES, Cluster
from profiles.errors import PipewrightError
from profiles.model import ModelProfile, ModelSpec

_SINGLE = (  # pins by how little it takes to give them up
    *("recompute", "zero_stage", "shard_degree", "micro_batch_size", "virtual_stages", "sequence_parallel"),
    *("family", "ep", "dp", "pp", "cp", "tp"),
)
_DEGREES = ("dp", "pp", "tp", "cp")
_FAMILIES = ("1f1b", "interleaved-1f1b")  # that tell whether something fits
_ONE_SEARCH_S = 0.1
_TRIES_IN_TURN = 8  # node counts one after another; then they double
_MOST_TRIES = 20


def nearest_change(
    known: ModelSpec | ModelProfile, machines: Cluster, arguments: PlanArguments, time_limit_s: float
) -> str | None:
    """What to change so that something fits, and what then does; None if nothing was found in the time."""
    ends = time.monotonic() + time_limit_s
    try:
        for words, changed in _fewer_pins(arguments):
            if time.monotonic() > ends:
                return None
            found = _first_fit(known, machines, changed, ends)
            if found is not None:
                return f"without {words}, {_described(found)}"
        if len(machines.groups) > 1:
            return None
        num_nodes = max(least_nodes(known, machines, arguments), machines.num_nodes + 1)
        for tries in range(_MOST_TRIES):
            if time.monotonic() > ends or num_nodes * machines.groups[0].devices_per_node > MAX_DEVICES:
                return None
            found = _first_fit(known, with_nodes(machines, num_nodes), arguments, ends)
            if found is not None:
                return f"on {num_nodes} nodes, {_described(found)}"
            num_nodes = num_nodes + 1 if tries < _TRIES_IN_TURN else 2 * num_nodes
    except KeyboardInterrupt:
        pass
    return None


def _fewer_pins(arguments: PlanArguments) -> Iterator[tuple[str, PlanArguments]]:
    """The question with pins given up, the nearest first, and which."""
    pinned = [name for name in _SINGLE if _is_pinned(name, arguments)]
    groups: list[tuple[str, ...]] = [(name,) for name in pinned]
    groups += list(combinations([name for name in _DEGREES if name in pinned], 2))
    groups += [tuple(pinned)] if len(pinned) > 1 else []
    for names in groups:
        given: dict[str, Any] = dict(arguments)
        words = " and ".join(f"{name}={_text(given[name])}" for name in names)
        for name in names:
            given[name] = "auto" if name == "family" else None
        yield f"the pin{'s' if len(names) > 1 else ''} {words}", given  # type: ignore[misc]
    if arguments.get("excluded"):
        without = arguments.copy()
        without["excluded"] = ()
        yield "the exclusions", without


def _is_pinned(name: str, arguments: PlanArguments) -> bool:
    return dict(arguments).get(name) not in (None, "auto")


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _first_fit(
    known: ModelSpec | ModelProfile, machines: Cluster, arguments: PlanArguments, ends: float
) -> PricedLayout | None:
    """A layout that fits, if one is found in time, made better by a short search."""
    try:
        question = ask(known, machines, arguments)
        found = _tightest_that_fits(question, ends)
        if found is None:
            return None
        return question.search(_ONE_SEARCH_S, seed=arguments.get("seed", 0), known=[found]).ranked[0]
    except PipewrightError:
        return None


def _tightest_that_fits(question: Question, ends: float) -> PricedLayout | None:
    """Of the layouts that need least memory, the first that fits under a plain schedule."""
    pricer, pinned = question.pricer, question.pins.family
    families = [get_family(name) for name in (_FAMILIES if pinned in (None, "auto") else (str(pinned),))]
    needs = {c: pricer.least_bytes(c) / c.pp for c in question.space.candidates if pricer.choices(c)}
    for candidate in sorted((c for c in needs if needs[c] <= pricer.capacity_bytes), key=lambda c: needs[c]):
        for family in families:
            if family.supports(candidate.pp, candidate.num_microbatches, candidate.virtual_stages) is not None:
                continue
            priced = pricer.price_family(candidate, family)
            if priced is not None and priced.fits:
                return priced
        if time.monotonic() > ends:
            return None
    return None


def _described(priced: PricedLayout) -> str:
    c, peak = priced.candidate, max(priced.memory, key=lambda memory: memory.total_bytes)
    degrees = " ".join(f"{name}={getattr(c, name)}" for name in ("tp", "cp", "ep", "pp", "dp") if getattr(c, name) > 1)
    return (
        f"{degrees or 'one device'} micro_batch_size={c.micro_batch_size} zero={c.zero_stage} recompute={c.recompute} "
        f"takes {peak.total_bytes / 2**30:.1f} of {peak.capacity_bytes / 2**30:.1f} GiB"
    )
