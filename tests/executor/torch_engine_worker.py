"""What test processes of torch's engine run under torchrun: python torch_engine_worker.py MODE DIRECTORY."""

import faulthandler
import json
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from executor_cases import WIDTH, loss_fn, make_batch, make_layer, make_plan, random_schedule
from torch import nn

from planner.errors import ExecutionError
from planner.executor import Pipeline
from planner.executor.holders import Tie
from planner.executor.torch_engine import TorchPipeline, refuse_for_torch
from planner.plans import Plan
from planner.schedule.families import get_family

Found = dict[str, Any]
FAMILIES = [
    ("naive", 1, 3),
    ("gpipe", 1, 4),
    ("1f1b", 1, 6),
    ("afp", 1, 6),
    ("zb-h1", 1, 6),
    ("zb-h2", 1, 6),
    ("interleaved-1f1b", 2, 6),
    ("breadth-first", 2, 3),
    ("hanayo", 2, 4),
    ("zb-v", 2, 6),
    ("v-half", 2, 5),
    ("v-min", 2, 5),
    ("dualpipev", 2, 6),
]
NUM_RANDOM = 12


def gradients_of(cls: type[Pipeline], plan: Plan, seed: int, **options: Any) -> Found:
    """Losses and accumulated gradients of two steps, with a third of other data before whose gradients are kept."""
    num_layers = sum(plan.layout.layers_per_stage)
    layers = [partial(make_layer, index, num_layers, seed) for index in range(num_layers)]
    pipe = cls(plan, layers, loss_fn, **options)
    rows = plan.layout.num_microbatches * plan.layout.micro_batch_size
    mine = slice(pipe.coordinates.data_rank * rows, (pipe.coordinates.data_rank + 1) * rows)
    losses = []
    for batch in range(2):
        inputs, targets = make_batch(plan.global_batch_size, batch)
        loss = pipe.step(inputs[mine], targets[mine])
        losses.append(None if loss is None else loss.item())
    return {"losses": losses, "gradients": {n: p.grad for n, p in pipe.named_parameters()}, "pipe": pipe}


def compare(plan: Plan, seed: int, *, ties: Sequence[Tie] = (), **options: Any) -> Found:
    ours = gradients_of(Pipeline, plan, seed, ties=ties)
    theirs = gradients_of(TorchPipeline, plan, seed, ties=ties, **options)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    worst = 0.0
    for name, expected in theirs["gradients"].items():
        got = ours["gradients"][name]
        worst = max(worst, (torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)).item())
    kinds = [[(e.kind, e.stage, e.microbatch) for e in r["pipe"].trace().steps[-1].events] for r in (ours, theirs)]
    kinds = [[event for event in events if event[1] is not None] for events in kinds]
    return {
        "gradients": worst,
        "losses": [ours["losses"], theirs["losses"]],
        "same_actions": kinds[0] == kinds[1],
        "schedule": list(plan.schedule),
    }


def agreement(num_ranks: int) -> Found:
    found: Found = {}
    for name, virtual, m in FAMILIES:
        schedule = get_family(name).generate(num_ranks, m, virtual)
        plan = make_plan(schedule, layers_per_stage=[2, *[1] * (schedule.num_stages - 1)], family=name)
        found[name] = compare(plan, seed=1)
        # The last stage of these models ends in a view, which torch lets pass there.
        found[f"{name} split by torch"] = compare(plan, seed=1, split="torch")
    plan = make_plan(
        get_family("zb-v").generate(num_ranks, 6, 2), recompute="full", layers_per_stage=[2] * 2 * num_ranks
    )
    found["recompute"] = compare(plan, seed=2)
    plan = make_plan(get_family("zb-h1").generate(num_ranks, 6, 1), layers_per_stage=[2] * num_ranks)
    found["tied"] = compare(plan, seed=2, ties=[((0, "weight"), (2 * num_ranks - 1, "weight"))])
    compared = seed = 0
    while compared < NUM_RANDOM:
        seed += 1
        plan = make_plan(random_schedule(seed, num_ranks))
        try:
            refuse_for_torch(plan)
        except ExecutionError:
            continue  # the last stage's forwards are out of order: seen to be refused by another test
        compared += 1
        found[f"random {seed}"] = compare(plan, seed)
    return found


def data_parallel() -> Found:
    schedule = get_family("zb-h1").generate(2, 4, 1)
    return {"pp 2 x dp 2": compare(make_plan(schedule, layers_per_stage=[2, 2], dp=2, family="zb-h1"), seed=3)}


class Frozen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class ByValue(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x


def refusals() -> Found:
    """Errors in the first step; both processes meet each, so that none waits for the other."""
    found: Found = {}
    rows = torch.rand(8, 3, WIDTH)

    def tell(name: str, layers: list[nn.Module]) -> None:
        plan = make_plan(get_family("zb-h1").generate(2, 4, 1))
        try:
            pipe = TorchPipeline(plan, layers, lambda o, t: (o - t).square().mean())
            pipe.step(rows, rows)
            pipe.step(rows[:, 1:], rows[:, 1:])
        except ExecutionError as error:
            found[name] = str(error)

    tell("frozen, then another shape", [Frozen(), nn.Linear(WIDTH, WIDTH)])
    tell("by value", [ByValue(), nn.Linear(WIDTH, WIDTH)])
    return found


def main(mode: str, directory: Path) -> None:
    dist.init_process_group("gloo")
    if mode == "four":
        found = data_parallel()
    else:
        found = agreement(2 if mode == "two" else 3)
        if mode == "two":
            found["refusals"] = refusals()
    (directory / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)
    warnings.simplefilter("error")
    main(sys.argv[1], Path(sys.argv[2]))
