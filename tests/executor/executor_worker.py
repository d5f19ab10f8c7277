"""What test processes run under torchrun: python executor_worker.py MODE DIRECTORY.

Every process writes its findings to DIRECTORY/found-RANK.json. One launch runs many cases: launching takes time.
"""

import faulthandler
import gc
import json
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from executor_cases import LENGTH, WIDTH, loss_fn, make_batch, make_layer, make_plan, random_schedule
from torch import Tensor, nn

from planner.errors import ExecutionError
from planner.executor import Pipeline
from planner.executor.groups import Groups
from planner.plans import Plan
from planner.schedule.families import get_family

NUM_RANDOM = 20
Found = dict[str, Any]


def make_pipeline(plan: Plan, seed: int, **options: Any) -> Pipeline:
    num_layers = sum(plan.layout.layers_per_stage)
    layers = [partial(make_layer, index, num_layers, seed) for index in range(num_layers)]
    return Pipeline(plan, layers, loss_fn, **options)


def reference(plan: Plan, seed: int, batches: list[int]) -> tuple[list[float], dict[str, Tensor | None]]:
    """Losses per batch and gradients summed over batches: the global batch in one go, in plain torch."""
    num_layers = sum(plan.layout.layers_per_stage)
    model = nn.Sequential(*(make_layer(index, num_layers, seed) for index in range(num_layers)))
    losses = []
    for batch in batches:
        inputs, targets = make_batch(plan.global_batch_size, batch)
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        losses.append(loss.item())
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


def local_batch(plan: Plan, pipe: Pipeline, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """This data rank's rows, only where they are needed."""
    rows = plan.layout.num_microbatches * plan.layout.micro_batch_size
    inputs, targets = make_batch(plan.global_batch_size, batch)
    mine = slice(pipe.coordinates.data_rank * rows, (pipe.coordinates.data_rank + 1) * rows)
    stages = {stage.index for stage in pipe.stages}
    return (
        inputs[mine] if 0 in stages else None,
        targets[mine] if plan.layout.num_stages - 1 in stages else None,
    )


def compare(plan: Plan, seed: int, *, batches: int = 1, **options: Any) -> Found:
    """Run `batches` steps without forgetting gradients between them; how far from the reference they are."""
    pipe = make_pipeline(plan, seed, **options)
    losses, gradients = reference(plan, seed, list(range(batches)))
    loss_difference = 0.0
    for batch in range(batches):
        loss = pipe.step(*local_batch(plan, pipe, batch))
        if loss is not None:
            loss_difference = max(loss_difference, abs(loss.item() - losses[batch]) / losses[batch])
    worst = 0.0
    for name, parameter in pipe.named_parameters():
        expected, got = gradients[name], parameter.grad
        assert expected is not None, name
        assert got is not None, name
        worst = max(worst, (torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)).item())
    return {"gradients": worst, "loss": loss_difference, "schedule": list(plan.schedule)}


def exactness(num_ranks: int) -> Found:
    found: Found = {}
    for name, virtual, m in [
        ("gpipe", 1, 4),
        ("1f1b", 1, 6),
        ("1f1b", 1, 1),
        ("interleaved-1f1b", 2, 2 * num_ranks),
        ("zb-h1", 1, 6),
        ("naive", 1, 3),
        ("afp", 1, 6),
        ("breadth-first", 2, 3),
        ("hanayo", 2, 4),
        ("zb-h2", 1, 6),
        ("zb-v", 2, 6),
        ("v-half", 2, 5),
        ("v-min", 2, 5),
        ("dualpipev", 2, 2 * num_ranks),
    ]:
        schedule = get_family(name).generate(num_ranks, m, virtual)
        layers_per_stage = [2, *[1] * (schedule.num_stages - 1)]
        plan = make_plan(schedule, layers_per_stage=layers_per_stage, family=name)
        found[f"{name} m={m}"] = compare(plan, seed=1, batches=2)
        plan = make_plan(schedule, layers_per_stage=layers_per_stage, family=name, recompute="full")
        found[f"{name} m={m} recompute"] = compare(plan, seed=1)
    for seed in range(NUM_RANDOM):
        plan = make_plan(random_schedule(seed, num_ranks))
        found[f"random {seed}"] = compare(plan, seed, batches=2, receive_ahead=seed % 4)
    return found


