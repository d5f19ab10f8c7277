"""What the optimizer's tests run under torchrun: python optimizer_worker.py MODE DIRECTORY.

Every process writes its findings to DIRECTORY/found-RANK.json.
"""

import faulthandler
import json
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from executor_cases import WIDTH, loss_fn, make_batch, make_layer, make_plan, random_schedule
from torch import Tensor, nn

from planner.executor import Pipeline
from planner.executor.groups import Groups
from planner.plans import Plan
from planner.schedule.families import get_family

NUM_STEPS = 9
INF_STEPS = {3: "first", 6: "last"}  # an inf is put into a gradient of the first stage, or of the last
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "lr_decay": 0.1}),
}
Found = dict[str, Any]


def disturb(step: int, name: str, gradient: Tensor, plan: Plan) -> None:
    """Scale a gradient as drawn for its stage and step, so that clipping depends on all of them."""
    stage = stage_of(plan, name)
    gradient *= random.Random(f"{step} {stage}").choice([0.01, 0.3, 1.0, 3.0])
    where = {"first": 0, "last": plan.layout.num_stages - 1}.get(INF_STEPS.get(step, ""))
    if stage == where:
        gradient.view(-1)[0] = math.inf


def stage_of(plan: Plan, name: str) -> int:
    layer = int(name.partition(".")[0])
    for stage, number in enumerate(plan.layout.layers_per_stage):
        layer -= number
        if layer < 0:
            return stage
    raise AssertionError(name)


class Reference(NamedTuple):
    """Plain torch in one process."""

    parameters: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    by_rank: list[list[float]]  # per step and rank, the sum of squares of its gradients


def train_plainly(plan: Plan, optimizer: str, max_norm: float | None) -> Reference:
    num_layers = sum(plan.layout.layers_per_stage)
    model = nn.Sequential(*(make_layer(index, num_layers, 7) for index in range(num_layers)))
    cls, options = OPTIMIZERS[optimizer]
    plain = cls(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(plain, 0.8)
    found = Reference(dict(model.named_parameters()), [], [], [])
    for step in range(NUM_STEPS):
        inputs, targets = make_batch(plan.global_batch_size, step)
        plain.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        by_rank = [0.0] * plan.layout.pp
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            disturb(step, name, parameter.grad, plan)
            by_rank[plan.layout.rank_of_stage[stage_of(plan, name)]] += parameter.grad.square().sum().item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm).item()
        if math.isfinite(norm):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain.step()
        schedule.step()
        found.losses.append(loss.item())
        found.norms.append(norm)
        found.by_rank.append(by_rank)
    return found


def expected_counts(reference: Reference, max_norm: float | None, rank: int) -> dict[str, int]:
    """What post-validation has to do on `rank`, from the reference's norms alone."""

    def clips(total: float) -> bool:
        return max_norm is not None and math.sqrt(total) > max_norm

    counts = {"skipped": 0, "rolled back": 0, "put off": 0, "restarted": 0}
    is_last = rank == len(reference.by_rank[0]) - 1
    for by_rank in reference.by_rank:
        total, mine = sum(by_rank), sum(by_rank[: rank + 1])
        counts["skipped"] += not math.isfinite(total)
        wrong = not math.isfinite(total) or clips(total)
        counts["rolled back"] += not is_last and wrong and math.isfinite(mine) and not clips(mine)
        counts["put off"] += not is_last and math.isfinite(mine) and clips(mine)
        counts["restarted"] += wrong and math.isfinite(by_rank[0])
    return counts


class Trained(NamedTuple):
    """One process's part of a run."""

    parameters: dict[str, Tensor]
    state: list[Tensor]
    losses: list[float]
    norms: list[float]
    counts: dict[str, int]
    discarded: int  # by the trace


