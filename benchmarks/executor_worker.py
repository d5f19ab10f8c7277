"""What each process of `benchmarks/executor.py` runs: python executor_worker.py PART DIRECTORY, under torchrun.

Reads DIRECTORY/PLAN.json for the plans and options.json, writes found-RANK.json.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from planner.executor import Pipeline
from planner.executor.torch_engine import TorchPipeline, torch_backward_input, torch_backward_weight
from planner.plans import Plan
from profiles.measure.memory import recording_memory
from profiles.measure.models import Architecture, build_layers, model_spec_for
from profiles.measure.recompute import call_with_recompute
from profiles.measure.split_backward import WeightGradStore, deferring

ROWS, WIDTH = 4, 16  # of the tiny boundary tensor
BOUNDARY_BYTES = 8 * 2**20  # of the large one
BLOCKS: dict[str, tuple[Architecture, int, bool]] = {  # architecture, width, whether it is recomputed
    "GPT-2, width 256": ("gpt2", 256, False),
    "GPT-2, width 512": ("gpt2", 512, False),
    "Llama, width 512": ("llama", 512, False),
    "GPT-2, width 512, recomputed": ("gpt2", 512, True),
}
Found = dict[str, Any]
Step = Callable[[], object]


class Scaled(nn.Module):
    """The least a layer can do with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """One product."""
        return x * self.gain


class Shifted(nn.Module):
    """Saves nothing for its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """From one float a row to a row of 2 MiB, or from such a row."""
        return x.expand(x.shape[0], BOUNDARY_BYTES // ROWS // 4) + self.shift


def mean_square(output: Tensor, targets: Tensor) -> Tensor:
    """A loss."""
    return (output - targets).square().mean()


def mean(output: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
    """A loss that saves nothing."""
    return output.mean()


def overhead(directory: Path, repeats: int) -> Found:
    """Wall and thread-CPU µs per compute action, each engine in turn, one step at a time."""
    rank = dist.get_rank()
    steps: dict[str, tuple[Step, int]] = {}
    for family in ("1f1b", "zb-h1", "zb-v"):
        plan = Plan.load(directory / f"{family}-64.json")
        m, num_actions = plan.layout.num_microbatches, len(plan.parsed_schedule.ranks[rank])
        rows = torch.rand(m * ROWS, WIDTH)
        engines: dict[str, Pipeline] = {
            "pipewright": Pipeline(plan, _layers(plan, Scaled), mean_square),
            "pipewright, no trace": Pipeline(plan, _layers(plan, Scaled), mean_square, trace_steps=0),
            "torch's runtime": TorchPipeline(plan, _layers(plan, Scaled), mean_square, trace_steps=0),
        }
        if family != "1f1b":
            engines["torch's runtime and split"] = TorchPipeline(
                plan, _layers(plan, Scaled), mean_square, split="torch", trace_steps=0
            )
        for name, pipe in engines.items():
            steps[f"{family}: {name}"] = (lambda pipe=pipe, rows=rows: pipe.step(rows, rows)), num_actions  # type: ignore[misc]
        if family == "1f1b":
            module = nn.Sequential(*(Scaled() for _ in range(plan.layout.layers_per_stage[rank])))
            steps["1f1b: hand-written loop"] = _hand_written(module, rows, m), num_actions
            steps["1f1b: torch's Schedule1F1B"] = _schedule_1f1b(module, rows, m), num_actions
    found: Found = {name: {"cpu_us": [], "wall_us": []} for name in steps}
    for repeat in range(repeats + 3):
        for name, (step, num_actions) in steps.items():
            dist.barrier()
            wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
            step()
            cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
            if repeat >= 3:
                found[name]["cpu_us"].append(cpu / 1e3 / num_actions)
                found[name]["wall_us"].append(wall / 1e3 / num_actions)
    return found


def _layers(plan: Plan, layer: Callable[[], nn.Module]) -> list[nn.Module]:
    return [layer() for _ in range(sum(plan.layout.layers_per_stage))]


def _schedule_1f1b(module: nn.Module, rows: Tensor, m: int) -> Step:
    rank = dist.get_rank()
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, m, loss_fn=mean_square)
    if rank == 0:
        return lambda: schedule.step(rows)
    return lambda: schedule.step(target=rows, return_outputs=False)


def _hand_written(module: nn.Module, rows: Tensor, m: int) -> Step:
    """1F1B of two ranks with isend and irecv, buffers on demand: what a person would write for this one case."""
    rank = dist.get_rank()
    other = 1 - rank
    pieces = rows.split(ROWS)

    def first() -> None:
        outputs: list[Tensor] = []
        sends: list[tuple[dist.Work | None, Tensor]] = []
        for j in range(m + 1):
            if j < m:
                output = module(pieces[j])
                sends.append((dist.isend(output.detach(), other), output))
                outputs.append(output)
            if j > 0:
                gradient = torch.empty(ROWS, WIDTH)
                work = dist.irecv(gradient, other)
                assert work is not None
                work.wait()
                torch.autograd.backward(outputs[0], gradient)
                del outputs[0]
                work, _ = sends.pop(0)
                assert work is not None
                work.wait()

    def last() -> None:
        sends: list[tuple[dist.Work | None, Tensor]] = []
        for j in range(m):
            value = torch.empty(ROWS, WIDTH)
            work = dist.irecv(value, other)
            assert work is not None
            work.wait()
            value.requires_grad_()
            (mean_square(module(value), pieces[j]) / m).backward()
            assert value.grad is not None
            sends.append((dist.isend(value.grad, other), value.grad))
            if len(sends) > 1:
                work, _ = sends.pop(0)
                assert work is not None
                work.wait()
        for work, _ in sends:
            assert work is not None
            work.wait()

    return last if rank else first


def memory(directory: Path) -> Found:
    """Peak resident memory above that before the first step, in boundary tensors of 8 MiB, for growing m."""
    found: Found = {}
    for family in ("1f1b", "zb-h1"):
        for m in (4, 16, 32):
            for name, cls in (("pipewright", Pipeline), ("torch's runtime", TorchPipeline)):
                plan = Plan.load(directory / f"{family}-{m}.json")
                rows = torch.zeros(m * plan.layout.micro_batch_size, 1)
                before = _resident_bytes("VmRSS")
                pipe = cls(plan, _layers(plan, Shifted), mean, trace_steps=0)
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak
                pipe.step(rows, rows)
                peak = _resident_bytes("VmHWM") - before
                dist.barrier()
                found[f"{family}, m {m}: {name}"] = peak / BOUNDARY_BYTES
                del pipe
                gc.collect()
    return found


def _resident_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def split(repeats: int) -> Found:
    """Of each of `BLOCKS`: thread CPU of BW, and of B and W apart, our way and torch's; bytes after each."""
    torch.set_num_threads(1)
    return {name: split_block(*block, repeats=repeats) for name, block in BLOCKS.items()}


