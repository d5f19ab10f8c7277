"""What splitting the backward costs: (B + W) / BW of a transformer block, in CPU time of one thread.

    python benchmarks/split_backward.py [--hidden-size 512] [--architecture gpt2] [--recompute]

B and W are those of `profiles.measure.split_backward`, which the profiler times and the executor runs; BW is plain
torch. CPU time of the thread, not wall time, so that other work on the machine counts little; the least of many
repetitions, in which the two ways take turns.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor, nn

from profiles.measure.models import Architecture, build_layers, model_spec_for
from profiles.measure.recompute import call_with_recompute
from profiles.measure.split_backward import WeightGradStore, deferring


@dataclass(frozen=True)
class SplitCost:
    """Least CPU times of one thread, in µs."""

    forward_us: float
    backward_input_us: float
    backward_weight_us: float
    fused_backward_us: float

    @property
    def ratio(self) -> float:
        """(B + W) / BW: 1 costs nothing."""
        return (self.backward_input_us + self.backward_weight_us) / self.fused_backward_us


def split_cost(
    module: nn.Module, layer_input: Tensor, *, repeats: int = 20, warmups: int = 3, recompute: bool = False
) -> SplitCost:
    """Time `module` on `layer_input` on this thread's CPU, with gradients there already, as in most microbatches.

    The number of torch's threads is set to one while it runs. ValueError when the input needs no gradient.
    """
    if not layer_input.requires_grad:
        raise ValueError("layer_input has requires_grad=False, but B is its gradient; call requires_grad_() on it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_once(module, layer_input, recompute) for _ in range(warmups + repeats)]
    finally:
        torch.set_num_threads(threads)
    return SplitCost(*(min(column) / 1e3 for column in zip(*rows[warmups:], strict=True)))


def _once(module: nn.Module, x: Tensor, recompute: bool) -> tuple[int, int, int, int]:
    """F, B, W and BW in ns."""
    dy = torch.ones_like(x)
    store = WeightGradStore()

    def forward(deferred: bool) -> Tensor:
        with deferring(store) if deferred else nullcontext():
            output: Tensor = call_with_recompute(module, x) if recompute else module(x)
        return output

    x.grad = None
    times_ns = [time.thread_time_ns()]
    output = forward(deferred=True)
    times_ns.append(time.thread_time_ns())
    torch.autograd.backward(output, dy)
    times_ns.append(time.thread_time_ns())
    store.run()
    times_ns.append(time.thread_time_ns())
    x.grad = None
    output = forward(deferred=False)
    start_ns = time.thread_time_ns()
    torch.autograd.backward(output, dy)
    fused_ns = time.thread_time_ns() - start_ns
    forward_ns, input_ns, weight_ns = (after - before for before, after in pairwise(times_ns))
    return forward_ns, input_ns, weight_ns, fused_ns


def block_cost(
    architecture: Architecture = "gpt2",
    *,
    hidden_size: int = 512,
    sequence_length: int = 128,
    micro_batch_size: int = 2,
    repeats: int = 20,
    recompute: bool = False,
) -> SplitCost:
    """`split_cost` of one block of a bundled model, with heads of 64, in float32."""
    spec = model_spec_for(
        architecture,
        num_layers=1,
        hidden_size=hidden_size,
        num_heads=max(1, hidden_size // 64),
        vocab_size=8,
        sequence_length=sequence_length,
    )
    (block,) = build_layers(architecture, spec, dtype=torch.float32, device="cpu", seed=0, only=range(1, 2))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(micro_batch_size, sequence_length, hidden_size, generator=generator).requires_grad_()
    return split_cost(block, x, repeats=repeats, recompute=recompute)


def main(
    architecture: Annotated[Literal["gpt2", "llama"], typer.Option(help="Whose block.")] = "gpt2",
    hidden_size: Annotated[int, typer.Option(min=64, help="Its width.")] = 512,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 128,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Of which the least counts.")] = 20,
    recompute: Annotated[bool, typer.Option(help="With the whole block recomputed.")] = False,
) -> None:
    """Print F, B, W, BW in ms and (B + W) / BW."""
    cost = block_cost(
        architecture,
        hidden_size=hidden_size,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        repeats=repeats,
        recompute=recompute,
    )
    times = {
        "F": cost.forward_us,
        "B": cost.backward_input_us,
        "W": cost.backward_weight_us,
        "BW": cost.fused_backward_us,
    }
    print(
        ", ".join(f"{name} {us / 1e3:.2f} ms" for name, us in times.items()), f"(B + W) / BW {cost.ratio:.3f}", sep=", "
    )


if __name__ == "__main__":
    typer.run(main)
