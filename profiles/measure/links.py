"""What transfers between processes cost: point to point, and all-reduce.

`measure_links` runs in every process of an initialised process group; `measure_links_here` starts processes of
its own on this machine for it. Payloads of several sizes are timed, and latency and bandwidth fitted to the
medians by least squares of the relative error, so that small messages count as much as large ones.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from profiles.cluster import Link
from profiles.errors import ProfileError
from profiles.facts import parse_facts
from profiles.measure.timing import Stopwatch
from profiles.model import MeasuredLinks

PAYLOAD_BYTES = (1 << 10, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
_WARMUPS = 3
_OUTPUT_OF_CHILD = 2000  # characters of a failed child's stderr that are shown


def measure_links(
    device: torch.device | str, *, payload_bytes: Sequence[int] = PAYLOAD_BYTES, repeats: int = 15
) -> MeasuredLinks:
    """Links of the initialised default process group, the same value in every process.

    Point to point is half a round trip between the first two processes while the others wait; all-reduce is over
    all of them, with the bandwidth per device that `Link.all_reduce_us` expects. ValueError in a group of one.
    """
    device = torch.device(device)
    num_processes = dist.get_world_size()
    if num_processes < 2:
        raise ValueError("a process group of one process has no links; start at least two")
    one_way_us, reduce_us = [], []
    for size in payload_bytes:
        payload = torch.zeros(max(size // 4, 1), dtype=torch.float32, device=device)
        one_way_us.append(_median_us(partial(_ping_pong, payload), device, repeats) / 2)
        reduce_us.append(_median_us(partial(dist.all_reduce, payload), device, repeats))
    latency_us, us_per_byte = _fit_line(payload_bytes, one_way_us)
    point_to_point = Link(latency_us=latency_us, bandwidth_bytes_per_s=1e6 / us_per_byte)
    # Link.all_reduce_us(b, n) = 2 (n − 1) (latency + b / n / bandwidth), matched term by term
    constant_us, us_per_byte = _fit_line(payload_bytes, reduce_us)
    steps = 2 * (num_processes - 1)
    all_reduce = Link(latency_us=constant_us / steps, bandwidth_bytes_per_s=1e6 * steps / num_processes / us_per_byte)
    how = (
        f"{num_processes} processes, {dist.get_backend()}, {payload_bytes[0]} to {payload_bytes[-1]} bytes, "
        f"median of {repeats} runs after {_WARMUPS} warm-ups, torch {torch.__version__}"
    )
    links = [MeasuredLinks(point_to_point=point_to_point, all_reduce=all_reduce, how=how)]
    dist.broadcast_object_list(links, src=0, device=device)
    return links[0]


def measure_links_here(num_processes: int = 2, backend: str = "gloo", *, timeout_s: float = 300) -> MeasuredLinks:
    """`measure_links` in `num_processes` fresh processes on this machine, under torchrun.

    "nccl" puts process i on CUDA device i, other backends all of them on the CPU. ProfileError if a process fails
    or `timeout_s` passes.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "links.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={num_processes}", "-m", "profiles.measure.links", backend, str(answer)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise ProfileError(
                f"measuring links between {num_processes} processes ({backend}) took over {timeout_s:g} s"
            ) from None
        if done.returncode != 0 or not answer.exists():
            raise ProfileError(
                f"measuring links between {num_processes} processes ({backend}) failed; profile without links, or "
                f"see what they said:\n{done.stderr[-_OUTPUT_OF_CHILD:]}"
            )
        return parse_facts(MeasuredLinks, answer.read_text(encoding="utf-8"), where="measured links")


def _ping_pong(payload: torch.Tensor) -> None:
    rank = dist.get_rank()
    if rank == 0:
        dist.send(payload, dst=1)
        dist.recv(payload, src=1)
    elif rank == 1:
        dist.recv(payload, src=0)
        dist.send(payload, dst=0)


def _median_us(transfer: Callable[[], object], device: torch.device, repeats: int) -> float:
    watch = Stopwatch(device)
    for run in range(_WARMUPS + repeats):
        dist.barrier()
        if run == _WARMUPS:
            watch.clear()
        with watch.span("transfer"):
            transfer()
    return statistics.median(watch.samples_us("transfer"))


def _fit_line(sizes: Sequence[int], times_us: Sequence[float]) -> tuple[float, float]:
    """(constant ≥ 0 in µs, slope > 0 in µs per byte) of least relative error."""
    times = np.asarray(times_us)
    columns = np.stack([np.ones(len(sizes)), np.asarray(sizes, dtype=float)], axis=1) / times[:, None]
    constant, slope = np.linalg.lstsq(columns, np.ones(len(sizes)))[0]
    if constant < 0:
        constant, slope = 0.0, float(np.sum(columns[:, 1]) / np.sum(columns[:, 1] ** 2))
    if slope <= 0:  # noise over tiny payloads: take the largest at face value
        constant, slope = 0.0, times[-1] / sizes[-1]
    return float(constant), float(slope)


def _main(backend: str, answer: str) -> None:
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group(backend, device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group(backend)
    try:
        links = measure_links(device)
        if dist.get_rank() == 0:
            links.save(answer)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
