"""What two processes take while they train: python memory_worker.py MODE DIRECTORY, under torchrun.

MODE growth: the most resident memory of steps with few and with many microbatches, in boundary tensors, by our
interpreter and by torch's runtime. MODE limit: bytes alive at most while plan.json of DIRECTORY trains.
"""

import faulthandler
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from executor_cases import make_plan
from live_bytes import LiveBytes
from torch import Tensor, nn

from planner.executor import Pipeline
from planner.executor.torch_engine import TorchPipeline
from planner.plans import Plan
from planner.schedule.families import get_family
from profiles.measure.models import build_layers, loss_fn, synthetic_batch

BOUNDARY_BYTES = 4 * 2**20


class Gain(nn.Module):
    """Keeps nothing but its input for the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def _mean(output: Tensor, targets: Tensor) -> Tensor:
    return (output.mean() - targets.mean()) ** 2


def _resident_bytes(name: str) -> int:
    """VmRSS is now, VmHWM the most since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def growth() -> dict[str, Any]:
    found = {}
    for engine, cls in (("ours", Pipeline), ("torch", TorchPipeline)):
        for m in (4, 32):
            plan = make_plan(get_family("1f1b").generate(2, m, 1), micro_batch_size=1, dtype="float32", family="1f1b")
            inputs, targets = torch.ones(m, BOUNDARY_BYTES // 4), torch.ones(m, 1)
            pipe = cls(plan, [Gain(), Gain()], _mean, device="cpu", trace_steps=0)
            dist.barrier()
            before = _resident_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
            for _ in range(2):
                pipe.step(inputs, targets)
            taken = _resident_bytes("VmHWM") - before
            found[f"{engine} m={m}"] = {
                "boundary tensors": taken / BOUNDARY_BYTES,
                "graphs": pipe.peak_graphs,
                "buffers": pipe.peak_boundary_tensors,
            }
            del pipe
    return found


def limit(directory: Path) -> dict[str, Any]:
    plan = Plan.load(directory / "plan.json")
    assert plan.architecture is not None
    spec = plan.model

    def layer(index: int) -> nn.Module:
        only = range(index, index + 1)
        return build_layers(plan.architecture, spec, dtype=torch.float32, device="cpu", seed=0, only=only)[0]

    batch = synthetic_batch(spec, plan.global_batch_size, seed=0, step=0)
    layers = [partial(layer, index) for index in range(spec.num_layers + 2)]
    with Pipeline(plan, layers, loss_fn, device="cpu", trace_steps=0) as pipe:
        pipe.step(*batch)  # from here on gradients are there
        live = LiveBytes()
        with live:
            pipe.step(*batch)
        return {"peak bytes": live.peak, "left bytes": live.now, "buffers": pipe.peak_boundary_tensors}


def main(mode: str, directory: Path) -> None:
    dist.init_process_group("gloo")
    found = growth() if mode == "growth" else limit(directory)
    (directory / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)
    warnings.simplefilter("error")
    main(sys.argv[1], Path(sys.argv[2]))
