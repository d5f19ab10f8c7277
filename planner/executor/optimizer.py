"""The optimizer of a pipeline: one global gradient norm decides about the update on every rank.

Synchronous, `step` waits for the norm of all ranks, then clips, updates or skips. With post-validation (Qi et al.,
Zero Bubble Pipeline Parallelism, ICLR 2024, arXiv 2401.10241, section 4) it waits for the ranks before this one
only, updates at once as their part of the norm suggests, and finds out later whether that was right; if not, the
update is taken back and made again. What comes out is the same to the last bit.

We depart from the paper in three points. A rank whose part of the norm is already too large does not update at
once: the scale it would use is wrong for certain unless it is the last. Updates are taken back by putting back
copies, not by inverse arithmetic, which would not be exact. The whole norm comes from the last rank directly, so
that validation on one rank never waits for validation on another.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import inf, sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from planner.errors import ExecutionError
from planner.executor.gradient_norm import Decision, GradientNorm, Rule
from planner.executor.groups import Groups
from planner.executor.rollback import OverwrittenState, StepSettings
from planner.executor.transport import LostPeerError, first_sentence, tells_of_lost_peer
from planner.plans import Layout


@dataclass
class _Unvalidated:
    """A step made, or put off, before the norm was known."""

    decision: Decision  # SKIP: nothing was done; CLIP: put off until the scale is known; UPDATE: done
    gradients: list[tuple[nn.Parameter, Tensor]]
    settings: StepSettings
    overwritten: OverwrittenState | None  # when it was done


class PipelineOptimizer(Optimizer):
    """A torch optimizer over this process's parameters that acts on the norm of the whole model's gradients.

    Use it as any other, learning rate schedules included; every process calls `step` equally often.
    `last_grad_norm`: before clipping, of the last validated step, None before the first or when nothing needs it.
    `num_skipped`: steps left out because of an inf or NaN. `num_rolled_back`: updates of this process that
    were made and taken back. `num_restarted`: validations that made every rank throw its first forwards away.
    """

    def __init__(
        self,
        inner: Optimizer,
        norm: GradientNorm,
        rule: Rule,
        is_counted: Callable[[nn.Parameter], bool],
        *,
        post_validation: bool,
        device: torch.device,
    ) -> None:
        """`inner` makes the updates. Made by `Pipeline.make_optimizer`."""
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner
        self._share()
        self._norm = norm
        self._rule = rule
        self._is_counted = is_counted
        self._post_validation = post_validation
        self._device = device
        self._unvalidated: _Unvalidated | None = None
        self._must_restart = False
        self._closed = False
        self.last_grad_norm: float | None = None
        self.num_skipped = 0
        self.num_rolled_back = 0
        self.num_restarted = 0

    def _share(self) -> None:
        """Groups, state and defaults are those of `inner`, for whoever reads or changes them here."""
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state
        self.defaults = self.inner.defaults

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip, and update or skip. With post-validation the gradients are gone afterwards, and parameters may be
        corrected during the next `Pipeline.step`, or by `validate`."""
        if closure is not None:
            raise ValueError("a closure cannot run a pipeline's step; call Pipeline.step, then step() without one")
        if self._closed:
            raise ExecutionError("the Pipeline of this optimizer is closed; make a new one, and load the state into it")
        self.validate()
        self._must_restart = False
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self._rule == Rule(None, skip_nonfinite=False):
            self._update()
            return
        mine = self._norm.local(p for p in held if self._is_counted(p))
        if not self._post_validation:
            self._act(self._norm.complete(mine), held)
            return
        prefix = self._norm.begin(mine)
        if self._norm.is_last:
            self._act(prefix.mine, held)
            self._compare(prefix.mine, prefix.first)
        else:
            self._act_at_once(prefix.mine, held)
        for parameter in held:
            parameter.grad = None

    def _act_at_once(self, square_sum: float, held: Sequence[nn.Parameter]) -> None:
        """Do what the sum over the ranks up to this one suggests."""
        decision = self._rule.decide(square_sum)
        settings = StepSettings(self.inner, self._device)
        overwritten = None
        if decision is Decision.UPDATE:
            overwritten = OverwrittenState(self.inner, held)
            self._update()
            settings.step_done()
        gradients = [(p, p.grad) for p in held if p.grad is not None]
        self._unvalidated = _Unvalidated(decision, gradients, settings, overwritten)

    def _update(self) -> None:
        """The inner optimizer's step. LostPeerError where it shares its state with a process that is gone (ZeRO 1)."""
        try:
            self.inner.step()
        except RuntimeError as error:
            if not tells_of_lost_peer(error):
                raise
            raise LostPeerError(f"the optimizer's step broke: {first_sentence(error)}") from None

    def validate(self) -> None:
        """Make this process's parameters right, if a step has been made whose norm was not yet known.

        For whoever reads parameters between `step` and the next `Pipeline.step`: to evaluate, to save. Waits until
        the last rank has made the step. Other processes need not call it, except those that share ZeRO 1 state.
        """
        made, self._unvalidated = self._unvalidated, None
        if made is None:
            return
        total, first = self._norm.end()
        final = self._rule.decide(total)
        self._compare(total, first)
        if made.decision is final is Decision.UPDATE:
            self.last_grad_norm = sqrt(total)
            return
        if made.overwritten is not None:
            made.overwritten.restore()
            self.num_rolled_back += 1
        # The next step's gradients are not there yet, but somebody may have put others.
        held = [parameter for parameter, _ in made.gradients]
        put_aside = [parameter.grad for parameter in held]
        for parameter, gradient in made.gradients:
            parameter.grad = gradient
        with made.settings.again():
            self._act(total, held)
        for parameter, newer in zip(held, put_aside, strict=True):
            parameter.grad = newer

    def _act(self, square_sum: float, held: Iterable[nn.Parameter]) -> None:
        """Do what the sum over all ranks asks for."""
        decision = self._rule.decide(square_sum)
        self.last_grad_norm = sqrt(square_sum)
        if decision is Decision.SKIP:
            self.num_skipped += 1
            return
        if decision is Decision.CLIP:
            assert self._rule.max_norm is not None
            norm = torch.tensor(self.last_grad_norm, dtype=torch.float64, device=self._device)
            nn.utils.clip_grads_with_norm_(held, self._rule.max_norm, norm)
        self._update()

    def _compare(self, total: float, first: float) -> None:
        """Whether any rank but the last has done something else than the sum over all ranks asks for.

        Sums of squares only grow from rank to rank, so if any rank was wrong, rank 0 was. Clipping is always wrong
        there, its scale being unknown. Every rank finds the same from the same two numbers.
        """
        final = self._rule.decide(total)
        self._must_restart = not self._norm.is_alone and (
            final is Decision.CLIP or self._rule.decide(first) is not final
        )
        self.num_restarted += self._must_restart

    @property
    def needs_validation(self) -> bool:
        """Whether the next `Pipeline.step` begins before all ranks' parameters are known to be right."""
        return self._unvalidated is not None or self._must_restart

    def must_restart(self) -> bool:
        """Validate; whether what has been computed since `step` has to be thrown away, everywhere. Asked once.

        Also when this process validated before: others may not have, and their forwards were wrong.
        """
        self.validate()
        restart, self._must_restart = self._must_restart, False
        return restart

    def finish(self) -> None:
        """Validate, and wait until others have received what they need for it."""
        self.validate()
        self._norm.finish()

    def let_go(self) -> None:
        """Forget the process groups: no step can be made any more."""
        self._closed = True
        self._norm.let_go()
        if "process_group" in vars(self.inner):  # torch's ZeroRedundancyOptimizer keeps it
            vars(self.inner)["process_group"] = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this process; those of an unvalidated step are kept elsewhere."""
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """More parameters to update."""
        if not hasattr(self, "inner"):  # torch's constructor, before there is anything to pass it on to
            super().add_param_group(param_group)
            return
        self.validate()
        self.inner.add_param_group(param_group)
        self._share()

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the inner optimizer, validated."""
        self.validate()
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.validate()
        self.inner.load_state_dict(state_dict)
        self._share()


