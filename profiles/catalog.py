"""What a name on the command line stands for: a shipped fact, a shorthand, or a file.

The facts themselves are JSON under `catalog/{models,devices,clusters}`, one file per name, each with its
source. A name always means the catalogue; a file of the same name is reached as `./name`.

A cluster file may be shorter than a saved `Cluster`: `device` may be a catalogue name, and then
`devices_per_node`, `intra_node` and the cluster's `inter_node` may be left out and are taken from the device.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path

from profiles.cluster import MAX_DEVICES, Cluster, DeviceSpec, NodeGroup
from profiles.errors import CatalogError, FileError
from profiles.facts import parse_facts, read_text
from profiles.huggingface import model_spec_from_config
from profiles.model import ModelSpec

_SHORTHAND = re.compile(r"(\d{1,18})x(\d{1,18})x(.+)", re.ASCII)
_SHORTHAND_HELP = "NODESxPER_NODExDEVICE (like 8x8xh100-sxm)"


def model_names() -> tuple[str, ...]:
    """Every model of the catalogue, sorted."""
    return _names("models")


def device_names() -> tuple[str, ...]:
    """Every device of the catalogue, sorted."""
    return _names("devices")


def cluster_names() -> tuple[str, ...]:
    """Every cluster of the catalogue, sorted."""
    return _names("clusters")


@cache
def model(name: str) -> ModelSpec:
    """The catalogue's model of this name; CatalogError with the closest names when there is none."""
    return parse_facts(ModelSpec, _shipped("models", name), where=f"catalogue model {name!r}")


@cache
def device(name: str) -> DeviceSpec:
    """The catalogue's device of this name; CatalogError with the closest names when there is none."""
    return parse_facts(DeviceSpec, _shipped("devices", name), where=f"catalogue device {name!r}")


@cache
def cluster(name: str) -> Cluster:
    """The catalogue's cluster of this name; CatalogError with the closest names when there is none."""
    return _parse_cluster(_shipped("clusters", name), where=f"catalogue cluster {name!r}")


def load_model_spec(text: str) -> ModelSpec:
    """The model that `text` names: a catalogue name, a file, or a directory that holds a `config.json`.

    A file is a Hugging Face `config.json` or, for shapes that have none, a saved `ModelSpec`. A profile is
    more than a model: it is refused here, `ModelProfile.load` reads it. CatalogError when `text` is neither
    name nor path, FileError when the file does not hold a model.
    """
    if text in model_names():
        return model(text)
    path = Path(text)
    if text and _is_directory(path):
        path /= "config.json"
        if not _is_file(path):
            raise FileError(f"{text}: this directory holds no config.json")
    if _is_file(path) or _looks_like_path(text):
        return _read_model(path)
    raise CatalogError(
        f"no model {text!r}: not in the catalogue, and no such file; {_did_you_mean(text, model_names())}"
        "give a catalogue name (`pipewright catalog` lists them), the path of a Hugging Face config.json, "
        "or a directory that holds one"
    )


def load_cluster(text: str) -> Cluster:
    """The cluster that `text` names: a catalogue name, NODESxPER_NODExDEVICE, or a cluster file.

    CatalogError when it is none of these or has no devices, FileError when the file does not hold a cluster.
    """
    if text in cluster_names():
        return cluster(text)
    path = Path(text)
    if text and _is_directory(path):
        raise FileError(f"{text}: is a directory; give the path of a cluster file")
    if _is_file(path) or _looks_like_path(text):
        return _parse_cluster(read_text(path), where=str(path))
    if match := _SHORTHAND.fullmatch(text):
        return _from_shorthand(text, int(match[1]), int(match[2]), match[3])
    if text in device_names():
        raise CatalogError(f"{text!r} is a device; say how many: 1x{device(text).devices_per_node}x{text}")
    raise CatalogError(
        f"no cluster {text!r}: not in the catalogue, not {_SHORTHAND_HELP}, and no such file; "
        f"{_did_you_mean(text, cluster_names())}`pipewright catalog` lists clusters and devices"
    )


