"""Undoing an optimizer's step exactly: by keeping what it overwrites, since arithmetic cannot take it back."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from planner.executor.checkpoint import RandomState


def _parts(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer, and the one inside it that holds this process's shard of the state."""
    inside = getattr(optimizer, "optim", None)
    return [optimizer, inside] if isinstance(inside, Optimizer) else [optimizer]


class OverwrittenState:
    """Copies of the parameters with gradients and of the whole optimizer state, as they are before a step.

    They take as many bytes as those parameters and that state; `restore` puts them back and can be called once.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = [(parameter, parameter.detach().clone()) for parameter in parameters]
        # A step may begin the state of a parameter, so what is absent now has to be absent again.
        self._states = [
            (part, {key: copy.deepcopy(value) for key, value in part.state.items()}) for part in _parts(optimizer)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as it was."""
        for parameter, value in self._parameters:
            parameter.copy_(value)
        for part, state in self._states:
            part.state.clear()
            part.state.update(state)


class StepSettings:
    """Options of all parameter groups (learning rate and so on) and random numbers, as a step finds them."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._device = device
        self._before = _options(optimizer)
        self._after = self._before
        self._random = RandomState.now(device)

    def step_done(self) -> None:
        """The step has been made: options that change from now on were changed by somebody else."""
        self._after = _options(self._optimizer)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Make the step again as it was first to be made.

        What somebody else (a learning rate schedule) has set since stays set afterwards.
        """
        now = _options(self._optimizer)
        _set(self._optimizer, self._before)
        with self._random.replayed(self._device):
            yield
        changed = [
            {key: value for key, value in new.items() if key not in old or not _same(value, old[key])}
            for new, old in zip(now, self._after, strict=True)
        ]
        _set(self._optimizer, changed)


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for part in _parts(optimizer)
        for group in part.param_groups
    ]


def _set(optimizer: Optimizer, options: Sequence[dict[str, Any]]) -> None:
    groups = [group for part in _parts(optimizer) for group in part.param_groups]
    for group, wanted in zip(groups, options, strict=True):
        for key, value in wanted.items():
            if isinstance(group.get(key), Tensor) and isinstance(value, Tensor):
                group[key].copy_(value)
            else:
                group[key] = copy.deepcopy(value)


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
