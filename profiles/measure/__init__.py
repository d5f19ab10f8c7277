"""A ModelProfile measured on this machine, from a bundled model or from any model given as a list of layers.

    from profiles.measure import ProfiledLayer, profile_bundled, profile_layers
    from profiles.measure.models import model_spec_for

    spec = model_spec_for("gpt2", num_layers=12, hidden_size=768, num_heads=12, vocab_size=50257, sequence_length=256)
    profile_bundled("gpt2", spec, micro_batch_sizes=(1, 2)).save("profile.json")

Of a model of your own, give one module of each run of equal layers, on the device, and batches to feed them:

    layers = [
        ProfiledLayer("embedding", "embedding", model.embedding),
        ProfiledLayer("block", "block", model.blocks[0], count=len(model.blocks)),
        ProfiledLayer("head", "head", model.head),
    ]
    profile = profile_layers(layers, lambda n: (inputs[:n], targets[:n]), loss_fn, model=spec)

Times depend on the threads a process may use: profile with as many as each process of the training will have.
"""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from profiles.errors import ProfileError
from profiles.measure.layers import LossFn, MakeBatch, OnProgress, ProfiledLayer, measure_model
from profiles.measure.links import measure_links, measure_links_here
from profiles.measure.models import Architecture, build_layers, loss_fn, synthetic_batch
from profiles.measure.neighbours import NeighbourRequest, neighbours
from profiles.model import Dtype, MeasuredLinks, ModelProfile, ModelSpec, Origin, Recompute, Variant

__all__ = ["ProfiledLayer", "profile_bundled", "profile_layers"]

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def profile_bundled(
    architecture: Architecture,
    spec: ModelSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = "float32",
    micro_batch_sizes: Sequence[int] = (1, 2, 4),
    recompute: Sequence[Recompute] = ("none",),
    repeats: int = 10,
    warmups: int = 3,
    num_threads: int | None = None,
    num_processes: int = 1,
    with_links: bool = True,
    on_progress: OnProgress | None = None,
) -> ModelProfile:
    """Measure a bundled model at every micro-batch size and recompute mode, at the spec's sequence length.

    Arguments and errors as in `profile_layers`. Only one block is built. `num_processes`: how many processes share this
    machine's CPU in the run; all but this one are kept busy meanwhile (`profiles.measure.neighbours`).
    """
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}, it must be at least 1")
    target = _usable_device(device)
    last = spec.num_layers + 1
    embedding, block, head = (
        build_layers(architecture, spec, dtype=TORCH_DTYPES[dtype], device=target, seed=0, only=range(i, i + 1))[0]
        for i in (0, 1, last)
    )

    def make_batch(micro_batch_size: int) -> tuple[Tensor, Tensor]:
        inputs, targets = synthetic_batch(spec, micro_batch_size, seed=0, step=0)
        return inputs.to(target), targets.to(target)

    beside = NeighbourRequest(
        architecture=architecture,
        model=spec,
        variant=Variant(micro_batch_size=max(micro_batch_sizes), sequence_length=spec.sequence_length, dtype=dtype),
        num_threads=num_threads or torch.get_num_threads(),
    )
    with neighbours(num_processes - 1 if target.type == "cpu" else 0, beside):
        measured = profile_layers(
            [
                ProfiledLayer("embedding", "embedding", embedding),
                ProfiledLayer("block", "block", block, count=spec.num_layers),
                ProfiledLayer("head", "head", head),
            ],
            make_batch,
            loss_fn,
            model=spec,
            architecture=architecture,
            device=target,
            dtype=dtype,
            micro_batch_sizes=micro_batch_sizes,
            recompute=recompute,
            repeats=repeats,
            warmups=warmups,
            num_threads=num_threads,
            with_links=False,
            on_progress=on_progress,
        )
    how = measured.origin.how
    if num_processes > 1 and target.type == "cpu":
        others = "1 process" if num_processes == 2 else f"{num_processes - 1} processes"
        how += f", beside {others} doing the same"
    if with_links and on_progress is not None:
        on_progress("links", 0, 1)
    return measured.model_copy(
        update={
            "links": _links(target) if with_links else None,
            "origin": measured.origin.model_copy(update={"how": how}),
        }
    )


def profile_layers(
    layers: Sequence[ProfiledLayer],
    make_batch: MakeBatch,
    loss_fn: LossFn,
    *,
    model: ModelSpec,
    architecture: Architecture | None = None,
    device: torch.device | str = "cpu",
    dtype: Dtype = "float32",
    sequence_length: int | None = None,
    micro_batch_sizes: Sequence[int] = (1, 2, 4),
    recompute: Sequence[Recompute] = ("none",),
    repeats: int = 10,
    warmups: int = 3,
    num_threads: int | None = None,
    with_links: bool = True,
    on_progress: OnProgress | None = None,
) -> ModelProfile:
    """Measure layers that are on `device` in `dtype`; see `profiles.measure.layers` for how.

    `make_batch(micro_batch_size)` gives (inputs, targets) on `device`, `loss_fn(output, targets)` a scalar.
    `sequence_length` (default: the model's) says what length those have. `num_threads` (default: as torch has it)
    holds while layers run. Links are measured in the process group if there is one, else between two fresh
    processes on this machine; not at all where CUDA has one device only. `on_progress(what, done, total)`.

    ProfileError: no such device, a variant that does not fit, layers that do not chain, links that fail.
    """
    target = _usable_device(device)
    variants = [
        Variant(
            micro_batch_size=size,
            sequence_length=sequence_length or model.sequence_length,
            dtype=dtype,
            recompute=mode,
        )
        for mode, size in product(recompute, micro_batch_sizes)
    ]
    with _threads(num_threads) as used_threads:
        groups = measure_model(
            layers,
            make_batch,
            loss_fn,
            variants=variants,
            device=target,
            warmups=warmups,
            repeats=repeats,
            on_progress=on_progress,
        )
    links = None
    if with_links:
        if on_progress is not None:
            on_progress("links", 0, 1)
        links = _links(target)
    return ModelProfile(
        model=model,
        architecture=architecture,
        layers=groups,
        links=links,
        origin=Origin(
            kind="measured",
            device=_device_name(target),
            device_kind="cpu" if target.type == "cpu" else "rocm" if torch.version.hip else "cuda",
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            how=(
                f"median of {_plural(repeats, 'run')} after {_plural(warmups, 'warm-up')}, "
                f"torch {torch.__version__}, {_plural(used_threads, 'thread')}"
            ),
        ),
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _links(device: torch.device) -> MeasuredLinks | None:
    if dist.is_available() and dist.is_initialized():
        return measure_links(device) if dist.get_world_size() > 1 else None
    if device.type == "cuda":
        return measure_links_here(2, "nccl") if torch.cuda.device_count() > 1 else None
    return measure_links_here(2, "gloo")


def _usable_device(device: torch.device | str) -> torch.device:
    """The device, with its index where it has one; ProfileError if torch cannot use it here."""
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ProfileError(f"device {device!r} is none that torch knows; choose cpu or cuda") from None
    if target.type == "cpu":
        return target
    if target.type != "cuda":
        raise ProfileError(f"device {str(target)!r} cannot be measured; choose cpu or cuda")
    index = target.index or 0
    if index >= torch.cuda.device_count():
        raise ProfileError(
            f"device {str(target)!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} "
            "CUDA devices; choose cpu, or install a torch built for this machine's GPU"
        )
    return torch.device("cuda", index)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"


@contextmanager
def _threads(num_threads: int | None) -> Iterator[int]:
    """Run the block with this many CPU threads per process; yields the number in use."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
