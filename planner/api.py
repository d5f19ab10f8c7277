"""What a user can ask for, as functions: each command of `pipewright` calls one of these."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from planner.assembly import assemble, runners_up
from planner.errors import LayoutError, PlanError, ScheduleError
from planner.jobs import prepare
from planner.layout import Degrees, Pins, enumerate_space
from planner.plans import Plan, Precision, RecomputePlan
from planner.pricing import PricedLayout, Pricer
from planner.schedule.families import get_family
from planner.search import SearchProgress, SearchResult, search
from planner.verify import verify
from profiles.catalog import load_cluster, load_model_spec
from profiles.cluster import Cluster
from profiles.errors import ProfileError
from profiles.facts import is_file, parse_facts, read_text
from profiles.model import BYTES_PER_ELEMENT, Dtype, ModelProfile, ModelSpec, Recompute

DEFAULT_TIME_LIMIT_S = 30.0
MAX_BATCH = 10**8
MAX_SEQUENCE = 10**8
MAX_MICRO_BATCH = 10**5
_PINNED_SHARE = 0.6  # of the time limit; the rest goes to the space without pins


def plan(
    model: str | Path | ModelSpec | ModelProfile,
    cluster: str | Path | Cluster,
    *,
    global_batch_size: int,
    sequence_length: int | None = None,
    dtype: Dtype | None = None,
    precision: Precision | None = None,
    tp: Degrees = None,
    pp: Degrees = None,
    dp: Degrees = None,
    cp: Degrees = None,
    ep: Degrees = None,
    virtual_stages: Degrees = None,
    micro_batch_size: Degrees = None,
    zero_stage: Degrees = None,
    shard_degree: Degrees = None,
    recompute: RecomputePlan | tuple[RecomputePlan, ...] | None = None,
    sequence_parallel: bool | None = None,
    family: str = "auto",
    excluded: Sequence[tuple[str, int | str]] = (),
    overlap: bool | None = None,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    seed: int = 0,
    command: str = "",
    on_progress: Callable[[SearchProgress], None] | None = None,
) -> Plan:
    """The fastest layout and schedule found for this model on this cluster, with its certificate.

    `model` is a catalogue name, a Hugging Face config.json, a profile file, or the facts themselves; `cluster` a
    catalogue name, NODESxPER_NODExDEVICE, a cluster file, or the facts. Degrees that are given are pinned to a value
    or to several, `excluded` names (dimension, value) pairs that must not be used; then the best layout without either
    is priced beside the answer. `global_batch_size` counts sequences per optimizer step. `precision` says what is kept
    in which dtype, where `dtype` alone means the usual mixed precision. `overlap`: whether data-parallel traffic runs
    beside the backward, by default with estimated profiles, as Megatron-LM and FSDP do it, and not with measured ones,
    as the bundled executor does not.

    Raises CatalogError, FileError, LayoutError or ProfileError for bad input, and InfeasibleError when no layout fits.
    """
    machines = cluster if isinstance(cluster, Cluster) else load_cluster(str(cluster))
    known = model if isinstance(model, ModelSpec | ModelProfile) else load_model(str(model))
    _check_numbers(global_batch_size, sequence_length, time_limit_s, dtype)
    if precision is not None and dtype not in (None, precision.compute):
        raise LayoutError(f"dtype {dtype} and precision.compute {precision.compute} disagree: give one of them")
    if family != "auto":
        get_family(family)
    pins = Pins(
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        ep=ep,
        virtual_stages=virtual_stages,
        micro_batch_size=micro_batch_size,
        zero_stage=zero_stage,
        shard_degree=shard_degree,
        recompute=recompute,
        sequence_parallel=sequence_parallel,
        family=family,
        excluded=tuple(excluded),
    )
    free_pins = Pins(family=family)
    job, dims = prepare(
        known, machines, global_batch_size, sequence_length, precision or dtype, (pins, free_pins), overlaps=overlap
    )
    share = _PINNED_SHARE if pins.any else 1.0
    result = search(
        job, enumerate_space(dims, pins), pins, time_limit_s=time_limit_s * share, seed=seed, on_progress=on_progress
    )
    best = result.ranked[0]
    beside = [("", priced) for priced in runners_up(result)]
    if pins.any and not result.interrupted:
        free = search(
            job,
            enumerate_space(dims, free_pins),
            free_pins,
            time_limit_s=time_limit_s * (1 - share),
            seed=seed,
            known=result.ranked,
            on_progress=on_progress,
        )
        result.interrupted |= free.interrupted
        result.limited_by_time |= free.limited_by_time
        beside = _beside_pinned(best, free)
    scope = "all layouts within the pins" if pins.any else "all layouts"
    scope += ", the fixed families and solver-made orders" if family == "auto" else f" under {family}"
    return assemble(
        job,
        result,
        beside=beside,
        scope=scope,
        schedule_bound_us=Pricer(job).schedule_bound_us(best.cut),
        time_limit_s=time_limit_s,
        seed=seed,
        command=command,
    )


def _beside_pinned(pinned: PricedLayout, free: SearchResult) -> list[tuple[str, PricedLayout]]:
    """The layouts of a search without pins, the best of them named, also where it is the pinned one."""
    others = [priced for priced in runners_up(free) if priced.candidate.degrees != pinned.candidate.degrees]
    return [("without pins", free.ranked[0]), *(("", priced) for priced in others)]


def profile(
    model: str | Path | ModelSpec,
    *,
    sequence_length: int | None = None,
    num_layers: int | None = None,
    micro_batch_sizes: Sequence[int] = (1, 2, 4),
    recompute: Sequence[Recompute] = ("none",),
    dtype: Dtype = "float32",
    device: str = "cpu",
    num_threads: int = 1,
    repeats: int = 10,
    warmups: int = 3,
    with_links: bool = True,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ModelProfile:
    """Measure the bundled GPT-2-like or Llama-like torch model of this shape on this device. Needs torch.

    Rotary, gated models without biases are Llama-like; LayerNorm, learned positions and biases make GPT-2. The bundled
    models keep embedding and head apart, so the profile's spec has untied embeddings whatever the catalogue says.
    Your own layers are measured with `profiles.measure.profile_layers`. ProfileError if the shape is of neither kind.
    """
    from profiles.measure import profile_bundled

    sizes = tuple(sorted(set(micro_batch_sizes)))
    if not sizes or sizes[0] < 1 or sizes[-1] > MAX_MICRO_BATCH:
        raise ProfileError(f"micro-batch sizes {sizes}: give whole numbers from 1 to {MAX_MICRO_BATCH}")
    spec = model if isinstance(model, ModelSpec) else load_model_spec(str(model))
    changes: dict[str, Any] = {"tied_embeddings": False}
    if sequence_length is not None:
        changes["sequence_length"] = sequence_length
    if num_layers is not None:
        changes["num_layers"] = num_layers
    shape = ModelSpec.model_validate({**spec.model_dump(), **changes})
    return profile_bundled(
        "llama" if shape.gated_mlp else "gpt2",
        shape,
        device=device,
        dtype=dtype,
        micro_batch_sizes=sizes,
        recompute=recompute,
        repeats=repeats,
        warmups=warmups,
        num_threads=num_threads,
        with_links=with_links,
        on_progress=on_progress,
    )


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


def validate(path: str | Path) -> Plan:
    """Load a plan file and check that its parts agree and that its schedule can run.

    FileError, PlanError or ScheduleError say what is wrong and where.
    """
    loaded = Plan.load(path)
    try:
        verify(loaded)
    except (PlanError, ScheduleError) as error:
        raise type(error)(f"{path}: {error}") from None
    return loaded


def json_schema() -> dict[str, Any]:
    """The JSON schema of a plan file."""
    return Plan.model_json_schema()


def _check_numbers(
    global_batch_size: int, sequence_length: int | None, time_limit_s: float, dtype: Dtype | None
) -> None:
    if not 1 <= global_batch_size <= MAX_BATCH:
        raise LayoutError(f"global batch size {global_batch_size}: give 1 to {MAX_BATCH} sequences")
    if sequence_length is not None and not 1 <= sequence_length <= MAX_SEQUENCE:
        raise LayoutError(f"sequence length {sequence_length}: give 1 to {MAX_SEQUENCE} tokens")
    if not (math.isfinite(time_limit_s) and time_limit_s > 0):
        raise LayoutError(f"time limit {time_limit_s}: give a finite number of seconds above 0")
    if dtype is not None and dtype not in BYTES_PER_ELEMENT:
        raise LayoutError(f"dtype {dtype!r} is not known; choose one of {', '.join(BYTES_PER_ELEMENT)}")
