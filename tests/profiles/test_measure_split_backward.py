import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from profiles.measure.models import build_layers, loss_fn, model_spec_for, synthetic_batch
from profiles.measure.recompute import call_with_recompute
from profiles.measure.split_backward import WeightGradStore, current_store, deferring, prepare

TOLERANCE = {"rtol": 1e-12, "atol": 1e-14}  # float64, other order of summation


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters(remove_duplicate=False)}


def fused(module: nn.Module, x: Tensor, dy: Tensor, times: int = 1) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    """Gradients by plain autograd."""
    module = copy.deepcopy(module)
    x = x.detach().requires_grad_(x.requires_grad)
    for _ in range(times):
        torch.autograd.backward(module(x), dy)
    return x.grad, gradients(module)


def split(module: nn.Module, x: Tensor, dy: Tensor, times: int = 1) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    """Gradients by B and W."""
    module = copy.deepcopy(module)
    x = x.detach().requires_grad_(x.requires_grad)
    for _ in range(times):
        store = WeightGradStore()
        with deferring(store):
            output = module(x)
        torch.autograd.backward(output, dy)
        store.run()
        assert store.num_pending == 0
        assert store.held_bytes == 0
    return x.grad, gradients(module)


def assert_equal_gradients(module: nn.Module, x: Tensor, dy: Tensor, times: int = 1) -> None:
    want_input, want = fused(module, x, dy, times)
    got_input, got = split(module, x, dy, times)
    torch.testing.assert_close(got_input, want_input, **TOLERANCE)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


