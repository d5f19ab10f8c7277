"""Facts check themselves when they are made, and say in words what is wrong with a file."""

import json
import math
import os
import stat

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from profiles.cluster import Cluster, DeviceSpec, Link, NodeGroup
from profiles.errors import CatalogError, FileError, PipewrightError, ProfileError
from profiles.facts import canonical_json, check_writable, parse_facts, read_text, write_atomically
from profiles.model import (
    LatentAttention,
    LayerGroup,
    LayerProfile,
    MeasuredLinks,
    MixtureOfExperts,
    ModelProfile,
    ModelSpec,
    Origin,
    Variant,
)

LINK = Link(bandwidth_bytes_per_s=1e9, latency_us=10.0, efficiency=0.5)
SLOW = Link(bandwidth_bytes_per_s=1e8, latency_us=50.0)
SLOWEST = Link(bandwidth_bytes_per_s=1e7, latency_us=90.0)
DEVICE = DeviceSpec(
    name="widget",
    kind="cuda",
    memory_bytes=10**9,
    memory_bandwidth_bytes_per_s=1e12,
    peak_flops={"float32": 1e13},
    matmul_efficiency=0.8,
    memory_efficiency=0.9,
    kernel_launch_us=4.0,
    scale_up=LINK,
    scale_out=SLOW,
    devices_per_node=4,
    source="a test",
)
SPEC = ModelSpec(
    name="small",
    num_layers=2,
    hidden_size=10,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    ffn_size=40,
    gated_mlp=True,
    vocab_size=100,
    sequence_length=16,
    tied_embeddings=False,
    source="a test",
)
VARIANT = Variant(micro_batch_size=1, sequence_length=16, dtype="float32")
OTHER_VARIANT = Variant(micro_batch_size=2, sequence_length=16, dtype="float32", tp=2, recompute="full")


def layer_profile(variant=VARIANT, **changes):
    fields = {
        "forward_us": 10.0,
        "backward_input_us": 11.0,
        "backward_weight_us": 9.0,
        "fused_backward_us": 19.5,
        "parameter_bytes": 4000,
        "activation_bytes": 200,
        "weight_activation_bytes": 100,
        "output_bytes": 64,
    }
    return LayerProfile(variant=variant, **(fields | changes))


def layer_group(name="block", count=1, variants=(VARIANT,), **changes):
    profiles = tuple(layer_profile(variant, **changes) for variant in variants)
    return LayerGroup(name=name, kind="block", count=count, profiles=profiles)


def model_profile(*groups):
    origin = Origin(kind="analytic", device="widget", when="", how="by hand")
    return ModelProfile(model=SPEC, layers=groups or (layer_group(),), origin=origin)


def node_group(num_nodes, devices_per_node, intra_node=LINK):
    return NodeGroup(device=DEVICE, num_nodes=num_nodes, devices_per_node=devices_per_node, intra_node=intra_node)


# Files


FACTS = [
    LINK,
    DEVICE,
    SPEC,
    VARIANT,
    model_profile(layer_group("embedding"), layer_group("block", count=3)),
    Cluster(name="c", groups=(node_group(2, 4),), inter_node=SLOW, source="a test"),
    SPEC.model_copy(update={"moe": MixtureOfExperts(num_experts=4, experts_per_token=2, expert_ffn_size=7)}),
    MeasuredLinks(point_to_point=LINK, all_reduce=SLOW, how="by hand"),
]


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: type(facts).__name__)
def test_facts_come_back_from_a_file_as_they_went_in(facts, tmp_path):
    path = tmp_path / "facts.json"
    facts.save(path)
    assert type(facts).load(path) == facts
    assert type(facts).load(str(path)) == facts
    assert path.read_text().endswith("}\n")


@given(st.floats(min_value=1, max_value=1e30), st.floats(min_value=0, max_value=1e14))
@settings(derandomize=True, deadline=None)
def test_no_bit_of_a_number_is_lost_in_json(bandwidth, latency):
    link = Link(bandwidth_bytes_per_s=bandwidth, latency_us=latency)
    assert parse_facts(Link, link.model_dump_json(), where="it") == link


