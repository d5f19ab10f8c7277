"""The catalogue says what was published, and a wrong name gets one helpful sentence."""

import json
import re

import pytest

from profiles.catalog import (
    cluster,
    cluster_names,
    device,
    device_names,
    load_cluster,
    load_model_spec,
    model,
    model_names,
)
from profiles.cluster import Cluster, Link
from profiles.errors import CatalogError, FileError
from profiles.model import ModelSpec

MIB = 2**20

PUBLISHED_SIZES = {  # name: parameters in billions, as its authors count them
    "bloom-176b": 176.2,
    "bloom-7b1": 7.07,
    "code-llama-34b": 33.7,
    "dbrx-132b": 132,
    "deepseek-67b": 67.4,
    "deepseek-moe-16b": 16.4,
    "deepseek-v2": 236,
    "deepseek-v3": 671,
    "falcon-180b": 180,
    "falcon-40b": 41.3,
    "falcon-7b": 7,
    "gemma-2b": 2.51,
    "gemma-7b": 8.54,
    "gpt-3-175b": 175,
    "gpt-neox-20b": 20.6,
    "gpt2": 0.124,
    "gpt2-large": 0.774,
    "gpt2-medium": 0.355,
    "gpt2-xl": 1.558,
    "grok-1-314b": 314,
    "kimi-k2": 1026,
    "llama-13b": 13.0,
    "llama-2-13b": 13.0,
    "llama-2-70b": 69.0,
    "llama-2-7b": 6.74,
    "llama-3-70b": 70.6,
    "llama-3-8b": 8.03,
    "llama-3.1-405b": 405.9,
    "llama-3.1-70b": 70.6,
    "llama-3.1-8b": 8.03,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "llama-33b": 32.5,
    "llama-65b": 65.2,
    "llama-7b": 6.7,
    "megatron-1.7b": 1.7,
    "megatron-145.6b": 145.6,
    "megatron-18.4b": 18.4,
    "megatron-1t": 1008,
    "megatron-22b": 22,
    "megatron-3.6b": 3.6,
    "megatron-310.1b": 310.1,
    "megatron-39.1b": 39.1,
    "megatron-7.5b": 7.5,
    "megatron-76.1b": 76.1,
    "mistral-7b": 7.24,
    "mistral-large-123b": 123,
    "mistral-nemo-12b": 12.2,
    "mixtral-8x22b": 141,
    "mixtral-8x7b": 46.7,
    "mpt-125m": 0.125,
    "mpt-13b": 13,
    "mpt-1b": 1.3,
    "mpt-30b": 30,
    "mpt-350m": 0.35,
    "mpt-760m": 0.76,
    "mpt-7b": 6.7,
    "mt-nlg-530b": 530,
    "nemotron-4-15b": 15.6,
    "nemotron-4-340b": 341,
    "olmoe-1b-7b": 6.92,
    "opt-13b": 13,
    "opt-175b": 175,
    "opt-30b": 30,
    "opt-6.7b": 6.7,
    "opt-66b": 66,
    "palm-540b": 540.35,
    "pythia-1.4b": 1.41,
    "pythia-12b": 11.8,
    "pythia-6.9b": 6.86,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen2-57b-a14b": 57.4,
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-14b": 14.7,
    "qwen2.5-32b": 32.5,
    "qwen2.5-3b": 3.09,
    "qwen2.5-72b": 72.7,
    "qwen2.5-7b": 7.61,
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.7,
    "qwen3-14b": 14.8,
    "qwen3-235b-a22b": 235,
    "qwen3-30b-a3b": 30.5,
    "qwen3-32b": 32.8,
    "qwen3-4b": 4.0,
    "qwen3-8b": 8.2,
    "yi-34b": 34.4,
    "zero-bubble-1.5b": 1.5,
    "zero-bubble-14.6b": 14.6,
    "zero-bubble-28.3b": 28.3,
    "zero-bubble-6.2b": 6.2,
}

ACTIVE_SIZES = {  # name: parameters one token meets, in billions, as published; some count the embedding too
    "deepseek-v2": 21,
    "deepseek-v3": 37,
    "kimi-k2": 32,
    "mixtral-8x22b": 39,
    "mixtral-8x7b": 12.9,
    "qwen2-57b-a14b": 14,
    "qwen3-235b-a22b": 22,
    "qwen3-30b-a3b": 3.3,
}

EXACT_SIZES = {  # name: (elements of all released tensors, elements of those that are norms or biases)
    "llama-2-7b": (6_738_415_616, 65 * 4096),
    "llama-3.1-8b": (8_030_261_248, 65 * 4096),
    "mistral-7b": (7_241_732_096, 65 * 4096),
    "mixtral-8x7b": (46_702_792_704, 65 * 4096),
    "qwen2.5-7b": (7_615_616_512, 57 * 3584 + 28 * (28 + 4 + 4) * 128),
}


