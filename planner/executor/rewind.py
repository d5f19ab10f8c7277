"""Beginning a step again: what forwards change besides tensors of their own is put back as it was."""

from collections.abc import Iterable

import torch
from torch import Tensor

from planner.executor.checkpoint import RandomState


class Rewind:
    """torch's random numbers and the buffers (like running means) of some modules, at the moment this is made."""

    def __init__(self, buffers: Iterable[Tensor], device: torch.device) -> None:
        self._device = device
        self._random = RandomState.now(device)
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in buffers]

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as it was; casts that autocast keeps of parameters are forgotten, as those may have changed."""
        self._random.restore(self._device)
        for buffer, value in self._buffers:
            buffer.copy_(value)
        torch.clear_autocast_cache()