def test_versioned_files_carry_their_schema(tmp_path):
    model_profile().save(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["schema"] == "pipewright.profile/1"


def profile_text(**changes):
    data = json.loads(model_profile(layer_group("embedding"), layer_group("block", count=3)).model_dump_json())
    return data | changes


def with_layer(**changes):
    data = profile_text()
    data["layers"][1]["profiles"][0] |= changes
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            with_layer(forward_us=math.nan),
            r"\$\.layers\[1\]\.profiles\[0\]\.forward_us: .*finite.* \(given: nan\)",
        ),
        (with_layer(forward_us=math.inf), r"forward_us: .*finite.* \(given: inf\)"),
        (with_layer(forward_us=-1.5), r"forward_us: .*greater than or equal to 0 \(given: -1\.5\)"),
        (with_layer(activation_bytes=-1), r"activation_bytes: .*greater than or equal to 0 \(given: -1\)"),
        (with_layer(activation_bytes=1.5), r"activation_bytes: .*integer.* \(given: 1\.5\)"),
        (with_layer(activation_bytes="200"), r"activation_bytes: .*integer \(given: 200\)"),
        (
            with_layer(forward_ms=1.0),
            r"profiles\[0\]\.forward_ms: Extra inputs are not permitted \(given: 1\.0\)",
        ),
        (
            with_layer(variant=VARIANT.model_dump() | {"dtype": "int4"}),
            r"variant\.dtype: .*'float64' \(given: int4\)",
        ),
        (profile_text(schema="pipewright.profile/2"), r"\$\.schema: .*'pipewright\.profile/1'"),
        (profile_text(layers=[]), r"\$\.layers: .*at least 1 item"),
        ([], r"\$: .*\(given: \[\]\)"),
        (
            profile_text(layers=[{"name": "x", "kind": "block", "profiles": ["y" * 100]}]),
            r"\(given: y{57}\.\.\.\)",
        ),
    ],
)
def test_a_wrong_value_is_shown_with_its_place(data, message, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(data))
    with pytest.raises(FileError, match=r"profile\.json: .*" + message) as caught:
        ModelProfile.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_shown_without_a_value(tmp_path):
    data = profile_text()
    del data["origin"]
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(FileError, match=r"p\.json: \$\.origin: Field required$"):
        ModelProfile.load(tmp_path / "p.json")


def test_many_wrong_places_are_counted_and_five_are_shown():
    with pytest.raises(FileError) as caught:
        parse_facts(ModelSpec, "{}", where="it")
    required = sum(field.is_required() for field in ModelSpec.model_fields.values())
    assert str(caught.value).count("Field required") == 5
    assert str(caught.value).endswith(f"; and {required - 5} more")


def test_a_truncated_file_is_said_to_be_incomplete(tmp_path):
    path = tmp_path / "profile.json"
    text = model_profile().model_dump_json()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(FileError, match=r"profile\.json: not valid JSON \(.*\); is the file complete\?"):
        ModelProfile.load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileError, match=r"nowhere\.json: no such file"):
        read_text(tmp_path / "nowhere.json")
    with pytest.raises(FileError, match="cannot be read as UTF-8 text"):
        read_text(tmp_path)
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(FileError, match=r"latin: cannot be read as UTF-8 text"):
        Link.load(tmp_path / "latin")


