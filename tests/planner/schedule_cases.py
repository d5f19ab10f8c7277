"""Drawn schedules and slow oracles for the schedule tests. Shares no code with what it judges."""

from collections.abc import Sequence
from fractions import Fraction

from hypothesis import reject
from hypothesis import strategies as st

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families import Family
from planner.schedule.simulation import StageTimes


def needs(
    action: Action, split: dict[tuple[int, int], bool], num_stages: int, again: set[tuple[int, int]]
) -> list[Action]:
    """The actions that `action` waits for, by the definition; `again`: what is recomputed."""
    kind, stage, microbatch = action
    if kind is Kind.R:
        return [Action(Kind.F, stage, microbatch)]
    if kind is Kind.W:
        return [Action(Kind.B, stage, microbatch)]
    if kind is Kind.F:
        return [Action(Kind.F, stage - 1, microbatch)] if stage else []
    found = [Action(Kind.F, stage, microbatch)]
    if (stage, microbatch) in again:
        found.append(Action(Kind.R, stage, microbatch))
    if stage + 1 < num_stages:
        found.append(Action(Kind.B if split[stage + 1, microbatch] else Kind.BW, stage + 1, microbatch))
    return found


def splits(schedule: Schedule) -> dict[tuple[int, int], bool]:
    """Whether the backward of (stage, microbatch) is B and W."""
    return {
        (action.stage, action.microbatch): action.kind is Kind.B
        for actions in schedule.ranks
        for action in actions
        if action.kind in (Kind.B, Kind.BW)
    }


def recomputed(schedule: Schedule) -> set[tuple[int, int]]:
    """The (stage, microbatch) with an R."""
    return {
        (action.stage, action.microbatch) for actions in schedule.ranks for action in actions if action.kind is Kind.R
    }


def uniform_stages(num_stages: int, *, f=1.0, b=1.0, w=1.0, transfer=0.0, held=2, held_w=1) -> list[StageTimes]:
    return [StageTimes(f, b, w, b + w, transfer, held, held_w)] * num_stages


@st.composite
def placements(draw, max_ranks=4, max_stages=6) -> tuple[int, ...]:
    num_ranks = draw(st.integers(1, max_ranks))
    num_stages = draw(st.integers(num_ranks, max_stages))
    free = draw(st.lists(st.integers(0, num_ranks - 1), min_size=num_stages, max_size=num_stages))
    order = draw(st.permutations(range(num_stages)))
    for rank in range(num_ranks):
        free[order[rank]] = rank
    return tuple(free)


@st.composite
def valid_schedules(draw, max_ranks=4, max_stages=6, max_microbatches=4) -> Schedule:
    """Run a random placement in a random order and note what every rank did: that order can run."""
    placement = draw(placements(max_ranks, max_stages))
    num_stages, num_microbatches = len(placement), draw(st.integers(1, max_microbatches))
    split = {(s, j): draw(st.booleans()) for s in range(num_stages) for j in range(num_microbatches)}
    todo = [Action(Kind.F, s, j) for s, j in split]
    for (s, j), is_split in split.items():
        todo += [Action(Kind.B, s, j), Action(Kind.W, s, j)] if is_split else [Action(Kind.BW, s, j)]
    again = {key for key in split if draw(st.integers(0, 3)) == 0}
    todo += [Action(Kind.R, s, j) for s, j in again]
    random = draw(st.randoms(use_true_random=False))
    done: set[Action] = set()
    ranks: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    while todo:
        ready = [a for a in todo if all(n in done for n in needs(a, split, num_stages, again))]
        action = random.choice(ready)
        todo.remove(action)
        done.add(action)
        ranks[placement[action.stage]].append(action)
    return Schedule(tuple(map(tuple, ranks)))


@st.composite
def bidirectional_schedules(draw, max_ranks=4, max_microbatches=4) -> Schedule:
    """One stage per rank, every microbatch up or down the ranks and some each way, run in a random order."""
    p, m = draw(st.integers(2, max_ranks)), draw(st.integers(2, max_microbatches))
    ways = [False, True, *(draw(st.booleans()) for _ in range(m - 2))]
    split = {(s, j): draw(st.booleans()) for s in range(p) for j in range(m)}
    todo = [Action(Kind.F, s, j) for s, j in split]
    for (s, j), is_split in split.items():
        todo += [Action(Kind.B, s, j), Action(Kind.W, s, j)] if is_split else [Action(Kind.BW, s, j)]
    random = draw(st.randoms(use_true_random=False))
    done: set[Action] = set()
    ranks: list[list[Action]] = [[] for _ in range(p)]
    while todo:
        action = random.choice([a for a in todo if all(n in done for n in needs(a, split, p, set()))])
        todo.remove(action)
        done.add(action)
        ranks[p - 1 - action.stage if ways[action.microbatch] else action.stage].append(action)
    return Schedule(tuple(map(tuple, ranks)))


