"""Processes that keep the other cores busy while layers are timed, as the other ranks of a run on this machine do.

Processes of one machine share its memory bandwidth, its last cache and its clock: an action takes longer beside
others than alone, and most so under schedules that leave few bubbles. A profile that was measured alone predicts such
steps too short.

Started as python -m profiles.measure.neighbours REQUEST, where a process says "ready" and works until its input ends.
"""

import select
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from profiles.errors import ProfileError
from profiles.facts import Count, Facts
from profiles.measure.layers import ProfiledLayer, measure_model
from profiles.measure.models import Architecture, build_layers, loss_fn, synthetic_batch
from profiles.model import ModelSpec, Variant


class NeighbourRequest(Facts):
    """What a neighbour runs: F, B, W, BW and the optimizer step of a bundled model's layers, over and over."""

    architecture: Architecture
    model: ModelSpec
    variant: Variant
    num_threads: Count


@contextmanager
def neighbours(count: int, request: NeighbourRequest) -> Iterator[None]:
    """Keep `count` processes busy on the CPU during the block. ProfileError if one cannot work."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(_neighbour(request))
        yield


@contextmanager
def _neighbour(request: NeighbourRequest) -> Iterator[None]:
    command = [sys.executable, "-m", "profiles.measure.neighbours", request.model_dump_json()]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise ProfileError(
                    "a process that was to work beside the measurement ended before it began; profile with 1 process"
                )
            yield
        finally:
            process.kill()


def _main(text: str) -> None:
    request = NeighbourRequest.model_validate_json(text)
    torch.set_num_threads(request.num_threads)
    spec = request.model
    dtype: torch.dtype = getattr(torch, request.variant.dtype)
    layers = [
        ProfiledLayer(str(index), "block", module)
        for index in (0, 1, spec.num_layers + 1)
        for module in build_layers(
            request.architecture, spec, dtype=dtype, device="cpu", seed=0, only=range(index, index + 1)
        )
    ]
    told = False
    while True:
        measure_model(
            layers,
            lambda n: synthetic_batch(spec, n, seed=0, step=0),
            loss_fn,
            variants=(request.variant,),
            device=torch.device("cpu"),
            warmups=0,
            repeats=1 if not told else 20,
            on_progress=_end_with_input,
        )
        if not told:
            print("ready", flush=True)
            told = True


def _end_with_input(*_: object) -> None:
    if select.select([sys.stdin], [], [], 0)[0] and not sys.stdin.read(1):
        sys.exit()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _main(sys.argv[1])
