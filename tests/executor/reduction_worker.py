"""Data-parallel reduction beside the pipeline, in four processes.

Started by torchrun: python reduction_worker.py DIRECTORY.
"""

import faulthandler
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from executor_cases import loss_fn, make_layer, make_plan, random_schedule
from executor_worker import local_batch
from torch import Tensor, nn

from planner.executor import Pipeline
from planner.plans import Plan
from planner.schedule.actions import Schedule
from planner.schedule.families import get_family

SMALL_BUCKETS = 300  # bytes: some parameters alone, some together


def layers_of(plan: Plan, *, tied: bool) -> list[nn.Module]:
    """With `tied`, the first block's inner matrix is also that of the third, which is in another stage of the rank."""
    count = sum(plan.layout.layers_per_stage)
    layers = [make_layer(index, count, 3) for index in range(count)]
    if tied:
        layers[3].inner.weight = layers[1].inner.weight  # type: ignore[union-attr, assignment]
    return layers


def trained(plan: Plan, *, overlap: bool, tied: bool, bucket_bytes: int) -> tuple[dict[str, Tensor], Pipeline]:
    """Gradients summed over two steps; the first block's bias is frozen in the second."""
    pipe = Pipeline(plan, layers_of(plan, tied=tied), loss_fn, overlap_reduction=overlap, trace_steps=1)
    pipe._sync._bucket_bytes = bucket_bytes  # type: ignore[attr-defined]
    for batch in range(2):
        for name, parameter in pipe.named_parameters():
            if name == "1.inner.bias":
                parameter.requires_grad_(batch == 0)
        pipe.step(*local_batch(plan, pipe, batch))
    return {name: p.grad.clone() for name, p in pipe.named_parameters() if p.grad is not None}, pipe


def case(plan: Plan, *, tied: bool = False, bucket_bytes: int = SMALL_BUCKETS) -> dict[str, Any]:
    apart, _ = trained(plan, overlap=False, tied=tied, bucket_bytes=bucket_bytes)
    beside, pipe = trained(plan, overlap=True, tied=tied, bucket_bytes=bucket_bytes)
    (step,) = pipe.trace().steps
    everywhere = True
    for name in sorted(beside):
        first = beside[name].clone()
        dist.broadcast(first, group=pipe.data_group, group_src=0)
        everywhere &= torch.equal(first, beside[name])
    return {
        "equal": beside.keys() == apart.keys() and all(torch.equal(beside[n], apart[n]) for n in apart),
        "same on all data ranks": everywhere,
        "names": sorted(beside),
        "events": [(e.kind, e.stage, e.microbatch, e.start_us, e.end_us) for e in step.events],
        "held": [len(pipe._sync._on_the_way), len(pipe._sync._arrived)],  # type: ignore[attr-defined]
    }


def main(directory: Path) -> None:
    dist.init_process_group("gloo")
    found = {}
    for name, virtual in (("1f1b", 1), ("zb-h1", 1), ("interleaved-1f1b", 2)):
        schedule = get_family(name).generate(2, 4, virtual)
        found[name] = case(make_plan(schedule, layers_per_stage=[2] * schedule.num_stages, dp=2, family=name))
    found["random"] = case(make_plan(random_schedule(8, 2, recomputes=True), dp=2))
    one_rank = Schedule.from_lines(["F0.0 F1.0 F0.1 F1.1 BW1.0 B1.1 W1.1 BW0.0 B0.1 W0.1"])
    plan = make_plan(one_rank, layers_per_stage=[2, 3], dp=4)
    for bucket_bytes in (1, SMALL_BUCKETS, 10**9):
        found[f"four data ranks, buckets of {bucket_bytes}"] = case(plan, tied=True, bucket_bytes=bucket_bytes)
    (directory / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)
    warnings.simplefilter("error")
    main(Path(sys.argv[1]))