def test_every_model_has_a_published_size_in_the_table_of_this_test():
    assert sorted(PUBLISHED_SIZES) == list(model_names())


@pytest.mark.parametrize("name", model_names())
def test_every_model_has_its_published_number_of_parameters(name):
    assert model(name).num_parameters == pytest.approx(PUBLISHED_SIZES[name] * 1e9, rel=0.04)


@pytest.mark.parametrize("name", ACTIVE_SIZES)
def test_a_mixture_has_its_published_number_of_active_parameters(name):
    assert model(name).num_active_parameters == pytest.approx(ACTIVE_SIZES[name] * 1e9, rel=0.08)


@pytest.mark.parametrize("name", EXACT_SIZES)
def test_parameters_of_a_released_model_are_counted_to_the_last_one(name):
    total, norms_and_biases = EXACT_SIZES[name]
    assert model(name).num_parameters == total - norms_and_biases


def test_published_flops_of_a_gpt3_step_are_reproduced():
    # Korthikanti et al., arXiv 2205.05198, appendix A: 72 B s l h² (1 + s/6h + V/12lh).
    s, h, num_layers, vocab, batch = 2048, 12288, 96, 51200, 1536
    want = 72 * batch * s * num_layers * h**2 * (1 + s / (6 * h) + vocab / (12 * num_layers * h))
    assert model("gpt-3-175b").step_flops(batch, s) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", model_names())
def test_every_model_is_named_as_its_file_and_says_its_source(name):
    spec = model(name)
    assert spec.name == name
    assert re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)*", name)
    assert len(spec.source) > 10


def test_biases_norms_and_positions_follow_the_family():
    def traits(name):
        spec = model(name)
        return spec.norm, spec.linear_bias, spec.qkv_bias, spec.learned_positions

    for name in ("gpt2", "gpt-3-175b", "megatron-1t", "mt-nlg-530b", "opt-66b"):
        assert traits(name) == ("layernorm", True, True, True), name
    assert traits("bloom-176b") == ("layernorm", True, True, False)
    assert traits("gpt-neox-20b") == ("layernorm", True, True, False)
    assert traits("mpt-7b") == ("layernorm", False, False, False)
    assert traits("nemotron-4-340b") == ("layernorm", False, False, False)
    for name in ("llama-3.1-8b", "mixtral-8x7b", "mistral-7b", "qwen3-8b", "deepseek-v3"):
        assert traits(name) == ("rmsnorm", False, False, False), name
    assert traits("qwen2.5-72b") == ("rmsnorm", False, True, False)


@pytest.mark.parametrize("name", device_names())
def test_every_device_is_plausible_and_says_its_source(name):
    spec = device(name)
    assert spec.name == name
    assert spec.peak_flops["float32"] > spec.peak_flops["float64"]
    assert 0.5 <= spec.matmul_efficiency <= 0.9
    assert spec.scale_up.bandwidth_bytes_per_s >= spec.scale_out.bandwidth_bytes_per_s
    assert spec.scale_up.latency_us <= 100
    for field in ("memory_bytes", "matmul_efficiency", "memory_efficiency", "scale_up", "scale_out"):
        assert field in spec.source or name == "cpu"


def test_the_devices_everyone_asks_for_are_there():
    wanted = "a100-40gb a100-80gb h100-sxm h200 b200 mi300x v100-32gb v100-16gb l40s rtx-4090 cpu"
    assert set(wanted.split()) <= set(device_names())
    assert "bfloat16" not in device("v100-32gb").peak_flops
    assert device("h100-sxm").peak_flops["bfloat16"] == 989e12


@pytest.mark.parametrize(
    ("name", "degree", "payload_mib", "measured_us"),
    [  # NCCL all-reduce in one node: vTrain's traces; H200's ring and B200 from ml-engineering
        ("a100-80gb", 8, 1, 92.8),
        ("a100-80gb", 8, 64, 579.9),
        ("a100-80gb", 8, 1024, 8193.0),
        ("v100-32gb", 8, 1, 79.9),
        ("v100-32gb", 8, 64, 911.3),
        ("v100-32gb", 8, 1024, 13969.0),
        ("h200", 8, 1, 46.0),
        ("h200", 8, 4096, 20446.0),
        ("b200", 8, 1, 50.9),
        ("b200", 8, 1024, 2597.7),
        ("mi300x", 8, 4096, 24020.0),
    ],
)
def test_the_link_in_a_node_reproduces_measured_all_reduces(name, degree, payload_mib, measured_us):
    predicted_us = device(name).scale_up.all_reduce_us(payload_mib * MIB, degree)
    assert predicted_us == pytest.approx(measured_us, rel=0.3 if payload_mib == 1 else 0.08)


