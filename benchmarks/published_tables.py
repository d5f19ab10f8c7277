"""Small published tables: one layer with and without recomputation, and bubble rates of schedules with given times."""

from typing import Any, get_args

from published_fields import Row
from published_model import spec_of
from published_software import software_of
from rich.table import Table

from planner.schedule.families import FAMILIES
from planner.schedule.simulation import StageTimes, simulate
from profiles import catalog
from profiles.analytic import profile_model
from profiles.collectives import Fabric
from profiles.model import Recompute, Variant


def layer_errors(facts: dict[str, Any], known: dict[str, Row]) -> list[tuple[str, str, float, float]]:
    """(row, what, measured ms, predicted ms) of one layer of the 22B model: tp 8, microbatch 4, 2048 tokens, A100."""
    device, found = catalog.device("a100-80gb"), []
    fabric = Fabric((8, 1), (device.scale_up, device.scale_out))
    row = {"shape": "megatron-22b", "precision": "fp16", "tensor_parallel": 8}
    spec = spec_of(row, known, [])
    for entry in facts.get("layer_timings_22b", []):
        sequence, recompute = _layer_config(entry)
        variant = Variant(
            tp=8,
            micro_batch_size=4,
            sequence_length=2048,
            dtype="float16",
            recompute=recompute,
            sequence_parallel=sequence,
        )
        software = software_of(row, facts, "float16", sequence, recompute)
        profile = profile_model(spec, device, [variant], fabric=fabric, attention="unfused", software=software)
        block = profile.layers[1].at(variant)
        found.append((entry["id"], "forward", entry["forward_ms"], block.forward_us / 1e3))
        found.append((entry["id"], "backward", entry["backward_ms"], block.fused_backward_us / 1e3))
    return found


def _layer_config(entry: Row) -> tuple[bool, Recompute]:
    """(sequence parallelism, recompute): as fields, or from words like "selective recompute + sequence parallelism"."""
    words = str(entry.get("config", "")).lower().replace("no sequence parallelism", "").replace("no recompute", "")
    sequence = entry.get("sequence_parallel", "sequence parallelism" in words)
    for recompute in get_args(Recompute):
        if entry.get("recompute", "") == recompute or f"{recompute} recompute" in words:
            return bool(sequence), recompute
    return bool(sequence), "none"


def layer_table(facts: dict[str, Any], known: dict[str, Row]) -> Table | None:
    """That as a table; None where the file has no such rows."""
    errors = layer_errors(facts, known) if "layer_timings_22b" in facts else []
    return _table("one layer", [(f"{row} {what}", want, got, "ms") for row, what, want, got in errors])


FAMILY_OF = {
    "1f1b": ("1f1b", 1),
    "interleaved_1f1b": ("interleaved-1f1b", 3),
    "zb-h1": ("zb-h1", 1),
    "zb-h2": ("zb-h2", 1),
}


def schedule_errors(facts: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(row and family, printed bubble rate, simulated) of schedules of fixed form, from the printed times.

    The cost is the longest time any rank is busy from its first to its last action, the rate is over the printed work
    m (F + B + W). Schedules that a solver made are compared in `benchmarks/schedules.py`; interleaved 1F1B ran with
    stages of other sizes than the printed means, and is left out.
    """
    found = []
    for entry in facts.get("schedule_checks", []):
        p, m = entry["pipeline_parallel"], entry["num_microbatches"]
        f, b, w = (entry[f"{name}_ms"] * 1e3 for name in ("forward", "backward_input", "backward_weight"))
        stage = StageTimes(f, b, w, b + w, entry["p2p_ms"] * 1e3)
        for name, want in entry["bubble_rate"].items():
            if name not in FAMILY_OF or name == "interleaved_1f1b":
                continue
            family = FAMILIES[FAMILY_OF[name][0]]
            timeline = simulate(family.build(p, m, 1), [stage] * p)
            found.append((f"{entry['id']} {name}", want, timeline.bubble_rate_span))
    return found


def schedule_table(facts: dict[str, Any]) -> Table | None:
    """That as a table; the error is of the step time, (1 − printed rate) / (1 − simulated rate) − 1."""
    rows = schedule_errors(facts) if "schedule_checks" in facts else []
    if not rows:
        return None
    table = Table("schedule", "printed bubble rate", "simulated", "error of time")
    for name, want, got in rows:
        table.add_row(name, f"{want:.4f}", f"{got:.4f}", f"{100 * ((1 - want) / (1 - got) - 1):+.1f} %")
    worst = max(abs((1 - want) / (1 - got) - 1) for _, want, got in rows)
    table.add_section()
    table.add_row("worst", "", "", f"{100 * worst:.1f} %")
    return table


def _table(title: str, rows: list[tuple[str, float, float, str]]) -> Table | None:
    if not rows:
        return None
    table = Table(title, "measured", "predicted", "error")
    for name, want, got, unit in rows:
        table.add_row(name, f"{want:g} {unit}", f"{got:.2f} {unit}", f"{100 * (got / want - 1):+.1f} %")
    return table
