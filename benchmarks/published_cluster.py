"""The machines of a published row: its device from the catalogue, and the network that its file describes in words."""

import re

from published_fields import Row, UnpricedError, stated, text_of

from profiles import catalog
from profiles.cluster import Cluster, DeviceSpec, Link, NodeGroup
from profiles.errors import CatalogError

DEVICES = {  # keys of published files: (device of the catalogue)
    "v100_16gb_sxm2": "v100-16gb",
    "v100_32gb_sxm2": "v100-32gb",
    "a100_40gb_sxm": "a100-40gb",
    "a100_80gb_sxm": "a100-80gb",
    "a100_80gb_pcie": "a100-80gb-pcie",
    "h100_80gb_sxm": "h100-sxm",
    "h100_80gb_pcie": "h100-pcie",
    "h100_96gb_500w": "h100-96gb-500w",
    "h800_80gb_sxm": "h800",
    "h200_141gb_sxm": "h200",
    "gh200_96gb": "gh200",
    "b200_sxm": "b200",
    "b300_sxm": "b300",
    "gb200": "gb200",
    "mi300x": "mi300x",
    "mi325x": "mi325x",
    "mi355x": "mi355x",
    "l40s": "l40s",
    "rtx_4090": "rtx-4090",
}

OMNI_PATH_EFFICIENCY = 0.27  # all-reduce over Omni-Path at Jean Zay: 23 to 55 Gb/s of 400 by algorithm bandwidth
ISLAND_LINK = Link(bandwidth_bytes_per_s=31e9, latency_us=10, efficiency=0.8)  # PCIe 4 x16

PER_NODE = re.compile(r"(?:(\d+) x (?:[a-z-]+ )?)?(\d+) gb/s(?: [a-z]+)?(?: per node)?")
PER_DEVICE = re.compile(r"(\d+) gb/s(?: [a-z]+)? per gpu")


def device_of(row: Row) -> DeviceSpec:
    """The device of the catalogue."""
    key = str(row.get("hardware") or "")
    name = DEVICES.get(key, key.replace("_", "-"))
    try:
        return catalog.device(name)
    except CatalogError as error:
        raise UnpricedError(f"hardware {key!r} is not in the catalogue of devices") from error


def cluster_of(row: Row, facts: Row, device: DeviceSpec, num_devices: int, filled: list[str]) -> Cluster:
    """Nodes as stated; the network rate from the file's `hardware` text, else what the device's nodes usually have.

    DeepSpeed's ZeRO 3 of 2021 gathered tensor by tensor over one ring, which one network card of a node serves: its
    runs in arXiv 2104.04473, table 2, moved 16 to 18 GB/s whatever their size. At Jean Zay, which its Omni-Path network
    tells, eight A100 are two NVLink islands of four, joined over PCIe.
    """
    usual = int(stated(row, "devices_per_node") or device.devices_per_node)
    per_node = min(usual, num_devices)
    nodes = -(-num_devices // per_node)
    text = str(row.get("network") or facts.get("hardware") or "").lower()
    gbit, scale_out = _gbit_per_device(text, device, usual), device.scale_out
    if gbit:
        scale_out = scale_out.model_copy(update={"bandwidth_bytes_per_s": gbit * 1e9 / 8})
    elif nodes > 1:
        filled.append(f"network {scale_out.bandwidth_bytes_per_s * 8 / 1e9:.0f} Gb/s per device")
    source = str(facts.get("source") or "the row")
    if "zero3" in text_of(row, "optimizer_sharding") and str(row.get("precision")) == "fp16":
        narrow = scale_out.bandwidth_bytes_per_s / per_node
        scale_out = scale_out.model_copy(update={"bandwidth_bytes_per_s": narrow})
    if "omni-path" in text:
        scale_out = scale_out.model_copy(update={"efficiency": OMNI_PATH_EFFICIENCY})
        if device.name.startswith("a100") and per_node == 8:
            group = NodeGroup(device=device, num_nodes=2 * nodes, devices_per_node=4, intra_node=device.scale_up)
            return Cluster(
                name="as published",
                groups=(group,),
                inter_node=ISLAND_LINK,
                nodes_per_pod=2,
                inter_pod=scale_out,
                source=source,
            )
    group = NodeGroup(device=device, num_nodes=nodes, devices_per_node=per_node, intra_node=device.scale_up)
    return Cluster(name="as published", groups=(group,), inter_node=scale_out, source=source)


def _gbit_per_device(text: str, device: DeviceSpec, per_node: int) -> float | None:
    """Gb/s per device from words like "8 x HDR 200 Gb/s" or "400 Gb/s per node", of the part about this device."""
    family = device.name.split("-")[0]
    parts = [part for part in text.split(";") if family in part] or [text]
    for part in parts:
        if found := PER_DEVICE.search(part):
            return float(found[1])
        for found in PER_NODE.finditer(part):
            named = re.search(r"^ for (\w+)", part[found.end() :])
            if found[0].endswith("gb/s") and not found[1] and " per " not in part[found.start() : found.end() + 12]:
                continue
            if not named or named[1] == family:
                return float(found[1] or 1) * float(found[2]) / per_node
    return None