@pytest.mark.parametrize("name", cluster_names())
def test_every_cluster_survives_a_round_trip_through_a_file(name, tmp_path):
    one = cluster(name)
    assert one.name == name
    one.save(tmp_path / "cluster.json")
    assert Cluster.load(tmp_path / "cluster.json") == one
    assert load_cluster(str(tmp_path / "cluster.json")) == one


def test_clusters_of_published_runs_have_their_sizes():
    sizes = {name: (cluster(name).num_nodes, cluster(name).num_devices) for name in cluster_names()}
    assert sizes["selene"] == (384, 3072)
    assert sizes["jean-zay-a100"] == (48, 384)
    assert sizes["gb200-nvl72"] == (1, 72)
    assert sizes["meta-llama3-h100"] == (2048, 16384)
    assert cluster("jean-zay-a100").inter_node.bandwidth_bytes_per_s == 4 * 100e9 / 8 / 8


def test_the_mixed_cluster_is_as_fast_between_nodes_as_its_slower_device():
    mixed = cluster("mixed-h100-a100")
    assert [group.device.name for group in mixed.groups] == ["h100-sxm", "a100-80gb"]
    assert mixed.inter_node == device("a100-80gb").scale_out
    assert mixed.num_devices == 64


@pytest.mark.parametrize(
    ("text", "num_nodes", "per_node", "device_name"),
    [
        ("8x8xh100-sxm", 8, 8, "h100-sxm"),
        ("1x2xcpu", 1, 2, "cpu"),
        ("2x8xmi300x", 2, 8, "mi300x"),
        ("1x4xrtx-4090", 1, 4, "rtx-4090"),
        ("128x8xa100-80gb", 128, 8, "a100-80gb"),
        ("01x3xl40s", 1, 3, "l40s"),
    ],
)
def test_a_shorthand_gives_nodes_of_a_device_with_the_links_of_that_device(text, num_nodes, per_node, device_name):
    one = load_cluster(text)
    spec = device(device_name)
    assert one.name == text
    assert (one.num_nodes, one.num_devices) == (num_nodes, num_nodes * per_node)
    assert one.groups[0].device == spec
    assert one.groups[0].intra_node == spec.scale_up
    assert one.inter_node == spec.scale_out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0x8xh100-sxm", r"cluster '0x8xh100-sxm' has 0 nodes; give at least 1"),
        ("8x0xh100-sxm", r"has 0 devices per node; give at least 1"),
        ("2000000x8xcpu", r"has 16000000 devices, the limit is 1000000"),
        ("8x8xh100", r"no device 'h100' in the catalogue; did you mean h100-96gb-500w or h100-pcie or h100-sxm\?"),
        ("8x8xH100-SXM", r"did you mean h100-sxm"),
        ("8x8xwidget", r"no device 'widget' in the catalogue; known: a100-40gb, .*v100-32gb"),
        ("8x8", r"not NODESxPER_NODExDEVICE \(like 8x8xh100-sxm\)"),
        ("-1x8xh100-sxm", r"no cluster '-1x8xh100-sxm'"),
        ("1.5x8xh100-sxm", r"no cluster '1.5x8xh100-sxm'"),
        ("８x8xcpu", r"no cluster"),
        ("seleen", r"no cluster 'seleen'.*did you mean selene\?"),
        ("h200", r"'h200' is a device; say how many: 1x8xh200"),
        ("", r"no cluster ''"),
        ("x" * 5000, r"no cluster 'xxx"),
        ("a\0b", r"no cluster"),
    ],
)
def test_a_wrong_cluster_gets_one_clear_message(text, message):
    with pytest.raises(CatalogError, match=message):
        load_cluster(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama-3.1-8", r"no model 'llama-3.1-8'.*did you mean llama-3.1-8b"),
        ("Llama_3.1_70B", r"did you mean llama-3.1-70b"),
        ("meta-llama/Llama-3.1-8B", r"did you mean llama-3.1-8b.*config.json"),
        ("zzz", r"no model 'zzz': not in the catalogue, and no such file; give a catalogue name"),
        ("", r"no model ''"),
        ("y" * 5000, r"no model 'yyy"),
    ],
)
def test_a_wrong_model_gets_close_names_and_what_else_is_possible(text, message):
    with pytest.raises(CatalogError, match=message):
        load_model_spec(text)


def test_names_cannot_leave_the_catalogue():
    for name in ("../models/gpt2", "../devices/cpu", "", "."):
        with pytest.raises(CatalogError, match="in the catalogue"):
            model(name)


@pytest.mark.parametrize("lookup", [model, device, cluster])
def test_an_unknown_name_is_refused_by_every_lookup(lookup):
    with pytest.raises(CatalogError, match=rf"no {lookup.__name__} 'nothing-like-it' in the catalogue"):
        lookup("nothing-like-it")


LLAMA_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


