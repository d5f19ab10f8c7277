"""Random valid schedules under torchrun: python random_worker.py FIRST_SEED END_SEED DIRECTORY.

Each seed draws a placement, orders, which microbatches have B and W or BW, which R; how receives are posted, whether
messages have tags, and whether layers recompute themselves, too, go round with the seed.
"""

import faulthandler
import json
import sys
import warnings
from pathlib import Path

import torch.distributed as dist
from executor_cases import make_plan, random_schedule
from executor_worker import Found, compare

from planner.executor.groups import Groups

_BY_TAG = Groups.matches_by_tag


def main(first: int, end: int, directory: Path) -> None:
    dist.init_process_group("gloo")
    found: Found = {}
    for seed in range(first, end):
        # Without tags is the way of NCCL: a group per channel, messages matched by their order alone.
        Groups.matches_by_tag = _BY_TAG if seed % 3 else property(lambda self: False)  # type: ignore[method-assign]
        schedule = random_schedule(seed, dist.get_world_size(), recomputes=seed % 5 > 0)
        plan = make_plan(schedule, recompute="full" if seed % 7 == 0 else "none")
        found[str(seed)] = compare(plan, seed, batches=2, receive_ahead=seed % 4)
    (directory / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(280)  # where everybody is, should they hang
    warnings.simplefilter("error")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
