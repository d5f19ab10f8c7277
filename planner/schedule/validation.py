"""What makes a schedule one that can run, and what is wrong with one that cannot.

Every stage lives on one rank and runs F of every microbatch once, and its backward once: either BW, or B and
later W. F s.j needs F (s-1).j; B and BW s.j need F s.j and the backward of stage s + 1; W s.j needs B s.j.
R s.j, where there is one, runs once, after F s.j and before the backward. In a bidirectional schedule every stage lives
on one rank per replica, and all actions of a microbatch are on the ranks of its replica (`planner.schedule.actions`).
Within a rank the list is the order, so what is left to check is that the ranks together can get through their
lists.
"""

from collections import deque
from collections.abc import Sequence

from planner.errors import ScheduleError
from planner.schedule.actions import Action, Kind, Schedule

_STEPS_AROUND = 2  # rows of the excerpt before and after the step
_MAX_COLUMNS = 8


def check(
    schedule: Schedule,
    *,
    num_stages: int | None = None,
    num_microbatches: int | None = None,
    rank_of_stage: Sequence[int] | None = None,
    num_replicas: int | None = None,
) -> None:
    """Refuse a schedule that cannot run, or is not for this many stages and microbatches or this placement.

    `rank_of_stage` has shape (S,), replica 0's where there are two. What is not given is what the schedule uses.
    ScheduleError says which rank, step and action, why, and shows the steps around; ValueError when `num_stages` is
    not the length of `rank_of_stage`. Linear in the number of actions.
    """
    run_order(
        schedule,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        rank_of_stage=rank_of_stage,
        num_replicas=num_replicas,
    )


def run_order(
    schedule: Schedule,
    *,
    num_stages: int | None = None,
    num_microbatches: int | None = None,
    rank_of_stage: Sequence[int] | None = None,
    num_replicas: int | None = None,
) -> list[tuple[int, int]]:
    """All actions as (rank, step), each after everything it needs: one topological order of the schedule.

    The same schedule always gives the same order. Checks, and raises, as `check` does.
    """
    if num_stages is None:
        num_stages = schedule.num_stages if rank_of_stage is None else len(rank_of_stage)
    elif rank_of_stage is not None and len(rank_of_stage) != num_stages:
        raise ValueError(f"rank_of_stage has {len(rank_of_stage)} entries for {num_stages} stages")
    if num_microbatches is None:
        num_microbatches = schedule.num_microbatches
    if not schedule.ranks:
        raise ScheduleError("the schedule has no ranks; write one line of actions per rank")
    for rank, actions in enumerate(schedule.ranks):
        if not actions:
            what = "the rank has no actions; give every rank a stage, or use fewer ranks"
            raise _error(schedule, rank, 0, what, at_step=False)
    if num_replicas == 2 and schedule.num_replicas == 1:
        last = schedule.num_ranks - 1
        raise ScheduleError(
            "the schedule was to run two replicas, but it runs one: of S = p stages, the first and the last must each "
            f"run on rank 0 and on rank {last}; there are {schedule.num_stages} stages on {last + 1} ranks"
        )
    homes = _Homes(schedule, num_stages, rank_of_stage, num_replicas or schedule.num_replicas)
    _check_each_action(schedule, num_stages, num_microbatches, homes)
    return _sweep(schedule, num_stages, num_microbatches, homes)


