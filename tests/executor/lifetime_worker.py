"""What test processes run under torchrun: python lifetime_worker.py DIRECTORY.

Names of pipelines and optimizers stay in the module to the interpreter's end, as in anybody's script.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from executor_cases import WIDTH, loss_fn, make_batch, make_layer, make_plan
from torch import Tensor, nn

from planner.errors import ExecutionError
from planner.executor import Pipeline
from planner.schedule.families import get_family


class Buffers(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([rank == 0, True]))
        self.register_buffer("count", torch.tensor(10 * rank))
        self.register_buffer("turned", torch.full((3, 2), float(rank)).t())
        self.register_buffer("wide", torch.ones(1).expand(4))

    def forward(self, value: Tensor) -> Tensor:
        return value


def threads() -> dict[str, int]:
    return Counter((task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())


def refusal(call: Callable[..., object], *args: object) -> str:
    try:
        call(*args)
    except ExecutionError as error:
        return str(error)
    return "none"


rank = int(os.environ["RANK"])
found: dict[str, object] = {}
for zero_stage in (0, 1):
    plan = make_plan(get_family("1f1b").generate(1, 2, 1), layers_per_stage=[4], dp=2, zero_stage=zero_stage)
    layers = [make_layer(0, 3, seed=rank), make_layer(1, 3, seed=rank), Buffers(rank), make_layer(2, 3, seed=rank)]
    inputs, targets = make_batch(plan.global_batch_size, 0)
    mine = slice(rank * len(inputs) // 2, (rank + 1) * len(inputs) // 2)
    with Pipeline(plan, layers, loss_fn, device="cpu") as pipe:
        start = [tensor.tolist() for tensor in pipe.state_dict().values()]
        optimizer = pipe.make_optimizer(torch.optim.AdamW, lr=0.01)
        with torch.inference_mode():
            inference = refusal(pipe.step, inputs[mine], targets[mine])
        pipe.step(inputs[mine], targets[mine])
        optimizer.step()
        gloo = {name: count for name, count in threads().items() if "gloo" in name}
    found[f"zero {zero_stage}"] = {
        "start": start,
        "end": [tensor.tolist() for tensor in pipe.state_dict().values()],
        "gloo threads before": gloo,
        "gloo threads after": {name: count for name, count in threads().items() if "gloo" in name},
        "inference": inference,
        "step": refusal(pipe.step, inputs[mine], targets[mine]),
        "optimizer": refusal(optimizer.step),
        "peak": pipe.peak_graphs,
    }
    pipe.close()  # once more does nothing

plan = make_plan(get_family("1f1b").generate(1, 2, 1), layers_per_stage=[2], dp=2)
other = nn.Linear(WIDTH, WIDTH + rank).double()
found["other layers"] = refusal(Pipeline, plan, [other, nn.Identity()], loss_fn)
Path(sys.argv[1], f"found-{rank}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()