@st.composite
def stages_for(draw, schedule: Schedule, *, zeros=True) -> list[StageTimes]:
    times = st.integers(0 if zeros else 1, 20)
    sizes = st.integers(0, 9)
    return [
        StageTimes(*(draw(times) for _ in range(5)), draw(sizes), draw(sizes), draw(times), draw(sizes))
        for _ in range(schedule.num_stages)
    ]


def numbers_for(family: Family, num_ranks: int, num_microbatches: int) -> tuple[int, int]:
    """Microbatches, at least this many, and chunks that the family has a schedule for; a draw without is rejected."""
    for many in range(num_microbatches, num_microbatches + 20):
        for chunks in (1, 2):
            if family.supports(num_ranks, many, chunks) is None:
                return many, chunks
    return reject()


def can_run(schedule: Schedule, num_stages: int, num_microbatches: int, *, mirrored: bool = False) -> bool:
    """Whether it is complete, each stage on one rank, and the ranks get through their lists.

    `mirrored`: each microbatch goes up or down the ranks instead, one stage per rank.
    """
    everything = [action for actions in schedule.ranks for action in actions]
    split, again = splits(schedule), recomputed(schedule)
    wanted = [Action(Kind.R, s, j) for s, j in again]
    for stage in range(num_stages):
        for j in range(num_microbatches):
            kinds = "FBW" if split.get((stage, j), False) else ("F", "BW")
            wanted += [Action(Kind(kind), stage, j) for kind in kinds]
    if not all(schedule.ranks) or sorted(everything) != sorted(wanted):
        return False
    homes = {(action.stage, rank) for rank, actions in enumerate(schedule.ranks) for action in actions}
    if mirrored:
        ways: dict[int, list[tuple[int, int]]] = {j: [] for j in range(num_microbatches)}
        for rank, actions in enumerate(schedule.ranks):
            for action in actions:
                ways[action.microbatch].append((action.stage, rank))
        down = {(s, s) for s in range(num_stages)}
        up = {(s, schedule.num_ranks - 1 - s) for s in range(num_stages)}
        if not all(set(way) in (down, up) for way in ways.values()):
            return False
    elif len(homes) != num_stages:
        return False
    lists = [list(actions) for actions in schedule.ranks]
    done: set[Action] = set()
    moved = True
    while moved:
        moved = False
        for actions in lists:
            if actions and all(need in done for need in needs(actions[0], split, num_stages, again)):
                done.add(actions.pop(0))
                moved = True
    return not any(lists)


def duration(action: Action, stages: Sequence[StageTimes]) -> Fraction:
    stage = stages[action.stage]
    return Fraction(
        {
            Kind.F: stage.forward_us,
            Kind.B: stage.backward_input_us,
            Kind.W: stage.backward_weight_us,
            Kind.BW: stage.fused_backward_us,
            Kind.R: stage.recompute_us,
        }[action.kind]
    )


def earliest_starts(
    schedule: Schedule, stages: Sequence[StageTimes], span: Fraction | None = None
) -> dict[Action, Fraction] | None:
    """Push every start up to what it waits for, until nothing moves; with `span`, also hold every rank to it.

    None when it never settles: no timing keeps that span.
    """
    num_stages, split, again = len(stages), splits(schedule), recomputed(schedule)
    home = {a[1:]: rank for rank, actions in enumerate(schedule.ranks) for a in actions}
    starts = {action: Fraction(0) for actions in schedule.ranks for action in actions}
    for _ in range(len(starts) + 2):
        before = dict(starts)
        for actions in schedule.ranks:
            for n, action in enumerate(actions):
                bounds = [starts[action]]
                if n:
                    bounds.append(starts[actions[n - 1]] + duration(actions[n - 1], stages))
                for need in needs(action, split, num_stages, again):
                    hop = 0
                    if home[need[1:]] != home[action[1:]]:
                        hop = stages[min(need.stage, action.stage)].transfer_us
                    bounds.append(starts[need] + duration(need, stages) + Fraction(hop))
                if n == 0 and span is not None:
                    bounds.append(starts[actions[-1]] + duration(actions[-1], stages) - span)
                starts[action] = max(bounds)
        if starts == before:
            return starts
    return None


def peak_bytes(actions: Sequence[Action], stages: Sequence[StageTimes]) -> int:
    """What a rank holds at every start and end of its actions, recounted from nothing each time."""
    peak = 0
    for now in range(len(actions)):
        started, ended = set(actions[: now + 1]), set(actions[:now])
        held = 0
        for action in started:
            if action.kind is not Kind.F:
                continue
            b, w, bw, r = (action._replace(kind=kind) for kind in (Kind.B, Kind.W, Kind.BW, Kind.R))
            full, part = stages[action.stage].activation_bytes, stages[action.stage].weight_activation_bytes
            if r in actions and r not in started:
                held += stages[action.stage].checkpoint_bytes
                continue
            if w in ended or bw in ended:
                continue
            if b in ended:
                held += part
            elif b in started:
                held += max(full, part)
            else:
                held += full
        peak = max(peak, held)
    return peak
