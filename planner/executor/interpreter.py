"""Runs one rank's program: F, R, B, W and BW in the planned order, each as soon as its tensor is there.

What an action holds, and until when. F holds the graph from the stage's input to its output until B or BW of
the same microbatch; the output itself only until it has been received. B leaves what the weight gradients
need in a store, W empties it. Of a microbatch that has an R, F keeps the input alone, and R makes the graph; the loss
is computed once, where the graph is made. Losses are keyed by microbatch, so any order of microbatches gives the same
result.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from planner.errors import ExecutionError
from planner.executor.checkpoint import Checkpoint, RandomState, without_graph
from planner.executor.gradients import GradientSync
from planner.executor.program import RankProgram, Step
from planner.executor.rewind import Rewind
from planner.executor.stage import Stage
from planner.executor.trace import Tracer
from planner.executor.transport import Transport
from planner.schedule.actions import Kind
from profiles.measure.split_backward import WeightGradStore

_ENDS = (Kind.W, Kind.BW)
LossFunction = Callable[[Tensor, Tensor], Tensor]


class _Graph(NamedTuple):
    """What F leaves for B or BW."""

    leaf: Tensor | None  # the stage's input; None on the first stage
    root: GradientEdge | None  # None when nothing in the stage requires a gradient
    loss: Tensor | None  # on the last stage, instead of a gradient from the next
    store: WeightGradStore | None  # when the backward is split


class Interpreter:
    """One rank's state during a step. `gradient_scale` multiplies every loss before its backward."""

    def __init__(
        self,
        program: RankProgram,
        stages: Mapping[int, Stage],
        transport: Transport,
        loss_fn: LossFunction,
        tracer: Tracer,
        sync: GradientSync,
        *,
        device: torch.device,
        gradient_scale: float,
    ) -> None:
        self._program = program
        self._stages = stages
        self._transport = transport
        self._loss_fn = loss_fn
        self._tracer = tracer
        self._sync = sync
        # The last backward of every stage here: W or BW, as every B comes before its W.
        self._closing = set({s.action.stage: s.action for s in program.steps if s.action.kind in _ENDS}.values())
        self._device = device
        self._scale = gradient_scale
        self._inputs: Sequence[Tensor] = ()
        self._targets: Sequence[Tensor] = ()
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._checkpoints: dict[tuple[int, int], Checkpoint] = {}  # between F and R
        self._stores: dict[tuple[int, int], WeightGradStore] = {}
        # Between stages of this rank; keyed by the stage that takes it.
        self._activations: dict[tuple[int, int], Tensor] = {}
        self._gradients: dict[tuple[int, int], Tensor] = {}
        self._losses: dict[int, Tensor] = {}
        self.peak_graphs = 0  # most (stage, microbatch) whose graph was held at once in this step

    def run(
        self,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        must_restart: Callable[[], bool] | None = None,
    ) -> list[Tensor]:
        """Run the program once; `inputs` and `targets` have one tensor per microbatch, where this rank needs
        them.

        `must_restart` is given when parameters are not yet validated. It is called at the cut
        (`planner.executor.cut`) and makes them right; when it says so (on all ranks or on none), what has run
        is thrown away and the program begins again, with the same random numbers and buffers.

        Returns the unscaled losses in microbatch order on the rank of the last stage, else nothing. Gradients
        are added to `.grad`.
        """
        self._inputs, self._targets = inputs, targets
        self.peak_graphs = 0
        tracer, transport, program = self._tracer, self._transport, self._program
        cut = 0
        if must_restart is None:
            transport.begin()
        else:
            cut = self._run_unvalidated(must_restart)
        self._run_steps(program.steps[cut:])
        waiting = tracer.mark()
        transport.finish()
        tracer.record("drain", None, None, waiting, waiting)
        self._inputs = self._targets = ()
        losses, self._losses = self._losses, {}
        return [losses[microbatch] for microbatch in sorted(losses)]

    def _run_unvalidated(self, must_restart: Callable[[], bool]) -> int:
        """Run what comes before the cut; the number of steps that are done and stay."""
        tracer, transport, cut = self._tracer, self._transport, self._program.num_unvalidated
        here = Rewind((b for stage in self._stages.values() for b in stage.buffers()), self._device)
        begun = tracer.mark()
        transport.begin(unvalidated=True)
        self._run_steps(self._program.steps[:cut])
        waiting = tracer.mark()
        restart = must_restart()
        tracer.record("validate", None, None, waiting, waiting)
        if not restart:
            transport.validated()
            return cut
        # All that forwards leave.
        self._graphs.clear()
        self._checkpoints.clear()
        self._activations.clear()
        self._losses.clear()
        transport.discard()
        here.restore()
        tracer.discard_step(begun)
        transport.begin()
        return 0

    def _run_steps(self, steps: Sequence[Step]) -> None:
        run = {
            Kind.F: self._forward,
            Kind.R: self._recompute,
            Kind.B: self._backward,
            Kind.BW: self._backward,
            Kind.W: self._weight,
        }
        tracer, transport, sync = self._tracer, self._transport, self._sync
        for step in steps:
            kind, stage, microbatch = step.action
            waiting = start = tracer.mark()
            received = None
            if step.receive is not None:
                received = transport.receive(step.receive, step.delivered)
                start = tracer.mark()
            result = run[kind](step, received)
            tracer.record(kind.value, stage, microbatch, waiting, start)
            if step.send is not None:
                assert result is not None
                transport.send(step.send, result)
            if step.action in self._closing:
                sync.stage_finished(stage)
            sync.look()
            del received, result

    def _forward(self, step: Step, received: Tensor | None) -> Tensor | None:
        """Returns what is to be sent."""
        _, index, microbatch = step.action
        key = index, microbatch
        value = received
        if value is None:
            value = self._inputs[microbatch] if index == 0 else self._activations.pop(key)
        if key in self._program.recomputed:
            self._checkpoints[key] = Checkpoint.before(value)
            with without_graph(value.device):
                output: Tensor = self._stages[index](value)
        else:
            output = self._build_graph(key, value)
        if index == self._program.num_stages - 1:
            return None
        if not output.is_floating_point():
            raise ExecutionError(f"stage {index} made {output.dtype}; between stages tensors are floating point")
        if step.send is None:
            self._activations[index + 1, microbatch] = output.detach()
            return None
        return output.detach()

    def _recompute(self, step: Step, received: Tensor | None) -> None:  # noqa: ARG002 (one signature for all kinds)
        """R: nobody but the backward needs the output, which has been handed on by F already."""
        _, index, microbatch = step.action
        value, random = self._checkpoints.pop((index, microbatch))
        self._build_graph((index, microbatch), value, random)

    def _build_graph(self, key: tuple[int, int], value: Tensor, random: RandomState | None = None) -> Tensor:
        """The stage's output; its graph, and the loss on the last stage, are kept for the backward.

        `random`: draw what was drawn from this state before.
        """
        index, microbatch = key
        leaf = value.requires_grad_() if index > 0 else None
        store = WeightGradStore() if key in self._program.split else None
        with nullcontext() if random is None else random.replayed(value.device):
            output: Tensor = self._stages[index](value, store)
        loss = root = None
        if index == self._program.num_stages - 1:
            loss = one_number(self._loss_fn(output, self._targets[microbatch]), microbatch)
            self._losses[microbatch] = loss.detach()
        elif output.requires_grad:
            root = get_gradient_edge(output)
        self._graphs[key] = _Graph(leaf, root, loss, store)
        self.peak_graphs = max(self.peak_graphs, len(self._graphs))
        return output

    def _backward(self, step: Step, received: Tensor | None) -> Tensor | None:
        """B and BW: the split ones put their weight part into the store of their forward."""
        _, index, microbatch = step.action
        key = index, microbatch
        leaf, root, loss, store = self._graphs.pop(key)
        if loss is not None:
            if loss.requires_grad:
                torch.autograd.backward(loss, torch.full_like(loss, self._scale))
            del loss
        else:
            gradient = self._gradients.pop(key) if received is None else received
            if root is not None:
                torch.autograd.backward(root, gradient)
            del gradient
        if store is not None:
            self._stores[key] = store
        if leaf is None:
            return None
        input_gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        if step.send is None:
            self._gradients[index - 1, microbatch] = input_gradient
            return None
        return input_gradient

    def _weight(self, step: Step, received: Tensor | None) -> None:  # noqa: ARG002 (one signature for all kinds)
        _, index, microbatch = step.action
        self._stores.pop((index, microbatch)).run()


def one_number(loss: object, microbatch: int) -> Tensor:
    """What loss_fn returned for `microbatch`, if that is a loss; else ExecutionError."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ExecutionError(f"loss_fn returned {what} for microbatch {microbatch}; it must return one number")
    return loss