class _Homes:
    """Which rank runs which stage of which microbatch, as far as it is known."""

    def __init__(
        self, schedule: Schedule, num_stages: int, rank_of_stage: Sequence[int] | None, num_replicas: int
    ) -> None:
        self.is_given = rank_of_stage is not None
        self.of_stage = {} if rank_of_stage is None else dict(enumerate(rank_of_stage))  # replica 0's
        self.mirrored: dict[int, int] = {}
        self.replicas = None if num_replicas == 1 else schedule.replica_of_microbatch
        if self.replicas is not None:
            if rank_of_stage is None:
                self.of_stage = {stage: stage for stage in range(num_stages)}
            last = schedule.num_ranks - 1
            self.mirrored = {stage: last - rank for stage, rank in self.of_stage.items()}

    def of_microbatch(self, microbatch: int) -> dict[int, int]:
        """The rank of every stage for one microbatch, one that no action names included."""
        replicas = self.replicas
        return self.mirrored if replicas and microbatch < len(replicas) and replicas[microbatch] else self.of_stage

    def __call__(self, action: Action) -> int:
        return self.of_microbatch(action.microbatch)[action.stage]


def _check_each_action(schedule: Schedule, num_stages: int, num_microbatches: int, homes: _Homes) -> None:
    """Everything that can be wrong without timing; learns where every stage is."""
    home, mirrored, replicas = homes.of_stage, homes.mirrored, homes.replicas
    # step of F, of B, of W and of BW by stage · m + microbatch; the rank is the stage's
    forwards: dict[int, int] = {}
    inputs: dict[int, int] = {}
    weights: dict[int, int] = {}
    fused: dict[int, int] = {}
    again: dict[int, int] = {}  # of R
    for rank, actions in enumerate(schedule.ranks):
        for step, action in enumerate(actions):
            kind, stage, microbatch = action
            if not 0 <= stage < num_stages:
                raise _error(schedule, rank, step, f"{action}: {_out_of_range('stage', stage, num_stages)}")
            if not 0 <= microbatch < num_microbatches:
                why = _out_of_range("microbatch", microbatch, num_microbatches)
                raise _error(schedule, rank, step, f"{action}: {why}")
            if replicas is not None:
                if (mirrored if replicas[microbatch] else home)[stage] != rank:
                    raise _wrong_replica(schedule, rank, step, homes)
            elif home.setdefault(stage, rank) != rank:
                raise _wrong_rank(schedule, rank, step, home[stage], planned=homes.is_given)
            key = stage * num_microbatches + microbatch
            if kind == "F":
                seen = forwards
            elif kind == "BW":
                seen = fused
                if key in inputs:
                    raise _mixed(schedule, rank, step, inputs[key])
            elif kind == "R":
                seen = again
                if key in fused or key in inputs:
                    raise _too_late(schedule, rank, step, fused[key] if key in fused else inputs[key])
            else:
                seen = inputs if kind == "B" else weights
                if key in fused:
                    raise _mixed(schedule, rank, step, fused[key])
            if key in seen:
                raise _error(schedule, rank, step, f"{action} has already run at step {seen[key]}; remove one of them")
            if kind == "W":
                if key not in inputs:
                    raise _too_early(schedule, rank, step, Kind.B)
            elif kind != "F" and key not in forwards:
                raise _too_early(schedule, rank, step, Kind.F)
            seen[key] = step
    wanted = num_stages * num_microbatches
    if len(forwards) < wanted or len(fused) + len(weights) < wanted:
        raise _missing(schedule, num_stages, num_microbatches, homes, forwards, inputs, fused, weights)


