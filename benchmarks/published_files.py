"""Files of published runs: their rows, what was measured, and groups of rows that differ only in layout.

A file has `rows` (objects, or lists in the order of `columns`), or `groups` whose members name rows of a `file` that
lies beside it or beside the shipped ones.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from published_fields import Row, UnpricedError, stated
from published_model import spec_of

from profiles.errors import FileError

SHIPPED = Path(__file__).parent / "published"
LAYOUT = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "dp": "data_parallel", "mbs": "micro_batch"}
COLUMN_DEFAULTS = {  # what a table of bare columns leaves out; its file says all that is known
    "hardware": "a100_80gb_sxm",
    "devices_per_node": 8,
    "precision": "fp16",
    "recompute": "none",  # told from the time of a layer (docs/price_model.md)
    "optimizer_sharding": "none",
    "schedule": "1f1b",
    "vocab_size": 50257,
    "padded_vocabulary": False,
}


@dataclass(frozen=True)
class PublishedFile:
    """One file: facts about all of it, and its rows."""

    path: Path
    facts: dict[str, Any]
    rows: list[Row]


def read(path: Path) -> PublishedFile:
    """FileError when it is no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise FileError(f"{path}: holds a JSON {type(data).__name__}, not an object with rows or groups")
    rows = data.get("rows") or []
    if columns := data.get("columns"):
        rows = [
            _from_columns(path, columns, index, row) if isinstance(row, list) else row for index, row in enumerate(rows)
        ]
    facts = {key: value for key, value in data.items() if key != "rows"}
    return PublishedFile(path, facts, [row for row in rows if isinstance(row, dict)])


def _from_columns(path: Path, columns: list[str], index: int, values: list[Any]) -> Row:
    return {"id": f"{path.stem}-{index}", **COLUMN_DEFAULTS, **dict(zip(columns, values, strict=False))}


def shapes() -> dict[str, Row]:
    """Published model shapes by key."""
    return {row["id"]: row for row in read(SHIPPED / "model_shapes.json").rows}


def shipped() -> list[PublishedFile]:
    """The files that come with the benchmark, in alphabetical order."""
    return [read(path) for path in sorted(SHIPPED.glob("*.json")) if path.stem != "model_shapes"]


def measured_s(row: Row, known: dict[str, Row]) -> float | None:
    """Step time in s: as printed, as derived, or from a printed rate; None if there is none."""
    for value in (row.get("iteration_time_s"), (row.get("derived") or {}).get("iteration_time_s")):
        if value:
            return float(value)
    if row.get("iteration_time_ms"):
        return float(row["iteration_time_ms"]) / 1e3
    batch, devices = stated(row, "global_batch"), stated(row, "num_devices")
    if not batch or not devices:
        return None
    if row.get("samples_per_s"):
        return float(batch / row["samples_per_s"])
    if row.get("samples_per_s_per_device"):
        return float(batch / row["samples_per_s_per_device"] / devices)
    length = stated(row, "sequence_length") or (known.get(str(row.get("shape"))) or {}).get("sequence_length")
    if row.get("tokens_per_s_per_device") and length:
        return float(batch * length / row["tokens_per_s_per_device"] / devices)
    return _from_utilization(row, known, batch, devices)


def _from_utilization(row: Row, known: dict[str, Row], batch: int, devices: int) -> float | None:
    """From MFU, or from TFLOP/s that count what was recomputed."""
    peaks: dict[str, float] = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "v100": 125e12, "b200": 2250e12}
    family = str(row.get("hardware")).split("_")[0]
    try:
        spec = spec_of(row, known, [])
    except UnpricedError:
        return None
    flops = spec.step_flops(batch, spec.sequence_length) / devices
    if row.get("mfu_percent") and family in peaks:
        peak = peaks[family] * (2 if str(row.get("precision")).startswith("fp8") else 1)
        return float(flops / (row["mfu_percent"] / 100 * peak))
    if row.get("hardware_tflops_per_device"):
        again = 4 / 3 if str(row.get("recompute")).startswith("full") else 1.0
        return float(flops * again / (row["hardware_tflops_per_device"] * 1e12))
    return None


def is_compared(row: Row) -> bool:
    """Whether a row counts: its numbers agree with each other, and it is not there for context only."""
    return row.get("consistent") is not False and row.get("split") != "context"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in layout: (row, facts of its file, measured s; None: ran out of memory)."""

    name: str
    members: list[tuple[Row, dict[str, Any], float | None]]
    missing: list[str]


def groups_of(file: PublishedFile) -> list[Group]:
    """The groups of a file that lists them; rows are looked up beside it, then among the shipped."""
    found = []
    for group in file.facts.get("groups") or []:
        source = _beside(file.path, str(group.get("file", "")))
        rows = {row["id"]: row for row in source.rows} if source else {}
        facts = source.facts if source else {}
        members: list[tuple[Row, dict[str, Any], float | None]] = []
        missing: list[str] = []
        listed = [(*entry, None)[:3] for entry in group.get("order", [])]
        known = next((rows[entry[0]] for entry in listed if entry[0] in rows), None)
        for name, label, value in listed:
            row = rows.get(name) or _from_label(name, str(label), known)
            if row is None:
                missing.append(str(name))
            else:
                members.append((row, facts, float(value)))
        for name in group.get("out_of_memory", []):
            if name in rows:
                members.append((rows[name], facts, None))
            else:
                missing.append(str(name))
        found.append(Group(str(group.get("id")), members, missing))
    return found


def groups_of_columns(file: PublishedFile) -> list[Group]:
    """Rows of a table of columns with equal devices, batch, width and depth."""
    if "columns" not in file.facts:
        return []
    by_key: dict[tuple[Any, ...], list[tuple[Row, dict[str, Any], float | None]]] = {}
    for row in file.rows:
        key = tuple(row.get(name) for name in ("num_devices", "global_batch", "hidden_size", "num_layers"))
        by_key.setdefault(key, []).append((row, file.facts, measured_s(row, {})))
    return [
        Group(f"{key[0]} devices, batch {key[1]}, hidden {key[2]}, {key[3]} layers", members, [])
        for key, members in by_key.items()
        if len(members) > 1
    ]


def _from_label(name: str, label: str, known: Row | None) -> Row | None:
    """A row that is in no file, from another of its group and a label like "tp8 pp6 dp8 mbs2"."""
    degrees = {key: int(value) for key, value in re.findall(r"(tp|pp|dp|mbs)(\d+)", label)}
    if known is None or len(degrees) < len(LAYOUT):
        return None
    row = {key: value for key, value in known.items() if key not in ("virtual_stages", "num_microbatches")}
    row |= {"id": name, **{LAYOUT[key]: value for key, value in degrees.items()}}
    if "zero-3" in name or "zero3" in name:
        row["optimizer_sharding"] = "zero3"
    return row


def _beside(path: Path, name: str) -> PublishedFile | None:
    for folder in (path.parent, SHIPPED):
        if name and (folder / name).is_file():
            return read(folder / name)
    return None
