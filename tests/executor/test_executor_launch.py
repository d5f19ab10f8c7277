"""`run_plan`: the bundled models under torchrun, and how failures end."""

import os
import re
import signal
import tempfile
from pathlib import Path

import pytest
from executor_cases import make_plan

from planner.errors import ExecutionError
from planner.executor.launch import run_plan
from planner.executor.trace import Trace
from planner.report.run import render_run
from planner.schedule.actions import Schedule
from planner.schedule.families import get_family
from profiles.errors import FileError
from profiles.measure.models import model_spec_for


@pytest.fixture(autouse=True)
def _temporary_files_end_with_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def plan_path(tmp_path):
    return save_plan(tmp_path, "zb-h1")


def save_plan(directory: Path, family: str, **options: object) -> Path:
    spec = model_spec_for("gpt2", num_layers=2, hidden_size=16, num_heads=2, vocab_size=31, sequence_length=8)
    defaults = {"layers_per_stage": [2, 2], "model": spec, "architecture": "gpt2", "sequence_length": 8}
    plan = make_plan(get_family(family).generate(2, 4, 1), family=family, **(defaults | options))
    path = directory / "plan.json"
    plan.save(path)
    return path


def test_a_run_trains_exactly_as_one_process_does_and_says_how_long_it_took(plan_path, tmp_path):
    steps = []
    report = run_plan(
        plan_path, steps=4, device="cpu", check=True, trace_path=tmp_path / "trace.json", on_progress=steps.append
    )
    assert report.exactness is not None
    assert report.exactness.worst_loss_relative_difference < 1e-10
    assert report.exactness.gradient_relative_difference < 1e-10
    assert report.losses[-1] < report.losses[0]
    assert [step.step for step in steps] == [0, 1, 2, 3]
    assert [step.loss for step in steps] == list(report.losses)
    assert (report.num_processes, report.backend, report.device, report.dtype) == (2, "gloo", "cpu", "float64")
    assert [(a.kind, a.stage, a.count) for a in report.actions] == [(k, s, 8) for s in (0, 1) for k in "FBW"]
    assert report.predicted.step_us == 10.0
    assert report.measured.step_us > 0
    trace = Trace.load(tmp_path / "trace.json")
    assert [len(rank.steps) for rank in trace.ranks] == [4, 4]


def test_the_runtime_of_torch_trains_the_same_and_its_actions_are_measured_too(plan_path):
    ours = run_plan(plan_path, steps=3, device="cpu")
    report = run_plan(plan_path, steps=3, device="cpu", engine="torch", check=True)
    assert report.engine == "torch"
    assert ours.engine == "pipewright"
    assert report.losses == ours.losses
    assert report.exactness is not None
    assert report.exactness.gradient_relative_difference < 1e-10
    assert [(a.kind, a.stage, a.count) for a in report.actions] == [(k, s, 4) for s in (0, 1) for k in "FBW"]
    assert all(a.handed_over_us == 0 for a in report.actions)  # it would be waiting, which torch does not tell apart


def test_what_the_runtime_of_torch_would_run_wrongly_is_refused_before_any_process_starts(tmp_path):
    spec = model_spec_for("gpt2", num_layers=2, hidden_size=16, num_heads=2, vocab_size=31, sequence_length=8)
    schedule = Schedule.from_lines(["F0.0 F0.1 BW0.1 BW0.0", "F1.1 BW1.1 F1.0 BW1.0"])
    plan = make_plan(schedule, layers_per_stage=[2, 2], model=spec, architecture="gpt2", sequence_length=8)
    plan.save(tmp_path / "plan.json")
    with pytest.raises(ExecutionError, match=r"rank 1, step 0: F1\.1 comes before F1\.0"):
        run_plan(tmp_path / "plan.json", device="cpu", engine="torch")


def test_a_data_parallel_run_is_exact_and_counts_the_reduction_apart_from_the_actions(tmp_path):
    report = run_plan(save_plan(tmp_path, "1f1b", dp=2), steps=3, device="cpu", check=True)
    assert report.exactness is not None
    assert report.exactness.gradient_relative_difference < 1e-10
    one_step = 2 * 4  # data ranks × microbatches
    assert {(a.kind, a.stage, a.count % one_step) for a in report.actions} == {
        (k, s, 0) for s in (0, 1) for k in ("F", "BW")
    }
    assert report.measured.data_parallel_us > 0


