"""The catalogue for people: what can be named on the command line."""

from rich.console import RenderableType

from planner.report.text import grid, render, size
from planner.schedule.families import FAMILIES
from profiles import catalog
from profiles.cluster import Cluster, DeviceSpec
from profiles.errors import CatalogError
from profiles.model import ModelSpec


def catalog_names() -> dict[str, list[str]]:
    """Every name, by kind."""
    return {
        "models": list(catalog.model_names()),
        "devices": list(catalog.device_names()),
        "clusters": list(catalog.cluster_names()),
        "families": [*FAMILIES, "auto"],
    }


def catalog_entry(name: str) -> ModelSpec | DeviceSpec | Cluster:
    """The entry of this name, of whichever kind; CatalogError if there is none."""
    if name in catalog.model_names():
        return catalog.model(name)
    if name in catalog.device_names():
        return catalog.device(name)
    if name in catalog.cluster_names():
        return catalog.cluster(name)
    raise CatalogError(f"{name!r} is no model, device or cluster of the catalogue; `pipewright catalog` lists them")


def render_catalog() -> str:
    """Tables of models, devices, clusters and families."""
    return render(_models(), _devices(), _clusters(), _families(), width=120)


def _models() -> RenderableType:
    rows = [
        [
            spec.name,
            f"{spec.num_parameters / 1e9:.2f} B",
            *(str(n) for n in (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads)),
            *(str(n) for n in (spec.vocab_size, spec.sequence_length)),
        ]
        for spec in map(catalog.model, catalog.model_names())
    ]
    columns = ("name", "parameters", "layers", "hidden", "heads", "kv heads", "vocabulary", "sequence")
    return grid("Models", columns, rows, left=("name",))


def _devices() -> RenderableType:
    rows = []
    for spec in map(catalog.device, catalog.device_names()):
        dtype = next(name for name in ("bfloat16", "float16", "float32") if name in spec.peak_flops)
        rows.append(
            [
                spec.name,
                size(spec.memory_bytes),
                f"{spec.memory_bandwidth_bytes_per_s / 1e9:.0f} GB/s",
                f"{spec.peak_flops[dtype] / 1e12:g} TFLOP/s {dtype}",
                f"{spec.scale_up.bandwidth_bytes_per_s / 1e9:g} GB/s",
                f"{spec.scale_out.bandwidth_bytes_per_s / 1e9:g} GB/s",
            ]
        )
    columns = ("name", "memory", "memory bandwidth", "peak", "in node", "between nodes")
    return grid("Devices", columns, rows, left=("name",))


def _clusters() -> RenderableType:
    rows = [
        [
            spec.name,
            str(spec.num_devices),
            str(spec.num_nodes),
            ", ".join(f"{g.num_nodes} × {g.devices_per_node} {g.device.name}" for g in spec.groups),
        ]
        for spec in map(catalog.cluster, catalog.cluster_names())
    ]
    columns = ("name", "devices", "nodes", "made of")
    return grid("Clusters (or write NODESxPER_NODExDEVICE)", columns, rows, left=("name", "made of"))


def _families() -> RenderableType:
    rows = [[family.name, family.title, family.source] for family in FAMILIES.values()]
    columns = ("name", "title", "source")
    return grid("Schedule families (or auto)", columns, rows, left=columns)
