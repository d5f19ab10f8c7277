"""The Plan: what is saved, exported, reported and run.

Everything a training job needs is inside: no catalogue, profile or cluster file has to be there when it runs.
"""

import math
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from planner.errors import PlanError, ScheduleError
from planner.schedule.actions import Schedule
from profiles.facts import Bytes, Count, Facts, Microseconds, NonNegative, NonNegativeCount
from profiles.model import Dtype, Engine, ModelSpec, Recompute

ZeroStage = Literal[0, 1, 2, 3]
RecomputePlan = Literal[Recompute, "mixed"]
RECOMPUTE_PLANS: tuple[RecomputePlan, ...] = (*get_args(Recompute), "mixed")
"""What a layout does to all its blocks alike, or "mixed": each layer as `Layout.recompute_of_layer` says."""


class Precision(Facts):
    """What is kept in which dtype. Weights are kept in the compute dtype (bfloat16 under float8)."""

    compute: Dtype
    gradients: Dtype = "float32"  # as accumulated over microbatches and reduced over data-parallel devices
    master_weights: Dtype | None = "float32"  # the optimizer's own copy; None: it updates the weights themselves
    optimizer: Dtype = "float32"  # each of AdamW's two moments; float8 is one byte

    @classmethod
    def of(cls, compute: Dtype) -> Self:
        """The usual choice: everything but weights in float32 for 16-bit compute, and all in one dtype else."""
        if compute in ("float32", "float64"):
            return cls(compute=compute, gradients=compute, master_weights=None, optimizer=compute)
        return cls(compute=compute)