def test_saving_replaces_the_whole_file_with_ordinary_permissions(tmp_path):
    path = tmp_path / "link.json"
    SLOW.save(path)
    LINK.save(path)
    assert Link.load(path) == LINK
    assert [path.name for path in tmp_path.iterdir()] == ["link.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "link.json"
    LINK.save(path)
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert Link.load(path) == LINK
    assert [path.name for path in tmp_path.iterdir()] == ["link.json"]


def test_a_save_to_where_nothing_can_be_is_a_file_error(tmp_path):
    with pytest.raises(FileError, match=r"cannot be written \(No such file or directory\)"):
        LINK.save(tmp_path / "no" / "where.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match=r"folder: is there and is no regular file"):
        LINK.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_save_through_a_link_writes_what_it_points_to_and_devices_are_left_alone(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    LINK.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert Link.load(tmp_path / "real.json") == LINK
    os.mkfifo(tmp_path / "pipe")
    for ask in (LINK.save, check_writable):
        with pytest.raises(FileError, match=r"pipe: is there and is no regular file"):
            ask(tmp_path / "pipe")


def test_what_cannot_be_written_is_known_before_the_work(tmp_path):
    check_writable(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileError, match=r"its folder .* does not exist"):
        check_writable(tmp_path / "no" / "plan.json")
    for name in ("x" * 250, "x" * 3000, "a\0b"):
        with pytest.raises(FileError, match="cannot be written"):
            check_writable(tmp_path / name)


def test_numbers_beyond_any_machine_are_refused():
    for changes in (
        {"bandwidth_bytes_per_s": 1e-300, "latency_us": 1.0},
        {"bandwidth_bytes_per_s": 1e9, "latency_us": 1e300},
    ):
        with pytest.raises(ValidationError):
            Link(**changes)


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    one = DEVICE.model_copy(update={"peak_flops": {"float32": 1.0, "float64": 2.0}})
    other = DEVICE.model_copy(update={"peak_flops": {"float64": 2.0, "float32": 1.0}})
    assert canonical_json(one) == canonical_json(other)
    assert (
        canonical_json(LINK)
        == '{"bandwidth_bytes_per_s":1000000000.0,"efficiency":0.5,"latency_us":10.0,"switched":true}'
    )


def test_facts_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        LINK.latency_us = 1.0


def test_user_errors_share_one_root():
    for kind in (FileError, CatalogError, ProfileError):
        assert issubclass(kind, PipewrightError)
        assert kind.exit_code == 2


# Shapes


def test_parameters_of_a_block_are_counted_by_hand():
    attention = 10 * 3 * (4 + 4 + 2 + 2)  # Q and O for 4 heads, K and V for 2
    ffn = 3 * 10 * 40
    assert SPEC.attention_parameters == attention
    assert SPEC.block_parameters(0) == attention + ffn
    assert SPEC.num_parameters == 2 * (attention + ffn) + 2 * 100 * 10
    assert SPEC.num_active_parameters == 2 * (attention + ffn) + 100 * 10
    assert SPEC.model_copy(update={"gated_mlp": False}).ffn_parameters(40) == 2 * 10 * 40


def test_tied_embeddings_are_counted_once():
    tied = ModelSpec(**(SPEC.model_dump() | {"tied_embeddings": True}))
    assert tied.num_parameters == SPEC.num_parameters - 100 * 10
    assert tied.num_active_parameters == SPEC.num_active_parameters


def test_experts_are_counted_in_full_and_per_token():
    moe = MixtureOfExperts(
        num_experts=8, experts_per_token=2, expert_ffn_size=5, num_shared_experts=1, num_dense_layers=1
    )
    spec = ModelSpec(**(SPEC.model_dump() | {"moe": moe}))
    expert, router = 3 * 10 * 5, 10 * 8
    assert spec.block_parameters(0) == SPEC.block_parameters(0)
    assert spec.block_parameters(1) == 360 + 9 * expert + router
    assert spec.block_parameters(1, active=True) == 360 + 3 * expert + router
    assert spec.block_parameters(0, active=True) == SPEC.block_parameters(0)


def test_latent_attention_is_counted_by_hand():
    latent = LatentAttention(q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=4)
    spec = ModelSpec(**(SPEC.model_dump() | {"latent_attention": latent}))
    query = 10 * 6 + 6 * 4 * (3 + 2)
    key_value = 10 * (5 + 2) + 5 * 4 * (3 + 4)
    output = 4 * 4 * 10
    assert spec.attention_parameters == query + key_value + output
    per_token = 2 * spec.num_active_parameters + 2 * 4 * 2 * 16 * (3 + 2 + 4)
    assert spec.step_flops(5, 16) == 3 * 5 * 16 * per_token


def test_step_flops_are_six_per_parameter_and_token_plus_attention():
    matrices = 6 * SPEC.num_active_parameters * 16
    attention = 3 * 2 * (2 * 2 * 16 * 16 * 4 * 3)  # 3 passes, 2 blocks, scores and values, 2 FLOPs each
    assert SPEC.step_flops(1, 16) == matrices + attention
    assert SPEC.step_flops(7, 16) == 7 * SPEC.step_flops(1, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"hidden_size": 0}, "greater than or equal to 1"),
        ({"hidden_size": 10.0}, "valid integer"),
        ({"norm": "batchnorm"}, "'layernorm' or 'rmsnorm'"),
        ({"colour": 1}, "Extra inputs are not permitted"),
        (
            {"moe": {"num_experts": 2, "experts_per_token": 3, "expert_ffn_size": 1}},
            "experts_per_token 3 exceeds num_experts 2",
        ),
        (
            {"moe": {"num_experts": 2, "experts_per_token": 1, "expert_ffn_size": 1, "num_dense_layers": 3}},
            r"moe\.num_dense_layers 3 exceeds num_layers 2",
        ),
    ],
)
def test_an_impossible_shape_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        ModelSpec(**(SPEC.model_dump() | changes))