class Tower(nn.Module):
    """Square linears with a nonlinearity between them, some sharing their weight."""

    def __init__(self, width: int, layers: list[tuple[bool, bool, bool]], is_tied: bool) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width, bias=bias, dtype=torch.float64) for bias, _, _ in layers)
        for linear, (bias, weight_frozen, bias_frozen) in zip(self.linears, layers, strict=True):
            linear.weight.requires_grad_(not weight_frozen)
            if bias:
                linear.bias.requires_grad_(not bias_frozen)
        if is_tied:
            self.linears[-1].weight = self.linears[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = x + torch.tanh(linear(x))
        return x


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    width=st.integers(1, 5),
    batch=st.lists(st.integers(0, 3), min_size=0, max_size=3).map(tuple),
    layers=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=4),
    is_tied=st.booleans(),
    input_has_gradient=st.booleans(),
    times=st.integers(1, 3),
)
def test_b_then_w_gives_the_gradients_of_plain_autograd(width, batch, layers, is_tied, input_has_gradient, times):
    torch.manual_seed(0)
    tower = Tower(width, layers, is_tied)
    x = torch.randn(*batch, width, dtype=torch.float64, requires_grad=input_has_gradient)
    if not input_has_gradient and not any(parameter.requires_grad for parameter in tower.parameters()):
        return  # no backward at all
    assert_equal_gradients(tower, x, torch.randn(*batch, width, dtype=torch.float64), times)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 6),
    padding=st.none() | st.integers(-6, 5),
    by_frequency=st.booleans(),
    indices=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    times=st.integers(1, 2),
)
def test_embedding_gradients_are_those_of_plain_autograd(rows, padding, by_frequency, indices, times):
    torch.manual_seed(0)
    if padding is not None and not -rows <= padding < rows:
        padding = None
    embedding = nn.Embedding(rows, 3, padding_idx=padding, scale_grad_by_freq=by_frequency, dtype=torch.float64)
    tokens = torch.tensor(indices) % rows
    assert_equal_gradients(embedding, tokens, torch.randn(len(indices), 3, dtype=torch.float64), times)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_whole_bundled_model_has_the_gradients_of_plain_autograd(architecture, recompute):
    spec = model_spec_for(
        architecture,
        num_layers=2,
        hidden_size=16,
        num_heads=4,
        num_kv_heads=2 if architecture == "llama" else None,
        vocab_size=11,
        sequence_length=7,
    )
    inputs, targets = synthetic_batch(spec, 3, seed=1, step=0)
    found = []
    for store in (None, WeightGradStore()):
        layers = build_layers(architecture, spec, dtype=torch.float64, device="cpu", seed=5)
        x = inputs
        with nullcontext() if store is None else deferring(store):
            for layer in layers:
                x = call_with_recompute(layer, x) if recompute else layer(x)
            loss = loss_fn(x, targets)
        loss.backward()
        if store is not None:
            assert store.num_pending > 0
            store.run()
        found.append([loss.detach()] + [p.grad for layer in layers for p in layer.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-13)


class CountedForwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.num_forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_forwards += 1
        return self.dropout(torch.tanh(self.linear(x)))


def test_recompute_repeats_the_forward_once_in_b_with_equal_dropout_and_not_in_w():
    torch.manual_seed(3)
    layer = CountedForwards()
    x = torch.randn(5, 4, requires_grad=True)
    dy = torch.randn(5, 4)
    torch.manual_seed(7)
    torch.autograd.backward(layer(x), dy)
    want = [x.grad, layer.linear.weight.grad, layer.linear.bias.grad]
    layer.zero_grad()
    x.grad = None
    layer.num_forwards = 0
    torch.manual_seed(7)
    store = WeightGradStore()
    with deferring(store):
        output = call_with_recompute(layer, x)
    torch.autograd.backward(output, dy)
    assert layer.num_forwards == 2
    assert layer.linear.weight.grad is None
    store.run()
    assert layer.num_forwards == 2
    torch.testing.assert_close([x.grad, layer.linear.weight.grad, layer.linear.bias.grad], want)


def test_no_weight_gradient_exists_before_w_and_norms_have_theirs_after_b():
    module = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 2))
    x = torch.randn(5, 4, requires_grad=True)
    store = WeightGradStore()
    with deferring(store):
        output = module(x)
    torch.autograd.backward(output, torch.ones_like(output))
    assert x.grad is not None
    assert module[0].weight.grad is not None
    assert [module[i].weight.grad for i in (1, 2)] == [None, None]
    assert [module[i].bias.grad for i in (1, 2)] == [None, None]
    assert store.num_pending == 2
    store.run()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_between_b_and_w_only_inputs_and_output_gradients_of_linears_are_held():
    module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 8))
    x = torch.randn(5, 4, requires_grad=True)
    store = WeightGradStore()
    with deferring(store):
        output = module(x)
    graph = weakref.ref(output.grad_fn)
    torch.autograd.backward(output, torch.randn_like(output))
    del output
    gc.collect()
    assert graph() is None
    assert store.held_bytes == 5 * (4 + 6 + 6 + 8) * 4  # x and dy of both, float32


def test_an_input_shared_by_two_linears_is_held_once():
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(5, 4)
    store = WeightGradStore()
    with deferring(store):
        output = first(x) + second(x)  # one gradient for both, too
    torch.autograd.backward(output, torch.randn_like(output))
    assert store.num_pending == 2
    assert store.held_bytes == 5 * (4 + 3) * 4


def test_gradients_made_by_w_carry_no_graph():
    linear = nn.Linear(4, 3)
    x = torch.randn(5, 4, requires_grad=True)
    hidden = x * 2
    store = WeightGradStore()
    with deferring(store):
        output = linear(hidden)
    torch.autograd.backward(output, torch.randn_like(output))
    store.run()
    assert linear.weight.grad.grad_fn is None
    assert not linear.weight.grad.requires_grad


def test_outside_of_deferring_nothing_changes():
    linear = nn.Linear(4, 3)
    state = set(linear.state_dict())
    attributes = set(vars(linear))
    store = WeightGradStore()
    with deferring(store):
        deferred = linear(torch.ones(2, 4))
        assert current_store() is store
    assert current_store() is None
    plain = linear(torch.ones(2, 4))
    torch.testing.assert_close(plain, deferred)
    plain.sum().backward()
    assert store.num_pending == 0
    assert linear.weight.grad is not None
    assert type(linear) is nn.Linear
    assert set(linear.state_dict()) == state
    assert set(vars(linear)) == attributes


