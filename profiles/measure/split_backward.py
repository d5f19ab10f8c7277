"""Split backward: the input gradients now (B), the weight gradients of linear layers whenever asked (W).

The profiler and the executor both run this engine, so what is measured is what is run.

    store = WeightGradStore()
    with deferring(store):
        output = stage(stage_input)                     # F
    torch.autograd.backward(output, output_gradient)    # B: stage_input.grad is there, the graph is gone
    store.run()                                         # W: every .grad is complete, the store is empty

A forward inside `deferring` records each product with a parameter (`F.linear`, hence `nn.Linear`;
`F.embedding`, hence `nn.Embedding`) as an autograd function of our own, whose backward returns the input
gradient only and queues (input, output gradient, parameters) in the store. A forward outside is plain torch
and its backward is fused (BW): the caller decides per forward, as the schedule says. A `TorchFunctionMode`
does it, so no module, parameter or class is changed.

Between B and W the store keeps the inputs and output gradients of those layers, and nothing else. They are
kept, not copied: who receives stage inputs or output gradients into buffers must not write there again
before W. All other parameters (norms, for instance) get their gradients within B.

Also computed within B, exactly, instead of being deferred: weights that are not leaves (say, products of
other parameters), parameters with hooks (which run as always), anything under autocast, sparse, renormalised
or frequency-scaled embeddings, and what torch hides inside one call (`nn.MultiheadAttention`). Reducers that
listen to autograd (DistributedDataParallel, FSDP) would miss deferred gradients: `prepare` refuses them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone gives it)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode


def prepare(module: nn.Module) -> None:
    """Check that the weight gradients of `module` may be deferred; the module is not changed.

    ValueError if a part of it is DistributedDataParallel or FSDP: those reduce gradients when autograd has
    accumulated them, and autograd never sees a deferred one.
    """
    for name, part in module.named_modules():
        if isinstance(part, DistributedDataParallel | FSDPModule | FullyShardedDataParallel):
            raise ValueError(
                f"module {name or 'itself'} is {type(part).__name__}, which misses deferred gradients; "
                "reduce gradients after the last W instead, or use a schedule without W"
            )


class _Work(Protocol):
    """One weight gradient still to be computed."""

    @property
    def parameters(self) -> tuple[Tensor, ...]: ...

    @property
    def held(self) -> tuple[Tensor, ...]: ...

    def accumulate(self) -> None: ...


class WeightGradStore:
    """Deferred weight gradients of one (stage, microbatch)."""

    def __init__(self) -> None:
        self._queue: deque[_Work] = deque()

    @property
    def num_pending(self) -> int:
        """Layer calls whose weight gradients are still to be computed."""
        return len(self._queue)

    @property
    def held_bytes(self) -> int:
        """Bytes of the storages kept alive for W, each counted once."""
        return storage_bytes(tensor for work in self._queue for tensor in work.held)

    @property
    def parameters(self) -> list[Tensor]:
        """Whose gradients are still to be computed, each parameter once."""
        return list({id(parameter): parameter for work in self._queue for parameter in work.parameters}.values())

    def put(self, work: _Work) -> None:
        """Queue one weight gradient."""
        self._queue.append(work)

    def run(self) -> None:
        """Add the queued gradients to `.grad`, in the order of their B, and let go of each as it is done."""
        with torch.no_grad():
            while self._queue:
                self._queue.popleft().accumulate()


_current_store: ContextVar[WeightGradStore | None] = ContextVar("current_store", default=None)


def current_store() -> WeightGradStore | None:
    """The store of the innermost `deferring` block; None outside of any."""
    return _current_store.get()


@contextmanager
def deferring(store: WeightGradStore) -> Iterator[None]:
    """Let forwards inside this block put the weight part of their later backward into `store`."""
    token = _current_store.set(store)
    try:
        with _Deferring(store):
            yield
    finally:
        _current_store.reset(token)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages under these tensors, each storage counted once and in full."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _Deferring(TorchFunctionMode):
    """Routes products with deferrable parameters through the functions below, everything else to torch."""

    def __init__(self, store: WeightGradStore) -> None:
        super().__init__()
        self._store = store

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return _linear(self._store, *args, **(kwargs or {}))
        if func is F.embedding:
            return _embedding(self._store, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(
    store: WeightGradStore,
    input: Tensor,  # noqa: A002 (F.linear's own name)
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    if not _deferrable(weight) or (bias is not None and bias.requires_grad and not _deferrable(bias)):
        return F.linear(input, weight, bias)
    return _deferred_linear(input, weight, bias, store)


def _embedding(
    store: WeightGradStore,
    input: Tensor,  # noqa: A002 (F.embedding's own name)
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq or sparse or not _deferrable(weight):
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    padding_row = None if padding_idx is None else padding_idx % weight.shape[0]
    return _deferred_embedding(input, weight, padding_row, store)


def _deferrable(parameter: Tensor) -> bool:
    """Whether the gradient of `parameter` can go to its `.grad` past autograd without anyone noticing."""
    return (
        parameter.requires_grad
        and parameter.is_leaf
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled(parameter.device.type)
    )


class _DeferredLinear(torch.autograd.Function):
    """y = x Wᵀ + b with x (..., in), W (out, in), b (out) or None; W requires a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, store: WeightGradStore) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight  # checkpointing unpacks a saved weight as another tensor, without the .grad
        ctx.bias = bias if bias is not None and bias.requires_grad else None
        ctx.store = store
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.store.put(_LinearWork(x.detach(), dy, ctx.weight, ctx.bias))
        return (dy.matmul(weight) if ctx.needs_input_grad[0] else None), None, None, None


_deferred_linear: Callable[..., Tensor] = _DeferredLinear.apply


@dataclass(frozen=True)
class _LinearWork:
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.x, self.dy

    def accumulate(self) -> None:
        dy = self.dy.reshape(-1, self.dy.shape[-1])
        x = self.x.reshape(-1, self.x.shape[-1])
        if self.weight.grad is None:
            self.weight.grad = dy.t().mm(x)
        else:
            self.weight.grad.addmm_(dy.t(), x)  # one pass over .grad, where autograd makes three
        if self.bias is not None:
            if self.bias.grad is None:
                self.bias.grad = dy.sum(0)
            else:
                self.bias.grad.add_(dy.sum(0))


class _DeferredEmbedding(torch.autograd.Function):
    """y = W[indices] with indices (...), W (rows, width); W requires a gradient."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, padding_row: int | None, store: WeightGradStore) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.weight, ctx.padding_row, ctx.store = weight, padding_row, store
        return F.embedding(indices, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, None]:
        (indices,) = ctx.saved_tensors
        ctx.store.put(_EmbeddingWork(indices, dy, ctx.weight, ctx.padding_row))
        return None, None, None, None


_deferred_embedding: Callable[..., Tensor] = _DeferredEmbedding.apply


@dataclass(frozen=True)
class _EmbeddingWork:
    indices: Tensor
    dy: Tensor
    weight: Tensor
    padding_row: int | None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.indices, self.dy

    def accumulate(self) -> None:
        dy = self.dy
        if self.padding_row is not None:
            dy = dy.masked_fill((self.indices == self.padding_row).unsqueeze(-1), 0)
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        self.weight.grad.index_put_((self.indices,), dy, accumulate=True)  # touches only the rows in use
