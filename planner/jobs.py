"""From what a user names to a `Job`: the profile that holds every variant the layout space asks for."""

from collections.abc import Sequence

from planner.candidate_costs import Job
from planner.errors import LayoutError
from planner.layout import Candidate, Dimensions, Pins, enumerate_space
from planner.plans import Precision
from profiles.analytic import profile_model
from profiles.cluster import Cluster
from profiles.collectives import Fabric
from profiles.errors import ProfileError
from profiles.model import Dtype, ModelProfile, ModelSpec


def prepare(
    known: ModelSpec | ModelProfile,
    machines: Cluster,
    global_batch_size: int,
    sequence_length: int | None,
    precision: Precision | Dtype | None,
    spaces: Sequence[Pins],
    *,
    overlaps: bool | None = None,
) -> tuple[Job, Dimensions]:
    """The job, and what its layouts have to divide; estimates whatever `spaces` need of a model given by shape.

    LayoutError if nothing divides, ProfileError if a measured profile lacks what is asked for.
    """
    if isinstance(known, ModelProfile):
        return _prepare_profile(known, machines, global_batch_size, sequence_length, precision, spaces[0], overlaps)
    length = sequence_length or known.sequence_length
    kept = _precision(precision or default_dtype(machines))
    dims = Dimensions(known, machines, global_batch_size, length, known.num_layers + 2)
    candidates = {c for pins in spaces for c in enumerate_space(dims, pins).candidates}
    if not candidates:
        raise LayoutError(
            f"no layout divides: {machines.num_devices} devices, global batch size {global_batch_size}, "
            f"{known.num_heads} heads, {dims.num_layers} layers; choose a batch with more divisors"
        )
    return Job(
        estimate(known, machines, candidates, length, kept),
        machines,
        global_batch_size,
        length,
        kept,
        overlaps is not False,
    ), dims


def estimate(
    spec: ModelSpec, machines: Cluster, candidates: set[Candidate], sequence_length: int, precision: Precision
) -> tuple[ModelProfile, ...]:
    """Analytic profiles of every node group at every variant these candidates need."""
    wanted = {
        c._replace(pp=1, dp=1, virtual_stages=1, num_microbatches=1, zero_stage=0, shard_degree=1) for c in candidates
    }
    variants = sorted({v for c in wanted for v in c.variants(sequence_length, precision.compute)}, key=str)
    fabric = Fabric.of(machines)
    return tuple(profile_model(spec, group.device, variants, fabric=fabric) for group in machines.groups)


def _precision(precision: Precision | Dtype) -> Precision:
    return precision if isinstance(precision, Precision) else Precision.of(precision)


def default_dtype(machines: Cluster) -> Dtype:
    """The first of bfloat16, float16 and float32 that every device computes in."""
    names: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
    return next((n for n in names if all(n in group.device.peak_flops for group in machines.groups)), "float32")


def _prepare_profile(
    profile: ModelProfile,
    machines: Cluster,
    global_batch_size: int,
    sequence_length: int | None,
    precision: Precision | Dtype | None,
    pins: Pins,
    overlaps: bool | None,
) -> tuple[Job, Dimensions]:
    lengths = sorted({v.sequence_length for v in profile.variants})
    dtypes = sorted({v.dtype for v in profile.variants})
    length = sequence_length or lengths[-1]
    kept = _precision(precision or dtypes[0])
    if length not in lengths or kept.compute not in dtypes:
        raise ProfileError(
            f"profile of {profile.model.name!r} holds sequence lengths {lengths} in {', '.join(dtypes)}, not {length} "
            f"in {kept.compute}; plan with those, or profile again"
        )
    for name in ("tp", "cp", "ep", "micro_batch_size", "recompute"):
        held = sorted({getattr(v, name) for v in profile.variants})
        for wanted in pins.values(name) or ():
            if wanted not in held and wanted != "mixed":
                raise ProfileError(
                    f"profile of {profile.model.name!r} holds {name} {', '.join(map(str, held))}, not {wanted}; "
                    "plan with those, or profile again"
                )
    kinds = {group.device.kind for group in machines.groups}
    if profile.origin.device_kind is not None and kinds != {profile.origin.device_kind}:
        raise ProfileError(
            f"the profile was measured on {profile.origin.device} ({profile.origin.device_kind}), cluster "
            f"{machines.name!r} is made of {', '.join(sorted(kinds))} devices; profile on such a device, or plan the "
            "model by name"
        )
    sizes = tuple(sorted({v.micro_batch_size for v in profile.variants}))
    dims = Dimensions(profile.model, machines, global_batch_size, length, profile.num_layers, sizes)
    estimated = profile.origin.kind == "analytic"
    return Job((profile,), machines, global_batch_size, length, kept, estimated if overlaps is None else overlaps), dims
