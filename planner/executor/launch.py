"""Runs a plan for a bundled model on this machine: one process per device under torchrun, then a report.

Whatever happens, no process stays behind: an error in one ends all, and so does an interrupt here, or the end
of this process. What the processes print goes to a log that is kept only when a process failed in a way nobody foresaw.
"""

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from planner.errors import ExecutionError
from planner.executor.groups import refuse_unsupported
from planner.executor.job import (
    Engine,
    JobDirectory,
    RankError,
    RankResult,
    ReferenceResult,
    RunRequest,
    StepProgress,
)
from planner.executor.measured_profile import base_profile
from planner.executor.results import make_profile, make_report
from planner.executor.run_report import RunReport
from planner.executor.trace import Trace
from planner.plans import Plan
from planner.schedule.validation import check as check_schedule
from profiles.model import Dtype, ModelProfile

_POLL_S = 0.1
_GRACE_S = 35.0  # torchrun itself gives its processes 30 s between asking and killing


def run_plan(
    plan_path: str | Path,
    *,
    steps: int = 10,
    seed: int = 0,
    dtype: Dtype | None = None,
    learning_rate: float = 1e-3,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    backend: str | None = None,
    engine: Engine = "pipewright",
    max_grad_norm: float | None = None,
    post_validation: bool = False,
    check: bool = False,
    trace_path: str | Path | None = None,
    measure_path: str | Path | None = None,
    profile_path: str | Path | None = None,
    process_group_timeout_s: float = 600.0,
    on_progress: Callable[[StepProgress], None] | None = None,
) -> RunReport:
    """Train the plan's bundled model for `steps` optimizer steps (AdamW, synthetic data) and report.

    `dtype`: the plan's by default. `device`: auto takes CUDA when there are enough devices for every process.
    `engine`: our interpreter, or "torch" for torch's own runtime.
    `max_grad_norm` clips the gradients of the whole model; steps with an inf or NaN are skipped in any case.
    `post_validation`: no barrier before the optimizer's step, see `planner.executor.optimizer`; the prediction then
    counts the schedule's span in place of its makespan.
    `check` trains a second time in one process of plain torch and compares losses of every step and gradients
    of the first. `trace_path`: where to write the last (at most 20) steps' trace of every process.
    `measure_path`: where to save measured times as a profile to plan from again: the plan's own profile, read from
    `profile_path`, with the layers of each stage stretched to what was measured (`planner.executor.measured_profile`).
    `on_progress` is called once per step while the job runs. Processes get OMP_NUM_THREADS=1 unless the
    environment says otherwise.

    FileError when the plan cannot be read. ExecutionError when it cannot be run here, or a process failed:
    the text is that of the process that failed first.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, it must be at least 1")
    if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm is {max_grad_norm:g}, it must be a positive number, or None")
    if measure_path is not None and engine == "torch":
        raise ExecutionError(
            "torch's runtime does not tell what a rank waits for from what it takes to hand over, so its times make no "
            "profile; measure with the engine of pipewright"
        )
    if post_validation and engine == "torch":
        raise ExecutionError(
            "torch's runtime cannot begin a step again, as post-validation must when an update was wrong; run it with "
            "the engine of pipewright, or without post-validation"
        )
    plan = Plan.load(plan_path)
    chosen = _refuse_what_cannot_run(plan, device, dtype, engine)
    _refuse_backend(backend, chosen)
    if profile_path is not None and measure_path is None:
        raise ValueError(f"profile_path is {profile_path}, which only a run with measure_path reads")
    base = None
    if measure_path is not None:
        given = None if profile_path is None else ModelProfile.load(profile_path)
        base = base_profile(plan, given, dtype or plan.dtype)
    with tempfile.TemporaryDirectory(prefix="pipewright-run-") as path:
        job = JobDirectory(path)
        plan.save(job.plan)
        request = RunRequest(
            steps=steps,
            seed=seed,
            dtype=dtype or plan.dtype,
            learning_rate=learning_rate,
            device=chosen,
            backend=backend,
            engine=engine,
            max_grad_norm=max_grad_norm,
            post_validation=post_validation,
            save_gradients=check,
            process_group_timeout_s=process_group_timeout_s,
            launcher_pid=os.getpid(),
        )
        request.save(job.request)
        processes = plan.layout.num_devices
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        _run([*torchrun, "-m", "planner.executor.train", path], job, on_progress)
        results = [RankResult.load(job.result(rank)) for rank in range(processes)]
        reference = None
        if check:
            _run(["planner.executor.reference", path], job, None)
            reference = ReferenceResult.load(job.reference)
    if trace_path is not None:
        Trace.gathered(result.trace for result in results).save(trace_path)
    report = make_report(plan, request, results, reference)
    if measure_path is not None and base is not None:
        make_profile(base, plan, request, results, report).save(measure_path)
    return report


def _refuse_what_cannot_run(
    plan: Plan, device: Literal["auto", "cpu", "cuda"], dtype: Dtype | None, engine: Engine
) -> Literal["cpu", "cuda"]:
    """Say here, before any process starts, what every process would say. Returns the device to run on."""
    if plan.architecture is None:
        raise ExecutionError(
            f"the plan for {plan.model.name!r} was not made from a bundled model, so there is nothing to "
            "build; write a training script with planner.executor.Pipeline(plan, layers, loss_fn), and start "
            "it with torchrun"
        )
    layout = plan.layout
    refuse_unsupported(layout)
    if (dtype or plan.dtype) == "float8":
        raise ExecutionError(
            "the bundled models do not compute in float8; run the plan in another dtype, like bfloat16"
        )
    check_schedule(
        plan.parsed_schedule,
        num_stages=layout.num_stages,
        num_microbatches=layout.num_microbatches,
        rank_of_stage=layout.rank_of_stage,
        num_replicas=layout.num_replicas,
    )
    if engine == "torch":
        from planner.executor.torch_engine import refuse_for_torch  # with private names of torch: where asked for only

        refuse_for_torch(plan)
    num_layers = plan.model.num_layers + 2
    if sum(layout.layers_per_stage) != num_layers:
        raise ExecutionError(
            f"the bundled model {plan.model.name!r} has {num_layers} layers with embedding and head, the "
            f"plan's layers_per_stage {list(layout.layers_per_stage)} add up to "
            f"{sum(layout.layers_per_stage)}; plan it again"
        )
    available = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and available < layout.num_devices:
        raise ExecutionError(
            f"the plan's layout {layout.degrees} runs on {layout.num_devices} CUDA devices, this machine has "
            f"{available}; run it on the CPU, or plan for this machine"
        )
    return "cuda" if device == "cuda" or available >= layout.num_devices else "cpu"


def _refuse_backend(backend: str | None, device: Literal["cpu", "cuda"]) -> None:
    usable = {"gloo": device == "cpu", "nccl": device == "cuda" and dist.is_nccl_available()}
    if backend is not None and not usable.get(backend, False):
        names = " or ".join(name for name, does in usable.items() if does) or "none"
        raise ExecutionError(f"backend {backend!r} cannot send {device} tensors between processes here; use {names}")


def _run(module: Sequence[str], job: JobDirectory, on_progress: Callable[[StepProgress], None] | None) -> None:
    """Run `python -m module...` to its end. ExecutionError when it failed."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    root = str(Path(__file__).parents[2])  # importable by the processes however it was here
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # an interrupt comes to us; we tell the job
        )
        try:
            told = 0
            while process.poll() is None:
                time.sleep(_POLL_S)
                told = _tell(job, on_progress, told)
            _tell(job, on_progress, told)
        finally:
            _stop(process)
    if process.returncode != 0:
        raise ExecutionError(_explain(job, process.returncode))


