"""torch's own runtime as an oracle: an engine that shares no interpreter, no transfers and no split with ours."""

from pathlib import Path

import pytest
import torch
from executor_cases import WIDTH, make_plan
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from worker_launch import found_by

from planner.errors import ExecutionError
from planner.executor.torch_engine import TorchPipeline, refuse_for_torch, torch_csv
from planner.schedule.actions import Schedule
from planner.schedule.families import get_family

WORKER = Path(__file__).with_name("torch_engine_worker.py")
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return found_by(WORKER, 2, "two", tmp_path_factory.mktemp("two"), may_warn=True)


def assert_agreement(found) -> int:
    compared = 0
    for rank, cases in enumerate(found):
        for name, case in cases.items():
            if name == "refusals":
                continue
            compared += 1
            where = f"rank {rank}, {name}: {case}"
            assert case["gradients"] < TOLERANCE, where
            assert case["same_actions"], where
            for ours, theirs in zip(*case["losses"], strict=True):
                assert ours == theirs, where
    return compared


def test_both_engines_give_the_same_losses_and_gradients_on_two_ranks(two):
    assert assert_agreement(two) == 2 * (13 * 2 + 2 + 12)


def test_both_engines_give_the_same_losses_and_gradients_on_three_ranks(tmp_path):
    assert assert_agreement(found_by(WORKER, 3, "three", tmp_path, may_warn=True)) == 3 * (13 * 2 + 2 + 12)


def test_both_engines_give_the_same_gradients_beside_data_parallelism(tmp_path):
    assert assert_agreement(found_by(WORKER, 4, "four", tmp_path, may_warn=True)) == 4


def test_changed_shapes_and_shapes_that_depend_on_values_are_refused_on_every_process(two):
    for cases in two:
        said = cases["refusals"]
        assert "has shape [8, 2, 6], the first step's had [8, 3, 6]" in said["frozen, then another shape"]
        assert said["by value"].startswith(
            "layer 0 (ByValue): torch's runtime needs the shape of its output beforehand"
        )


def test_the_csv_speaks_the_letters_of_torch():
    schedule = Schedule.from_lines(["F0.0 F0.1 B0.0 W0.0 BW0.1", "F1.0 BW1.0 F1.1 B1.1 W1.1"])
    assert torch_csv(schedule) == "0F0,0F1,0I0,0W0,0B1\n1F0,1B0,1F1,1I1,1W1\n"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["F0.0 F0.1 BW0.1 BW0.0", "F1.1 BW1.1 F1.0 BW1.0"],
            r"^rank 1, step 0: F1.1 comes before F1.0; torch's runtime numbers losses in the order",
        ),
        (
            ["F0.0 R0.0 BW0.0", "F1.0 BW1.0"],
            r"^rank 0, step 1: R0.0 is none of F, B, W and BW, which are all that torch's runtime knows",
        ),
        (
            ["F0.0 F1.1 BW1.1 BW0.0", "F0.1 F1.0 BW1.0 BW0.1"],
            r"^rank 1, step 0: F0.1: stage 0 is on rank 0, too, and torch's runtime has one copy of each stage",
        ),
    ],
)
def test_what_torch_cannot_run_or_runs_wrongly_is_refused_with_rank_step_and_action(lines, message):
    plan = make_plan(Schedule.from_lines(lines), rank_of_stage=[0, 1])
    with pytest.raises(ExecutionError, match=message):
        refuse_for_torch(plan)


class InView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).transpose(0, 1)


def mean_square(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output - targets).square().mean()


def test_a_stage_that_ends_in_a_view_is_refused_with_the_split_of_torch_and_run_with_ours():
    plan = make_plan(Schedule.from_lines(["F0.0 F1.0 B1.0 B0.0 W1.0 W0.0"]), micro_batch_size=3)
    rows = torch.rand(3, 3, WIDTH)
    layers = [InView(), nn.Linear(WIDTH, WIDTH)]
    try:
        with pytest.raises(ExecutionError, match="stage 0 ends in a view of another tensor, which torch's split"):
            TorchPipeline(plan, layers, mean_square, split="torch", device="cpu").step(rows, rows)
        pipe = TorchPipeline(plan, layers, mean_square, device="cpu")
        pipe.step(rows, rows)
        got = {name: parameter.grad.clone() for name, parameter in pipe.named_parameters()}
        pipe.zero_grad()
        mean_square(nn.Sequential(*layers)(rows), rows).backward()
        for name, parameter in pipe.named_parameters():
            torch.testing.assert_close(got[name], parameter.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_layers_that_reduce_their_own_gradients_are_refused():
    plan = make_plan(get_family("1f1b").generate(1, 1, 1), layers_per_stage=[1])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layer = DistributedDataParallel(nn.Linear(WIDTH, WIDTH))
        with pytest.raises(ExecutionError, match="stage 0: 0 is DistributedDataParallel, whose reductions"):
            TorchPipeline(plan, [layer], mean_square, device="cpu")
    finally:
        torch.distributed.destroy_process_group()


def test_a_loss_that_is_not_one_number_is_refused():
    plan = make_plan(get_family("1f1b").generate(1, 1, 1), layers_per_stage=[1])
    rows = torch.rand(2, WIDTH)
    try:
        pipe = TorchPipeline(plan, [nn.Linear(WIDTH, WIDTH)], lambda o, t: o, device="cpu")
        with pytest.raises(ExecutionError, match=r"loss_fn returned shape \[2, 6\] for microbatch 0"):
            pipe.step(rows, rows)
        with pytest.raises(ExecutionError, match="an earlier step of this Pipeline failed"):
            pipe.step(rows, rows)
    finally:
        torch.distributed.destroy_process_group()