class Layout(Facts):
    """How the model is cut and where its parts run.

    A process's global rank is ((pipeline_rank × dp + data_rank) × cp + context_rank) × tp + tensor_rank. Expert groups
    are ep consecutive of the dp × cp processes that hold the same shard of the dense layers.
    """

    tp: Count = 1
    pp: Count = 1
    dp: Count = 1
    cp: Count = 1
    ep: Count = 1
    virtual_stages: Count = 1
    micro_batch_size: Count
    num_microbatches: Count  # per data-parallel replica and step
    zero_stage: ZeroStage = 0
    shard_degree: Count = 1  # devices over which ZeRO shards: a divisor of dp × cp; less is hybrid sharding
    sequence_parallel: bool = True  # of what tensor parallelism leaves whole; no meaning at tp=1
    recompute: RecomputePlan = "none"
    recompute_of_layer: tuple[Recompute, ...] = ()  # shape (num_layers,) where recompute is "mixed", else empty
    layers_per_stage: tuple[Count, ...]  # shape (pp × virtual_stages,), embedding and head counted as layers
    rank_of_stage: tuple[NonNegativeCount, ...]  # placement, shape (pp × virtual_stages,)
    num_replicas: Literal[1, 2] = 1  # 2: bidirectional, stage s is on rank pp − 1 − s, too; microbatches take either
    devices: tuple[NonNegativeCount, ...]  # device index in the cluster of every global rank, shape (num_devices,)

    @property
    def num_devices(self) -> int:
        """Processes the layout runs on."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def num_stages(self) -> int:
        """Pipeline stages, S = p · v."""
        return self.pp * self.virtual_stages

    @property
    def degrees(self) -> str:
        """One line that tells two layouts apart."""
        chunks = f" v{self.virtual_stages}" if self.virtual_stages > 1 else ""
        chunks += " x2" if self.num_replicas == 2 else ""
        context = f" cp{self.cp}" if self.cp > 1 else ""
        experts = f" ep{self.ep}" if self.ep > 1 else ""
        zero = f" zero{self.zero_stage}" if self.zero_stage else ""
        hybrid = f"/{self.shard_degree}" if self.zero_stage and self.shard_degree < self.dp * self.cp else ""
        sequence = "" if self.tp == 1 or self.sequence_parallel else " no-sp"
        recompute = {"none": "", "selective": " sel-recompute", "full": " recompute", "mixed": " part-recompute"}
        return (
            f"tp{self.tp} pp{self.pp} dp{self.dp}{context}{experts}{chunks} mbs{self.micro_batch_size}"
            f"{zero}{hybrid}{sequence}{recompute[self.recompute]}"
        )

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        for name in ("layers_per_stage", "rank_of_stage"):
            if len(getattr(self, name)) != self.num_stages:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, pp={self.pp} × virtual_stages="
                    f"{self.virtual_stages} needs {self.num_stages}"
                )
        if set(self.rank_of_stage) != set(range(self.pp)):
            raise ValueError(f"rank_of_stage {self.rank_of_stage} does not use exactly the ranks 0..{self.pp - 1}")
        if self.num_replicas == 2 and (self.pp < 2 or self.rank_of_stage != tuple(range(self.pp))):
            raise ValueError(
                f"num_replicas=2 needs pp of at least 2 and stage s on rank s, not pp={self.pp} and rank_of_stage "
                f"{self.rank_of_stage}"
            )
        if self.dp * self.cp % self.ep:
            raise ValueError(f"ep={self.ep} does not divide dp={self.dp} × cp={self.cp}: experts lie inside them")
        if self.dp * self.cp % self.shard_degree:
            raise ValueError(f"shard_degree={self.shard_degree} does not divide dp={self.dp} × cp={self.cp}")
        wanted = sum(self.layers_per_stage) if self.recompute == "mixed" else 0
        if len(self.recompute_of_layer) != wanted:
            raise ValueError(
                f"recompute_of_layer has {len(self.recompute_of_layer)} entries, recompute={self.recompute} needs "
                f"{wanted}"
            )
        if len(self.devices) != self.num_devices or len(set(self.devices)) != self.num_devices:
            raise ValueError(f"devices names {len(set(self.devices))} devices, the degrees need {self.num_devices}")
        return self


class StageCosts(Facts):
    """One pipeline stage under this layout: times of one microbatch in µs, sizes per device in bytes."""

    forward_us: Microseconds
    backward_input_us: Microseconds
    backward_weight_us: Microseconds
    fused_backward_us: Microseconds
    optimizer_us: Microseconds
    parameter_bytes: Bytes
    expert_parameter_bytes: Bytes = 0  # of parameter_bytes
    deferred_parameter_bytes: Bytes | None = None  # of parameter_bytes: gradients come in W, not B; None: not told
    activation_bytes: Bytes
    weight_activation_bytes: Bytes
    output_bytes: Bytes
    temporary_bytes: Bytes
    transfer_us: Microseconds  # of its output to the next stage, and of that gradient back; 0 for the last
    splits_backward: bool = True  # False where a layer recomputes: its backward runs in one piece
    recompute_us: Microseconds | None = None  # R, the forward again; None: not told, and the stage has no R
    checkpoint_bytes: Bytes | None = None  # what F takes of a microbatch that has an R: the stage's input


class RankMemory(Facts):
    """Peak memory of every device of one pipeline rank, in bytes, part by part."""

    weight_bytes: Bytes
    gradient_bytes: Bytes
    optimizer_bytes: Bytes
    activation_bytes: Bytes  # peak over the actual schedule
    temporary_bytes: Bytes
    buffer_bytes: Bytes  # in-flight boundary tensors
    capacity_bytes: Bytes  # what a process may use: device memory less the reserve

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return (
            self.weight_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.activation_bytes
            + self.temporary_bytes
            + self.buffer_bytes
        )


class TimeParts(Facts):
    """Where the step time goes, in µs. All parts add up to it; the parts up to the bubble are of the busiest rank."""

    compute_us: Microseconds  # F, B and W as they would run without recomputation and with infinitely fast links
    recompute_us: Microseconds  # forwards that are repeated in the backward
    tensor_parallel_us: Microseconds  # collectives inside the layers; 0 where a measured profile does not tell
    context_parallel_us: Microseconds  # what attention does not hide of passing K and V on
    expert_parallel_us: Microseconds  # exchange of tokens between experts
    weight_traffic_us: Microseconds  # gathering weights and scattering gradients under ZeRO 2 and 3, beyond the compute
    bubble_us: Microseconds  # when the busiest rank waits, transfers between stages included
    exposed_data_parallel_us: Microseconds
    overhead_us: Microseconds  # what every step takes besides (`planner.traffic`)
    optimizer_us: Microseconds

    @property
    def by_name(self) -> dict[str, float]:
        """Every part with its name in words, in order."""
        return {name.removesuffix("_us").replace("_", " "): value for name, value in self}

    @property
    def total_us(self) -> float:
        """All parts together: the step time."""
        return math.fsum(value for _, value in self)


class Prediction(Facts):
    """What one optimizer step is predicted to take. step = pipeline + exposed data-parallel + optimizer."""

    step_time_us: Microseconds
    pipeline_us: Microseconds  # makespan of the schedule, transfers included
    exposed_data_parallel_us: Microseconds  # with what every step takes besides
    optimizer_us: Microseconds
    bubble_rate_span: NonNegative
    bubble_rate_makespan: NonNegative
    model_flops: NonNegative  # of one step over all devices
    mfu: NonNegative  # against the dense peak of the dtype
    hfu: NonNegative = 0.0  # the same with recomputation counted
    tokens_per_s: NonNegative
    parts: TimeParts | None = None  # None in a plan that nobody priced
    memory: tuple[RankMemory, ...]  # shape (pp,)


class Certificate(Facts):
    """How far the plan can be from the best one, under the cost model, and who says so."""

    objective_us: NonNegative
    lower_bound_us: NonNegative  # on the step time of every layout and schedule of the space searched
    lower_bound_kind: str
    gap: NonNegative
    status: Literal["optimal", "feasible"]
    schedule_solver: str  # who made the schedule
    schedule_lower_bound_us: NonNegative  # on the pipeline time of this cut alone, any order
    num_candidates: NonNegativeCount  # = refused + evaluated + pruned + unreached
    num_evaluated: NonNegativeCount
    num_overflowing: NonNegativeCount  # of those evaluated: proven not to fit
    num_pruned: NonNegativeCount  # by their floor
    num_unreached: NonNegativeCount  # when time ran out; their floors count in the bound
    refused: dict[str, int]  # candidates without a price, by reason
    dropped: dict[str, int]  # degrees outside the space, by reason
    interrupted: bool
    limited_by_time: bool  # another run may end elsewhere
    seconds: NonNegative
    seed: int
    time_limit_s: NonNegative


WITHOUT_PINS = "without pins"
"""Label of the best layout without pins, beside a plan that was made with some."""


class Alternative(Facts):
    """Another layout that was priced in full, for comparison."""

    label: str
    layout: str
    family: str
    step_time_us: Microseconds
    mfu: NonNegative
    peak_memory_bytes: Bytes
    parts: TimeParts | None = None
    gap: NonNegative | None = None  # of the best without pins: to the bound of its own search


class Provenance(Facts):
    """What the plan was made from."""

    pipewright_version: str
    command: str
    cluster: str
    device: str
    profile_origin: str
    profile_sha256: str
    cluster_sha256: str
    assumptions: tuple[str, ...]


class Plan(Facts):
    """A layout, a schedule, what they are predicted to do, and how sure that is."""

    schema_version: Literal["pipewright.plan/1"] = Field(default="pipewright.plan/1", alias="schema")
    model: ModelSpec
    architecture: Literal["gpt2", "llama"] | None = None  # bundled torch model that `pipewright run` builds
    sequence_length: Count
    global_batch_size: Count  # sequences per optimizer step
    precision: Precision
    engine: Engine = "deferred-linear"  # how B and W are split: times and bytes of the stages are those of this engine
    layout: Layout
    stages: tuple[StageCosts, ...]
    family: str  # "1f1b", "zb-h1", ..., or "auto" when a solver made the order
    schedule: tuple[str, ...]  # text form, one line per rank
    prediction: Prediction
    certificate: Certificate
    alternatives: tuple[Alternative, ...] = ()
    placement_notes: tuple[str, ...] = ()  # how the groups lie on the machines, and why
    provenance: Provenance

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        layout = self.layout
        if len(self.stages) != layout.num_stages:
            raise ValueError(f"stages has {len(self.stages)} entries, the layout has {layout.num_stages} stages")
        per_step = layout.micro_batch_size * layout.num_microbatches * layout.dp
        if per_step != self.global_batch_size:
            raise ValueError(
                f"micro_batch_size {layout.micro_batch_size} × num_microbatches {layout.num_microbatches} × "
                f"dp {layout.dp} is {per_step}, not global_batch_size {self.global_batch_size}"
            )
        all_priced: list[tuple[str, Prediction | Alternative]] = [("prediction", self.prediction)]
        all_priced += [(f"alternative {other.layout}", other) for other in self.alternatives]
        for where, priced in all_priced:
            parts = priced.parts
            if parts is not None and not math.isclose(parts.total_us, priced.step_time_us, rel_tol=1e-6):
                raise ValueError(
                    f"{where}: parts add up to {parts.total_us} µs, but step_time_us is {priced.step_time_us}"
                )
        for name in ("schedule", "prediction.memory"):
            rows = self.schedule if name == "schedule" else self.prediction.memory
            if len(rows) != layout.pp:
                raise ValueError(f"{name} has {len(rows)} rows, the layout has {layout.pp} pipeline ranks")
        return self

    @property
    def dtype(self) -> Dtype:
        """What it computes in."""
        return self.precision.compute

    @property
    def parsed_schedule(self) -> Schedule:
        """The schedule as actions; PlanError if its text cannot be read."""
        try:
            return Schedule.from_lines(self.schedule)
        except ScheduleError as error:
            raise PlanError(f"plan.schedule: {error}") from None

    def __str__(self) -> str:
        from planner.report.plan import render_plan

        return render_plan(self)
