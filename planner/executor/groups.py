"""Who is who: the process group, this process's coordinates in the layout, and the groups it talks in.

A global rank is (pipeline_rank × dp + data_rank) × tp + tensor_rank, as in `planner.plans.Layout`.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from planner.errors import ExecutionError
from planner.executor.program import Channel
from planner.executor.transport import telling_lost_peers
from planner.plans import Layout


@dataclass(frozen=True)
class Coordinates:
    """Where a process sits in the layout."""

    global_rank: int
    pipeline_rank: int
    data_rank: int
    tensor_rank: int

    @classmethod
    def of(cls, layout: Layout, global_rank: int) -> "Coordinates":
        """Coordinates of a global rank."""
        rest, tensor_rank = divmod(global_rank, layout.tp)
        pipeline_rank, data_rank = divmod(rest, layout.dp)
        return cls(global_rank, pipeline_rank, data_rank, tensor_rank)


@dataclass(frozen=True)
class Groups:
    """The process groups of one process."""

    coordinates: Coordinates
    backend: str
    device: torch.device
    mesh: DeviceMesh  # dimensions pp, dp, tp
    owns_world: bool  # the default group was made here, and is destroyed here

    @property
    def matches_by_tag(self) -> bool:
        """Whether messages carry tags; where not, each channel needs a communicator of its own."""
        return self.backend == "gloo"

    @property
    def pipeline(self) -> dist.ProcessGroup:
        """The ranks of this pipeline, in pipeline order."""
        return self.mesh.get_group("pp")

    @property
    def data(self) -> dist.ProcessGroup:
        """The processes that hold the same stages."""
        return self.mesh.get_group("dp")


def refuse_unsupported(layout: Layout) -> None:
    """ExecutionError for what of a layout this executor cannot run."""
    for axis in ("tp", "cp", "ep"):
        degree = getattr(layout, axis)
        if degree > 1:
            raise ExecutionError(
                f"{axis}={degree} is not yet run by this executor, which runs pp × dp; "
                f"plan with {axis}=1 to run here, or export the plan ({layout.degrees})"
            )
    if layout.zero_stage > 1 or (layout.zero_stage == 1 and layout.shard_degree != layout.dp):
        raise ExecutionError(
            f"ZeRO stage {layout.zero_stage} over {layout.shard_degree} of {layout.dp} data-parallel processes is not "
            "yet run by this executor; plan with zero_stage 0, or 1 over all of them, to run here"
        )
    if "selective" in (layout.recompute, *layout.recompute_of_layer):
        raise ExecutionError(
            "selective recomputation is not run by this executor, whose layers recompute whole or not at all; "
            "plan with recompute none or full to run here"
        )


def connect(layout: Layout, device: torch.device | None, backend: str | None, timeout: timedelta) -> Groups:
    """Join the job. Uses the default process group where there is one, else makes it from torchrun's
    environment.

    ExecutionError when the number of processes is not what the layout needs.
    """
    wanted = layout.num_devices
    owns_world = not dist.is_initialized()
    found = int(os.environ.get("WORLD_SIZE", "1")) if owns_world else dist.get_world_size()
    if found != wanted:
        raise ExecutionError(
            f"the plan's layout {layout.degrees} runs on {wanted} processes, this job has {found}; start "
            f"it with: torchrun --standalone --nproc-per-node {wanted} {sys.argv[0] or 'your_script.py'}"
        )
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if owns_world:
        backend = backend or ("nccl" if device.type == "cuda" else "gloo")
        # Not bound to its device: a bound group would split its communicator for every channel and bystander.
        if "RANK" in os.environ:
            store, rank, world_size = _next_store(timeout)
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
        else:  # one process outside torchrun needs no rendezvous
            store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in its __all__
            dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (layout.pp, layout.dp, layout.tp), mesh_dim_names=("pp", "dp", "tp"))
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    backend = backends.get(device.type)
    if backend is None or (backend == "gloo" and device.type == "cuda"):
        raise ExecutionError(
            f"the process group sends {', '.join(f'{d} tensors by {b}' for d, b in backends.items())}, which cannot "
            f"send from one process to another on {device.type}; use {'nccl' if device.type == 'cuda' else 'gloo'}"
        )
    return Groups(
        coordinates=Coordinates.of(layout, dist.get_rank()),
        backend=backend,
        device=device,
        mesh=mesh,
        owns_world=owns_world,
    )


_joined: list[tuple[Any, int, int]] = []  # by each time this process has joined the job; the first has the store


def _next_store(timeout: timedelta) -> tuple[Any, int, int]:
    """Where the processes find each other, this process's rank, how many there are.

    Under a prefix of its own each time: in a store that was used before, a process finds where others listened then,
    and waits for them until the timeout. All processes make and close pipelines in one order, so they count alike.
    """
    if not _joined:
        _joined.append(next(rendezvous("env://", timeout=timeout)))
    store, rank, world_size = _joined[0]
    mine = dist.PrefixStore(f"pipeline-{len(_joined)}", store)  # type: ignore[attr-defined]  # public
    _joined.append((mine, rank, world_size))
    return _joined[-1]


def channel_groups(
    groups: Groups, layout: Layout, channels: Sequence[Channel], timeout: timedelta
) -> dict[Channel, dist.ProcessGroup]:
    """A group of two for each channel this process sends or receives on, connected; `channels` are all of them.

    NCCL runs what is in one communicator in order, so a receive that waits would hold up everything behind
    it: every channel gets its own. All processes make all groups in one order: torch names groups by counting
    them, and making a group among its members alone can hang (github.com/pytorch/pytorch/pull/189073).
    """
    made: dict[Channel, dist.ProcessGroup] = {}
    here = groups.coordinates
    probe = torch.zeros(1, device=groups.device)
    for other in range(layout.dp * layout.tp):
        for channel in channels:
            ends = [rank * layout.dp * layout.tp + other for rank in channel[:2]]
            group = dist.new_group(ends, timeout=timeout)
            if here.global_rank in ends:
                made[channel] = group
    with telling_lost_peers("the connection of pipeline ranks"):
        for group in made.values():  # the same order at both ends: nobody waits in a circle
            dist.all_reduce(probe, group=group)
    return made
