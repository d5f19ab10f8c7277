"""A Plan, run: this process's part of the model, and one call per optimizer step.

    with Pipeline(plan, layers, loss_fn) as pipe:      # under torchrun, one process per device
        optimizer = pipe.make_optimizer(torch.optim.AdamW, lr=1e-4)
        for inputs, targets in batches:                # this data rank's share of the global batch
            optimizer.zero_grad()
            loss = pipe.step(inputs, targets)          # the mean loss on the last stage, None elsewhere
            optimizer.step()

The gradients after `step` are those of the mean loss over the global batch, on every process for the
parameters it holds. A parameter that several pipeline ranks hold, as its stage has a replica or it is tied to one of
another stage, has the same gradient on all of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import accumulate
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.errors import ExecutionError
from planner.executor.data_ranks import start_alike
from planner.executor.gradient_norm import Rule
from planner.executor.gradients import DataParallelSum, GradientSync, NoSync
from planner.executor.groups import channel_groups, connect, refuse_unsupported
from planner.executor.holders import HolderSum, SharedParameters, Tie, Ties
from planner.executor.interpreter import Interpreter, LossFunction
from planner.executor.optimizer import Optimizers, PipelineOptimizer, sharded_class
from planner.executor.program import rank_program
from planner.executor.stage import Layer, Stage, build_layer
from planner.executor.trace import RankTrace, Trace, Tracer
from planner.executor.transport import Transport, telling_lost_peers
from planner.plans import Plan
from planner.schedule.validation import check


class Pipeline:
    """One process's part of a planned training job."""

    def __init__(
        self,
        plan: Plan,
        layers: Sequence[Layer],
        loss_fn: LossFunction,
        *,
        device: torch.device | str | None = None,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        process_group_timeout_s: float = 600.0,
        receive_ahead: int = 1,
        trace_steps: int = 1,
        overlap_reduction: bool = True,
        ties: Sequence[Tie] = (),
    ) -> None:
        """Check everything, join the job, build this process's layers.

        `layers`: the whole model in order, one entry per layer the plan counts (embedding and head included),
        each an nn.Module or a callable without arguments that makes one; callables of other processes' layers
        are never called. Each layer takes the one tensor the layer before returns. Data-parallel ranks start from
        the parameters and buffers of the first of them. `loss_fn(output, targets)` is the mean over the rows of one
        microbatch. `device`: by default this process's CUDA device if there is one, else the CPU; `backend`: by
        default nccl on CUDA, else gloo; a process group that is there already is used as it is. `dtype` converts
        the layers. `receive_ahead`: receives posted beyond the next. `trace_steps`: how many last steps `trace`
        keeps. `overlap_reduction`: whether gradients of a stage are reduced over the data ranks beside what a
        process still has to run, instead of after it. `ties`: pairs of parameters that are one, where layers are
        callables, like ((0, "weight"), (5, "weight")) for layers 0 and 5; modules are tied where they share a
        parameter.

        ExecutionError when plan, model and job do not fit together; ScheduleError when the schedule cannot
        run.
        """
        layout = plan.layout
        self.plan = plan
        refuse_unsupported(layout)
        schedule = plan.parsed_schedule
        check(
            schedule,
            num_stages=layout.num_stages,
            num_microbatches=layout.num_microbatches,
            rank_of_stage=layout.rank_of_stage,
            num_replicas=layout.num_replicas,
        )
        bounds = (0, *accumulate(layout.layers_per_stage))
        if len(layers) != bounds[-1]:
            raise ExecutionError(
                f"the model has {len(layers)} layers, the plan's layers_per_stage "
                f"{list(layout.layers_per_stage)} add up to {bounds[-1]}; pass the layers the "
                "plan was made for, embedding and head included"
            )
        holders = [schedule.holders(s) for s, count in enumerate(layout.layers_per_stage) for _ in range(count)]
        tied = Ties(layers, ties, holders)
        timeout = timedelta(seconds=process_group_timeout_s)
        if layout.zero_stage == 1:
            sharded_class()
        self._groups = connect(layout, None if device is None else torch.device(device), backend, timeout)
        self.device = self._groups.device
        self.coordinates = self._groups.coordinates  # this process's place in the layout
        self.backend = self._groups.backend  # what sends tensors: gloo or nccl
        program = rank_program(schedule, self.coordinates.pipeline_rank)
        # As the profile counts it: blocks are recomputed, the embedding and the head are not.
        every = layout.recompute_of_layer or (layout.recompute,) * len(layers)
        recompute = {index for index in range(1, len(layers) - 1) if every[index] == "full"}
        hosted = [n for index in program.stages for n in range(bounds[index], bounds[index + 1])]
        built = {n: build_layer(n, layers[n], self.device, dtype) for n in hosted}
        tied.join_here(built)
        stages = {}
        for index in program.stages:
            first, end = bounds[index], bounds[index + 1]
            stages[index] = Stage(
                index,
                first,
                [built[n] for n in range(first, end)],
                recompute=recompute,
                splits=any(stage == index for stage, _ in program.split),
            )
        self.stages = tuple(stages.values())
        self.module = nn.ModuleDict({n: layer for stage in self.stages for n, layer in stage.layers.items()})
        self._has_first = 0 in stages
        self._has_last = layout.num_stages - 1 in stages
        self.tracer = Tracer(self.device, keep=trace_steps)
        channels = None
        if not self._groups.matches_by_tag:
            channels = channel_groups(self._groups, layout, program.channels, timeout)
        self._transport = Transport(
            program, self._groups.pipeline, self.device, channels=channels, receive_ahead=receive_ahead
        )
        self._sync: GradientSync = NoSync()
        if layout.dp > 1:
            start_alike(built, self._groups)
            parameters_of = {index: stage.parameters() for index, stage in stages.items()}
            self._sync = DataParallelSum(parameters_of, self._groups.data, self.tracer, overlaps=overlap_reduction)
        self._shared = SharedParameters(built, tied, schedule, self._groups, timeout)
        if self._shared:
            self._sync = HolderSum(self._shared, self._sync)
        self._interpreter = Interpreter(
            program,
            stages,
            self._transport,
            loss_fn,
            self.tracer,
            self._sync,
            device=self.device,
            gradient_scale=1.0 / (layout.num_microbatches * layout.dp),
        )
        self._optimizers = Optimizers(self._groups, layout, timeout)
        self._peak_buffers = self._peak_graphs = 0
        self._failed = self._closed = False

    @property
    def peak_boundary_tensors(self) -> int:
        """Most tensors this process held for transfers at one time in the last step, sends and receives."""
        return self._peak_buffers

    @property
    def peak_graphs(self) -> int:
        """Most (stage, microbatch) held here between F and its backward at one time in the last step."""
        return self._peak_graphs

    def step(self, inputs: Tensor | None, targets: Tensor | None) -> Tensor | None:
        """Run one optimizer step's forwards and backwards, and add the gradients to `.grad`.

        `inputs` and `targets` hold this data rank's num_microbatches × micro_batch_size rows; `inputs` are
        needed by processes of the first stage, `targets` by those of the last, others may pass None. Returns
        the mean loss over the global batch on processes of the last stage, else None. ExecutionError when
        rows or shapes do not fit.
        """
        self._refuse_unusable()
        split_inputs = self._microbatches(inputs, "inputs", "first") if self._has_first else ()
        split_targets = self._microbatches(targets, "targets", "last") if self._has_last else ()
        self._failed = True  # until it is done
        self.tracer.begin_step()
        with torch.enable_grad():
            self._sync.begin()
            must_restart = self._optimizers.must_restart if self._optimizers.needs_validation else None
            losses = self._interpreter.run(split_inputs, split_targets, must_restart)
        self._peak_buffers, self._peak_graphs = self._transport.peak_buffers, self._interpreter.peak_graphs
        loss = self._shared.mean_loss(losses)
        return self._end_step(loss)

    def _end_step(self, loss: Tensor | None, unreduced: Sequence[Stage] = ()) -> Tensor | None:
        """Wait until gradients are what the step promises; the loss over the global batch, given this pipeline's.

        `unreduced`: stages of which nobody has said that they have finished.
        """
        if self.plan.layout.dp > 1 or self._shared:
            start = self.tracer.mark()
            for stage in unreduced:
                self._sync.stage_finished(stage.index)
            self._sync.finish()
            if loss is not None and self.plan.layout.dp > 1:
                with telling_lost_peers("the mean of the loss"):
                    dist.all_reduce(loss, group=self._groups.data)
                loss /= self.plan.layout.dp
            self.tracer.record("reduce", None, None, start, start)
        self._failed = False
        return loss

    def _refuse_unusable(self) -> None:
        if self._closed:
            raise ExecutionError("this Pipeline is closed, its process groups are gone; make a new one")
        if self._failed:
            raise ExecutionError("an earlier step of this Pipeline failed; the job has to be started again")
        if torch.is_inference_mode_enabled():
            raise ExecutionError("a step makes gradients, which torch.inference_mode forbids; call it outside")

    def _microbatches(self, rows: Tensor | None, what: str, where: str) -> tuple[Tensor, ...]:
        layout = self.plan.layout
        m, size = layout.num_microbatches, layout.micro_batch_size
        if rows is None:
            raise ExecutionError(f"this process runs the {where} stage and needs {what}; it was given None")
        if rows.dim() == 0 or rows.shape[0] != m * size:
            raise ExecutionError(
                f"{what} has {rows.shape[0] if rows.dim() else 'no'} rows, a step takes {m * size} on each "
                f"data-parallel rank: num_microbatches {m} × micro_batch_size {size}"
            )
        return torch.split(rows.detach().to(self.device), size)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters this process holds, each once."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with names: the layer's index in the model, then its own name, like 3.weight."""
        return self.module.named_parameters()

    def is_counted(self, parameter: nn.Parameter) -> bool:
        """Whether this pipeline rank is the one that counts `parameter` in sums over the pipeline, as in norms.

        Of a parameter that several ranks hold, exactly one does: the first.
        """
        return self._shared.is_counted(parameter)

    def zero_grad(self) -> None:
        """Forget the gradients of this process."""
        self.module.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """This process's part of the state dict of nn.Sequential(*layers), validated."""
        self.validate()
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load this process's part; entries of other layers are passed over, missing ones are an error."""
        self.validate()  # or what is loaded could be rolled back
        mine = {name: value for name, value in state.items() if name.partition(".")[0] in self.module}
        self.module.load_state_dict(mine)

    def make_optimizer(
        self,
        cls: type[torch.optim.Optimizer],
        *,
        parameters: Iterable[Any] | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        post_validation: bool = False,
        **options: Any,
    ) -> PipelineOptimizer:
        """`cls(parameters, **options)` with one gradient norm for the whole model. Every process must call it.

        `parameters`: by default all this process holds; parameter groups as torch takes them. With zero_stage 1
        the state is sharded over the data ranks. `max_grad_norm` clips like torch.nn.utils.clip_grad_norm_, on
        the norm over all ranks; `skip_nonfinite` leaves a step out, on all ranks, when a gradient anywhere is
        inf or NaN. `post_validation`: step without waiting for the ranks behind this one, and correct the step
        afterwards if their gradients say so; see `PipelineOptimizer`.
        """
        self._refuse_unusable()
        if post_validation and self._shared:
            raise ExecutionError(
                "post_validation is not for pipelines in which several ranks hold a parameter, by a second replica or "
                "a tie: their sum lets no rank run ahead; leave it out"
            )
        return self._optimizers.make(
            cls,
            self.parameters() if parameters is None else parameters,
            Rule(max_grad_norm, skip_nonfinite),
            self.is_counted,
            post_validation=post_validation,
            options=options,
        )

    def validate(self) -> None:
        """Make this process's parameters right where an optimizer with post-validation made them too early."""
        if not self._closed:
            self._optimizers.validate()

    def trace(self) -> RankTrace:
        """What this process did in the last `trace_steps` steps."""
        return self.tracer.rank_trace(self.coordinates)

    def gather_trace(self) -> Trace | None:
        """The traces of all processes on global rank 0, None elsewhere. Every process must call it."""
        mine = self.trace().model_dump_json()
        everyone: list[str] | None = [""] * dist.get_world_size() if dist.get_rank() == 0 else None
        with telling_lost_peers("the gathering of traces"):
            dist.gather_object(mine, everyone)
        if everyone is None:
            return None
        return Trace.gathered(RankTrace.model_validate_json(text) for text in everyone)

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The processes that hold the same stages as this one."""
        return self._groups.data

    def barrier(self) -> None:
        """Wait until every process of the job is here."""
        with telling_lost_peers("the barrier"):
            dist.all_reduce(torch.zeros(1, device=self.device))

    def close(self) -> None:
        """Leave the job, validated; the process group goes too if it was made here.

        What this process holds of the model stays, and can be read. Nothing here, nor any optimizer made here, knows
        a process group any more, however long the caller keeps it: the threads of gloo end with the last reference,
        and end in order only before the interpreter does.
        """
        if self._closed:
            return
        if not self._failed:
            self._optimizers.finish()
        self._closed = True
        owns_world = self._groups.owns_world
        self._shared.let_go()
        del self._optimizers, self._interpreter, self._transport, self._sync, self._groups
        if owns_world and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After an error others may be in the middle of a transfer: taking the group down could wait for them.
        if exception_type is None:
            self.close()
