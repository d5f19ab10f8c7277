"""torch's own pipeline runtime under the face of `Pipeline`: an oracle for our interpreter, and another engine.

    with TorchPipeline(plan, layers, loss_fn) as pipe:   # as Pipeline
        loss = pipe.step(inputs, targets)

The order of actions goes to torch as the compute-only CSV of torch.distributed.pipelining (`torch_csv`), which adds
transfers of its own. All names that torch keeps private are in this file. Tested with torch 2.13; the CSV and the
runtime that reads it have had the same form from 2.6 on.

What is different from `Pipeline`: receive buffers for all microbatches are there from the first step on and sends are
held to the end of a step, so a plan for little memory is not kept to. What torch's runtime cannot run, or would run
with wrong gradients and no error, is refused here: `refuse_for_torch` for the plan, and the layers when they are built.
"""

import gc
import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from planner.errors import ExecutionError
from planner.executor.interpreter import LossFunction, one_number
from planner.executor.pipeline import Pipeline
from planner.executor.stage import Layer, Stage
from planner.executor.trace import EventKind, Tracer
from planner.executor.transport import LostPeerError, first_sentence, tells_of_lost_peer
from planner.plans import Plan
from planner.schedule.actions import Kind, Schedule
from profiles.errors import PipewrightError
from profiles.measure.split_backward import WeightGradStore

Split = Literal["deferred", "torch"]
_make_runtime: Callable[..., _PipelineScheduleRuntime] = _PipelineScheduleRuntime  # torch leaves it untyped
torch_backward_input: Callable[..., Any] = stage_backward_input  # its B and W by themselves, to measure
torch_backward_weight: Callable[..., Any] = stage_backward_weight
_LETTERS = {Kind.F: "F", Kind.B: "I", Kind.W: "W", Kind.BW: "B"}  # torch's names; its B is our BW


def torch_csv(schedule: Schedule) -> str:
    """The schedule as torch's compute-only CSV, one line per rank, of what `refuse_for_torch` lets pass."""
    rows = ([f"{a.stage}{_LETTERS[a.kind]}{a.microbatch}" for a in actions] for actions in schedule.ranks)
    return "".join(",".join(row) + "\n" for row in rows)


def refuse_for_torch(plan: Plan) -> None:
    """ExecutionError for what of a valid plan torch's runtime cannot run, or runs wrongly: rank, step and action."""
    schedule = plan.parsed_schedule
    every = [
        (f"rank {rank}, step {step}: {action}", rank, action)
        for rank, actions in enumerate(schedule.ranks)
        for step, action in enumerate(actions)
    ]
    home: dict[int, int] = {}
    for where, rank, action in every:
        if action.kind not in _LETTERS:
            raise ExecutionError(
                f"{where} is none of F, B, W and BW, which are all that torch's runtime knows; {_OURS}"
            )
        if home.setdefault(action.stage, rank) != rank:
            raise ExecutionError(
                f"{where}: stage {action.stage} is on rank {home[action.stage]}, too, and torch's runtime has one "
                f"copy of each stage; {_OURS}"
            )
    last = schedule.num_stages - 1
    forwards = [(where, action) for where, _, action in every if action.kind is Kind.F and action.stage == last]
    for expected, (where, action) in enumerate(forwards):
        if action.microbatch != expected:
            raise ExecutionError(
                f"{where} comes before F{last}.{expected}; torch's runtime numbers losses in the order in "
                f"which the last stage makes them, and would give wrong gradients; {_OURS}"
            )


_OURS = "run it with the engine of pipewright"


