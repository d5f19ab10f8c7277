"""Runs a plan for a bundled model on this machine: one process per device under torchrun, then a report.

Whatever happens, no process stays behind: an error in one ends all, and so does an interrupt here, or the end
of this process. What the processes print goes to a log that is kept only when a process failed in a way nobody foresaw.
"""

import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

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
from planner.executor.measured_profile import base_profile, corrected_profile
from planner.executor.run_report import ActionTime, Exactness, RunReport, StepParts, Updates
from planner.executor.trace import Trace
from planner.plans import Plan, StageCosts
from planner.schedule.actions import Kind
from planner.schedule.validation import check as check_schedule
from profiles.model import Dtype, ModelProfile

_POLL_S = 0.1
_GRACE_S = 35.0  # torchrun itself gives its processes 30 s between asking and killing
_WARM_UP_STEPS = 2
_ON_THE_RANK = {*(kind.value for kind in Kind), "validate", "drain"}  # one after the other; reductions run beside


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
    if post_validation and engine == "torch":
        raise ExecutionError(
            "torch's runtime cannot begin a step again, as post-validation must when an update was wrong; run it with "
            "the engine of pipewright, or without post-validation"
        )
    plan = Plan.load(plan_path)
    chosen = _refuse_what_cannot_run(plan, device, dtype, engine)
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
    report = _report(plan, request, results, reference)
    if measure_path is not None and base is not None:
        _measured(base, plan, request, results, report).save(measure_path)
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


def _report(
    plan: Plan, request: RunRequest, results: Sequence[RankResult], reference: ReferenceResult | None
) -> RunReport:
    layout, predicted = plan.layout, plan.prediction
    skipped = min(_WARM_UP_STEPS, request.steps - 1)
    # Per step, the parts of the process that took longest.
    parts_by_process = [zip(r.pipeline_us, r.data_parallel_us, r.optimizer_us, strict=True) for r in results]
    slowest = [max(step, key=sum) for step in zip(*parts_by_process, strict=True)]
    step_times = [sum(parts) for parts in slowest]
    pipeline, reduction, optimizer = zip(*slowest, strict=True)
    predicted_us = predicted.pipeline_us
    if request.post_validation:  # no barrier: a step costs its span; work is the same share of both
        predicted_us *= (1 - predicted.bubble_rate_makespan) / (1 - predicted.bubble_rate_span)
    losses = next(result.losses for result in results if result.losses)
    memory = [result.peak_device_memory_bytes for result in results[:: layout.dp * layout.tp]]
    return RunReport(
        layout=layout.degrees,
        family=plan.family,
        num_processes=layout.num_devices,
        device=torch.cuda.get_device_name() if request.device == "cuda" else "cpu",
        backend=results[0].backend,
        engine=request.engine,
        dtype=request.dtype,
        planned_dtype=plan.dtype,
        torch_version=torch.__version__,
        threads_per_process=results[0].threads,
        seed=request.seed,
        learning_rate=request.learning_rate,
        losses=losses,
        step_times_us=tuple(step_times),
        num_skipped_steps=skipped,
        measured=StepParts(
            step_us=statistics.median(step_times[skipped:]),
            pipeline_us=statistics.median(pipeline[skipped:]),
            data_parallel_us=statistics.median(reduction[skipped:]),
            optimizer_us=statistics.median(optimizer[skipped:]),
        ),
        predicted=StepParts(
            step_us=predicted.step_time_us - predicted.pipeline_us + predicted_us,
            pipeline_us=predicted_us,
            data_parallel_us=predicted.exposed_data_parallel_us,
            optimizer_us=predicted.optimizer_us,
        ),
        actions=_action_times(plan.stages, results, skipped),
        updates=Updates(
            max_grad_norm=request.max_grad_norm,
            post_validation=request.post_validation,
            gradient_norms=results[0].gradient_norms,
            num_skipped=results[0].num_skipped,
            num_rolled_back=tuple(r.num_rolled_back for r in results[:: layout.dp * layout.tp]),
            num_restarted=results[0].num_restarted,
        ),
        peak_boundary_tensors=tuple(r.peak_boundary_tensors for r in results[:: layout.dp * layout.tp]),
        peak_device_memory_bytes=tuple(m for m in memory if m is not None) if None not in memory else None,
        exactness=None if reference is None else _exactness(losses, reference),
    )


def _measured(
    base: ModelProfile, plan: Plan, request: RunRequest, results: Sequence[RankResult], report: RunReport
) -> ModelProfile:
    """What the run measured, as a profile."""
    updates: defaultdict[int, list[float]] = defaultdict(list)
    for result in results:
        updates[result.trace.pipeline_rank].append(statistics.median(result.optimizer_us[report.num_skipped_steps :]))
    counted = request.steps - report.num_skipped_steps
    return corrected_profile(
        base,
        plan,
        report.actions,
        {rank: statistics.fmean(times) for rank, times in updates.items()},
        device_name=base.origin.device if request.device == "cpu" else report.device,
        how=(
            f"a run of {plan.layout.degrees}, {plan.family}, {plan.layout.num_microbatches} microbatches: mean of "
            f"{counted} {'step' if counted == 1 else 'steps'} after {report.num_skipped_steps}, torch "
            f"{report.torch_version}, {report.threads_per_process} threads, engine {report.engine}"
        ),
    )


def _action_times(stages: Sequence[StageCosts], results: Sequence[RankResult], skipped: int) -> tuple[ActionTime, ...]:
    seen: defaultdict[tuple[Kind, int], list[tuple[float, float, float]]] = defaultdict(list)
    for result in results:
        for step in result.trace.steps:
            if step.step < skipped:
                continue
            inside = [event for event in step.events if event.kind in _ON_THE_RANK]
            for event, following in zip(inside, [*inside[1:], None], strict=True):
                if event.stage is None or event.microbatch is None:
                    continue
                turned_us = event.end_us if following is None else following.start_us - following.waited_us
                handed_over_us = max(0.0, turned_us - event.end_us)
                times = event.end_us - event.start_us, event.waited_us, handed_over_us
                seen[Kind(event.kind), event.stage].append(times)
    rows = []
    for kind, stage in sorted(seen, key=lambda key: (key[1], list(Kind).index(key[0]))):
        costs = stages[stage]
        predicted_us = {
            Kind.F: costs.forward_us,
            Kind.B: costs.backward_input_us,
            Kind.W: costs.backward_weight_us,
            Kind.BW: costs.fused_backward_us,
            Kind.R: costs.recompute_us or 0.0,
        }[kind]
        durations, waits, handing_over = zip(*seen[kind, stage], strict=True)
        rows.append(
            ActionTime(
                kind=kind.value,
                stage=stage,
                count=len(durations),
                measured_us=statistics.fmean(durations),
                waited_us=statistics.fmean(waits),
                handed_over_us=statistics.fmean(handing_over),
                predicted_us=predicted_us,
            )
        )
    return tuple(rows)


def _exactness(losses: Sequence[float], reference: ReferenceResult) -> Exactness:
    differences = (abs(a - b) / (abs(b) or 1.0) for a, b in zip(losses, reference.losses, strict=True))
    return Exactness(
        reference_losses=reference.losses,
        loss_relative_differences=tuple(differences),
        gradient_relative_difference=reference.gradient_relative_difference,
        worst_parameter=reference.worst_parameter,
    )
