"""Measure the layers of a model: F, B, W, BW and the optimizer step of each, and the bytes each holds.

The layers are run as a chain, one of each: per microbatch F through all of them, then B backwards through all,
then W; and the same with BW in place of B and W. So every layer finds the caches as the others leave them, as
in a pipeline stage, and adds to gradients that exist, as in all microbatches but the first. Autograd is cut
between layers, so each backward is that of one layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from profiles.errors import ProfileError
from profiles.measure.memory import Phase, recording_memory
from profiles.measure.recompute import call_with_recompute
from profiles.measure.split_backward import WeightGradStore, deferring, prepare, storage_bytes
from profiles.measure.timing import Stopwatch, Timing
from profiles.model import LayerGroup, LayerKind, LayerProfile, Variant

LossFn = Callable[[Tensor, Tensor], Tensor]
MakeBatch = Callable[[int], tuple[Tensor, Tensor]]
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ProfiledLayer:
    """`count` consecutive equal layers, of which `module` is one: it takes one tensor and returns one."""

    name: str
    kind: LayerKind
    module: nn.Module
    count: int = 1

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of one of them, once."""
        return list(self.module.parameters())


def measure_model(
    layers: Sequence[ProfiledLayer],
    make_batch: MakeBatch,
    loss_fn: LossFn,
    *,
    variants: Sequence[Variant],
    device: torch.device,
    warmups: int,
    repeats: int,
    on_progress: OnProgress | None = None,
) -> tuple[LayerGroup, ...]:
    """One `LayerGroup` per layer, each measured at every one of `variants`.

    `make_batch(micro_batch_size)` gives inputs of the first layer and targets of the loss, both on `device`.
    The loss is part of the last layer, whose output goes nowhere (0 output bytes). With recompute "full" the
    layers of kind "block" are recomputed, and no others. Parameters keep their values, gradients are dropped.

    ProfileError names the layer and the variant that do not fit into memory, and layers that do not chain.
    """
    if warmups < 0 or repeats < 1:
        raise ValueError(f"warmups={warmups} repeats={repeats}: measure at least once")
    for layer in layers:
        prepare(layer.module)
    rows: list[list[LayerProfile]] = [[] for _ in layers]
    try:
        num_runs = warmups + repeats
        for number, variant in enumerate(variants):
            chain = _Chain(layers, loss_fn, make_batch(variant.micro_batch_size), variant, device)
            for run in range(num_runs):
                if on_progress is not None:
                    on_progress(str(variant), number * num_runs + run, len(variants) * num_runs)
                chain.run(is_warmup=run < warmups)
            for row, profile in zip(rows, chain.profiles(), strict=True):
                row.append(profile)
    finally:
        for layer in layers:
            layer.module.zero_grad(set_to_none=True)
    return tuple(
        LayerGroup(name=layer.name, kind=layer.kind, count=layer.count, profiles=tuple(row))
        for layer, row in zip(layers, rows, strict=True)
    )


@dataclass(frozen=True)
class _Memory:
    activation_bytes: int
    weight_activation_bytes: int
    output_bytes: int
    temporary_bytes: int
    deferred_parameter_bytes: int