def _sweep(schedule: Schedule, num_stages: int, num_microbatches: int, homes: _Homes) -> list[tuple[int, int]]:
    """Run each rank until it waits for another, until all are done; refuse when none can go on."""
    m = num_microbatches
    last = num_stages - 1
    forward_done = bytearray(num_stages * m)
    backward_done = bytearray(num_stages * m)
    # who waits for F and for the backward of a stage and microbatch: at most one rank, the neighbour stage's
    waits_for_forward: dict[int, int] = {}
    waits_for_backward: dict[int, int] = {}
    next_step = [0] * schedule.num_ranks
    order: list[tuple[int, int]] = []
    ready = deque(range(schedule.num_ranks))
    while ready:
        rank = ready.popleft()
        actions = schedule.ranks[rank]
        step = next_step[rank]
        while step < len(actions):
            kind, stage, microbatch = actions[step]
            key = stage * m + microbatch
            if kind == "F":
                if stage > 0 and not forward_done[key - m]:
                    waits_for_forward[key - m] = rank
                    break
                forward_done[key] = 1
                if key in waits_for_forward:
                    ready.append(waits_for_forward.pop(key))
            elif kind == "B" or kind == "BW":
                if stage < last and not backward_done[key + m]:
                    waits_for_backward[key + m] = rank
                    break
                backward_done[key] = 1
                if key in waits_for_backward:
                    ready.append(waits_for_backward.pop(key))
            order.append((rank, step))
            step += 1
        next_step[rank] = step
    if waits_for_forward or waits_for_backward:
        needs = {rank: Action(Kind.F, *divmod(key, m)) for key, rank in waits_for_forward.items()}
        for key, rank in waits_for_backward.items():
            fused = Action(Kind.BW, *divmod(key, m))
            needs[rank] = fused if fused in schedule.ranks[homes(fused)] else fused._replace(kind=Kind.B)
        raise _deadlock(schedule, next_step, needs, homes)
    return order


def _out_of_range(what: str, index: int, count: int) -> str:
    plural = f"{what}es" if what.endswith("ch") else f"{what}s"
    return f"{what} {index} is out of range, there are {count} {plural}: {_up_to(count)}"


def _up_to(count: int) -> str:
    return f"0..{count - 1}" if count else "none"


def _wrong_rank(schedule: Schedule, rank: int, step: int, home: int, *, planned: bool) -> ScheduleError:
    action = schedule.ranks[rank][step]
    if planned:
        why = f"the placement puts stage {action.stage} on rank {home}; move it, or change the placement"
    else:
        first = next(n for n, other in enumerate(schedule.ranks[home]) if other.stage == action.stage)
        where = f"{schedule.ranks[home][first]} at step {first}"
        why = f"stage {action.stage} is on rank {home} already ({where}); a stage lives on one rank"
    return _error(schedule, rank, step, f"{action}: {why}")


def _wrong_replica(schedule: Schedule, rank: int, step: int, homes: _Homes) -> ScheduleError:
    action = schedule.ranks[rank][step]
    replica = int(homes.of_microbatch(action.microbatch) is homes.mirrored)
    why = (
        f"microbatch {action.microbatch} takes replica {replica}, by the rank of its stage 0, and that has stage "
        f"{action.stage} on rank {homes(action)}; move it, or the whole microbatch"
    )
    return _error(schedule, rank, step, f"{action}: {why}")


def _mixed(schedule: Schedule, rank: int, step: int, other_step: int) -> ScheduleError:
    action, other = schedule.ranks[rank][step], schedule.ranks[rank][other_step]
    return _error(
        schedule,
        rank,
        step,
        f"{action} after {other} at step {other_step}: BW is B and W in one, write either BW, or B and W",
    )


def _too_early(schedule: Schedule, rank: int, step: int, needs: Kind) -> ScheduleError:
    action = schedule.ranks[rank][step]
    needed = Action(needs, action.stage, action.microbatch)
    try:
        where = f"which is at step {schedule.ranks[rank].index(needed)}; put {needed} first"
    except ValueError:
        where = f"which is missing; put {needed} before it"
    return _error(schedule, rank, step, f"{action} runs before {needed}, {where}")


def _too_late(schedule: Schedule, rank: int, step: int, other_step: int) -> ScheduleError:
    action, other = schedule.ranks[rank][step], schedule.ranks[rank][other_step]
    what = f"{action} runs after {other}, which is at step {other_step} and needs it; put {action} first"
    return _error(schedule, rank, step, what)