def test_the_innermost_deferring_block_gets_the_work():
    linear = nn.Linear(4, 3)
    outer, inner = WeightGradStore(), WeightGradStore()
    with deferring(outer):
        first = linear(torch.ones(2, 4))
        with deferring(inner):
            second = linear(torch.ones(2, 4))
    (first + second).sum().backward()
    assert (outer.num_pending, inner.num_pending) == (1, 1)


def test_forwards_without_gradients_are_left_alone():
    linear = nn.Linear(4, 3)
    with deferring(WeightGradStore()), torch.no_grad():
        assert linear(torch.ones(2, 4)).grad_fn is None


def test_an_optimizer_step_between_f_and_b_is_noticed_as_in_plain_torch():
    linear = nn.Linear(4, 3)
    x = torch.ones(2, 4, requires_grad=True)
    with deferring(WeightGradStore()):
        output = linear(x)
    with torch.no_grad():
        linear.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class Composed(nn.Module):
    """What cannot be deferred: a weight made of parameters, and torch's own multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))
        self.right = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
        self.out = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.left @ self.right)
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def test_weights_that_cannot_be_deferred_get_exact_gradients_within_b():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert_equal_gradients(Composed(), x, torch.randn(2, 3, 4, dtype=torch.float64))


def test_parameters_with_hooks_are_not_deferred_so_that_hooks_run():
    linear = nn.Linear(4, 3)
    seen = []
    linear.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad is not None))
    store = WeightGradStore()
    with deferring(store):
        output = linear(torch.ones(2, 4))
    output.sum().backward()
    assert seen == [True]
    assert store.num_pending == 0


def test_autocast_is_not_deferred():
    linear = nn.Linear(4, 3)
    store = WeightGradStore()
    with deferring(store), torch.autocast("cpu", torch.bfloat16):
        output = linear(torch.ones(2, 4))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert store.num_pending == 0
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}])
def test_sparse_and_renormalised_embeddings_are_not_deferred(options):
    embedding = nn.Embedding(5, 3, **options)
    store = WeightGradStore()
    with deferring(store):
        output = embedding(torch.tensor([1, 1, 2]))
    output.sum().backward()
    assert store.num_pending == 0
    assert embedding.weight.grad is not None


def test_low_precision_gradients_keep_dtype_and_layout():
    linear = nn.Linear(4, 3, dtype=torch.bfloat16)
    for _ in range(2):
        store = WeightGradStore()
        with deferring(store):
            output = linear(torch.ones(2, 5, 4, dtype=torch.bfloat16))
        output.sum().backward()
        store.run()
    assert linear.weight.grad.dtype == torch.bfloat16
    assert linear.weight.grad.is_contiguous()
    assert linear.weight.grad.tolist() == [[20.0] * 4] * 3
    assert linear.bias.grad.tolist() == [20.0] * 3


def test_prepare_refuses_modules_that_reduce_gradients_within_autograd(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        replicated = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="module 0 is DistributedDataParallel, which misses deferred gradients"):
            prepare(nn.Sequential(replicated))
    finally:
        torch.distributed.destroy_process_group()
    prepare(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.gpu
def test_b_then_w_gives_the_gradients_of_plain_autograd_on_cuda():
    torch.manual_seed(0)
    tower = Tower(64, [(True, False, False), (False, False, False), (True, False, False)], is_tied=True).cuda()
    x = torch.randn(3, 8, 64, dtype=torch.float64, device="cuda", requires_grad=True)
    assert_equal_gradients(tower, x, torch.randn(3, 8, 64, dtype=torch.float64, device="cuda"), times=2)
