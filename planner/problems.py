"""From stages priced in float µs to integer scheduling problems, and from schedules to orders of such problems.

Times are rounded to whole µs here, once per stage, F and B to at least 1; solvers see nothing else of the facts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from planner.plans import StageCosts
from planner.schedule.actions import Action, Kind, Schedule
from solvers.pipeline import Objective, Op, Order, PipelineProblem


def pipeline_problem(
    stages: Sequence[StageCosts],
    rank_of_stage: Sequence[int],
    num_microbatches: int,
    *,
    splits_backward: bool | Sequence[bool],
    capacity_bytes: Sequence[int] | None,
    objective: Objective = "makespan",
    rounding: Callable[[float], int] = round,
) -> PipelineProblem:
    """The integer scheduling problem of these stages; `capacity_bytes` is what activations may take on each rank.

    `splits_backward`: of all stages, or of each, shape (S,).
    Rounded down (`math.floor`), its lower bounds hold for the unrounded times; sums are rounded after they are taken.
    """
    split = (splits_backward,) * len(stages) if isinstance(splits_backward, bool) else tuple(splits_backward)
    backward = [s.backward_input_us if apart else s.fused_backward_us for s, apart in zip(stages, split, strict=True)]
    weight = [s.backward_weight_us if apart else 0.0 for s, apart in zip(stages, split, strict=True)]
    return PipelineProblem(
        forward_us=tuple(max(1, rounding(s.forward_us)) for s in stages),
        backward_us=tuple(max(1, rounding(us)) for us in backward),
        weight_us=tuple(map(rounding, weight)),
        split=split,
        transfer_us=tuple(rounding(s.transfer_us) for s in stages[:-1]),
        rank_of_stage=tuple(rank_of_stage),
        num_microbatches=num_microbatches,
        activation_bytes=tuple(s.activation_bytes for s in stages),
        weight_activation_bytes=tuple(s.weight_activation_bytes for s in stages),
        capacity_bytes=None if capacity_bytes is None else tuple(capacity_bytes),
        objective=objective,
    )


def of_any_backward(problem: PipelineProblem) -> PipelineProblem:
    """A problem whose lower bounds hold for schedules that run B and W, or BW, as each microbatch likes.

    BW can be replaced by B and W at the same times: the gradient leaves no later, and where M_W ≤ M_B nothing more is
    held. So it is enough to let no M_W be above its M_B, which only ever frees memory.
    """
    kept = tuple(map(min, problem.activation_bytes, problem.weight_activation_bytes))
    return replace(problem, weight_activation_bytes=kept)


def order_of(schedule: Schedule) -> Order:
    """A schedule as solvers see it."""
    return tuple(tuple(Op(str(a.kind), a.stage, a.microbatch) for a in actions) for actions in schedule.ranks)


def adapted(schedule: Schedule, problem: PipelineProblem, *, splits: bool) -> Schedule:
    """A family's schedule made to run on stages that keep their backward in one piece, or recompute.

    There B becomes BW and W is left out; R goes right before the backward. With `splits`, BW of every other stage
    becomes B and W, so that the order is one that solvers could have made.
    """
    recomputes, split = problem.has_recompute, problem.split
    if all(split) and not any(recomputes) and not splits:
        return schedule

    def expand(actions: Iterable[Action]) -> Iterable[Action]:
        for action in actions:
            kind, stage, microbatch = action
            if kind is Kind.F:
                yield action
                continue
            if kind is Kind.W:
                if split[stage]:
                    yield action
                continue
            if recomputes[stage]:
                yield Action(Kind.R, stage, microbatch)
            if not split[stage]:
                yield Action(Kind.BW, stage, microbatch)
            elif kind is Kind.BW and splits:
                yield Action(Kind.B, stage, microbatch)
                yield Action(Kind.W, stage, microbatch)
            else:
                yield action

    return Schedule(tuple(tuple(expand(actions)) for actions in schedule.ranks))
