"""The executor against plain torch: real processes, real transfers, float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from executor_cases import loss_fn, make_batch, make_layer, make_plan
from torch import nn
from worker_launch import found_by, torchrun

from planner.errors import ExecutionError, ScheduleError
from planner.executor import Pipeline, Trace
from planner.schedule.actions import Schedule
from planner.schedule.families import get_family

WORKER = Path(__file__).with_name("executor_worker.py")
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    return found_by(WORKER, 2, "two", directory), directory


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return found_by(WORKER, 3, "three", tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return found_by(WORKER, 4, "four", tmp_path_factory.mktemp("four"))


def assert_exact(found):
    compared = 0
    for rank, cases in enumerate(found):
        for name, case in cases.items():
            if "gradients" in case:
                compared += 1
                where = f"rank {rank}, {name}: {case}"
                assert case["gradients"] < TOLERANCE, where
                assert case["loss"] < TOLERANCE, where
    return compared


def test_gradients_of_every_family_and_of_random_schedules_are_those_of_plain_torch_on_two_ranks(two):
    assert assert_exact(two[0]) == 2 * 68


def test_gradients_of_every_family_and_of_random_schedules_are_those_of_plain_torch_on_three_ranks(three):
    assert assert_exact(three) == 3 * 68


def test_pipeline_and_data_parallel_together_give_the_gradients_of_the_global_batch(four):
    assert assert_exact(four) == 4 * 4


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_two_steps_of_adamw_give_the_parameters_of_plain_torch(four, zero_stage):
    assert all(cases[f"adamw zero {zero_stage}"]["parameters"] < 1e-12 for cases in four)


def test_parameters_used_on_one_data_rank_get_a_gradient_on_all_and_unused_ones_on_none(four):
    for rank, cases in enumerate(four):
        stage = rank // 2
        assert cases["experts"]["gradients seen"] == [f"{stage}.always", f"{stage}.sometimes"]


def test_data_ranks_start_from_the_parameters_of_the_first_whatever_their_seeds(four):
    starts = [cases["start"]["first parameters"] for cases in four]  # pipeline ranks 0, 0, 1, 1
    assert starts[0] == starts[1] != starts[2] == starts[3]
    assert len(starts[0]) == 2 * 3 + 3 + 2


@pytest.mark.parametrize("family", ["1f1b", "zb-h1"])
def test_what_is_held_does_not_grow_with_the_microbatches(two, family):
    for cases in two[0]:
        few, many = (cases["memory"][f"{family} m={m}"] for m in (4, 16))
        assert few == many
        assert few["left"] == 0


def test_rows_and_missing_batches_are_refused_with_numbers(two):
    first, last = two[0]
    assert first["refusals"]["rows"].startswith("inputs has 7 rows, a step takes 8 on each data-parallel rank")
    assert last["refusals"]["rows"].startswith("targets has 7 rows, a step takes 8")
    assert first["refusals"]["nothing"] == "this process runs the first stage and needs inputs; it was given None"
    assert last["refusals"]["nothing"] == "this process runs the last stage and needs targets; it was given None"


def test_the_trace_holds_the_planned_actions_in_order_on_one_clock(two):
    trace = Trace.load(two[1] / "trace.json")
    schedule = get_family("zb-h1").generate(2, 3, 1)
    starts = []
    for rank, actions in zip(trace.ranks, schedule.ranks, strict=True):
        assert [step.step for step in rank.steps] == [1, 2]  # the last two of three
        for step in rank.steps:
            ran = [(e.kind, e.stage, e.microbatch) for e in step.events]
            assert ran == [*((a.kind.value, a.stage, a.microbatch) for a in actions), ("drain", None, None)]
            ends = [event.end_us for event in step.events]
            assert all(e.start_us <= e.end_us for e in step.events)
            assert ends == sorted(ends)
            starts += [event.start_us - event.waited_us for event in step.events]
    assert min(starts) == 0.0
    forward = {(r.pipeline_rank, e.microbatch): e for r in trace.ranks for e in r.steps[1].events if e.kind == "F"}
    for microbatch in range(3):  # the second rank waits for the first
        assert forward[0, microbatch].end_us <= forward[1, microbatch].start_us


def test_an_error_in_one_process_ends_the_job_and_is_told(tmp_path):
    done = torchrun(WORKER, 2, "failing_loss", tmp_path)
    assert done.returncode != 0
    assert "ArithmeticError: the loss of microbatch 1 cannot be computed" in done.stderr


def test_a_change_of_shape_is_refused_with_both_shapes(tmp_path):
    done = torchrun(WORKER, 2, "changing_shape", tmp_path)
    assert done.returncode != 0
    assert (
        "stage 0 made float64 [2, 2, 6] of microbatch 0, but the boundary to stage 1 was set up for float64 [2, 3, 6]"
        in done.stderr
    )


def test_one_process_runs_a_plan_for_one_without_torchrun():
    plan = make_plan(get_family("1f1b").generate(1, 3, 1), layers_per_stage=[3])
    inputs, targets = make_batch(6, 0)
    with Pipeline(plan, [lambda n=n: make_layer(n, 3, 0) for n in range(3)], loss_fn, device="cpu") as pipe:
        pipe.step(inputs, targets)
        loss = pipe.step(inputs, targets)
        model = nn.Sequential(*(make_layer(n, 3, 0) for n in range(3)))
        expected = loss_fn(model(inputs), targets)
        expected.backward()
        assert loss is not None
        assert abs(loss.item() - expected.item()) < 1e-12
        names = dict(model.named_parameters())
        for name, parameter in pipe.named_parameters():
            torch.testing.assert_close(parameter.grad, 2 * names[name].grad)  # two steps, not zeroed
        pipe.zero_grad()
        assert all(parameter.grad is None for parameter in pipe.parameters())
        assert pipe.state_dict().keys() == model.state_dict().keys()
        pipe.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
        torch.testing.assert_close(pipe.state_dict()["0.weight"], model.state_dict()["0.weight"] + 1)
        with pytest.raises(ExecutionError, match="inputs has 5 rows, a step takes 6"):
            pipe.step(inputs[:5], targets)


def test_importing_the_executor_loads_no_solver():
    look = "import sys, planner.executor; print([m for m in sys.modules if m in ('solvers', 'ortools', 'pulp')])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


LAYERS = [nn.Identity(), nn.Identity()]


def test_the_wrong_number_of_processes_is_refused_with_the_command_to_use():
    plan = make_plan(get_family("1f1b").generate(2, 2, 1))
    with pytest.raises(ExecutionError, match=r"runs on 2 processes, this job has 1; .*torchrun .*--nproc-per-node 2"):
        Pipeline(plan, LAYERS, loss_fn)


def test_a_model_of_another_length_is_refused():
    plan = make_plan(get_family("1f1b").generate(2, 2, 1), layers_per_stage=[2, 3])
    with pytest.raises(
        ExecutionError, match=r"the model has 2 layers, the plan's layers_per_stage \[2, 3\] add up to 5"
    ):
        Pipeline(plan, LAYERS, loss_fn)


def test_a_tensor_parallel_plan_is_refused():
    plan = make_plan(get_family("1f1b").generate(2, 2, 1), tp=2)
    with pytest.raises(ExecutionError, match="tp=2 is not yet run by this executor"):
        Pipeline(plan, LAYERS, loss_fn)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 3, "dp": 2}, r"ZeRO stage 3 over 2 of 2 data-parallel processes is not yet run"),
        ({"recompute": "selective"}, r"selective recomputation is not run by this executor"),
    ],
)
def test_layouts_for_other_engines_are_refused(changes, message):
    plan = make_plan(get_family("1f1b").generate(2, 2, 1), **changes)
    with pytest.raises(ExecutionError, match=message):
        Pipeline(plan, LAYERS, loss_fn)


def test_a_schedule_that_cannot_run_is_refused_before_anything_runs():
    deadlocked = Schedule.from_lines(["F0.0 BW0.0 F0.1 BW0.1", "F1.0 F1.1 BW1.0 BW1.1"])
    with pytest.raises(ScheduleError, match="deadlock"):
        Pipeline(make_plan(deadlocked), LAYERS, loss_fn)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: "a string", r"layers\[0\] gave str; each entry is an nn.Module"),
        (nn.LSTM(2, 2), r"layer 0 \(LSTM\) returned tuple; layers pass one tensor on"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(layer, message):
    plan = make_plan(get_family("1f1b").generate(1, 1, 1), layers_per_stage=[1])
    rows = torch.zeros(2, 2)

    def run() -> None:
        Pipeline(plan, [layer], loss_fn, device="cpu").step(rows, rows)

    try:
        with pytest.raises(ExecutionError, match=message):
            run()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("loss", "what"), [(lambda o, t: o, r"shape \[2, 2\]"), (lambda o, t: 1.0, "float")])
def test_a_loss_that_is_not_one_number_is_refused(loss, what):
    plan = make_plan(get_family("1f1b").generate(1, 1, 1), layers_per_stage=[1])
    rows = torch.zeros(2, 2)
    pipe = Pipeline(plan, [nn.Linear(2, 2)], loss, device="cpu")
    try:
        with pytest.raises(ExecutionError, match=f"loss_fn returned {what} for microbatch 0"):
            pipe.step(rows, rows)
        with pytest.raises(ExecutionError, match="an earlier step of this Pipeline failed"):
            pipe.step(rows, rows)
    finally:
        pipe.close()
