"""How far every rank may run into a step before it knows that its parameters are right.

With post-validation (`planner.executor.optimizer`) a step begins with parameters that may still have to be
corrected. The forwards before the cut run on them; at the cut each rank learns whether all of it has to be thrown
away. Derived from the schedule alone, without torch.
"""

from collections.abc import Sequence

from planner.schedule.actions import Kind, Schedule


def unvalidated_cut(schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the number of actions at the head of its list that may run before validation, shape (p,).

    A cut is one number per rank. It is allowed when every action before it is a forward, and closed when
    everything that an action before it needs lies before it too, on whichever rank: then each rank reaches its cut
    whatever the others do after theirs, and nothing before a cut waits for somebody who waits at its own. Returned
    is the largest allowed closed cut, on every rank at once. It exists: take for every rank the larger of two allowed
    closed cuts' numbers. An action before that lies before one of the two, and so does what it needs; being allowed
    is a matter of each rank alone. Found by beginning with all leading forwards and shortening a rank to just
    before its first action that needs one not before the cut, until there is none. By induction no allowed closed
    cut reaches beyond what is left: each holds at most the leading forwards, and an action whose need lies beyond
    all of them is in none of them, nor is anything behind it in its rank's list. What is left at the end is closed.

    The forward of a stage needs that of the stage before, of the same microbatch, wherever it runs.
    """
    place = {
        (action.stage, action.microbatch): (rank, position)
        for rank, actions in enumerate(schedule.ranks)
        for position, action in enumerate(actions)
        if action.kind is Kind.F
    }
    cut = [
        next((n for n, action in enumerate(actions) if action.kind is not Kind.F), len(actions))
        for actions in schedule.ranks
    ]
    shortened = True
    while shortened:
        shortened = False
        for rank, actions in enumerate(schedule.ranks):
            for position in range(cut[rank]):
                _, stage, microbatch = actions[position]
                if stage > 0 and not is_before(cut, place[stage - 1, microbatch]):
                    cut[rank] = position
                    shortened = True
                    break
    return tuple(cut)


def is_before(cut: Sequence[int], place: tuple[int, int]) -> bool:
    """Whether the action at `place`, (rank, position in its list), lies before the cut."""
    rank, position = place
    return position < cut[rank]
