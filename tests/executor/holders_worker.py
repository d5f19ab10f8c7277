"""What test processes run under torchrun: python holders_worker.py MODE DIRECTORY. See `executor_worker`.

Every family, with stages even and uneven, embeddings tied and not, against the same training in one process.
"""

import faulthandler
import hashlib
import itertools
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from executor_cases import loss_fn, make_batch, make_layer, make_plan
from torch import Tensor, nn

from planner.errors import ExecutionError
from planner.executor import Pipeline
from planner.executor.groups import Groups
from planner.plans import Plan
from planner.schedule.actions import Schedule
from planner.schedule.families import FAMILIES

Found = dict[str, Any]
LEARNING_RATE = 0.01


def train_reference(plan: Plan, tied: bool, seed: int, steps: int) -> tuple[list[float], dict[str, Tensor], nn.Module]:
    """Losses of each step, gradients of the first, the model after the last: one microbatch after the other."""
    num_layers = sum(plan.layout.layers_per_stage)
    model = nn.Sequential(*(make_layer(index, num_layers, seed) for index in range(num_layers)))
    if tied:
        model[-1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses, first = [], {}
    for step in range(steps):
        optimizer.zero_grad()
        inputs, targets = make_batch(plan.global_batch_size, step)
        size = plan.layout.micro_batch_size
        each = []
        for ids, following in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
            loss = loss_fn(model(ids), following)
            (loss * size / plan.global_batch_size).backward()
            each.append(loss.detach())
        losses.append(torch.stack(each).mean().item())
        if step == 0:
            copies = {p: p.grad.clone() for p in model.parameters()}
            first = {n: copies[p] for n, p in model.named_parameters(remove_duplicate=False)}
        optimizer.step()
    return losses, first, model


def check(plan: Plan, *, tied: bool, seed: int = 1, modules: bool = False) -> Found:
    """Two steps of AdamW: how far losses, the first gradients and the last parameters are from one process's."""
    num_layers = sum(plan.layout.layers_per_stage)
    layers: list[Any] = [partial(make_layer, index, num_layers, seed) for index in range(num_layers)]
    ties: Sequence[Any] = (((0, "weight"), (num_layers - 1, "weight")),) if tied else ()
    if modules:
        layers = [layer() for layer in layers]
        if tied:
            layers[-1].weight = layers[0].weight
        ties = ()
    pipe = Pipeline(plan, layers, loss_fn, ties=ties)
    optimizer = pipe.make_optimizer(torch.optim.AdamW, lr=LEARNING_RATE)
    losses, gradients, model = train_reference(plan, tied, seed, steps=2)
    rows = plan.layout.num_microbatches * plan.layout.micro_batch_size
    mine = slice(pipe.coordinates.data_rank * rows, (pipe.coordinates.data_rank + 1) * rows)
    stages = {stage.index for stage in pipe.stages}
    found: Found = {"loss": [], "gradients": 0.0, "parameters": 0.0}
    for step in range(2):
        optimizer.zero_grad()
        inputs, targets = make_batch(plan.global_batch_size, step)
        loss = pipe.step(
            inputs[mine] if 0 in stages else None,
            targets[mine] if plan.layout.num_stages - 1 in stages else None,
        )
        if loss is not None:
            found["loss"].append(abs(loss.item() - losses[step]))
        for name, parameter in pipe.named_parameters() if step == 0 else ():
            found["gradients"] = max(found["gradients"], _far(parameter.grad, gradients[name]))
        optimizer.step()
        if step == 0:
            squares = [gradient.square().sum() for gradient in {id(g): g for g in gradients.values()}.values()]
            found["norm"] = abs(optimizer.last_grad_norm / torch.stack(squares).sum().sqrt().item() - 1)
    expected = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in pipe.named_parameters():
        found["parameters"] = max(found["parameters"], _far(parameter.detach(), expected[name].detach()))
    found["bits"] = {
        name: hashlib.sha256(parameter.detach().numpy().tobytes() + parameter.grad.numpy().tobytes()).hexdigest()
        for name, parameter in pipe.module.named_parameters(remove_duplicate=False)
    }
    found["counted"] = [name for name, parameter in pipe.named_parameters() if pipe.is_counted(parameter)]
    return found


def _far(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


def numbers(num_ranks: int, names: Iterable[str], *, every: bool) -> Iterator[tuple[str, int, int]]:
    """Families with microbatches and chunks they support: all of m = 4..12 and v up to 4, or the first two of each."""
    for name in names:
        family = FAMILIES[name]
        fitting = [
            (m, v)
            for m, v in itertools.product(range(4, 13), (1, 2, 4) if every else (1, 2))
            if family.supports(num_ranks, m, v) is None
        ]
        yield from ((name, m, v) for m, v in (fitting if every else fitting[:1]))


def families(num_ranks: int, names: Iterable[str] = tuple(FAMILIES), *, every: bool = False) -> Found:
    found: Found = {}
    turns = itertools.cycle([(True, False), (False, True)])
    for name, m, v in numbers(num_ranks, names, every=every):
        schedule = FAMILIES[name].generate(num_ranks, m, v)
        chosen = itertools.product((False, True), repeat=2) if every else (next(turns),)
        for tied, uneven in chosen:
            rest = schedule.num_stages - 1
            plan = make_plan(schedule, layers_per_stage=[2, *[1] * rest] if uneven else [2] * (rest + 1), family=name)
            words = f"{name} m={m} v={v} {'tied' if tied else 'untied'} {'uneven' if uneven else 'even'}"
            found[words] = check(plan, tied=tied, modules=m % 2 == 1)
    return found


def two_replicas(num_ranks: int, dp: int = 1) -> Found:
    found: Found = {}
    for name, family in FAMILIES.items():
        if family.num_replicas == 2:
            m = next(m for m in range(4, 99) if family.supports(num_ranks, m) is None)
            for tied in (False, True):
                plan = make_plan(family.generate(num_ranks, m), layers_per_stage=[2] * num_ranks, dp=dp, family=name)
                found[f"{name} {'tied' if tied else 'untied'}"] = check(plan, tied=tied, modules=tied)
    return found


def without_tags(num_ranks: int) -> Found:
    """The way of NCCL, on gloo: a group per channel, messages matched by their order alone."""
    Groups.matches_by_tag = property(lambda self: False)  # type: ignore[assignment, method-assign]  # on purpose
    return two_replicas(num_ranks)


def refusals() -> Found:
    found: Found = {}
    good = FAMILIES["gems"].generate(2, 4)
    layers = [partial(make_layer, index, 4, 0) for index in range(4)]

    def refused(name: str, plan: Plan, **options: Any) -> None:
        try:
            Pipeline(plan, options.pop("layers", layers), loss_fn, **options)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    broken = [list(actions) for actions in good.ranks]
    broken[0][0], broken[0][2] = broken[0][2], broken[0][0]
    other = [list(actions) for actions in good.ranks]
    other[0].append(other[1].pop())
    plan = make_plan(good, layers_per_stage=[2, 2])
    for name, orders in (("circle", broken), ("other rank", other)):
        lines = Schedule(tuple(map(tuple, orders))).to_lines()
        refused(name, plan.model_copy(update={"schedule": lines}))
    refused("one replica", plan.model_copy(update={"schedule": FAMILIES["1f1b"].generate(2, 4).to_lines()}))
    refused("no layer", plan, ties=(((0, "weight"), (9, "weight")),))
    refused("no parameter", plan, ties=(((0, "weight"), (3, "height")),))
    refused("shapes", plan, ties=(((0, "weight"), (3, "bias")),))
    apart = make_plan(FAMILIES["1f1b"].generate(2, 4), layers_per_stage=[2, 2])
    refused("shapes across ranks", apart, ties=(((0, "weight"), (3, "bias")),))
    pipe = Pipeline(plan, layers, loss_fn)
    try:
        pipe.make_optimizer(torch.optim.AdamW, post_validation=True)
    except ExecutionError as error:
        found["post_validation"] = str(error)
    return found


def main(mode: str, directory: str) -> None:
    faulthandler.dump_traceback_later(800, exit=True)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    runs = {
        "two": {"families": families, "refusals": lambda _: refusals(), "without tags": without_tags},
        "four": {"families": families, "data parallel": lambda _: two_replicas(2, dp=2)},
    }
    chosen = runs[mode] if mode in runs else {"families": partial(families, names=[mode], every=True)}  # one family
    found = {name: run(ranks) for name, run in chosen.items()}
    Path(directory, f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
