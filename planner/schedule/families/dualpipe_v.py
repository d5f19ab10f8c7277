"""DualPipeV: DualPipe folded into a V, so that no weights are held twice; forwards and backwards go side by side.

Rank r hosts stages a = r and b = 2p − 1 − r. In the order of F a, F b and so on, rank r runs
1. 2(p − r − 1) times F a;  2. r + 1 times F a, F b;  3. p − r − 1 times B b, W b, F b;
4. m − 2p + r + 1 times F a, BW b, F b, BW a;  5. p − r − 1 times BW b, F b, BW a;
6. r + 1 times the backward of b, then of a: BW at first, then B with its W put off, from the middle on;
7. p − r − 1 times the oldest W put off, B a with its W put off;  8. r + 1 times the oldest W put off.
The authors overlap the pairs F a, BW b and F b, BW a of steps 4 and 5; here they run one after the other. The first
step needs m ≥ 2p. The backward of a microbatch is BW or B and W, as the step says.

With equal chunks, T_F, T_B, T_W of a whole rank: makespan bubble (p − 1)(T_F + T_B − T_W) / 2 where the times are close
to each other, more where they are far apart. Peak activations: at most p + 1/2 microbatches of a whole rank.
"""

from collections import deque
from itertools import count

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family, only_two_stages_per_rank, vee


def _refuse(num_ranks: int, num_microbatches: int, virtual_stages: int) -> str | None:
    if num_microbatches < 2 * num_ranks:
        return (
            f"it needs at least {2 * num_ranks} microbatches for {num_ranks} ranks, not {num_microbatches}; "
            "use more, or the family zb-v"
        )
    return only_two_stages_per_rank(num_ranks, num_microbatches, virtual_stages)


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    return Schedule(tuple(_order(rank, num_ranks, num_microbatches) for rank in range(num_ranks)))


def _order(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    a, b = rank, 2 * num_ranks - 1 - rank
    rest = num_ranks - rank - 1
    forwards = {stage: count() for stage in (a, b)}
    backwards = {stage: count() for stage in (a, b)}
    order: list[Action] = []
    pending: deque[Action] = deque()

    def forward(stage: int) -> None:
        order.append(Action(Kind.F, stage, next(forwards[stage])))

    def backward(stage: int, *, puts_off: bool = False) -> None:
        microbatch = next(backwards[stage])
        order.append(Action(Kind.B if puts_off else Kind.BW, stage, microbatch))
        if puts_off:
            pending.append(Action(Kind.W, stage, microbatch))

    for _ in range(2 * rest):
        forward(a)
    for _ in range(rank + 1):
        forward(a)
        forward(b)
    for _ in range(rest):
        backward(b, puts_off=True)
        order.append(pending.popleft())
        forward(b)
    for _ in range(num_microbatches - 2 * num_ranks + rank + 1):
        forward(a)
        backward(b)
        forward(b)
        backward(a)
    for _ in range(rest):
        backward(b)
        forward(b)
        backward(a)
    for number in range(2 * (rank + 1)):  # b, a, b, a, ..
        backward(a if number % 2 else b, puts_off=number > rank)
    for _ in range(rest):
        order.append(pending.popleft())
        backward(a, puts_off=True)
    return (*order, *pending)


FAMILY = Family(
    name="dualpipev",
    title="DualPipeV",
    source="DeepSeek-AI, DeepSeek-V3, arXiv 2412.19437, section 3.2.1; github.com/deepseek-ai/DualPipe",
    splits_backward=True,
    build=_build,
    place=vee,
    refuse=_refuse,
)