# Profiles


def test_a_variant_names_what_differs_from_the_ordinary():
    assert str(VARIANT) == "micro_batch_size=1 sequence_length=16 float32"
    assert str(OTHER_VARIANT) == "micro_batch_size=2 sequence_length=16 float32 tp=2 recompute=full"


def test_layers_are_listed_one_by_one_in_model_order():
    profile = model_profile(layer_group("embedding", forward_us=1.0), layer_group("block", count=3))
    assert profile.num_layers == 4
    assert [layer.forward_us for layer in profile.at(VARIANT)] == [1.0, 10.0, 10.0, 10.0]


def test_each_variant_has_its_own_costs():
    both = LayerGroup(
        name="block", kind="block", profiles=(layer_profile(), layer_profile(OTHER_VARIANT, forward_us=77.0))
    )
    profile = model_profile(both)
    assert profile.variants == (VARIANT, OTHER_VARIANT)
    assert profile.at(OTHER_VARIANT)[0].forward_us == 77.0


def test_a_variant_that_was_not_profiled_is_refused_with_those_that_were():
    with pytest.raises(
        ProfileError,
        match=r"layer 'block' was not profiled at micro_batch_size=2 .* tp=2 recompute=full; profiled: "
        r"micro_batch_size=1 sequence_length=16 float32\. Profile it",
    ):
        model_profile().at(OTHER_VARIANT)


def test_layers_of_one_profile_hold_the_same_variants():
    with pytest.raises(ValidationError, match="layer 'b' and layer 'a' hold different variants"):
        model_profile(layer_group("a"), layer_group("b", variants=(OTHER_VARIANT,)))
    with pytest.raises(ValidationError, match="layer 'a' holds one variant twice"):
        model_profile(layer_group("a", variants=(VARIANT, VARIANT)))
    with pytest.raises(ValidationError, match="at least 1 item"):
        layer_group("a", variants=())