def train(
    plan: Plan,
    optimizer: str,
    max_norm: float | None,
    *,
    post_validation: bool,
    make: Callable[..., nn.Module] = make_layer,
    wanders: bool = False,
    **options: Any,
) -> Trained:
    """`wanders`: look at the parameters after some steps, so that validation happens outside of the pipeline."""
    num_layers = sum(plan.layout.layers_per_stage)
    torch.manual_seed(dist.get_rank())
    layers = [partial(make, index, num_layers, 7) for index in range(num_layers)]
    pipe = Pipeline(plan, layers, loss_fn, trace_steps=NUM_STEPS, **options)
    cls, settings = OPTIMIZERS[optimizer]
    made = pipe.make_optimizer(cls, max_grad_norm=max_norm, post_validation=post_validation, **settings)
    schedule = torch.optim.lr_scheduler.ExponentialLR(made, 0.8)
    rows = plan.layout.num_microbatches * plan.layout.micro_batch_size
    mine = slice(pipe.coordinates.data_rank * rows, (pipe.coordinates.data_rank + 1) * rows)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        inputs, targets = make_batch(plan.global_batch_size, step)
        made.zero_grad()
        loss = pipe.step(inputs[mine], targets[mine])
        norms.append(made.last_grad_norm)
        if loss is not None:
            losses.append(loss.item())
        for name, parameter in pipe.named_parameters():
            assert parameter.grad is not None
            disturb(step, name, parameter.grad, plan)
        made.step()
        schedule.step()
        if wanders and step % 3 == pipe.coordinates.pipeline_rank % 3:
            pipe.state_dict()  # not on all ranks: this is no collective
    pipe.close()
    norms.append(made.last_grad_norm)
    state = [v.clone() for entry in state_of(made.inner) for v in entry.values() if isinstance(v, Tensor)]
    assert norms[0] is None
    trace = pipe.trace()
    return Trained(
        parameters={name: p.detach().clone() for name, p in pipe.module.state_dict().items()},
        state=state,
        losses=losses,
        norms=norms[1:],
        counts={
            "skipped": made.num_skipped,
            "rolled back": made.num_rolled_back,
            "restarted": made.num_restarted,
        },
        discarded=sum(event.kind == "discarded" for step in trace.steps for event in step.events),
    )


def state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return list(getattr(optimizer, "optim", optimizer).state.values())


def compare(plan: Plan, optimizer: str, *, clip: bool = True, **options: Any) -> Found:
    free = train_plainly(plan, optimizer, None)
    # Between two of the norms, so that clipping triggers on some steps and not on others.
    norms = sorted(norm for norm in free.norms if math.isfinite(norm))
    max_norm = sum(norms[2:4]) / 2 if clip else None
    reference = train_plainly(plan, optimizer, max_norm)
    together = train(plan, optimizer, max_norm, post_validation=False, **options)
    apart = train(plan, optimizer, max_norm, post_validation=True, **options)
    rank = dist.get_rank() // plan.layout.dp
    differences = [
        ((p - reference.parameters[name]).abs().max() / reference.parameters[name].abs().max()).item()
        for name, p in together.parameters.items()
    ]
    finite = [(a, b) for a, b in zip(together.norms, reference.norms, strict=True) if math.isfinite(b)]
    return {
        "from plain torch": max(differences),
        "norms from plain torch": max(abs(a - b) / b for a, b in finite),
        "losses from plain torch": max(
            (abs(a - b) / b for a, b in zip(together.losses, reference.losses, strict=False)), default=0.0
        ),
        "expected": expected_counts(reference, max_norm, rank),
        "together": together.counts,
        **bits(together, apart),
    }


def bits(together: Trained, apart: Trained) -> Found:
    """Whether two runs are the same to the last bit, and how the second got there."""
    same = (
        all(torch.equal(p, apart.parameters[name]) for name, p in together.parameters.items())
        and len(together.state) == len(apart.state)
        and all(map(torch.equal, together.state, apart.state))
        and together.losses == apart.losses
        # inf is inf, but no NaN is equal to another
        and [repr(n) for n in together.norms] == [repr(n) for n in apart.norms]
    )
    return {"same bits": same, "apart": apart.counts, "discarded": apart.discarded}


def plan_of(name: str, num_ranks: int, virtual: int, m: int, **options: Any) -> Plan:
    schedule = get_family(name).generate(num_ranks, m, virtual)
    return make_plan(schedule, layers_per_stage=[2, *[1] * (schedule.num_stages - 1)], family=name, **options)


def pipelines(num_ranks: int) -> Found:
    found: Found = {}
    for name, virtual, optimizer in [
        ("1f1b", 1, "adamw"),
        ("zb-h1", 1, "sgd"),
        ("zb-v", 2, "adamw"),
        ("interleaved-1f1b", 2, "sgd"),
    ]:
        found[name] = compare(plan_of(name, num_ranks, virtual, 2 * num_ranks), optimizer)
    found["adagrad, wandering"] = compare(plan_of("zb-h1", num_ranks, 1, 4), "adagrad", wanders=True)
    for seed in range(3):
        plan = make_plan(random_schedule(300 + seed, num_ranks))
        found[f"random {seed}"] = compare(plan, "sgd", receive_ahead=seed)
    return found


