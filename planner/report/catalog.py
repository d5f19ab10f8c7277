"""The catalogue for people: what can be named on the command line."""

from rich.table import Table

from planner.report.terminal import render, size
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
    return render(_models(), _devices(), _clusters(), _families())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _models() -> Table:
    table = _table("Models", "name", "parameters", "layers", "hidden", "heads", "kv heads", "vocabulary", "sequence")
    for spec in map(catalog.model, catalog.model_names()):
        table.add_row(
            spec.name,
            f"{spec.num_parameters / 1e9:.2f} B",
            str(spec.num_layers),
            str(spec.hidden_size),
            str(spec.num_heads),
            str(spec.num_kv_heads),
            str(spec.vocab_size),
            str(spec.sequence_length),
        )
    return table


def _devices() -> Table:
    table = _table("\nDevices", "name", "memory", "memory bandwidth", "peak", "in node", "between nodes")
    for spec in map(catalog.device, catalog.device_names()):
        dtype = next(name for name in ("bfloat16", "float16", "float32") if name in spec.peak_flops)
        table.add_row(
            spec.name,
            size(spec.memory_bytes),
            f"{spec.memory_bandwidth_bytes_per_s / 1e9:.0f} GB/s",
            f"{spec.peak_flops[dtype] / 1e12:g} TFLOP/s {dtype}",
            f"{spec.scale_up.bandwidth_bytes_per_s / 1e9:g} GB/s",
            f"{spec.scale_out.bandwidth_bytes_per_s / 1e9:g} GB/s",
        )
    return table


def _clusters() -> Table:
    table = _table("\nClusters (or write NODESxPER_NODExDEVICE)", "name", "devices", "nodes", "made of")
    for spec in map(catalog.cluster, catalog.cluster_names()):
        parts = ", ".join(f"{g.num_nodes} × {g.devices_per_node} {g.device.name}" for g in spec.groups)
        table.add_row(spec.name, str(spec.num_devices), str(spec.num_nodes), parts)
    return table


def _families() -> Table:
    table = _table("\nSchedule families (or auto)", "name", "title", "source")
    for family in FAMILIES.values():
        table.add_row(family.name, family.title, family.source)
    return table