@pytest.mark.parametrize("field", ["forward_us", "fused_backward_us", "optimizer_us", "spread"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_times_are_finite_and_not_negative(field, value):
    with pytest.raises(ValidationError, match=field):
        layer_profile(**{field: value})


# Machines


def test_a_transfer_takes_latency_and_bytes_over_what_the_link_reaches():
    assert LINK.transfer_us(0) == 10.0
    assert LINK.transfer_us(1_000_000) == 10.0 + 2000.0  # 1 MB at half of 1 GB/s


def test_a_ring_moves_each_share_once_around_twice_for_an_all_reduce():
    assert LINK.reduce_scatter_us(4_000_000, 4) == 3 * (10.0 + 2000.0)
    assert LINK.all_reduce_us(4_000_000, 4) == 6 * (10.0 + 2000.0)
    assert LINK.all_reduce_us(4_000_000, 1) == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"bandwidth_bytes_per_s": 0.0},
        {"bandwidth_bytes_per_s": math.inf},
        {"latency_us": -1.0},
        {"efficiency": 0.0},
        {"efficiency": 1.01},
    ],
)
def test_an_impossible_link_is_refused(changes):
    with pytest.raises(ValidationError):
        Link(**(LINK.model_dump() | changes))


@pytest.mark.parametrize(
    "changes",
    [{"memory_bytes": -1}, {"peak_flops": {"float32": 0.0}}, {"kind": "tpu"}, {"devices_per_node": 0}],
)
def test_an_impossible_device_is_refused(changes):
    with pytest.raises(ValidationError):
        DeviceSpec(**(DEVICE.model_dump() | changes))


def uneven_cluster(**changes):
    fields = {
        "name": "uneven",
        "groups": (node_group(2, 3), node_group(1, 2, intra_node=SLOW), node_group(2, 1)),
        "inter_node": SLOW,
        "source": "a test",
    }
    return Cluster(**(fields | changes))


def test_devices_are_numbered_node_by_node_over_all_groups():
    cluster = uneven_cluster()
    assert (cluster.num_nodes, cluster.num_devices) == (5, 10)
    assert cluster.node_of_device == (0, 0, 0, 1, 1, 1, 2, 2, 3, 4)
    assert [cluster.group_of_node(node).devices_per_node for node in range(5)] == [3, 3, 2, 1, 1]
    with pytest.raises(IndexError, match="cluster 'uneven' has 5 nodes"):
        cluster.group_of_node(5)


def test_the_link_between_two_devices_is_that_of_their_common_level():
    cluster = uneven_cluster(nodes_per_pod=2, inter_pod=SLOWEST)
    assert cluster.link_between(0, 2) == LINK
    assert cluster.link_between(6, 7) == SLOW  # that node's own, slower link
    assert cluster.link_between(0, 3) == SLOW  # nodes 0 and 1, one pod
    assert cluster.link_between(0, 6) == SLOWEST  # nodes 0 and 2, two pods
    assert cluster.link_between(6, 0) == SLOWEST
    assert uneven_cluster().link_between(0, 9) == SLOW


def test_pods_and_the_link_between_them_go_together():
    for changes in ({"nodes_per_pod": 2}, {"inter_pod": SLOWEST}):
        with pytest.raises(ValidationError, match="give both or neither"):
            uneven_cluster(**changes)


def test_a_cluster_without_nodes_is_refused():
    with pytest.raises(ValidationError, match="at least 1 item"):
        uneven_cluster(groups=())
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        node_group(0, 8)


@pytest.mark.parametrize("changes", [{}, {"nodes_per_pod": 2, "inter_pod": SLOWEST}])
def test_the_graph_is_a_tree_whose_narrowest_edge_is_the_link_between_two_devices(changes):
    cluster = uneven_cluster(**changes)
    graph = cluster.graph()
    assert nx.is_tree(graph)
    assert sum(kind == "device" for kind, _ in graph) == cluster.num_devices
    assert sum(kind == "pod" for kind, _ in graph) == (3 if changes else 1)
    for a in range(cluster.num_devices):
        for b in range(a):
            path = nx.shortest_path(graph, ("device", a), ("device", b))
            links = [graph.edges[edge]["link"] for edge in nx.utils.pairwise(path)]
            narrowest = min(links, key=lambda link: link.bandwidth_bytes_per_s * link.efficiency)
            assert cluster.link_between(a, b) == narrowest