@pytest.mark.parametrize("post_validation", [False, True])
def test_a_clipped_run_trains_as_one_process_does_and_says_what_the_updates_did(plan_path, post_validation):
    free = run_plan(plan_path, steps=4, device="cpu").updates.gradient_norms
    assert all(norm is not None for norm in free)
    most = sorted(free)[1] * 1.001
    report = run_plan(plan_path, steps=6, device="cpu", check=True, max_grad_norm=most, post_validation=post_validation)
    assert report.exactness is not None
    assert report.exactness.worst_loss_relative_difference < 1e-10
    done = report.updates
    assert done.gradient_norms[0] == free[0]
    assert 0 < done.num_clipped < 6
    assert done.num_restarted == (done.num_clipped if post_validation else 0)
    assert done.num_rolled_back[0] <= done.num_restarted
    assert (done.num_skipped, done.num_rolled_back[1]) == (0, 0)
    # What the plan predicts is made up: a pipeline of 8 µs with 20 % bubble, 10 % of the span.
    assert report.predicted.pipeline_us == pytest.approx(8 * 0.8 / 0.9 if post_validation else 8)
    text = render_run(report)
    assert f"clipped to {most:g} in {done.num_clipped} of 6 steps" in " ".join(text.split())
    assert ("begun again" in text) == post_validation


def test_post_validation_is_ours_alone(plan_path):
    with pytest.raises(ExecutionError, match="torch's runtime cannot begin a step again"):
        run_plan(plan_path, device="cpu", engine="torch", post_validation=True)


def test_only_our_engine_measures_a_profile(plan_path, tmp_path):
    with pytest.raises(ExecutionError, match="torch's runtime does not tell what a rank waits for"):
        run_plan(plan_path, device="cpu", engine="torch", measure_path=tmp_path / "measured.json")


def test_a_norm_that_is_none_is_a_wrong_argument(plan_path):
    with pytest.raises(ValueError, match="max_grad_norm is -1, it must be a positive number"):
        run_plan(plan_path, device="cpu", max_grad_norm=-1.0)


def test_a_process_that_cannot_work_ends_the_run_with_its_own_words(plan_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "carrier-pigeon")
    with pytest.raises(ExecutionError, match=r"process \d failed with \w+: .*carrier-pigeon") as failure:
        run_plan(plan_path, steps=1, device="cpu")
    log = re.search(r"\(log: (\S+)\)", str(failure.value))
    assert log is not None
    assert "Traceback" in Path(log[1]).read_text()


@pytest.mark.parametrize("post_validation", [False, True])
def test_training_that_diverges_ends_with_the_steps_and_the_learning_rate(plan_path, post_validation):
    with pytest.raises(
        ExecutionError,
        match=r"the gradients of steps 2 to 4 are inf or NaN: training diverged; lower the learning rate",
    ):
        run_plan(plan_path, steps=6, device="cpu", learning_rate=1e30, post_validation=post_validation)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_killed_process_ends_the_run_and_is_named(zero_stage, tmp_path):
    plan_path = save_plan(tmp_path, "1f1b", dp=2, zero_stage=zero_stage) if zero_stage else save_plan(tmp_path, "zb-h1")

    def kill_one(_):
        for pid in workers():
            os.kill(pid, signal.SIGKILL)
            break

    with pytest.raises(ExecutionError, match=r"process \d was ended by SIGKILL; out of memory\?"):
        run_plan(plan_path, steps=100_000, device="cpu", on_progress=kill_one)
    assert workers() == []


def test_an_interrupt_leaves_no_process_behind(plan_path):
    def interrupt(_):
        assert len(workers()) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan_path, steps=100_000, device="cpu", on_progress=interrupt)
    assert workers() == []


def workers() -> list[int]:
    """Training processes that this process's torchrun has started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and "planner.executor.train" in (entry / "cmdline").read_text():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended while we looked
    return [pid for pid, parent in parents.items() if parents.get(parent) == os.getpid()]


def test_a_plan_without_a_bundled_model_points_to_the_pipeline_class(tmp_path):
    path = save_plan(tmp_path, "1f1b", architecture=None)
    with pytest.raises(ExecutionError, match=r"not made from a bundled model.*planner\.executor\.Pipeline"):
        run_plan(path, device="cpu")


def test_a_plan_with_too_few_layers_is_refused(tmp_path):
    path = save_plan(tmp_path, "1f1b", layers_per_stage=[2, 1])
    with pytest.raises(ExecutionError, match=r"has 4 layers with embedding and head.*\[2, 1\] add up to 3"):
        run_plan(path, device="cpu")


def test_a_tensor_parallel_plan_is_refused_before_any_process_starts(tmp_path):
    path = save_plan(tmp_path, "1f1b", tp=2)
    with pytest.raises(ExecutionError, match="tp=2 is not yet run"):
        run_plan(path, device="cpu")


def test_more_cuda_devices_than_there_are_is_refused(plan_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ExecutionError, match="runs on 2 CUDA devices, this machine has 1"):
        run_plan(plan_path, device="cuda")


@pytest.mark.parametrize("backend", ["nccl", "carrier-pigeon"])
def test_a_backend_that_cannot_send_is_refused_before_any_process_starts(plan_path, backend):
    with pytest.raises(ExecutionError, match=f"backend '{backend}' cannot send cpu tensors between .*; use gloo"):
        run_plan(plan_path, device="cpu", backend=backend)


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        run_plan(tmp_path / "nothing.json")


def test_steps_below_one_are_a_wrong_argument(plan_path):
    with pytest.raises(ValueError, match="steps is 0"):
        run_plan(plan_path, steps=0)
