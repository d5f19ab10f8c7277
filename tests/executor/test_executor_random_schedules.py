"""Any valid schedule trains exactly; any other is refused before a process group is there."""

import random
from pathlib import Path

import pytest
import torch.distributed as dist
from executor_cases import can_run, loss_fn, make_plan, random_schedule
from torch import nn
from worker_launch import found_by

from planner.errors import ScheduleError
from planner.executor import Pipeline
from planner.schedule.actions import Action, Kind, Schedule

WORKER = Path(__file__).with_name("random_worker.py")
TOLERANCE = 1e-10


def assert_exact(num_ranks: int, seeds: range, directory: Path) -> None:
    every = found_by(WORKER, num_ranks, seeds.start, seeds.stop, directory, timeout_s=290)
    for rank, found in enumerate(every):
        assert len(found) == len(seeds)
        for seed, case in found.items():
            where = f"seed {seed}, rank {rank}: {case}"
            assert case["gradients"] < TOLERANCE, where
            assert case["loss"] < TOLERANCE, where


def test_random_schedules_with_recompute_give_the_gradients_of_plain_torch(tmp_path):
    assert_exact(3, range(1000, 1040), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "seeds"), [(2, range(2000, 2100)), (3, range(3000, 3060)), (4, range(4000, 4040))]
)
def test_two_hundred_random_schedules_give_the_gradients_of_plain_torch(num_ranks, seeds, tmp_path):
    assert_exact(num_ranks, seeds, tmp_path)


def broken(schedule: Schedule, seed: int) -> Schedule:
    """One thing changed: an action dropped, doubled, moved, sent to another rank, or made one of another kind."""
    rng = random.Random(seed)
    ranks = [list(actions) for actions in schedule.ranks]
    actions = rng.choice(ranks)
    here, there = rng.randrange(len(actions)), rng.randrange(len(actions))
    action = actions.pop(here)
    what = rng.choice(["drop", "double", "move", "rank", "kind", "microbatch"])
    if what == "double":
        actions[here:here] = [action]
        actions.insert(there, action)
    elif what == "move":
        actions.insert(there, action)
    elif what == "rank":
        rng.choice(ranks).append(action)
    elif what == "kind":
        actions.insert(here, action._replace(kind=rng.choice(list(Kind))))
    elif what == "microbatch":
        actions.insert(here, action._replace(microbatch=rng.randint(0, schedule.num_microbatches)))
    return Schedule(tuple(map(tuple, ranks)))


def test_random_invalid_schedules_are_refused_before_anything_runs():
    """Says what is wrong and where; a schedule that is still valid gets as far as the number of processes."""
    refused = 0
    for seed in range(200):
        schedule = random_schedule(seed, 2 + seed % 2, recomputes=True)
        plan = make_plan(schedule)
        changed = broken(schedule, seed)
        if can_run(changed, schedule.num_stages, schedule.num_microbatches):
            continue
        refused += 1
        plan = plan.model_copy(update={"schedule": changed.to_lines()})
        with pytest.raises(
            ScheduleError, match=r"^(rank \d+, step \d+: |rank \d+: |deadlock: .*\n|no rank runs)"
        ) as error:
            Pipeline(plan, [nn.Identity()] * schedule.num_stages, loss_fn, device="cpu")
        assert "rank" in str(error.value), seed
    assert refused > 100
    assert not dist.is_initialized()


def test_the_oracle_knows_what_can_run():
    def runs(*lines: str) -> bool:
        return can_run(Schedule.from_lines(lines), 2, 1)

    assert runs("F0.0 R0.0 BW0.0", "F1.0 B1.0 W1.0")
    assert not runs("F0.0 BW0.0 R0.0", "F1.0 B1.0 W1.0")
    assert not runs("R0.0 F0.0 BW0.0", "F1.0 B1.0 W1.0")
    assert not runs("F0.0 BW0.0", "F1.0 B1.0")
    assert not runs("F0.0 BW0.0 BW0.0", "F1.0 BW1.0")
    assert Action.parse("R0.0").kind is Kind.R