class _Chain:
    """One of each layer, at one variant."""

    def __init__(
        self,
        layers: Sequence[ProfiledLayer],
        loss_fn: LossFn,
        batch: tuple[Tensor, Tensor],
        variant: Variant,
        device: torch.device,
    ) -> None:
        self._layers = layers
        self._loss_fn = loss_fn
        self._inputs, self._targets = batch[0].clone(), batch[1]  # a view would count with its whole storage
        self._variant = variant
        self._device = device
        self._watch = Stopwatch(device)
        self._optimizers = [_optimizer(layer) for layer in layers]

    def run(self, *, is_warmup: bool) -> None:
        """One microbatch split, one fused, one optimizer step; timed unless it is a warm-up."""
        self._microbatch("split")
        self._microbatch("fused")
        self._step()
        if is_warmup:
            self._watch.clear()

    def profiles(self) -> list[LayerProfile]:
        """What was measured, layer by layer."""
        profiles = []
        x = self._inputs
        for index in range(len(self._layers)):
            with self._naming(index):
                x, memory = self._measure_memory(index, x)
            profiles.append(self._profile(index, memory))
        return profiles

    def _microbatch(self, mode: Literal["split", "fused"]) -> None:
        stores = [WeightGradStore() for _ in self._layers]
        passes: list[tuple[Tensor, Tensor]] = []
        x = self._inputs
        for index, store in enumerate(stores):
            x = _as_input(x)
            context = deferring(store) if mode == "split" else nullcontext()
            with self._naming(index), self._watch.span(("F", index)), context:
                output = self._call(index, x)
            passes.append((x, output))
            x = output
        gradient: Tensor | None = None
        while passes:
            x, output = passes.pop()
            index = len(passes)
            with self._naming(index), self._watch.span(("B" if mode == "split" else "BW", index)):
                _backward(output, gradient)
            gradient = x.grad
        if mode == "split":
            for index, store in enumerate(stores):
                with self._naming(index), self._watch.span(("W", index)):
                    store.run()

    def _step(self) -> None:
        for index, optimizer in enumerate(self._optimizers):
            if optimizer is not None:
                with self._naming(index), self._watch.span(("optimizer", index)):
                    optimizer.step()

    def _measure_memory(self, index: int, given: Tensor) -> tuple[Tensor, _Memory]:
        """The layer's output, and what it allocates; its gradients exist already."""
        is_last = index == len(self._layers) - 1
        saved: set[int] = set()

        def note(tensor: Tensor) -> Tensor:
            saved.add(tensor.untyped_storage().data_ptr())
            return tensor

        x, store = _as_input(given), WeightGradStore()
        with recording_memory(self._device) as split:
            with split.phase("F"), deferring(store), saved_tensors_hooks(note, lambda tensor: tensor):
                output = self._call(index, x)
            detached = output.detach()
            gradient = None if is_last else torch.ones_like(detached)
            with split.phase("B"):
                _backward(output, gradient)
            weight_activation_bytes = store.held_bytes
            deferred_bytes = sum(p.numel() * p.element_size() for p in store.parameters)
            with split.phase("W"):
                store.run()
        x = _as_input(given)
        with recording_memory(self._device) as fused:
            with fused.phase("F"):
                output = self._call(index, x)
            with fused.phase("BW"):
                _backward(output, gradient)
        forward = split.phases["F"]
        held_bytes = forward.end_bytes - forward.start_bytes + storage_bytes([x])
        if detached.untyped_storage().data_ptr() not in saved:
            held_bytes -= storage_bytes([detached])
        return detached, _Memory(
            activation_bytes=max(held_bytes, 0),
            weight_activation_bytes=weight_activation_bytes,
            output_bytes=0 if is_last else detached.numel() * detached.element_size(),
            temporary_bytes=max(
                forward.peak_bytes - forward.end_bytes,
                *(_rise_bytes(phase) for phase in (split.phases["B"], split.phases["W"], fused.phases["BW"])),
            ),
            deferred_parameter_bytes=deferred_bytes,
        )

    def _profile(self, index: int, memory: _Memory) -> LayerProfile:
        times = {
            name: Timing.of(self._watch.samples_us((name, index)) or [0.0])
            for name in ("F", "B", "W", "BW", "optimizer")
        }
        return LayerProfile(
            variant=self._variant,
            forward_us=times["F"].median_us,
            backward_input_us=times["B"].median_us,
            backward_weight_us=times["W"].median_us,
            fused_backward_us=times["BW"].median_us,
            optimizer_us=times["optimizer"].median_us,
            parameter_bytes=sum(p.numel() * p.element_size() for p in self._layers[index].parameters),
            deferred_parameter_bytes=memory.deferred_parameter_bytes,
            activation_bytes=memory.activation_bytes,
            weight_activation_bytes=memory.weight_activation_bytes,
            output_bytes=memory.output_bytes,
            temporary_bytes=memory.temporary_bytes,
            spread=times["F"].spread,
        )

    def _call(self, index: int, x: Tensor) -> Tensor:
        layer = self._layers[index]
        if self._variant.recompute == "full" and layer.kind == "block":
            output = call_with_recompute(layer.module, x)
        else:
            output = layer.module(x)
        if not isinstance(output, Tensor):
            raise ProfileError(
                f"layer {layer.name!r} returns {type(output).__name__}; wrap it in a module that returns one tensor"
            )
        return self._loss_fn(output, self._targets) if index == len(self._layers) - 1 else output

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Say which layer and variant an error of torch is about."""
        where = f"layer {self._layers[index].name!r} at {self._variant}"
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ProfileError(
                f"{where} does not fit into the memory of {self._device}: {str(error).splitlines()[0]}; "
                "measure a smaller micro-batch size, or recompute"
            ) from None
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ProfileError(f"{where} cannot be run: {error}") from error


def _as_input(tensor: Tensor) -> Tensor:
    """The same values as a leaf of its own, asking for a gradient where there can be one."""
    leaf = tensor.detach()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def _backward(output: Tensor, gradient: Tensor | None) -> None:
    if output.requires_grad:
        torch.autograd.backward(output, gradient)


def _rise_bytes(phase: Phase) -> int:
    return phase.peak_bytes - phase.start_bytes


def _optimizer(layer: ProfiledLayer) -> torch.optim.Optimizer | None:
    """AdamW as training uses it, but with rate 0, so that parameters keep their values."""
    trained = [parameter for parameter in layer.parameters if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0) if trained else None
