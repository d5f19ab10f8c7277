"""The layers of one stage on this process, and how a forward through them is run."""

from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from planner.errors import ExecutionError
from profiles.measure.recompute import call_with_recompute
from profiles.measure.split_backward import WeightGradStore, deferring, prepare

Layer = nn.Module | Callable[[], nn.Module]


class Stage(nn.Module):
    """Consecutive layers, called one after the other with one tensor."""

    def __init__(
        self, index: int, first_layer: int, layers: Sequence[nn.Module], *, recompute: Container[int], splits: bool
    ) -> None:
        """`first_layer`: the model's index of the first of `layers`; `recompute`: which indices are recomputed.

        `splits`: whether some backward of this stage is B and W. ExecutionError when that cannot be.
        """
        super().__init__()
        self.index = index
        self.layers = nn.ModuleDict({str(first_layer + n): layer for n, layer in enumerate(layers)})
        self._recompute = {name for name in self.layers if int(name) in recompute}
        if splits:
            try:
                prepare(self)
            except ValueError as error:
                raise ExecutionError(f"stage {index}: {error}") from None

    def forward(self, value: Tensor, store: WeightGradStore | None = None) -> Tensor:
        """The stage's output; with a `store`, the weight part of the backward will be put there."""
        context = nullcontext() if store is None else deferring(store)
        with context:
            for name, layer in self.layers.items():
                value = call_with_recompute(layer, value) if name in self._recompute else layer(value)
                if not isinstance(value, Tensor):
                    raise ExecutionError(
                        f"layer {name} ({type(layer).__name__}) returned {type(value).__name__}; layers pass "
                        "one tensor on: pack what the next layer needs into one, or merge the two layers"
                    )
        return value


def build_layer(index: int, layer: Layer, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Layer `index` of the model on its device; a factory is called, a module is taken as it is."""
    built = layer if isinstance(layer, nn.Module) else layer()
    if not isinstance(built, nn.Module):
        raise ExecutionError(
            f"layers[{index}] gave {type(built).__name__}; each entry is an nn.Module, or a callable without "
            "arguments that returns one"
        )
    return built.to(device=device, dtype=dtype)
