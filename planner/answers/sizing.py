"""The smallest cluster: the fewest nodes of one kind on which a model can be trained at all, or by a deadline.

Node counts are tried from the least that can hold the model states (or do the products in time) upwards: every count of
the first few, then doubling until one will do, then the counts between by bisection. A count is refused by proof, where
no layout divides it, none fits or the search's bound is too slow; the answer says whether that holds for all smaller
counts, or rests on more nodes being no worse.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Unpack

from planner.answers.readings import Budget, budget
from planner.answers.variations import profiled_length, with_nodes
from planner.api import DEFAULT_TIME_LIMIT_S, solve
from planner.errors import InfeasibleError, LayoutError
from planner.memory import capacity_bytes, state_bytes_per_parameter
from planner.plans import Plan, Precision
from planner.pricing import PricedLayout
from planner.questions import PlanArguments, Question, ask, check_time_limit, load_model, read_precision
from planner.search import SearchProgress
from profiles.catalog import load_cluster
from profiles.cluster import MAX_DEVICES, Cluster
from profiles.facts import Count, Facts, Microseconds
from profiles.model import ModelProfile, ModelSpec

Verdict = Literal["fits", "in time", "no layout divides", "does not fit", "too slow", "undecided"]
PROVEN_UNFIT: tuple[Verdict, ...] = ("no layout divides", "does not fit", "too slow")
NUM_IN_TURN = 8  # admissible counts that are tried one after another before doubling
_PROBE_SHARE = 0.1  # of the time limit, for one node count
_FINAL_SHARE = 0.3
_FIRST_FIT_S = 0.1  # without a deadline any layout will do, and a search goes on until it has one


class NodeCount(Facts):
    """What came of one number of nodes."""

    num_nodes: Count
    num_devices: Count
    verdict: Verdict
    reason: str = ""
    step_time_us: Microseconds | None = None  # of the best layout found
    lower_bound_us: Microseconds | None = None  # on every layout's


class SmallestCluster(Facts):
    """The fewest nodes that will do, the plan for them, and what became of the other counts."""

    deadline_days: float | None = None
    tokens: int | None = None
    num_nodes: Count | None = None  # None: nothing was found
    num_devices: Count | None = None
    plan: Plan | None = None
    budget: Budget | None = None
    least_nodes: Count  # fewer cannot hold the model states, or do the products in time
    least_reason: str
    tried: tuple[NodeCount, ...]  # ascending
    proven: bool  # every smaller count is refused by proof
    interrupted: bool = False


class _DecidedError(KeyboardInterrupt):
    """Ends a search as Ctrl-C does: what is to be known is known."""


@dataclass
class _Watch:
    """Ends a search once a layout is in time, or none can be."""

    target_us: float | None
    lower_bound_us: float = 0.0
    is_decided: bool = False

    def __call__(self, state: SearchProgress) -> None:
        if self.target_us is None or state.phase == "bounding layouts":
            return
        if state.lower_bound_us > self.target_us:
            self.lower_bound_us = state.lower_bound_us
        if not self.is_decided and (state.best_us <= self.target_us or self.lower_bound_us):
            self.is_decided = True
            raise _DecidedError


@dataclass
class _Probes:
    """The node counts tried so far."""

    known: ModelSpec | ModelProfile
    machines: Cluster
    arguments: PlanArguments
    target_us: float | None  # step time that meets the deadline
    ends: float
    probe_s: float
    seed: int
    tried: dict[int, NodeCount] = field(default_factory=dict)
    found: dict[int, tuple[Question, list[PricedLayout]]] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def is_over(self) -> bool:
        """Whether time is up, or nobody wants to wait any longer."""
        return self.interrupted or time.monotonic() >= self.ends

    def will_do(self, num_nodes: int) -> bool:
        """Try one number of nodes."""
        if num_nodes not in self.tried:
            self.tried[num_nodes] = self._probe(num_nodes)
        return self.tried[num_nodes].verdict in ("fits", "in time")

    def divides(self, num_nodes: int) -> bool:
        """Whether any layout divides this number of nodes; notes it where none does."""
        if num_nodes in self.tried:
            return self.tried[num_nodes].verdict != "no layout divides"
        return self._question(num_nodes) is not None

    def _question(self, num_nodes: int) -> Question | None:
        machines = with_nodes(self.machines, num_nodes)
        try:
            question = ask(self.known, machines, self.arguments)
            if question.space.candidates:
                return question
            reason = "the pins leave no layout"
        except LayoutError as error:
            reason = str(error)
        self.tried[num_nodes] = _count(machines, "no layout divides", reason)
        return None

    def _probe(self, num_nodes: int) -> NodeCount:
        question = self._question(num_nodes)
        if question is None:
            return self.tried[num_nodes]
        machines, limit_s = question.job.cluster, self.probe_s
        if self.target_us is None:
            limit_s = min(limit_s, _FIRST_FIT_S)
        watch = _Watch(self.target_us)
        try:
            result = question.search(limit_s, seed=self.seed, on_progress=watch)
        except InfeasibleError as error:
            return _count(machines, "does not fit" if error.proven else "undecided", str(error))
        except _DecidedError:
            return _count(machines, "too slow", lower_bound_us=watch.lower_bound_us)
        self.interrupted |= result.interrupted and not watch.is_decided
        step_us, bound_us = result.ranked[0].step_us, max(result.lower_bound_us, watch.lower_bound_us)
        self.found[num_nodes] = question, result.ranked
        verdict: Verdict = "fits"
        if self.target_us is not None:
            in_time = step_us <= self.target_us
            verdict = "in time" if in_time else "too slow" if bound_us > self.target_us else "undecided"
        return _count(machines, verdict, step_time_us=step_us, lower_bound_us=bound_us)


def smallest_cluster(
    model: str | Path | ModelSpec | ModelProfile,
    cluster: str | Path | Cluster,
    *,
    tokens: int | None = None,
    deadline_days: float | None = None,
    max_nodes: int | None = None,
    **arguments: Unpack[PlanArguments],
) -> SmallestCluster:
    """The fewest nodes of the cluster's kind on which the model fits, or trains on `tokens` in `deadline_days`.

    Arguments are those of `planner.plan`; the number of nodes of `cluster` does not matter. `max_nodes`: try no more.
    `num_nodes` of the answer is None if nothing was found. Ctrl-C gives the best so far, if there is any.
    LayoutError if the cluster has several kinds of nodes, or for a deadline without tokens.
    """
    machines = cluster if isinstance(cluster, Cluster) else load_cluster(str(cluster))
    known = model if isinstance(model, ModelSpec | ModelProfile) else load_model(str(model))
    limit_s = arguments.get("time_limit_s", DEFAULT_TIME_LIMIT_S)
    check_time_limit(limit_s)
    started = time.monotonic()
    probes, least, reason = _start(known, machines, arguments, tokens, deadline_days, limit_s, started)
    most = max_nodes or MAX_DEVICES // machines.groups[0].devices_per_node
    try:
        count = _settle(probes, _fewest(probes, least, most))
    except KeyboardInterrupt:
        if not any(tried.verdict in ("fits", "in time") for tried in probes.tried.values()):
            raise
        probes.interrupted = True
        count = min(n for n, tried in probes.tried.items() if tried.verdict in ("fits", "in time"))
    found = None
    if count is not None:
        question, priced = probes.found[count]
        found = solve(
            question,
            top=arguments.get("top", 0),
            time_limit_s=max(0.01, started + limit_s - time.monotonic()) if not probes.interrupted else 0.01,
            seed=arguments.get("seed", 0),
            command=arguments.get("command", ""),
            known=priced,
            on_progress=arguments.get("on_progress"),
        )
    smaller = range(least, (count or most + 1))
    return SmallestCluster(
        deadline_days=deadline_days,
        tokens=tokens,
        num_nodes=count,
        num_devices=None if found is None else found.layout.num_devices,
        plan=found,
        budget=None if found is None or tokens is None else budget(found, tokens),
        least_nodes=least,
        least_reason=reason,
        tried=tuple(tried for _, tried in sorted(probes.tried.items())),
        proven=all(n in probes.tried and probes.tried[n].verdict in PROVEN_UNFIT for n in smaller),
        interrupted=probes.interrupted,
    )


def least_nodes(known: ModelSpec | ModelProfile, machines: Cluster, arguments: PlanArguments) -> int:
    """Fewer nodes cannot hold the model states, however they are sharded."""
    return _start(known, machines, arguments, None, None, 1.0, 0.0)[1]


def _start(
    known: ModelSpec | ModelProfile,
    machines: Cluster,
    arguments: PlanArguments,
    tokens: int | None,
    deadline_days: float | None,
    limit_s: float,
    started: float,
) -> tuple[_Probes, int, str]:
    """Nothing tried yet, the least number of nodes that may do, and why."""
    spec = known if isinstance(known, ModelSpec) else known.model
    node = with_nodes(machines, 1)
    precision = read_precision(known, node, arguments)
    tokens_per_step = arguments["global_batch_size"] * _sequence_length(known, arguments)
    target_us = _target_us(tokens_per_step, tokens, deadline_days)
    least, reason = _least_nodes(spec, node, precision, tokens_per_step, target_us)
    probes = _Probes(
        known,
        machines,
        arguments,
        target_us,
        ends=started + limit_s * (1 - _FINAL_SHARE),
        probe_s=limit_s * _PROBE_SHARE,
        seed=arguments.get("seed", 0),
    )
    return probes, least, reason


def _fewest(probes: _Probes, least: int, most: int) -> int | None:
    """The fewest nodes that will do, as far as there was time to look; None if none was found."""
    last_refused, num_nodes, in_turn = least - 1, least, 0
    while num_nodes <= most and in_turn < NUM_IN_TURN and not probes.is_over:
        if probes.divides(num_nodes):
            in_turn += 1
            if probes.will_do(num_nodes):
                return num_nodes
            last_refused = num_nodes
        num_nodes += 1
    found = None
    while found is None and num_nodes <= most and not probes.is_over:
        if probes.divides(num_nodes):
            if probes.will_do(num_nodes):
                found = num_nodes
            else:
                last_refused, num_nodes = num_nodes, 2 * num_nodes
        else:
            num_nodes += 1
    while found is not None and not probes.is_over:  # what is doubtful counts as refused here
        between = [n for n in _middle_out(last_refused, found) if probes.divides(n)][:1]
        if not between:
            break
        if probes.will_do(between[0]):
            found = between[0]
        else:
            last_refused = between[0]
    return found


def _settle(probes: _Probes, count: int | None) -> int | None:
    """Look longer at smaller numbers that nobody could decide on, the nearest first."""
    doubtful = [n for n, tried in probes.tried.items() if tried.verdict == "undecided" and n < (count or math.inf)]
    for position, num_nodes in enumerate(sorted(doubtful, reverse=True)):
        if probes.is_over:
            break
        probes.probe_s = (probes.ends - time.monotonic()) / (len(doubtful) - position)
        del probes.tried[num_nodes]
        if probes.will_do(num_nodes):
            count = num_nodes
    return count


def _middle_out(low: int, high: int) -> list[int]:
    """The numbers between two others, the middle first."""
    middle = (low + high) / 2
    return sorted(range(low + 1, high), key=lambda n: abs(n - middle))


def _sequence_length(known: ModelSpec | ModelProfile, arguments: PlanArguments) -> int:
    longest = known.sequence_length if isinstance(known, ModelSpec) else profiled_length(known)
    return arguments.get("sequence_length") or longest


def _target_us(tokens_per_step: int, tokens: int | None, deadline_days: float | None) -> float | None:
    """The step time that meets the deadline."""
    if deadline_days is None:
        return None
    if tokens is None:
        raise LayoutError(f"a deadline of {deadline_days:g} days needs a token budget; give the tokens, too")
    if not (math.isfinite(deadline_days) and deadline_days > 0):
        raise LayoutError(f"deadline {deadline_days} days: give a finite number above 0")
    return deadline_days * 86400e6 / -(-tokens // tokens_per_step)


def _least_nodes(
    spec: ModelSpec, node: Cluster, precision: Precision, tokens_per_step: int, target_us: float | None
) -> tuple[int, str]:
    """Fewer nodes cannot do, whatever the layout, and why."""
    group = node.groups[0]
    state_bytes = spec.num_parameters * sum(state_bytes_per_parameter(precision))
    node_bytes = group.devices_per_node * capacity_bytes(group.device)
    by_memory = math.ceil(state_bytes / node_bytes)
    if target_us is not None:
        flops = 6.0 * spec.num_active_parameters * tokens_per_step
        node_flops = group.devices_per_node * group.device.peak_flops.get(precision.compute, math.inf)
        by_time = math.ceil(flops / (node_flops * target_us / 1e6))
        if by_time > by_memory:
            return by_time, f"at the peak of their devices, {by_time} nodes do the matrix products of a step in time"
    states, room = state_bytes / 2**30, node_bytes / 2**30
    return max(1, by_memory), f"model states take {states:.0f} GiB, and a node has room for {room:.0f} GiB"


def _count(machines: Cluster, verdict: Verdict, reason: str = "", **times: float) -> NodeCount:
    return NodeCount(
        num_nodes=machines.num_nodes, num_devices=machines.num_devices, verdict=verdict, reason=reason, **times
    )