def data_parallel() -> Found:
    found: Found = {}
    for zero_stage in (0, 1):
        for name, virtual, optimizer in [("zb-h1", 1, "adamw"), ("interleaved-1f1b", 2, "sgd")]:
            plan = plan_of(name, 2, virtual, 4, dp=2, zero_stage=zero_stage)
            found[f"{name} zero {zero_stage}"] = compare(plan, optimizer, wanders=name == "zb-h1")
    return found


class Forgetful(nn.Module):
    """Draws random numbers and changes a buffer whenever it runs."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.mean())
        return x + nn.functional.dropout(self.inner(x), 0.3)


def make_forgetful(index: int, num_layers: int, seed: int) -> nn.Module:
    if index in (0, num_layers - 1):
        return make_layer(index, num_layers, seed)
    torch.manual_seed(seed + index)
    return Forgetful()


def dropout(num_ranks: int) -> Found:
    plan = make_plan(get_family("zb-h1").generate(num_ranks, 4, 1), layers_per_stage=[2] * num_ranks)
    norm = 0.5
    together = train(plan, "adamw", norm, post_validation=False, make=make_forgetful)
    apart = train(plan, "adamw", norm, post_validation=True, make=make_forgetful)
    return {"dropout": bits(together, apart)}


def without_tags(num_ranks: int) -> Found:
    """The way of NCCL, on gloo: a group per channel, messages matched by their order alone."""
    Groups.matches_by_tag = property(lambda self: False)  # type: ignore[assignment, method-assign]  # on purpose
    found: Found = {}
    for name, virtual in [("zb-v", 2), ("interleaved-1f1b", 2)]:
        found[f"{name} without tags"] = compare(plan_of(name, num_ranks, virtual, 2 * num_ranks), "sgd")
    for seed in range(3):
        plan = make_plan(random_schedule(400 + seed, num_ranks))
        found[f"random {seed} without tags"] = compare(plan, "sgd", receive_ahead=1 + seed)
    return found


def head_start(directory: Path) -> Found:
    """The last rank makes its step only once rank 0 has begun the next one: with a barrier, nobody would go on."""
    plan = plan_of("1f1b", 2, 1, 4)
    layers = [partial(make_layer, index, 3, 0) for index in range(3)]
    pipe = Pipeline(plan, layers, loss_fn)
    optimizer = pipe.make_optimizer(torch.optim.SGD, lr=0.1, max_grad_norm=1e-3, post_validation=True)
    here, begun = pipe.coordinates.pipeline_rank, directory / "begun"
    waited = -1.0
    for step in range(2):
        if here == 0 and step == 1:
            pipe.stages[0].register_forward_hook(lambda *_: begun.touch())
        pipe.step(*make_batch(plan.global_batch_size, step))
        if here == 1 and step == 0:
            deadline = time.monotonic() + 30
            while not begun.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            waited = float(begun.exists())
        optimizer.step()
    pipe.close()
    return {"head start": {"rank": here, "saw the next step begin": waited, "rolled back": optimizer.num_rolled_back}}


def failing() -> None:
    """The last process fails in a forward that would be thrown away."""
    plan = plan_of("1f1b", 2, 1, 4)
    calls = 0

    def fail_later(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise ArithmeticError("the loss of microbatch 0 cannot be computed")
        return loss_fn(output, targets)

    with Pipeline(plan, [partial(make_layer, index, 3, 0) for index in range(3)], fail_later) as pipe:
        optimizer = pipe.make_optimizer(torch.optim.SGD, lr=0.1, max_grad_norm=1e-3, post_validation=True)
        for batch in range(3):
            pipe.step(*make_batch(plan.global_batch_size, batch))
            optimizer.step()


def main(mode: str, directory: Path) -> None:
    if mode == "failing":
        return failing()
    dist.init_process_group("gloo")
    if mode == "two":
        found = pipelines(2) | dropout(2) | head_start(directory)
        found["no clipping"] = compare(plan_of("1f1b", 2, 1, 4), "sgd", clip=False)
        found |= without_tags(2)
    else:
        found = data_parallel() | pipelines(4) | dropout(4) | without_tags(4)
    (directory / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    return None


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    faulthandler.dump_traceback_later(140)  # where everybody is, should they hang
    warnings.simplefilter("error")
    main(sys.argv[1], Path(sys.argv[2]))
