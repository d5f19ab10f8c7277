"""R as an action: the same gradients as without, dropout included, with the input alone held until R."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from executor_cases import WIDTH, Block, loss_fn, make_batch, make_layer, make_plan
from torch import Tensor, nn

from planner.executor import Pipeline
from planner.executor.program import rank_program
from planner.plans import Plan
from planner.schedule.actions import Schedule

PLAIN = ["F0.0 F1.0 F0.1 F1.1 BW1.0 BW0.0 BW1.1 BW0.1"]
RECOMPUTED = ["F0.0 F1.0 F0.1 F1.1 R0.0 R1.0 BW1.0 BW0.0 R1.1 B1.1 R0.1 W1.1 B0.1 W0.1"]


class Dropping(nn.Module):
    """A block with dropout, which counts its forwards and those of them that kept a graph."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.block = Block(torch.Generator().manual_seed(seed))
        self.dropout = nn.Dropout(0.5)
        self.forwards = self.graphs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        self.graphs += torch.is_grad_enabled()
        return self.dropout(self.block(x))


def make_layers() -> list[nn.Module]:
    return [make_layer(0, 4, 0), Dropping(1), Dropping(2), make_layer(3, 4, 0)]


def plan_of(lines: Sequence[str], **options: object) -> Plan:
    return make_plan(Schedule.from_lines(lines), layers_per_stage=[2, 2], **options)


def trained(
    plan: Plan,
    layers: list[nn.Module],
    *,
    steps: int = 1,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[list[Tensor], dict[str, Tensor], Tensor, Pipeline]:
    """Losses, gradients, the random state afterwards, and the pipeline, closed."""
    torch.manual_seed(7)
    losses = []
    with Pipeline(plan, layers, loss_fn, device="cpu") as pipe:
        for step in range(steps):
            with around():
                loss = pipe.step(*make_batch(4, step))
            assert loss is not None
            losses.append(loss)
        gradients = {name: parameter.grad for name, parameter in pipe.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        return losses, gradients, torch.get_rng_state(), pipe


@pytest.mark.parametrize("layers_recompute", ["none", "full"])
def test_gradients_losses_and_random_numbers_are_those_without_recompute(layers_recompute):
    """With "full", blocks are recomputed once more inside their backward."""
    losses, gradients, random, _ = trained(plan_of(PLAIN), make_layers(), steps=2)
    again, same, after, _ = trained(plan_of(RECOMPUTED, recompute=layers_recompute), make_layers(), steps=2)
    assert torch.equal(torch.stack(again), torch.stack(losses))
    assert torch.equal(after, random)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-13, atol=1e-15)


def test_a_forward_runs_twice_and_keeps_its_graph_once():
    layers = make_layers()
    *_, pipe = trained(plan_of(RECOMPUTED), layers)
    for layer in (layers[1], layers[2]):
        assert (layer.forwards, layer.graphs) == (4, 2)
    assert pipe.peak_graphs == 2  # four without R


def test_the_loss_of_a_microbatch_is_computed_once():
    seen = []

    def counted(output: Tensor, targets: Tensor) -> Tensor:
        seen.append(output.requires_grad)
        return loss_fn(output, targets)

    with Pipeline(plan_of(RECOMPUTED), make_layers(), counted, device="cpu") as pipe:
        pipe.step(*make_batch(4, 0))
    assert seen == [True, True]


def test_under_autocast_parameters_get_their_gradients():
    """Autocast keeps the casts of a forward, also of one without graph."""

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16)

    def layers() -> list[nn.Module]:
        return [layer.float() for layer in make_layers()]

    _, gradients, _, _ = trained(plan_of(PLAIN), layers(), around=autocast)
    _, same, _, _ = trained(plan_of(RECOMPUTED), layers(), around=autocast)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-5, atol=1e-6)


def test_buffers_change_twice_as_with_checkpointing_in_torch():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    def layers() -> list[nn.Module]:
        return [make_layer(0, 3, 0), Counting(), make_layer(2, 3, 0), nn.Identity()]

    counts = []
    found = []
    for lines in (PLAIN, RECOMPUTED):
        made = layers()
        found.append(trained(plan_of(lines), made)[1])
        counts.append(int(made[1].norm.num_batches_tracked))
    assert counts == [2, 4]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_the_program_sends_the_output_at_f_and_not_at_r():
    first, last = (
        rank_program(Schedule.from_lines(["F0.0 R0.0 BW0.0", "F1.0 R1.0 B1.0 W1.0"]), rank) for rank in (0, 1)
    )
    assert [(str(s.action), s.receive is not None, s.send is not None) for s in (*first.steps, *last.steps)] == [
        ("F0.0", False, True),
        ("R0.0", False, False),
        ("BW0.0", True, False),
        ("F1.0", True, False),
        ("R1.0", False, False),
        ("B1.0", False, True),
        ("W1.0", False, False),
    ]
    assert (first.recomputed, last.recomputed) == (frozenset({(0, 0)}), frozenset({(1, 0)}))


@pytest.mark.gpu
def test_dropout_on_cuda_repeats_too():
    found = []
    for lines in (PLAIN, RECOMPUTED):
        torch.manual_seed(7)
        with Pipeline(plan_of(lines), make_layers(), loss_fn, device="cuda") as pipe:
            pipe.step(*make_batch(4, 0))
            found.append({name: parameter.grad for name, parameter in pipe.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-14)
