"""A layout in words: who does what, what every stage holds and recomputes, what is kept in which dtype."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

from planner.plans import Layout, Precision


def degrees_in_words(layout: Layout) -> str:
    """The product that makes up the devices, and what is spread over them besides."""
    factors = [("tensor", layout.tp), ("context", layout.cp), ("pipeline", layout.pp), ("data", layout.dp)]
    shown = [(name, degree) for name, degree in factors if degree > 1 or name != "context"]
    words = " × ".join(f"{name} {degree}" for name, degree in shown) + f" = {_count(layout.num_devices, 'device')}"
    if layout.ep > 1:
        words += f"; experts over {layout.ep} of the {layout.dp * layout.cp} data-parallel devices"
    if layout.tp > 1:
        words += "; with sequence parallelism" if layout.sequence_parallel else "; without sequence parallelism"
    return words


def batch_in_words(layout: Layout) -> str:
    """Microbatches and chunks."""
    chunks = f", {layout.virtual_stages} chunks per rank" if layout.virtual_stages > 1 else ""
    return f"{layout.num_microbatches} microbatches of {layout.micro_batch_size} per replica and step{chunks}"


def sharding_in_words(layout: Layout) -> str:
    """What ZeRO shards, over how many devices."""
    copies = layout.dp * layout.cp
    what = {
        0: "",
        1: "optimizer state",
        2: "optimizer state and gradients",
        3: "optimizer state, gradients and weights (FSDP)",
    }[layout.zero_stage]
    if not what:
        return f"none: model states whole on each of {_count(copies, 'data-parallel device')}" if copies > 1 else "none"
    if layout.shard_degree == copies:
        return f"ZeRO {layout.zero_stage}: {what}, over all {copies} data-parallel devices"
    return (
        f"ZeRO {layout.zero_stage}, hybrid: {what}, over {layout.shard_degree} devices each, in "
        f"{_count(copies // layout.shard_degree, 'replica')}"
    )


def layers_in_words(layout: Layout) -> str:
    """Layers of every stage, embedding and head counted."""
    runs = _runs([str(layers) for layers in layout.layers_per_stage])
    shown = "; ".join(f"{stages}: {layers}" for stages, layers in runs)
    return f"{shown} (embedding and head counted)"


def recompute_in_words(layout: Layout) -> str:
    """What the blocks of every stage recompute."""
    if layout.recompute != "mixed":
        return {
            "none": "none",
            "selective": "the core of attention, in every block",
            "full": "every block in full",
        }[layout.recompute]
    bounds = list(accumulate(layout.layers_per_stage, initial=0))
    last = bounds[-1] - 1
    texts = []
    for begin, end in pairwise(bounds):
        blocks = [layout.recompute_of_layer[layer] for layer in range(begin, end) if 0 < layer < last]
        texts.append(_recomputed(blocks))
    return "; ".join(f"{stages}: {text}" for stages, text in _runs(texts))


def precision_in_words(precision: Precision) -> str:
    """What is kept in which dtype."""
    master = "no master weights" if precision.master_weights is None else f"{precision.master_weights} master weights"
    return f"{precision.compute}; {precision.gradients} gradients, {master}, {precision.optimizer} moments"


def _recomputed(blocks: Sequence[str]) -> str:
    counts = Counter(blocks)
    full, core = counts["full"], counts["selective"]
    if not full + core:
        return "none"
    parts = [f"{number} {how}" for number, how in ((full, "in full"), (core, "selectively")) if number]
    if len(blocks) in (full, core):
        return f"{'its block' if len(blocks) == 1 else f'all {len(blocks)} blocks'} {parts[0].split(' ', 1)[1]}"
    return f"{' and '.join(parts)} of {_count(len(blocks), 'block')}"


def _runs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Neighbouring stages of which the same is said, as one entry: `stages 0–3`."""
    runs = []
    for text, group in groupby(enumerate(texts), key=lambda pair: pair[1]):
        numbers = [number for number, _ in group]
        if len(numbers) == len(texts):
            runs.append(("every stage" if len(texts) > 1 else "one stage", text))
        elif len(numbers) == 1:
            runs.append((f"stage {numbers[0]}", text))
        else:
            runs.append((f"stages {numbers[0]}–{numbers[-1]}", text))
    return runs


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
