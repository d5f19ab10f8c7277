"""DualPipe: two replicas in opposite directions, each microbatch's forward beside another's backward.

Replica 0 has stage s on rank s, replica 1 on rank p − 1 − s; the first half of the microbatches takes replica 0. On
rank r, direction 0 is the replica that starts in its own half of the ranks, direction 1 the other. With n = p / 2,
h = min(r, p − 1 − r) and M = m / 2 microbatches per direction, in the order of F0 and so on, rank r runs
1. 2(n − h − 1) times F0;  2. h + 1 times F0, F1;  3. n − h − 1 times B1, W1, F1;
4. M − 2n + h + 1 times F0, BW1, F1, BW0;  5. n − h − 1 times BW1, F1, BW0;
6. h + 1 times the backward of direction 1, then of 0: BW at first, then B with its W put off, from the middle on;
7. n − h − 1 times the oldest W put off, B0 with its W put off;  8. what is left of the W put off.
The authors overlap the pairs F0, BW1 and F1, BW0; here they run one after the other. p and m are even, m ≥ 2p.

With equal stages: makespan bubble (p/2 − 1)(T_F + T_B − T_W) where the times are close to each other, more where they
are far apart. Peak activations: at most p + 1 microbatches. Every rank holds two stages' weights, gradients and
optimizer state; ranks r and p − 1 − r sum the gradients of both.
"""

from collections import deque
from itertools import count

from planner.schedule.actions import Action, Kind, Schedule
from planner.schedule.families.base import Family, only_two_directions


def _refuse(num_ranks: int, num_microbatches: int, virtual_stages: int) -> str | None:
    if num_ranks % 2 or num_microbatches % 2:
        return (
            f"it takes an even number of ranks and of microbatches, not {num_ranks} and {num_microbatches}; use "
            "such, or the family dualpipev"
        )
    if num_microbatches < 2 * num_ranks:
        return (
            f"it needs at least {2 * num_ranks} microbatches for {num_ranks} ranks, not {num_microbatches}; "
            "use more, or the family chimera"
        )
    return only_two_directions(num_ranks, num_microbatches, virtual_stages)


def _build(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    del virtual_stages
    return Schedule(tuple(_order(rank, num_ranks, num_microbatches // 2) for rank in range(num_ranks)))


def _order(rank: int, num_ranks: int, per_direction: int) -> tuple[Action, ...]:
    half, mirror = num_ranks // 2, num_ranks - 1 - rank
    near = min(rank, mirror)  # h
    rest = half - near - 1
    # replica 0 runs stage `rank` here and has microbatches from 0, replica 1 `mirror` and those from m / 2
    replicas = (rank, 0), (mirror, per_direction)
    (stage0, first0), (stage1, first1) = replicas if rank < half else replicas[::-1]
    stages = stage0, stage1
    forwards = count(first0), count(first1)
    backwards = count(first0), count(first1)
    order: list[Action] = []
    pending: deque[Action] = deque()

    def forward(direction: int) -> None:
        order.append(Action(Kind.F, stages[direction], next(forwards[direction])))

    def backward(direction: int, *, puts_off: bool = False) -> None:
        stage, microbatch = stages[direction], next(backwards[direction])
        order.append(Action(Kind.B if puts_off else Kind.BW, stage, microbatch))
        if puts_off:
            pending.append(Action(Kind.W, stage, microbatch))

    for _ in range(2 * rest):
        forward(0)
    for _ in range(near + 1):
        forward(0)
        forward(1)
    for _ in range(rest):
        backward(1, puts_off=True)
        order.append(pending.popleft())
        forward(1)
    for _ in range(per_direction - num_ranks + near + 1):
        forward(0)
        backward(1)
        forward(1)
        backward(0)
    for _ in range(rest):
        backward(1)
        forward(1)
        backward(0)
    for number in range(2 * (near + 1)):  # 1, 0, 1, 0, ..
        backward(1 - number % 2, puts_off=number > near)
    for _ in range(rest):
        order.append(pending.popleft())
        backward(0, puts_off=True)
    return (*order, *pending)


FAMILY = Family(
    name="dualpipe",
    title="DualPipe",
    source="DeepSeek-AI, DeepSeek-V3, arXiv 2412.19437, section 3.2.1; github.com/deepseek-ai/DualPipe",
    splits_backward=True,
    build=_build,
    refuse=_refuse,
    num_replicas=2,
)
