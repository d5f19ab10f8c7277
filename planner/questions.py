"""What was asked, read and checked: the job, the layouts within the pins and the layouts without them."""

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from planner.errors import LayoutError
from planner.jobs import default_dtype, prepare
from planner.layout import Dimensions, Pins, Space, enumerate_space
from planner.plans import Precision
from planner.pricing import Job, PricedLayout, Pricer
from planner.schedule.families import get_family
from planner.search import SearchProgress, SearchResult, search
from profiles.catalog import load_cluster, load_model_spec
from profiles.cluster import Cluster
from profiles.facts import is_file, parse_facts, read_text
from profiles.model import BYTES_PER_ELEMENT, Dtype, ModelProfile, ModelSpec

MAX_BATCH = 10**8
MAX_SEQUENCE = 10**8
MAX_MICRO_BATCH = 10**5

OnProgress = Callable[[SearchProgress], None] | None


@dataclass(frozen=True)
class Question:
    """A job and its layout spaces, ready to be searched."""

    job: Job
    dims: Dimensions
    pins: Pins
    free_pins: Pins

    @cached_property
    def space(self) -> Space:
        """The layouts within the pins."""
        return enumerate_space(self.dims, self.pins)

    @cached_property
    def pricer(self) -> Pricer:
        """Prices the layouts of this job."""
        return Pricer(self.job)

    @property
    def scope(self) -> str:
        """Over what a certificate of `search` holds."""
        scope = "all layouts within the pins" if self.pins.any else "all layouts"
        if self.pins.family in (None, "auto"):
            return f"{scope}, the fixed families and solver-made orders"
        return f"{scope} under {self.pins.family}"

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
        more: dict[str, Any] = {}
        if num_best > 1 and "num_best" in inspect.signature(search).parameters:
            more["num_best"] = num_best
        return search(
            self.job,
            self.space,
            self.pins,
            time_limit_s=time_limit_s,
            seed=seed,
            known=known,
            on_progress=on_progress,
            **more,
        )

    def search_without_pins(
        self, time_limit_s: float, *, seed: int, known: Sequence[PricedLayout], on_progress: OnProgress = None
    ) -> SearchResult:
        """Search all layouts, given what is priced already."""
        return search(
            self.job,
            enumerate_space(self.dims, self.free_pins),
            self.free_pins,
            time_limit_s=time_limit_s,
            seed=seed,
            known=known,
            on_progress=on_progress,
        )


def ask(
    model: str | Path | ModelSpec | ModelProfile,
    cluster: str | Path | Cluster,
    *,
    global_batch_size: int,
    sequence_length: int | None,
    dtype: Dtype | None,
    precision: Precision | None,
    gradient_dtype: Dtype | None,
    master_weight_dtype: Dtype | Literal["none"] | None,
    optimizer_dtype: Dtype | None,
    pins: Pins,
    overlap: bool | None,
) -> Question:
    """Read and check what `planner.api.plan` is given; raises what it raises."""
    machines = cluster if isinstance(cluster, Cluster) else load_cluster(str(cluster))
    known = model if isinstance(model, ModelSpec | ModelProfile) else load_model(str(model))
    if not 1 <= global_batch_size <= MAX_BATCH:
        raise LayoutError(f"global batch size {global_batch_size}: give 1 to {MAX_BATCH} sequences")
    if sequence_length is not None and not 1 <= sequence_length <= MAX_SEQUENCE:
        raise LayoutError(f"sequence length {sequence_length}: give 1 to {MAX_SEQUENCE} tokens")
    for name in (
        dtype,
        gradient_dtype,
        optimizer_dtype,
        None if master_weight_dtype == "none" else master_weight_dtype,
    ):
        if name is not None and name not in BYTES_PER_ELEMENT:
            raise LayoutError(f"dtype {name!r} is not known; choose one of {', '.join(BYTES_PER_ELEMENT)}")
    if precision is not None and dtype not in (None, precision.compute):
        raise LayoutError(f"dtype {dtype} and precision.compute {precision.compute} disagree: give one of them")
    for family in (pins.family, *(value for name, value in pins.excluded if name == "family")):
        if family not in (None, "auto"):
            get_family(str(family))
    changes = {"gradients": gradient_dtype, "master_weights": master_weight_dtype, "optimizer": optimizer_dtype}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes:
        usual = precision or Precision.of(dtype or _usual_dtype(known, machines))
        kept = {name: None if value == "none" else value for name, value in changes.items()}
        precision = usual.model_copy(update=kept)
    free_pins = Pins(family=pins.family)
    spaces = (pins, free_pins) if pins.any else (pins,)
    job, dims = prepare(
        known, machines, global_batch_size, sequence_length, precision or dtype, spaces, overlaps=overlap
    )
    return Question(job, dims, pins, free_pins)


def _usual_dtype(known: ModelSpec | ModelProfile, machines: Cluster) -> Dtype:
    if isinstance(known, ModelProfile):
        return min(variant.dtype for variant in known.variants)
    return default_dtype(machines)


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