def _from_shorthand(text: str, num_nodes: int, devices_per_node: int, device_name: str) -> Cluster:
    for count, what in ((num_nodes, "nodes"), (devices_per_node, "devices per node")):
        if count == 0:
            raise CatalogError(f"cluster {text!r} has 0 {what}; give at least 1: {_SHORTHAND_HELP}")
    num_devices = num_nodes * devices_per_node
    if num_devices > MAX_DEVICES:
        raise CatalogError(f"cluster {text!r} has {num_devices} devices, the limit is {MAX_DEVICES}; give fewer")
    try:
        spec = device(device_name)
    except CatalogError as error:
        raise CatalogError(f"cluster {text!r}: {error}") from None
    group = NodeGroup(device=spec, num_nodes=num_nodes, devices_per_node=devices_per_node, intra_node=spec.scale_up)
    return Cluster(name=text, groups=(group,), inter_node=spec.scale_out, source=spec.source)


def _parse_cluster(text: str, where: str) -> Cluster:
    """A `Cluster` from JSON text, after names of devices and what follows from them are filled in."""
    data = _json_object(text, where)
    groups = data.get("groups")
    groups = groups if isinstance(groups, list) else []
    used: list[DeviceSpec] = []
    for index, group in enumerate(groups):
        if isinstance(group, dict) and isinstance(group.get("device"), str):
            try:
                spec = device(group["device"])
            except CatalogError as error:
                raise FileError(f"{where}: $.groups[{index}].device: {error}") from None
            used.append(spec)
            group["device"] = spec.model_dump()
            group.setdefault("devices_per_node", spec.devices_per_node)
            group.setdefault("intra_node", spec.scale_up.model_dump())
    if used and len(used) == len(groups or ()):
        slowest = min((spec.scale_out for spec in used), key=lambda link: link.bandwidth_bytes_per_s * link.efficiency)
        data.setdefault("inter_node", slowest.model_dump())
    return parse_facts(Cluster, json.dumps(data), where=where)


def _read_model(path: Path) -> ModelSpec:
    where = str(path)
    text = read_text(path)
    data = _json_object(text, where)
    if "schema" in data:
        raise FileError(
            f"{where}: holds {_quote(data['schema'])}, not a model's config.json; a profile is read by "
            "ModelProfile.load, a cluster is given as --cluster"
        )
    if "model_type" not in data and "gated_mlp" in data:
        return parse_facts(ModelSpec, text, where=where)
    name = path.absolute().parent.name if path.name == "config.json" else path.stem
    return model_spec_from_config(data, name=name or "model", where=where)


def _json_object(text: str, where: str) -> dict[str, object]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: not valid JSON ({error}); is the file complete?") from None
    if not isinstance(data, dict):
        raise FileError(f"{where}: holds a JSON {type(data).__name__}, not an object")
    return data


@cache
def _names(kind: str) -> tuple[str, ...]:
    folder = files("profiles") / "catalog" / kind
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def _shipped(kind: str, name: str) -> str:
    if name not in _names(kind):
        known = _names(kind)
        listed = f"known: {', '.join(known)}" if len(known) <= 30 else "`pipewright catalog` lists them"
        raise CatalogError(
            f"no {kind.removesuffix('s')} {name!r} in the catalogue; {_did_you_mean(name, known)}{listed}"
        )
    return (files("profiles") / "catalog" / kind / f"{name}.json").read_text(encoding="utf-8")


def _did_you_mean(text: str, known: Iterable[str]) -> str:
    plain = text.lower().replace("_", "-").replace(" ", "-").rsplit("/", 1)[-1]
    known = tuple(known)
    close = [name for name in known if plain and name.startswith(plain)][:3]
    close = close or difflib.get_close_matches(plain, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _looks_like_path(text: str) -> bool:
    return text.endswith(".json") or text.startswith((".", "/", "~"))


def _is_directory(path: Path) -> bool:
    return _ask(path.is_dir)


def _is_file(path: Path) -> bool:
    return _ask(path.exists) and not _ask(path.is_dir)


def _ask(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except (OSError, ValueError):  # a name too long for a path, or with a NUL in it, is no path
        return False


def _quote(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else "another kind of document"
