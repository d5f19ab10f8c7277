"""The directory through which a launched job talks: what is asked of it, how far it is, how it ended.

The launcher writes the plan and the request; every process writes its result or its error; the process with
the loss appends one line per step.
"""

from pathlib import Path
from typing import Literal

from planner.executor.trace import RankTrace
from planner.plans import Plan
from profiles.facts import Count, Facts, NonNegative
from profiles.measure.models import Architecture
from profiles.model import Dtype, ModelSpec

Engine = Literal["pipewright", "torch"]
"""Who runs the actions: our interpreter, or torch's runtime behind `planner.executor.torch_engine`."""


class RunRequest(Facts):
    """What every process of the job is asked to do."""

    steps: Count
    seed: int
    dtype: Dtype
    learning_rate: NonNegative
    device: Literal["cpu", "cuda"]
    backend: str | None
    engine: Engine
    max_grad_norm: NonNegative | None
    post_validation: bool
    save_gradients: bool  # of the first step, for the reference to compare with
    process_group_timeout_s: NonNegative
    launcher_pid: int  # processes end when this one is gone


class StepProgress(Facts):
    """One finished step, as soon as it is."""

    step: int
    loss: float
    step_us: NonNegative  # on the process that reports it


class RankResult(Facts):
    """What one process measured. Tuples have one entry per step."""

    trace: RankTrace
    backend: str
    threads: Count
    losses: tuple[float, ...]  # empty off the last stage
    pipeline_us: tuple[NonNegative, ...]
    data_parallel_us: tuple[NonNegative, ...]
    optimizer_us: tuple[NonNegative, ...]
    gradient_norms: tuple[float | None, ...]  # of the whole model, before clipping; None is inf or NaN
    num_skipped: int
    num_rolled_back: int
    num_restarted: int
    peak_boundary_tensors: int
    peak_device_memory_bytes: int | None


class RankError(Facts):
    """How one process failed."""

    who: str  # "process 3"
    when_s: float
    is_consequence: bool  # the cause lies in another process
    is_expected: bool  # an error of ours, whose text helps by itself
    type_name: str
    message: str


class ReferenceResult(Facts):
    """What the single-process reference found."""

    losses: tuple[float, ...]
    gradient_relative_difference: float
    worst_parameter: str


class JobDirectory:
    """Names of the files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.plan = self.path / "plan.json"
        self.request = self.path / "request.json"
        self.progress = self.path / "progress.jsonl"
        self.reference = self.path / "reference.json"
        self.log = self.path / "log.txt"

    def result(self, global_rank: int) -> Path:
        """The `RankResult` of a process."""
        return self.path / f"result-{global_rank}.json"

    def error(self, name: str) -> Path:
        """The `RankError` of a process: its global rank, or "reference"."""
        return self.path / f"error-{name}.json"

    def gradients(self, pipeline_rank: int) -> Path:
        """Gradients of the first step by parameter name, saved by torch."""
        return self.path / f"gradients-{pipeline_rank}.pt"


def model_of(plan: Plan) -> tuple[Architecture, ModelSpec]:
    """The bundled model a plan is for, at the plan's sequence length; ValueError when it is for none."""
    if plan.architecture is None:
        raise ValueError(f"plan for {plan.model.name!r} names no bundled architecture")
    return plan.architecture, plan.model.model_copy(update={"sequence_length": plan.sequence_length})
