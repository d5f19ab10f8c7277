"""The optimizer's step across stages, against plain torch and against itself: real processes, float64."""

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch
from executor_cases import loss_fn, make_batch, make_layer, make_plan
from torch import nn
from worker_launch import found_by, torchrun

from planner.executor import Pipeline
from planner.executor.gradient_norm import Decision, Rule, square_sum
from planner.executor.rollback import OverwrittenState, StepSettings
from planner.schedule.families import get_family

WORKER = Path(__file__).with_name("optimizer_worker.py")
TOLERANCE = 1e-10
UPDATE, CLIP, SKIP = Decision.UPDATE, Decision.CLIP, Decision.SKIP


@pytest.fixture(scope="module", params=[(2, "two", 15), (4, "four", 18)], ids=["two processes", "four processes"])
def found(request, tmp_path_factory):
    num_processes, mode, num_cases = request.param
    cases = found_by(WORKER, num_processes, mode, tmp_path_factory.mktemp(mode), timeout_s=250)
    assert [sum("same bits" in case for case in mine.values()) for mine in cases] == [num_cases] * num_processes
    return cases


def each(found, key):
    return [
        (f"rank {rank}, {name}", case) for rank, mine in enumerate(found) for name, case in mine.items() if key in case
    ]


def test_clipped_and_skipped_steps_give_the_parameters_losses_and_norms_of_plain_torch(found):
    for where, case in each(found, "from plain torch"):
        for what in ("from plain torch", "losses from plain torch", "norms from plain torch"):
            assert case[what] < TOLERANCE, f"{where}: {case}"
        assert case["together"] == {"skipped": case["expected"]["skipped"], "rolled back": 0, "restarted": 0}, where


def test_post_validated_steps_are_the_synchronous_ones_to_the_last_bit(found):
    for where, case in each(found, "same bits"):
        assert case["same bits"], f"{where}: {case}"


def test_steps_are_made_at_once_and_taken_back_as_often_as_the_norms_say(found):
    seen = dict.fromkeys(("skipped", "rolled back", "put off", "restarted"), 0)
    for where, case in each(found, "expected"):
        expected = case["expected"]
        assert case["apart"] == {key: expected[key] for key in case["apart"]}, f"{where}: {case}"
        seen = {key: seen[key] + expected[key] for key in seen}
        assert expected["restarted"] < 9, f"{where}: every step was wrong at first, so none shows that others stand"
    assert min(seen.values()) > 0, seen


def test_forwards_run_before_validation_and_are_thrown_away_when_it_fails(found):
    for where, case in each(found, "discarded"):
        # The last step is validated when the pipeline closes, with no forwards behind it.
        assert case["apart"]["restarted"] - 1 <= case["discarded"] <= case["apart"]["restarted"], f"{where}: {case}"
        assert case["discarded"] > 0, where


def test_rank_0_begins_the_next_step_before_the_last_rank_has_made_the_one_before(found):
    starts = [mine["head start"] for mine in found if "head start" in mine]
    if len(found) == 2:
        assert [start["saw the next step begin"] for start in starts] == [-1.0, 1.0]


def test_an_error_in_a_forward_before_validation_ends_the_job_and_is_told(tmp_path):
    done = torchrun(WORKER, 2, "failing", tmp_path, timeout_s=250)
    assert done.returncode != 0
    assert "ArithmeticError: the loss of microbatch 0 cannot be computed" in done.stderr


@pytest.mark.parametrize(
    ("max_norm", "skip", "total", "decision"),
    [
        (2.0, True, 3.9, UPDATE),
        (2.0, True, 4.1, CLIP),
        (2.0, True, math.inf, SKIP),
        (2.0, True, math.nan, SKIP),
        (2.0, False, math.inf, CLIP),
        (2.0, False, math.nan, CLIP),
        (None, True, 1e300, UPDATE),
        (None, True, math.nan, SKIP),
        (None, False, math.nan, UPDATE),
    ],
)
def test_norms_are_judged_as_torch_judges_them(max_norm, skip, total, decision):
    assert Rule(max_norm, skip).decide(total) is decision


def test_the_norm_of_16_bit_gradients_does_not_overflow_in_16_bits():
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    weight.grad = torch.full_like(weight, 60000.0)
    assert square_sum([weight, nn.Parameter(torch.zeros(1))], torch.device("cpu")).item() == pytest.approx(4 * 6e4**2)


