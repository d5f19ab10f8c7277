"""What F leaves of a microbatch that an R action runs again: the stage's input, and where the random numbers stood.

R repeats the forward from there with the graph, so masks of dropout come out the same, and puts the random numbers
back to where it found them. F and R run in one call of `Pipeline.step`, hence under the same autocast. As with
`torch.utils.checkpoint`, buffers that a forward changes (BatchNorm's running statistics and counter) change twice, and
a stage that writes into its input, or draws from a generator of its own, does not repeat itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor


class RandomState(NamedTuple):
    """The state of torch's default generators, of the CPU and of one CUDA device."""

    cpu: Tensor
    cuda: Tensor | None  # None where the work is on the CPU

    @classmethod
    def now(cls, device: torch.device) -> Self:
        """As it is."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self, device: torch.device) -> None:
        """Draw from this state from now on."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)

    @contextmanager
    def replayed(self, device: torch.device) -> Iterator[None]:
        """Draw from this state inside the block, and go on after it as if nothing had been drawn."""
        with torch.random.fork_rng([] if self.cuda is None else [device]):
            self.restore(device)
            yield


class Checkpoint(NamedTuple):
    """One microbatch between F and R."""

    value: Tensor  # the stage's input
    random: RandomState

    @classmethod
    def before(cls, value: Tensor) -> Self:
        """To be taken just before F runs on `value`."""
        return cls(value, RandomState.now(value.device))


@contextmanager
def without_graph(device: torch.device) -> Iterator[None]:
    """Run a forward that will be repeated.

    Under autocast, casts of parameters made here are forgotten: torch before its change #165068 would take them from
    autocast's cache for the repeated forward, and they lead to no parameter.
    """
    with torch.no_grad():
        yield
    if torch.is_autocast_enabled(device.type):
        torch.clear_autocast_cache()