def without_tags(num_ranks: int) -> Found:
    """The way of NCCL, on gloo: a group per channel, messages matched by their order alone."""
    Groups.matches_by_tag = property(lambda self: False)  # type: ignore[assignment, method-assign]  # on purpose
    found: Found = {}
    for seed in range(NUM_RANDOM):
        plan = make_plan(random_schedule(100 + seed, num_ranks))
        found[f"random {100 + seed} without tags"] = compare(plan, seed, batches=2, receive_ahead=seed % 4)
    return found


def data_parallel() -> Found:
    found: Found = {}
    for name, virtual in [("1f1b", 1), ("interleaved-1f1b", 2), ("zb-h1", 1)]:
        schedule = get_family(name).generate(2, 4, virtual)
        plan = make_plan(schedule, layers_per_stage=[2] * schedule.num_stages, dp=2, family=name)
        found[name] = compare(plan, seed=3, batches=2)
    found["random"] = compare(make_plan(random_schedule(5, 2), dp=2), seed=5)
    for zero_stage in (0, 1):
        found[f"adamw zero {zero_stage}"] = {"parameters": _train(zero_stage)}
    found["experts"] = {"gradients seen": _unused_parameters()}
    found["start"] = {"first parameters": _first_parameters()}
    return found


def _train(zero_stage: int) -> float:
    """Two steps of AdamW; the worst difference of a parameter from plain torch's."""
    schedule = get_family("1f1b").generate(2, 4, 1)
    plan = make_plan(schedule, layers_per_stage=[2, 2], dp=2, zero_stage=zero_stage)
    pipe = make_pipeline(plan, 4)
    optimizer = pipe.make_optimizer(torch.optim.AdamW, lr=0.01)
    assert (type(optimizer.inner) is torch.optim.AdamW) == (zero_stage == 0), type(optimizer.inner)
    model = nn.Sequential(*(make_layer(index, 4, 4) for index in range(4)))
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in range(2):
        optimizer.zero_grad()
        pipe.step(*local_batch(plan, pipe, batch))
        optimizer.step()
        plain.zero_grad()
        inputs, targets = make_batch(plan.global_batch_size, batch)
        loss_fn(model(inputs), targets).backward()
        plain.step()
    expected = dict(model.named_parameters())
    return max((p - expected[name]).abs().max().item() for name, p in pipe.named_parameters())


class Expert(nn.Module):
    """Uses `always`; `sometimes` on data rank 1 alone; `never` nowhere."""

    def __init__(self, uses_both: bool) -> None:
        super().__init__()
        self.uses_both = uses_both
        for name in ("always", "sometimes", "never"):
            setattr(self, name, nn.Parameter(torch.ones(1, dtype=torch.float64)))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.always
        return x * self.sometimes if self.uses_both else x


def _unused_parameters() -> list[str]:
    plan = make_plan(get_family("1f1b").generate(2, 2, 1), dp=2)
    data_rank = dist.get_rank() % 2
    layers = [Expert(data_rank == 1) for _ in range(2)]
    pipe = Pipeline(plan, layers, lambda output, target: (output - target).mean())
    rows = torch.ones(4, 3, dtype=torch.float64)
    pipe.step(rows, rows)
    return sorted(name for name, p in pipe.named_parameters() if p.grad is not None)


def _first_parameters() -> list[float]:
    """What a pipeline starts from whose layers every process makes from a seed of its own, one of them transposed."""
    plan = make_plan(get_family("1f1b").generate(2, 2, 1), dp=2)
    torch.manual_seed(dist.get_rank())
    layers = [nn.Linear(2, 3, dtype=torch.float64) for _ in range(2)]
    for layer in layers:
        layer.weight = nn.Parameter(torch.rand(2, 3, dtype=torch.float64).T)
        layer.register_buffer("drawn", torch.rand(2, dtype=torch.float64))
    pipe = Pipeline(plan, layers, lambda output, target: (output - target).mean())
    return [value for tensor in pipe.state_dict().values() for value in tensor.flatten().tolist()]