def _missing(
    schedule: Schedule,
    num_stages: int,
    num_microbatches: int,
    homes: _Homes,
    forwards: dict[int, int],
    inputs: dict[int, int],
    fused: dict[int, int],
    weights: dict[int, int],
) -> ScheduleError:
    """The first missing action by stage and microbatch. Stops there, so a huge index costs nothing."""
    for stage in range(num_stages):
        if stage not in homes.of_stage:
            wanted = f"all {num_stages} stages {_up_to(num_stages)}"
            return ScheduleError(f"no rank runs stage {stage}; the schedule must run {wanted}")
        for microbatch in range(num_microbatches):
            key = stage * num_microbatches + microbatch
            rank = homes.of_microbatch(microbatch)[stage]
            if not 0 <= rank < schedule.num_ranks:
                have = f"the schedule has {schedule.num_ranks} ranks: {_up_to(schedule.num_ranks)}"
                return ScheduleError(f"the placement puts stage {stage} on rank {rank}, but {have}")
            wanted = f"stage {stage} must run all {num_microbatches} microbatches {_up_to(num_microbatches)}"
            if key not in forwards:
                action = Action(Kind.F, stage, microbatch)
                step = forwards.get(key - 1, -1) if microbatch else 0
                return _error(schedule, rank, step, f"{action} is missing; {wanted}", at_step=False)
            name = f"{stage}.{microbatch}"
            if key in inputs and key not in weights:
                what = f"W{name} is missing; add it after B{name}, or write BW{name} instead"
                return _error(schedule, rank, inputs[key], what)
            if key not in inputs and key not in fused:
                what = f"F{name} is never followed by its backward; add BW{name}, or B{name} and W{name}"
                return _error(schedule, rank, forwards[key], what)
    raise AssertionError("nothing is missing")


def _deadlock(schedule: Schedule, next_step: Sequence[int], needs: dict[int, Action], homes: _Homes) -> ScheduleError:
    """Follow who waits for whom until a rank comes again: that circle is what has to be broken."""
    rank = min(needs)
    path: list[int] = []
    while rank not in path:
        path.append(rank)
        rank = homes(needs[rank])
    circle = path[path.index(rank) :]
    lines = ["deadlock: these actions wait for each other in a circle; reorder one of these ranks"]
    for rank in circle:
        step, needed = next_step[rank], needs[rank]
        holder = homes(needed)
        waits_for = f"{needed} (rank {holder}, step {schedule.ranks[holder].index(needed)})"
        lines.append(f"rank {rank}, step {step}: {schedule.ranks[rank][step]} waits for {waits_for}")
    return ScheduleError("\n".join([*lines, *_grid(schedule, circle[0], next_step[circle[0]])]))


def _error(schedule: Schedule, rank: int, step: int, what: str, *, at_step: bool = True) -> ScheduleError:
    where = f"rank {rank}, step {step}" if at_step else f"rank {rank}"
    step %= max(1, len(schedule.ranks[rank]))
    return ScheduleError("\n".join([f"{where}: {what}", *_grid(schedule, rank, step)]))


def _grid(schedule: Schedule, rank: int, step: int) -> list[str]:
    """The steps around `step` on `rank` and its neighbours, one column per rank."""
    first = max(0, min(rank - _MAX_COLUMNS // 2, schedule.num_ranks - _MAX_COLUMNS))
    columns = range(first, min(first + _MAX_COLUMNS, schedule.num_ranks))
    longest = max(len(schedule.ranks[column]) for column in columns)
    steps = range(max(0, step - _STEPS_AROUND), min(step + _STEPS_AROUND + 1, longest))
    rows = [("", *(f"Rank {column}" for column in columns))]
    for row in steps:
        cells = (schedule.ranks[column][row : row + 1] for column in columns)
        rows.append((f"Step {row}:", *(str(cell[0]) if cell else "" for cell in cells)))
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["   ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if step in steps:
        marked = 1 + step - steps.start
        lines[marked] = "   ".join(map(str.ljust, rows[marked], widths)) + f"   <-- rank {rank}"
    return lines
