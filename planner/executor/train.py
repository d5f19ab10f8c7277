"""One process of a launched job: trains its part of a bundled model on synthetic data, and writes down how it
went.

Started by `planner.executor.launch` under torchrun: python -m planner.executor.train DIRECTORY.
"""

import math
import os
import sys
import threading
import time
import traceback
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from planner.errors import ExecutionError
from planner.executor.job import JobDirectory, RankError, RankResult, RunRequest, StepProgress, model_of
from planner.executor.pipeline import Pipeline
from planner.executor.transport import LostPeerError, telling_lost_peers
from planner.plans import Plan
from profiles.errors import PipewrightError
from profiles.measure.models import Architecture, build_layers, loss_fn, synthetic_batch, tied_parameters
from profiles.model import ModelSpec

MAX_TRACED_STEPS = 20
MAX_SKIPPED_STEPS = 3  # in a row; one inf may come by chance


def main(directory: str) -> int:
    """Run this process's part of the job in `directory`; the exit status."""
    job = JobDirectory(directory)
    rank = int(os.environ["RANK"])
    try:
        request = RunRequest.load(job.request)
        end_with(request.launcher_pid)
        _train(job, request)
    except Exception as error:
        write_error(job, str(rank), error, who=f"process {rank}")
        return 1
    return 0


def write_error(job: JobDirectory, name: str, error: Exception, *, who: str) -> None:
    """Leave `error` for the launcher; the traceback goes to the log."""
    traceback.print_exc()
    RankError(
        who=who,
        when_s=time.time(),
        is_consequence=isinstance(error, LostPeerError),
        is_expected=isinstance(error, PipewrightError),
        type_name=type(error).__name__,
        message=str(error),
    ).save(job.error(name))


def end_with(launcher_pid: int) -> None:
    """End this process as soon as the launcher is gone: nobody would read the result, or stop the job."""

    def watch() -> None:
        while True:
            time.sleep(1.0)
            try:
                os.kill(launcher_pid, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train(job: JobDirectory, request: RunRequest) -> None:
    plan = Plan.load(job.plan)
    architecture, spec = model_of(plan)
    layers = [partial(_layer, architecture, spec, request, index) for index in range(spec.num_layers + 2)]
    engine = Pipeline
    if request.engine == "torch":
        from planner.executor.torch_engine import TorchPipeline as engine  # noqa: N813
    with engine(
        plan,
        layers,
        loss_fn,
        device=request.device,
        backend=request.backend,
        process_group_timeout_s=request.process_group_timeout_s,
        trace_steps=min(request.steps, MAX_TRACED_STEPS),
        ties=tied_parameters(spec),
    ) as pipe:
        _run_steps(job, request, plan, spec, pipe)


def _layer(architecture: Architecture, spec: ModelSpec, request: RunRequest, index: int) -> nn.Module:
    dtype = getattr(torch, request.dtype)
    only = range(index, index + 1)
    return build_layers(architecture, spec, dtype=dtype, device="cpu", seed=request.seed, only=only)[0]


def _run_steps(job: JobDirectory, request: RunRequest, plan: Plan, spec: ModelSpec, pipe: Pipeline) -> None:
    here = pipe.coordinates
    optimizer = pipe.make_optimizer(
        torch.optim.AdamW,
        lr=request.learning_rate,
        max_grad_norm=request.max_grad_norm,
        post_validation=request.post_validation,
    )
    gradient_norms: list[float | None] = []
    rows = plan.layout.num_microbatches * plan.layout.micro_batch_size
    mine = slice(here.data_rank * rows, (here.data_rank + 1) * rows)
    reporting = plan.parsed_schedule.holders(plan.layout.num_stages - 1)[0]
    losses: list[float] = []
    pipeline_us, data_parallel_us, optimizer_us = [], [], []
    for step in range(request.steps):
        inputs, targets = synthetic_batch(spec, plan.global_batch_size, seed=request.seed, step=step)
        optimizer.zero_grad()
        if step == 0 or not request.post_validation:
            pipe.barrier()  # steps start together, as they do in the prediction
        start = _now_us(pipe.device)
        loss = pipe.step(inputs[mine], targets[mine])
        middle = _now_us(pipe.device)
        if step > 0:  # known by now, if it was not before
            _note_norm(gradient_norms, optimizer.last_grad_norm, request)
        if step == 0 and request.save_gradients:
            _save_gradients(job, pipe)
        before_update = _now_us(pipe.device)
        mark = pipe.tracer.mark()
        optimizer.step()
        pipe.tracer.record("optimizer", None, None, mark, mark)
        end = _now_us(pipe.device)
        events = pipe.trace().steps[-1].events
        reduction = sum(e.end_us - e.start_us for e in events if e.kind == "reduce" and e.stage is None)
        pipeline_us.append(max(0.0, middle - start - reduction))
        data_parallel_us.append(reduction)
        optimizer_us.append(end - before_update)
        if loss is not None:
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ExecutionError(
                    f"the loss of step {step + 1} is {losses[-1]}: training diverged; lower the learning rate "
                    f"{request.learning_rate:g}"
                )
            if (here.pipeline_rank, here.data_rank) == (reporting, 0):
                step_us = middle - start + end - before_update
                line = StepProgress(step=step, loss=losses[-1], step_us=step_us).model_dump_json()
                with job.progress.open("a") as stream:
                    stream.write(line + "\n")
    optimizer.finish()
    _note_norm(gradient_norms, optimizer.last_grad_norm, request)
    on_cuda = pipe.device.type == "cuda"
    RankResult(
        trace=pipe.trace(),
        backend=pipe.backend,
        threads=torch.get_num_threads(),
        losses=tuple(losses),
        pipeline_us=tuple(pipeline_us),
        data_parallel_us=tuple(data_parallel_us),
        optimizer_us=tuple(optimizer_us),
        gradient_norms=tuple(gradient_norms),
        num_skipped=optimizer.num_skipped,
        num_rolled_back=optimizer.num_rolled_back,
        num_restarted=optimizer.num_restarted,
        peak_boundary_tensors=pipe.peak_boundary_tensors,
        peak_device_memory_bytes=torch.cuda.max_memory_allocated(pipe.device) if on_cuda else None,
    ).save(job.result(here.global_rank))


def _note_norm(norms: list[float | None], norm: float | None, request: RunRequest) -> None:
    norms.append(norm if norm is not None and math.isfinite(norm) else None)
    if len(norms) >= MAX_SKIPPED_STEPS and norms[-MAX_SKIPPED_STEPS:].count(None) == MAX_SKIPPED_STEPS:
        raise ExecutionError(
            f"the gradients of steps {len(norms) - MAX_SKIPPED_STEPS + 1} to {len(norms)} are inf or NaN: training "
            f"diverged; lower the learning rate {request.learning_rate:g}"
        )


def _now_us(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns() / 1e3


def _save_gradients(job: JobDirectory, pipe: Pipeline) -> None:
    """Data rank 0 saves; the others must hold the very same gradients, or the replicas would drift apart."""
    gradients = {name: p.grad for name, p in pipe.named_parameters() if p.grad is not None}
    if pipe.plan.layout.dp > 1:
        for name, gradient in gradients.items():
            first = gradient.clone()
            with telling_lost_peers("the comparison of gradients"):
                dist.broadcast(first, group=pipe.data_group, group_src=0)
            if not torch.equal(first, gradient):
                here = pipe.coordinates.data_rank
                raise ExecutionError(f"data ranks {here} and 0 hold different gradients of parameter {name}")
    if pipe.coordinates.data_rank == 0:
        torch.save(gradients, job.gradients(pipe.coordinates.pipeline_rank))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