def split_block(architecture: Architecture, hidden_size: int, recompute: bool, *, repeats: int) -> Found:
    """One block of a bundled model, heads of 64, 2 × 256 tokens, float32; gradients are there from warm-ups on."""
    spec = model_spec_for(
        architecture,
        num_layers=1,
        hidden_size=hidden_size,
        num_heads=hidden_size // 64,
        vocab_size=64,
        sequence_length=256,
    )
    (block,) = build_layers(architecture, spec, dtype=torch.float32, device="cpu", seed=0, only=range(1, 2))
    x, dy = torch.rand(2, 256, hidden_size), torch.rand(2, 256, hidden_size)
    forward = partial(call_with_recompute, block) if recompute else block
    ways = [_Whole(block, forward, dy), _Ours(block, forward, dy), _Torchs(block, forward, dy)]
    times: dict[str, list[float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.thread_time_ns()
        yield
        times.setdefault(name, []).append((time.thread_time_ns() - start) / 1e3)

    for _ in range(repeats + 2):
        for way in ways:
            way.run(x, timed)
    found: Found = {"times_us": {name: samples[2:] for name, samples in times.items()}}
    for way in ways[1:]:
        with recording_memory(torch.device("cpu")) as recorded:
            way.run(x, lambda name: recorded.phase(name[0]))
        start = recorded.phases["F"].start_bytes
        found[f"bytes, {way.name}"] = {name: phase.end_bytes - start for name, phase in recorded.phases.items()}
    return found


class _Way:
    """A way of running F and the backward; `phase` is entered around each of F, B, W and BW."""

    name = ""

    def __init__(self, block: nn.Module, forward: Callable[[Tensor], Tensor], dy: Tensor) -> None:
        self.block, self.forward, self.dy = block, forward, dy

    def run(self, x: Tensor, phase: Callable[[str], AbstractContextManager[object]]) -> None:
        raise NotImplementedError


class _Whole(_Way):
    """BW of plain torch."""

    def run(self, x: Tensor, phase: Callable[[str], AbstractContextManager[object]]) -> None:
        with phase("F, whole"):
            output = self.forward(x.clone().requires_grad_())
        with phase("BW"):
            torch.autograd.backward(output, self.dy)


class _Ours(_Way):
    """B and W as profiles measure them and the executor runs them."""

    name = "ours"

    def run(self, x: Tensor, phase: Callable[[str], AbstractContextManager[object]]) -> None:
        leaf, store = x.clone().requires_grad_(), WeightGradStore()
        with phase("F, ours"), deferring(store):
            output = self.forward(leaf)
        with phase("B, ours"):
            torch.autograd.backward(output, self.dy)
            del output
        with phase("W, ours"):
            store.run()


class _Torchs(_Way):
    """B and W of torch.distributed.pipelining."""

    name = "torch's"

    def run(self, x: Tensor, phase: Callable[[str], AbstractContextManager[object]]) -> None:
        leaf = x.clone().requires_grad_()
        with phase("F, torch's"):
            output = self.forward(leaf)
        with phase("B, torch's"):
            _, groups = torch_backward_input([output], [self.dy], [leaf], self.block.parameters())
            del output
        with phase("W, torch's"):
            torch_backward_weight(self.block.parameters(), groups)
            del groups


def split_ratio(times_us: Mapping[str, Sequence[float]], way: str) -> float:
    """(B + W) / BW of the least times: 1 costs nothing."""
    return (min(times_us[f"B, {way}"]) + min(times_us[f"W, {way}"])) / min(times_us["BW"])


def main(part: str, directory: Path) -> None:
    """Measure one part."""
    repeats = json.loads((directory / "options.json").read_text())["repeats"]
    torch.manual_seed(0)
    rank = 0
    if part == "backward":
        found = split(repeats)
    else:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        found = overhead(directory, repeats) if part == "overhead" else memory(directory)
        dist.destroy_process_group()
    (directory / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