def test_a_config_is_read_from_its_path_and_from_its_directory(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    from_file = load_model_spec(str(folder / "config.json"))
    assert from_file == load_model_spec(str(folder))
    assert from_file.name == "my-model"
    assert str(folder) in from_file.source
    (tmp_path / "other.json").write_text(json.dumps(LLAMA_CONFIG))
    assert load_model_spec(str(tmp_path / "other.json")).name == "other"


def test_a_name_means_the_catalogue_even_when_a_directory_has_it(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    monkeypatch.chdir(tmp_path)
    assert load_model_spec("gpt2") == model("gpt2")
    assert load_model_spec("./gpt2").hidden_size == 64


def test_a_saved_shape_is_read_back(tmp_path):
    model("deepseek-v3").save(tmp_path / "shape.json")
    assert load_model_spec(str(tmp_path / "shape.json")) == model("deepseek-v3")
    assert ModelSpec.load(tmp_path / "shape.json") == model("deepseek-v3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"model_type": "llama", "hidden_size": 40',
            r"config\.json: not valid JSON \(.*\); is the file complete\?",
        ),
        ("[1, 2]", r"config\.json: holds a JSON list, not an object"),
        ("[" * 100_000, r"config\.json: not valid JSON"),
        (
            '{"schema": "pipewright.profile/1"}',
            r'config\.json: holds "pipewright.profile/1".*ModelProfile\.load',
        ),
        ('{"gated_mlp": true, "name": "x"}', r"config\.json: \$\.num_layers: Field required"),
        ("{}", r"config\.json: \$\.model_type: missing"),
        ('{"hidden_size": ' + "1" * 5000 + "}", r"config\.json: not valid JSON"),
    ],
)
def test_a_file_that_holds_no_model_is_named_in_the_message(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(FileError, match=message):
        load_model_spec(str(path))


def test_missing_paths_are_missing_files_and_not_unknown_names(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        load_model_spec(str(tmp_path / "config.json"))
    with pytest.raises(FileError, match="no such file"):
        load_cluster("nowhere.json")
    with pytest.raises(FileError, match=r"holds no config\.json"):
        load_model_spec(str(tmp_path))
    with pytest.raises(FileError, match="is a directory"):
        load_cluster(str(tmp_path))


def write_cluster(path, **changes):
    data = {
        "schema": "pipewright.cluster/1",
        "name": "two kinds",
        "groups": [
            {"device": "h100-sxm", "num_nodes": 2},
            {"device": "rtx-4090", "num_nodes": 1, "devices_per_node": 4},
        ],
        "source": "a test",
    } | changes
    path.write_text(json.dumps(data))
    return str(path)


def test_a_cluster_file_may_name_devices_and_leave_out_what_follows_from_them(tmp_path):
    one = load_cluster(write_cluster(tmp_path / "c.json"))
    assert one.num_devices == 20
    assert one.groups[0].intra_node == device("h100-sxm").scale_up
    assert one.groups[1].device == device("rtx-4090")
    assert one.inter_node == device("rtx-4090").scale_out
    own_link = {"bandwidth_bytes_per_s": 1e9, "latency_us": 7.0}
    one = load_cluster(write_cluster(tmp_path / "c.json", inter_node=own_link))
    assert one.inter_node == Link(bandwidth_bytes_per_s=1e9, latency_us=7.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"groups": [{"device": "h100", "num_nodes": 1}]},
            r"\$\.groups\[0\]\.device: no device 'h100'.*did you mean",
        ),
        (
            {"groups": [{"device": "cpu", "num_nodes": 0}]},
            r"\$\.groups\[0\]\.num_nodes: .*greater than or equal to 1",
        ),
        ({"groups": []}, r"\$\.groups: .*at least 1 item"),
        ({"groups": "cpu"}, r"\$\.groups: .*\(given: cpu\)"),
        ({"groups": [{"num_nodes": 1}]}, r"\$\.groups\[0\]\.device: Field required"),
        ({"colour": "red"}, r"\$\.colour: Extra inputs are not permitted \(given: red\)"),
        ({"schema": "pipewright.cluster/2"}, r"\$\.schema: .*pipewright\.cluster/1"),
        ({"nodes_per_pod": 2}, r"nodes_per_pod and inter_pod go together"),
        (
            {"inter_node": {"bandwidth_bytes_per_s": float("nan"), "latency_us": 1}},
            r"bandwidth_bytes_per_s: .*\(given: nan\)",
        ),
        ({"inter_node": {"bandwidth_bytes_per_s": -1, "latency_us": 1}}, r"greater than or equal to 1 \(given: -1"),
    ],
)
def test_a_wrong_cluster_file_is_named_with_the_place_that_is_wrong(changes, message, tmp_path):
    with pytest.raises(FileError, match=r"c\.json: " + f".*{message}"):
        load_cluster(write_cluster(tmp_path / "c.json", **changes))