def _tell(job: JobDirectory, on_progress: Callable[[StepProgress], None] | None, told: int) -> int:
    """Pass on the steps finished since `told`; returns how many have been passed on."""
    if on_progress is None or not job.progress.exists():
        return told
    whole_lines = job.progress.read_text().split("\n")[:-1]
    for line in whole_lines[told:]:
        on_progress(StepProgress.model_validate_json(line))
    return len(whole_lines)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the job if it still runs; torchrun passes the signal on to its processes."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()  # the processes see that their launcher is gone, or soon will be
        process.wait()


def _explain(job: JobDirectory, status: int) -> str:
    """What to tell about a failed job: the first error that no other process's error caused."""
    errors = [RankError.load(path) for path in job.path.glob("error-*.json")]
    causes = sorted((e for e in errors if not e.is_consequence), key=lambda error: error.when_s)
    if causes:
        first = causes[0]
        if first.is_expected:
            return f"{first.message} (said by {first.who})"
        return f"{first.who} failed with {first.type_name}: {first.message}{_keep_log(job)}"
    log = job.log.read_text(errors="replace")
    killed = re.search(r"exitcode: -(\d+)\) local_rank: (\d+)", log)
    if killed is not None:
        number, rank = int(killed[1]), killed[2]
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = "; out of memory? Plan a smaller micro-batch, or recompute" if name == "SIGKILL" else ""
        return f"process {rank} was ended by {name}{hint}{_keep_log(job)}"
    if errors:
        return min(errors, key=lambda error: error.when_s).message + _keep_log(job)
    last = "\n".join(log.strip().splitlines()[-5:])
    return f"the job ended with status {status} before any process could say why; its last words:\n{last}"


def _keep_log(job: JobDirectory) -> str:
    """Save the log from the end of the job's directory; words that say where it is."""
    handle, path = tempfile.mkstemp(prefix="pipewright-run-", suffix=".log")
    with os.fdopen(handle, "wb") as kept:
        kept.write(job.log.read_bytes())
    return f" (log: {path})"
