"""The same training in one process of plain torch, to hold a launched job against. Shares no code with the
interpreter.

Started by `planner.executor.launch`: python -m planner.executor.reference DIRECTORY.
"""

import math
import sys

import torch
from torch import Tensor, nn

from planner.executor.job import JobDirectory, ReferenceResult, RunRequest, model_of
from planner.executor.train import end_with, write_error
from planner.plans import Plan
from profiles.measure.models import build_layers, loss_fn, synthetic_batch


def main(directory: str) -> int:
    """Train, compare the first gradients with those the job saved, write the result; the exit status."""
    job = JobDirectory(directory)
    try:
        request = RunRequest.load(job.request)
        end_with(request.launcher_pid)
        _train(job, request, Plan.load(job.plan))
    except Exception as error:
        write_error(job, "reference", error, who="the reference process")
        return 1
    return 0


def _train(job: JobDirectory, request: RunRequest, plan: Plan) -> None:
    architecture, spec = model_of(plan)
    dtype = getattr(torch, request.dtype)
    layers = build_layers(architecture, spec, dtype=dtype, device="cpu", seed=request.seed)
    model = nn.Sequential(*layers).to(request.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=request.learning_rate)
    size = plan.layout.micro_batch_size
    losses = []
    worst = 0.0, "none"
    for step in range(request.steps):
        inputs, targets = synthetic_batch(spec, plan.global_batch_size, seed=request.seed, step=step)
        optimizer.zero_grad()
        # One microbatch at a time, for the memory; equally long pieces, so their mean is that of the batch.
        pieces = list(zip(torch.split(inputs, size), torch.split(targets, size), strict=True))
        total = 0.0
        for tokens, following in pieces:
            loss = loss_fn(model(tokens.to(request.device)), following.to(request.device))
            torch.autograd.backward(loss / len(pieces))
            total += loss.item()
        losses.append(total / len(pieces))
        if step == 0:
            worst = _worst_gradient(job, plan, dict(model.named_parameters(remove_duplicate=False)))
        norm = nn.utils.clip_grad_norm_(model.parameters(), request.max_grad_norm or math.inf)
        if norm.isfinite():
            optimizer.step()
    ReferenceResult(losses=tuple(losses), gradient_relative_difference=worst[0], worst_parameter=worst[1]).save(
        job.reference
    )


def _worst_gradient(job: JobDirectory, plan: Plan, parameters: dict[str, nn.Parameter]) -> tuple[float, str]:
    worst = 0.0, "none"
    held = set()  # by identity; a parameter may be held by several ranks, and have several names
    for pipeline_rank in range(plan.layout.pp):
        theirs = torch.load(job.gradients(pipeline_rank), map_location="cpu", mmap=True, weights_only=True)
        for name, gradient in theirs.items():
            held.add(parameters[name])
            worst = max(worst, (_relative_difference(gradient, parameters[name].grad), name))
    left = [name for name, parameter in parameters.items() if parameter.grad is not None and parameter not in held]
    if left:
        raise RuntimeError(f"no process holds a gradient of {left[0]}")
    return worst


def _relative_difference(ours: Tensor, reference: Tensor | None) -> float:
    if reference is None:
        raise RuntimeError("a process holds a gradient that the reference does not have")
    reference = reference.cpu()
    norm: float = torch.linalg.vector_norm(reference).item()
    difference: float = torch.linalg.vector_norm(ours - reference).item()
    return difference / norm if norm > 0 else difference


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
