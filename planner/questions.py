"""What was asked, read and checked: the job, the layouts within the pins and the layouts without them."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Required, TypedDict

from planner.candidate_costs import Job
from planner.errors import LayoutError
from planner.jobs import default_dtype, prepare
from planner.layout import Degrees, Dimensions, Pins, Space, enumerate_space
from planner.plans import Precision, RecomputePlan
from planner.pricing import PricedLayout, Pricer
from planner.schedule.families import get_family
from planner.search import SearchProgress, SearchResult, search
from profiles.catalog import load_cluster, load_model_spec
from profiles.cluster import Cluster
from profiles.facts import is_file, parse_facts, read_text
from profiles.model import BYTES_PER_ELEMENT, Dtype, ModelProfile, ModelSpec

MAX_BATCH = 10**8
MAX_SEQUENCE = 10**8

OnProgress = Callable[[SearchProgress], None] | None


class PlanArguments(TypedDict, total=False):
    """The keyword arguments of `planner.plan`."""

    global_batch_size: Required[int]
    sequence_length: int | None
    dtype: Dtype | None
    precision: Precision | None
    gradient_dtype: Dtype | None
    master_weight_dtype: Dtype | Literal["none"] | None
    optimizer_dtype: Dtype | None
    tp: Degrees
    pp: Degrees
    dp: Degrees
    cp: Degrees
    ep: Degrees
    virtual_stages: Degrees
    micro_batch_size: Degrees
    zero_stage: Degrees
    shard_degree: Degrees
    recompute: RecomputePlan | tuple[RecomputePlan, ...] | None
    sequence_parallel: bool | None
    family: str
    excluded: Sequence[tuple[str, int | str]]
    overlap: bool | None
    top: int
    time_limit_s: float
    seed: int
    command: str
    on_progress: OnProgress


def within(arguments: PlanArguments, time_limit_s: float, *, top: int = 0) -> PlanArguments:
    """The same arguments with another time limit."""
    copied = arguments.copy()
    copied["time_limit_s"], copied["top"] = time_limit_s, top
    return copied


@dataclass(frozen=True)
class Question:
    """A job and its layout spaces, ready to be searched."""

    job: Job
    dims: Dimensions
    pins: Pins

    @cached_property
    def space(self) -> Space:
        """The layouts within the pins."""
        return enumerate_space(self.dims, self.pins)

    @cached_property
    def pricer(self) -> Pricer:
        """Prices the layouts of this job."""
        return Pricer(self.job)

    @property
    def is_pinned(self) -> bool:
        """Whether anything but the schedule family is pinned or excluded."""
        return _is_pinned(self.pins)

    @property
    def scope(self) -> str:
        """Over what a certificate of `search` holds."""
        scope = "all layouts within the pins" if self.is_pinned else "all layouts"
        if self.pins.family not in (None, "auto"):
            return f"{scope} under {self.pins.family}"
        left_out = [str(value) for name, value in self.pins.excluded if name == "family"]
        if not left_out:
            return f"{scope}, the fixed families and solver-made orders"
        return f"{scope}, schedules other than {', '.join(left_out)}"

    def search(
        self,
        time_limit_s: float,
        *,
        seed: int,
        num_best: int = 1,
        known: Sequence[PricedLayout] = (),
        on_progress: OnProgress = None,
    ) -> SearchResult:
        """Search the layouts within the pins, on until the `num_best` best are proven."""
        return search(
            self.job,
            self.space,
            self.pins,
            time_limit_s=time_limit_s,
            seed=seed,
            known=known,
            num_best=num_best,
            pricer=self.pricer,
            on_progress=on_progress,
        )

    def search_without_pins(
        self, time_limit_s: float, *, seed: int, known: Sequence[PricedLayout], on_progress: OnProgress = None
    ) -> SearchResult:
        """Search all layouts, given what is priced already."""
        return search(
            self.job,
            enumerate_space(self.dims, _free(self.pins)),
            _free(self.pins),
            time_limit_s=time_limit_s,
            seed=seed,
            known=known,
            pricer=self.pricer,
            on_progress=on_progress,
        )


def ask(
    model: str | Path | ModelSpec | ModelProfile, cluster: str | Path | Cluster, arguments: PlanArguments
) -> Question:
    """Read and check what `planner.plan` is given; raises what it raises."""
    machines = cluster if isinstance(cluster, Cluster) else load_cluster(str(cluster))
    known = model if isinstance(model, ModelSpec | ModelProfile) else load_model(str(model))
    global_batch_size, sequence_length = arguments["global_batch_size"], arguments.get("sequence_length")
    if not 1 <= global_batch_size <= MAX_BATCH:
        raise LayoutError(f"global batch size {global_batch_size}: give 1 to {MAX_BATCH} sequences")
    if sequence_length is not None and not 1 <= sequence_length <= MAX_SEQUENCE:
        raise LayoutError(f"sequence length {sequence_length}: give 1 to {MAX_SEQUENCE} tokens")
    precision = read_precision(known, machines, arguments)
    pins = _pins(arguments)
    spaces = (pins, _free(pins)) if _is_pinned(pins) else (pins,)
    overlaps = arguments.get("overlap")
    job, dims = prepare(known, machines, global_batch_size, sequence_length, precision, spaces, overlaps=overlaps)
    return Question(job, dims, pins)


def read_precision(known: ModelSpec | ModelProfile, machines: Cluster, arguments: PlanArguments) -> Precision:
    """What is kept in which dtype, by these arguments; LayoutError if they disagree or name no dtype."""
    dtype, precision = arguments.get("dtype"), arguments.get("precision")
    replaced = {
        "gradients": arguments.get("gradient_dtype"),
        "master_weights": arguments.get("master_weight_dtype"),
        "optimizer": arguments.get("optimizer_dtype"),
    }
    for name in (dtype, *replaced.values()):
        if name not in (None, "none", *BYTES_PER_ELEMENT):
            raise LayoutError(f"dtype {name!r} is not known; choose one of {', '.join(BYTES_PER_ELEMENT)}")
    if precision is not None and dtype not in (None, precision.compute):
        raise LayoutError(f"dtype {dtype} and precision.compute {precision.compute} disagree: give one of them")
    if dtype is None and isinstance(known, ModelProfile):
        dtype = min(variant.dtype for variant in known.variants)
    usual = precision or Precision.of(dtype or default_dtype(machines))
    given = {name: None if value == "none" else value for name, value in replaced.items() if value is not None}
    return usual.model_copy(update=given)


def check_time_limit(time_limit_s: float) -> None:
    """LayoutError unless there is some time."""
    if not (math.isfinite(time_limit_s) and time_limit_s > 0):
        raise LayoutError(f"time limit {time_limit_s}: give a finite number of seconds above 0")


def load_model(text: str) -> ModelSpec | ModelProfile:
    """A catalogue name, a Hugging Face config.json, or a file that `pipewright profile` wrote."""
    if is_file(text):
        content = read_text(text)
        try:
            schema = json.loads(content).get("schema")
        except (ValueError, AttributeError, RecursionError):
            schema = None
        if schema is not None:
            return parse_facts(ModelProfile, content, where=text)
    return load_model_spec(text)


def _pins(arguments: PlanArguments) -> Pins:
    given: dict[str, Any] = {field.name: arguments.get(field.name) for field in fields(Pins)}
    pins = Pins(**{**given, "family": given["family"] or "auto", "excluded": tuple(given["excluded"] or ())})
    for family in (pins.family, *(value for name, value in pins.excluded if name == "family")):
        if family not in (None, "auto"):
            get_family(str(family))
    return pins


def _free(pins: Pins) -> Pins:
    """Only what is said of the schedule family."""
    return Pins(family=pins.family, excluded=tuple(pair for pair in pins.excluded if pair[0] == "family"))


def _is_pinned(pins: Pins) -> bool:
    return replace(pins, excluded=tuple(pair for pair in pins.excluded if pair[0] != "family")).any
