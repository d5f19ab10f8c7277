"""What a launched run showed: losses, measured beside predicted times, and how exact the training was."""

from typing import Literal

from pydantic import Field

from profiles.facts import Count, Facts, NonNegative


class StepParts(Facts):
    """One optimizer step and its parts, in µs. Measured: of each step's slowest process, medians over steps."""

    step_us: NonNegative
    pipeline_us: NonNegative  # from the first action to the last, waiting included; with post-validation, on one rank
    data_parallel_us: NonNegative  # predicted: the exposed part; measured: the reduction, waiting included
    optimizer_us: NonNegative


class ActionTime(Facts):
    """One kind of action on one stage: mean over microbatches, data ranks and steps."""

    kind: Literal["F", "B", "W", "BW", "R"]
    stage: int
    count: Count  # actions measured
    measured_us: NonNegative
    waited_us: NonNegative  # before it, for a tensor from another rank
    handed_over_us: NonNegative = 0.0  # after it, until the rank turned to its next action: starting to send
    predicted_us: NonNegative

    @property
    def occupied_us(self) -> float:
        """How long the rank could do nothing else for it: the action, and handing over what it made."""
        return self.measured_us + self.handed_over_us


class Exactness(Facts):
    """The run compared with plain torch in one process: same seed, same data, same optimizer."""

    reference_losses: tuple[float, ...]
    loss_relative_differences: tuple[NonNegative, ...]  # per step
    gradient_relative_difference: NonNegative  # first step, the worst parameter: norm(a − b) / norm(b)
    worst_parameter: str  # its layer's index and its own name

    @property
    def worst_loss_relative_difference(self) -> float:
        """The largest of all steps."""
        return max(self.loss_relative_differences)


class Updates(Facts):
    """What the optimizer's steps did."""

    max_grad_norm: NonNegative | None
    post_validation: bool
    gradient_norms: tuple[float | None, ...]  # per step, of the whole model before clipping; None is inf or NaN
    num_skipped: int  # steps with an inf or NaN somewhere
    num_rolled_back: tuple[int, ...]  # per pipeline rank, updates made at once and taken back
    num_restarted: int  # steps whose first forwards were run again

    @property
    def num_clipped(self) -> int:
        """Steps whose gradients were scaled down."""
        most = self.max_grad_norm
        return 0 if most is None else sum(norm is not None and norm > most for norm in self.gradient_norms)


class RunReport(Facts):
    """One run of a plan on this machine."""

    schema_version: Literal["pipewright.run/1"] = Field(default="pipewright.run/1", alias="schema")
    layout: str
    family: str
    num_processes: Count
    device: str
    backend: str
    engine: Literal["pipewright", "torch"]
    dtype: str
    planned_dtype: str  # what the predictions are for
    torch_version: str
    threads_per_process: Count
    seed: int
    learning_rate: NonNegative
    losses: tuple[float, ...]  # per step, mean over the global batch before that step's update
    step_times_us: tuple[NonNegative, ...]  # per step, of the slowest process
    num_skipped_steps: int  # first steps, left out of what follows
    measured: StepParts
    predicted: StepParts
    actions: tuple[ActionTime, ...]
    updates: Updates
    peak_boundary_tensors: tuple[int, ...]  # per pipeline rank, most held at once for transfers
    peak_device_memory_bytes: tuple[int, ...] | None  # per pipeline rank, allocated, CUDA only
    exactness: Exactness | None  # when asked for

    @property
    def prediction_error(self) -> float:
        """(predicted − measured) / measured step time."""
        return (self.predicted.step_us - self.measured.step_us) / self.measured.step_us