class Optimizers:
    """The optimizers of one process's pipeline; every process makes the same ones, in the same order."""

    def __init__(self, groups: Groups, layout: Layout, timeout: timedelta) -> None:
        self._groups = groups
        self._layout = layout
        self._timeout = timeout
        self._made: list[PipelineOptimizer] = []

    def make(
        self,
        cls: type[Optimizer],
        parameters: Iterable[Any],
        rule: Rule,
        is_counted: Callable[[nn.Parameter], bool],
        *,
        post_validation: bool,
        options: dict[str, Any],
    ) -> PipelineOptimizer:
        """As `Pipeline.make_optimizer` says."""
        if rule.max_norm is not None and not 0 < rule.max_norm < inf:
            raise ValueError(f"max_grad_norm is {rule.max_norm:g}, it must be a positive number, or None")
        if post_validation and rule == Rule(None, skip_nonfinite=False):
            raise ValueError(
                "post_validation corrects steps that are clipped or skipped, and neither is asked for; give "
                "max_grad_norm or skip_nonfinite=True, or leave post_validation off"
            )
        groups, layout = self._groups, self._layout
        given = list(parameters)
        if not given:  # a stage may have nothing to train, but torch's optimizers want something
            given = [nn.Parameter(torch.empty(0, device=groups.device))]
        is_sharded = layout.zero_stage == 1 and layout.dp > 1
        optimizer = PipelineOptimizer(
            _sharded(cls, given, groups.data, options) if is_sharded else cls(given, **options),
            GradientNorm(groups, layout, in_passing=post_validation, timeout=self._timeout),
            rule,
            is_counted,
            post_validation=post_validation,
            device=groups.device,
        )
        self._made.append(optimizer)
        return optimizer

    def validate(self) -> None:
        """Make the parameters of this process right."""
        for optimizer in self._made:
            optimizer.validate()

    def finish(self) -> None:
        """Validate, wait until others have received what they need for it, and let go of the optimizers.

        They know the pipeline, which knows them: with it and its process groups nothing may be left to the end of
        the interpreter, when the threads of gloo cannot end in order any more.
        """
        for optimizer in self._made:
            optimizer.finish()
            optimizer.let_go()
        self._made.clear()

    @property
    def needs_validation(self) -> bool:
        """Whether a step of the pipeline that begins now may have to begin again."""
        return any(optimizer.needs_validation for optimizer in self._made)

    def must_restart(self) -> bool:
        """Validate; whether what has been computed since has to be thrown away, on all ranks."""
        answers = [optimizer.must_restart() for optimizer in self._made]  # everyone is asked
        return any(answers)


def _sharded(
    cls: type[Optimizer], parameters: Sequence[Any], group: dist.ProcessGroup, options: dict[str, Any]
) -> Optimizer:
    """ZeRO stage 1: the state of every parameter on one process of `group`."""
    sharded: Optimizer = sharded_class()(parameters, optimizer_class=cls, process_group=group, **options)
    return sharded


def sharded_class() -> Any:
    """torch's ZeroRedundancyOptimizer. To be imported before the process group is made: torch's module keeps the one
    that is there then as a default argument, for ever."""
    with warnings.catch_warnings():
        # On import the package warns about its own use of torch.jit.
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer
