"""Full activation recompute of one layer: between F and B only the layer's input is kept.

B first repeats the forward, then goes on as without recompute. The split backward of
`profiles.measure.split_backward` stays exact, and the forward is repeated once, in B, not again in W.
"""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from profiles.measure.split_backward import current_store, deferring


def call_with_recompute(layer: nn.Module, layer_input: Tensor) -> Tensor:
    """The output of `layer`; its backward will start by repeating the forward, with equal dropout masks."""
    store = current_store()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), nullcontext() if store is None else deferring(store)

    output: Tensor = checkpoint(layer, layer_input, use_reentrant=False, context_fn=contexts)
    return output