class TorchPipeline(Pipeline):
    """One process's part of a planned training job, run by torch's runtime. `step` is that of `Pipeline`."""

    def __init__(
        self, plan: Plan, layers: Sequence[Layer], loss_fn: LossFunction, *, split: Split = "deferred", **options: Any
    ) -> None:
        """As `Pipeline`, with its options.

        `split`: how W is split from B where the schedule does so. "deferred" is our way, as profiles measure it;
        "torch" is torch's walk through the graph, which keeps everything F saved until W, needs stages that do not
        end in a view, and on the first stage does everything in W.

        ExecutionError as `Pipeline` and `refuse_for_torch`, and for layers inside DistributedDataParallel or FSDP.
        """
        refuse_for_torch(plan)
        super().__init__(plan, layers, loss_fn, **options)
        for stage in self.stages:
            _refuse_reducers(stage)
        self._loss_fn = loss_fn
        self._split = split
        self._scale = 1.0 / (plan.layout.num_microbatches * plan.layout.dp)
        self._losses: list[Tensor] = []
        self._runtime: _PipelineScheduleRuntime | None = None  # made in the first step, when shapes are known
        self._shapes: dict[str, torch.Size] = {}  # of the inputs and targets of every step

    @property
    def peak_boundary_tensors(self) -> int:
        """Not known: torch keeps these to itself. 0."""
        return 0

    @property
    def peak_graphs(self) -> int:
        """Not known: torch keeps these to itself. 0."""
        return 0

    def step(self, inputs: Tensor | None, targets: Tensor | None) -> Tensor | None:
        """As `Pipeline.step`."""
        self._refuse_unusable()
        if self._has_first:
            inputs = torch.cat(self._microbatches(inputs, "inputs", "first"))
            self._refuse_other_shape("inputs", inputs)
        if self._has_last:
            targets = torch.cat(self._microbatches(targets, "targets", "last"))
            self._refuse_other_shape("targets", targets)
        self._failed = True  # until it is done
        self.tracer.begin_step()
        self._optimizers.must_restart()  # parameters are validated before anything runs, so nothing has to be repeated
        with torch.enable_grad(), _telling_lost_peers():
            self._sync.begin()
            if self._runtime is None:
                self._runtime = self._make_runtime(inputs)
            self._losses.clear()
            options: dict[str, Any] = {"target": targets if self._has_last else None}
            if "return_outputs" in inspect.signature(self._runtime.step).parameters:
                options["return_outputs"] = False
            self._runtime.step(*((inputs,) if self._has_first else ()), **options)
        loss = torch.stack(self._losses).mean() if self._losses else None
        return self._end_step(loss, self.stages)

    def close(self) -> None:
        """As `Pipeline.close`. torch's stages hold the process group: at the interpreter's end it would be too late."""
        self._runtime = None
        gc.collect()
        super().close()

    def _refuse_other_shape(self, what: str, rows: Tensor) -> None:
        first = self._shapes.setdefault(what, rows.shape)
        if first != rows.shape:
            raise ExecutionError(
                f"{what} has shape {list(rows.shape)}, the first step's had {list(first)}, and torch's runtime "
                "receives into buffers of that step: pad the rows, or make a new TorchPipeline"
            )

    def _scaled_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """What torch differentiates; the loss itself is kept. Called in microbatch order, see `refuse_for_torch`."""
        loss = one_number(self._loss_fn(output, targets), len(self._losses))
        self._losses.append(loss.detach())
        return loss * self._scale

    def _make_runtime(self, inputs: Tensor | None) -> _PipelineScheduleRuntime:
        schedule, layout = self.plan.parsed_schedule, self.plan.layout
        splits = {a.stage for actions in schedule.ranks for a in actions if a.kind is Kind.B}
        shapes = self._boundary_shapes(inputs)
        stages = [
            _TracedStage(
                stage,
                shapes,
                split=self._split if stage.index in splits else None,
                device=self.device,
                group=self._groups.pipeline,
                tracer=self.tracer,
            )
            for stage in self.stages
        ]
        # The loss is scaled by us: torch would scale what is in .grad, earlier steps' gradients included.
        runtime = _make_runtime(list(stages), layout.num_microbatches, loss_fn=self._scaled_loss, scale_grads=False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "schedule.csv"
            path.write_text(torch_csv(schedule))
            runtime._load_csv(str(path))
        return runtime

    def _boundary_shapes(self, inputs: Tensor | None) -> list[Tensor]:
        """What goes into each stage and out of the last, as meta tensors, shape (num_stages + 1,).

        Given these, torch does not run every stage once more on arbitrary numbers to see what comes out.
        """
        layout = self.plan.layout
        mine = {stage.index: stage for stage in self.stages}
        value = torch.empty(0, device="meta")
        if inputs is not None and self._has_first:
            value = inputs[: layout.micro_batch_size].to("meta")
        shapes = [value]
        for index, rank in enumerate(layout.rank_of_stage):
            told: list[Any] = [None]
            if index in mine:
                try:
                    value = _output_of(mine[index], shapes[-1])
                    told = [(value.shape, value.dtype)]
                except ExecutionError as error:
                    told = [str(error)]
            if layout.pp > 1:
                dist.broadcast_object_list(told, group=self._groups.pipeline, group_src=rank, device=self.device)
            if isinstance(told[0], str):  # every process says so, and none waits
                raise ExecutionError(told[0])
            shape, dtype = told[0]
            shapes.append(torch.empty(shape, dtype=dtype, device="meta", requires_grad=True))
        return shapes


class _TracedStage(PipelineStage):
    """A stage of ours as one of torch's. What torch does in it is recorded."""

    def __init__(
        self,
        stage: Stage,
        shapes: Sequence[Tensor],
        *,
        split: Split | None,
        device: torch.device,
        group: dist.ProcessGroup,
        tracer: Tracer,
    ) -> None:
        """`shapes` as of `TorchPipeline._boundary_shapes`; `split` is None where no backward is split."""
        store = _StageStore() if split == "deferred" else None
        super().__init__(
            _Module(stage, store, may_be_view=split != "torch" or stage.index == len(shapes) - 2),
            stage.index,
            len(shapes) - 1,
            device,
            input_args=shapes[stage.index],
            output_args=shapes[stage.index + 1],
            group=group,
            dw_builder=None if store is None else lambda: store.take().run,
        )
        self._tracer = tracer

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        """F."""
        with self._recorded("F", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **options)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> None:
        """BW, or B."""
        with self._recorded("BW" if options.get("full_backward", True) else "B", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, *args, **options)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> None:
        """W."""
        with self._recorded("W", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **options)

    @contextmanager
    def _recorded(self, kind: EventKind, microbatch: int) -> Iterator[None]:
        start = self._tracer.mark()
        yield
        self._tracer.record(kind, self.stage_index, microbatch, start, start)


class _Module(nn.Module):
    """What torch calls as the module of a stage."""

    def __init__(self, stage: Stage, store: "_StageStore | None", *, may_be_view: bool) -> None:
        super().__init__()
        self.stage = stage
        self._store = store
        self._may_be_view = may_be_view

    def forward(self, value: Tensor) -> Tensor:
        output: Tensor = self.stage(value, self._store)
        if not self._may_be_view and output._is_view():
            raise ExecutionError(
                f"stage {self.stage.index} ends in a view of another tensor, which torch's split backward cannot "
                "detach; use split='deferred', or let the last layer end in another operation"
            )
        if (
            not output.requires_grad
        ):  # a first stage without parameters to train: torch sends it a gradient all the same
            output = output.detach().requires_grad_()
        return output.contiguous()


class _StageStore(WeightGradStore):
    """Takes the weight gradients of all microbatches of a stage; those of one are taken out after its backward."""

    def take(self) -> WeightGradStore:
        """A store with what is pending here, which it leaves empty."""
        taken = WeightGradStore()
        taken._queue, self._queue = self._queue, taken._queue
        return taken


def _output_of(stage: Stage, value: Tensor) -> Tensor:
    """What comes out of a stage, as a meta tensor; nothing is computed, and no parameter or buffer touched."""
    for name, layer in stage.layers.items():
        named = chain(layer.named_parameters(remove_duplicate=False), layer.named_buffers(remove_duplicate=False))
        state = {part: tensor.to("meta") for part, tensor in named}
        try:
            with torch.no_grad():
                value = functional_call(layer, state, (value,))
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            raise ExecutionError(
                f"layer {name} ({type(layer).__name__}): torch's runtime needs the shape of its output beforehand, "
                f"which cannot be found without computing it ({first_sentence(RuntimeError(str(error)))}); {_OURS}"
            ) from None
        if not isinstance(value, Tensor):
            raise ExecutionError(
                f"layer {name} ({type(layer).__name__}) returned {type(value).__name__}; layers pass one tensor on: "
                "pack what the next layer needs into one, or merge the two layers"
            )
    if not value.is_floating_point():
        raise ExecutionError(f"stage {stage.index} made {value.dtype}; between stages tensors are floating point")
    return value


def _refuse_reducers(stage: Stage) -> None:
    for name, part in stage.named_modules():
        if isinstance(part, DistributedDataParallel | FSDPModule | FullyShardedDataParallel):
            raise ExecutionError(
                f"stage {stage.index}: {name.removeprefix('layers.')} is {type(part).__name__}, whose reductions "
                "torch's runtime starts for whole stages only, and with a split backward not at all; leave it out: "
                "gradients are reduced after the pipeline"
            )


@contextmanager
def _telling_lost_peers() -> Iterator[None]:
    """Tell what another process caused from what went wrong here, which torch both raises as RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, PipewrightError):  # of a layer of ours, said once more by torch
            raise error.__cause__ from None
        if tells_of_lost_peer(error):
            raise LostPeerError(f"torch's runtime lost a transfer: {first_sentence(error)}") from None
        raise