class Counting(torch.optim.Optimizer):
    """Keeps a count in its group, draws random numbers, and begins the state of a parameter late."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["sum"] = state.get("sum", torch.zeros_like(p)) + p.grad
                    p -= group["lr"] * group["count"] * (state["sum"] + torch.randn_like(p))


def test_a_step_made_again_is_as_it_would_have_been_and_leaves_later_changes_alone():
    def one_step(made_again: bool) -> tuple[list[torch.Tensor], dict[str, object]]:
        torch.manual_seed(1)
        weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizer = Counting(weights, lr=0.5)
        for number in range(2):
            weights[0].grad = torch.full((3,), 1.0 + number)
            weights[1].grad = torch.ones(3) if number else None
            if made_again and number == 1:
                settings = StepSettings(optimizer, torch.device("cpu"))
                kept = OverwrittenState(optimizer, weights)
                optimizer.step()
                settings.step_done()
                optimizer.param_groups[0]["lr"] = 0.25
                kept.restore()
                assert weights[1] not in optimizer.state
                with settings.again():
                    optimizer.step()
            else:
                optimizer.step()
                optimizer.param_groups[0]["lr"] = 0.5 / (number + 1)
        left = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        return [*weights, *(state["sum"] for state in optimizer.state.values()), torch.rand(2)], left

    once, once_left = one_step(False)
    again, again_left = one_step(True)
    assert once_left == again_left == {"lr": 0.25, "count": 2}
    assert all(map(torch.equal, once, again))


def test_a_closed_pipeline_and_its_process_groups_are_gone_with_the_last_name_for_them():
    def train() -> weakref.ref[Pipeline]:
        plan = make_plan(get_family("1f1b").generate(1, 3, 1), layers_per_stage=[3])
        with Pipeline(plan, [make_layer(n, 3, 0) for n in range(3)], loss_fn, device="cpu") as pipe:
            optimizer = pipe.make_optimizer(torch.optim.SGD, lr=0.1)
            pipe.step(*make_batch(6, 0))
            optimizer.step()
        return weakref.ref(pipe)

    gc.disable()  # it may come too late: threads of a process group must not outlive the interpreter
    try:
        assert train()() is None
    finally:
        gc.enable()


@pytest.fixture
def alone():
    plan = make_plan(get_family("1f1b").generate(1, 3, 1), layers_per_stage=[3])
    layers = [make_layer(n, 3, 0) for n in range(3)]
    with Pipeline(plan, layers, loss_fn, device="cpu") as pipe:
        yield pipe


@pytest.mark.parametrize("post_validation", [False, True])
def test_one_process_clips_and_saves_like_plain_torch(alone, post_validation):
    model = nn.Sequential(*(make_layer(n, 3, 0) for n in range(3)))
    plain = torch.optim.AdamW(model.parameters(), lr=0.1)
    ours = alone.make_optimizer(torch.optim.AdamW, lr=0.1, max_grad_norm=0.3, post_validation=post_validation)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (plain, ours)]
    for batch in range(3):
        inputs, targets = make_batch(6, batch)
        for optimizer in (plain, ours):
            optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        alone.step(inputs, targets)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        for optimizer, schedule in zip((plain, ours), schedules, strict=True):
            optimizer.step()
            schedule.step()
        assert ours.last_grad_norm == pytest.approx(norm.item(), rel=1e-12)
    assert ours.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert (ours.num_skipped, ours.num_rolled_back) == (0, 0)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(parameter, dict(model.named_parameters())[name], rtol=1e-12, atol=1e-12)
    saved = ours.state_dict()
    torch.testing.assert_close(saved, plain.state_dict(), rtol=1e-12, atol=1e-12)
    ours.load_state_dict(saved)
    assert ours.param_groups is ours.inner.param_groups
    assert ours.state is ours.inner.state


def test_groups_of_parameters_and_later_ones_are_the_inner_optimizers(alone):
    weights = list(alone.parameters())
    groups = [{"params": weights[:1], "lr": 0.5}, {"params": weights[1:2]}]
    ours = alone.make_optimizer(torch.optim.SGD, parameters=groups, lr=0.1)
    ours.add_param_group({"params": weights[2:]})
    assert [group["lr"] for group in ours.param_groups] == [0.5, 0.1, 0.1]
    assert ours.inner.param_groups == ours.param_groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0, it must be a positive number"),
        ({"max_grad_norm": math.nan}, "max_grad_norm is nan, it must be a positive number"),
        ({"skip_nonfinite": False, "post_validation": True}, "post_validation corrects steps that are clipped"),
    ],
)
def test_options_that_make_no_sense_are_refused(alone, options, message):
    with pytest.raises(ValueError, match=message):
        alone.make_optimizer(torch.optim.SGD, lr=0.1, **options)


def test_a_closure_is_refused(alone):
    with pytest.raises(ValueError, match="a closure cannot run a pipeline's step"):
        alone.make_optimizer(torch.optim.SGD, lr=0.1).step(lambda: 0.0)


def test_with_nothing_to_clip_or_skip_torch_steps_as_it_likes(alone):
    ours = alone.make_optimizer(torch.optim.SGD, lr=1.0, skip_nonfinite=False)
    for parameter in alone.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    ours.step()
    assert ours.last_grad_norm is None
    assert all(parameter.isnan().all() for parameter in alone.parameters())