def memory() -> Found:
    """What is alive at most, for few and for many microbatches."""
    found: Found = {}
    for name in ("1f1b", "zb-h1"):
        for m in (4, 16):
            plan = make_plan(get_family(name).generate(2, m, 1), layers_per_stage=[3, 3], family=name)
            pipe = make_pipeline(plan, 0)
            found[f"{name} m={m}"] = _peaks(plan, pipe)
    return found


def _peaks(plan: Plan, pipe: Pipeline) -> Found:
    boundary = (plan.layout.micro_batch_size, LENGTH, WIDTH)
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()
    peaks = {"saved": 0, "boundary": 0}

    def pack(tensor: Tensor) -> _Saved:
        box = _Saved(tensor)
        saved.add(box)
        peaks["saved"] = max(peaks["saved"], len(saved))
        return box

    def count() -> int:
        return sum(issubclass(type(o), Tensor) and o.shape == boundary for o in gc.get_objects())

    def look(*_: object) -> None:
        peaks["boundary"] = max(peaks["boundary"], count())

    for layer in pipe.module.values():
        layer.register_forward_hook(look)
    gc.collect()
    gc.freeze()  # what is there already need not be looked through
    before = count()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        pipe.step(*local_batch(plan, pipe, 0))
    left = len(saved) + count() - before
    gc.unfreeze()
    return {
        **peaks,
        "graphs": pipe.peak_graphs,
        "buffers": pipe.peak_boundary_tensors,
        "left": left,
    }


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def refusals() -> Found:
    """Errors that every process sees before anything is sent."""
    plan = make_plan(get_family("1f1b").generate(2, 4, 1), layers_per_stage=[2, 2])
    found: Found = {}
    for name, batch in {"rows": make_batch(7, 0), "nothing": (None, None)}.items():
        try:
            make_pipeline(plan, 0).step(*batch)
        except ExecutionError as error:
            found[name] = str(error)
    return found


def trace(directory: Path) -> Found:
    plan = make_plan(get_family("zb-h1").generate(2, 3, 1), layers_per_stage=[2, 2], family="zb-h1")
    pipe = make_pipeline(plan, 0, trace_steps=2)
    for batch in range(3):
        pipe.step(*local_batch(plan, pipe, batch))
    gathered = pipe.gather_trace()
    if gathered is not None:
        gathered.save(directory / "trace.json")
    return {}


def failing_loss() -> None:
    """The last process fails in the middle of the second step."""
    plan = make_plan(get_family("1f1b").generate(2, 4, 1), layers_per_stage=[2, 2])
    calls = 0

    def fail_later(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise ArithmeticError("the loss of microbatch 1 cannot be computed")
        return loss_fn(output, targets)

    layers = [partial(make_layer, index, 4, 0) for index in range(4)]
    with Pipeline(plan, layers, fail_later) as pipe:
        for batch in range(2):
            pipe.step(*local_batch(plan, pipe, batch))


def changing_shape() -> None:
    """The second step's sequences are shorter."""
    plan = make_plan(get_family("1f1b").generate(2, 4, 1), layers_per_stage=[2, 2])
    with make_pipeline(plan, 0) as pipe:
        inputs, targets = make_batch(8, 0)
        pipe.step(inputs, targets)
        pipe.step(inputs[:, 1:], targets[:, 1:])


def main(mode: str, directory: Path) -> None:
    alone: dict[str, Callable[[], None]] = {"failing_loss": failing_loss, "changing_shape": changing_shape}
    if mode in alone:
        return alone[mode]()
    dist.init_process_group("gloo")
    if mode == "two":
        found = exactness(2) | {"memory": memory(), "refusals": refusals()} | trace(directory)
        found |= without_tags(2)
    elif mode == "three":
        found = exactness(3) | without_tags(3)
    else:
        found = data_parallel()
    (directory / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    return None


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    faulthandler.dump_traceback_later(100)  # where everybody is, should they hang
    warnings.simplefilter("error")
    main(sys.argv[1], Path(sys.argv[2]))
