import datetime
import itertools

import pytest
import torch
from torch import nn

from profiles.errors import ProfileError
from profiles.measure import ProfiledLayer, profile_bundled, profile_layers
from profiles.measure.links import _fit_line, measure_links_here
from profiles.measure.models import model_spec_for
from profiles.measure.timing import Stopwatch, Timing
from profiles.model import ModelProfile, Variant

SIZES = {"num_layers": 4, "hidden_size": 16, "num_heads": 4, "vocab_size": 50, "sequence_length": 8}
QUICK = {"repeats": 2, "warmups": 1, "with_links": False, "num_threads": 1}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bundled_profile_has_every_variant_of_every_layer_and_survives_a_file(architecture, dtype, tmp_path):
    spec = model_spec_for(architecture, **SIZES)
    profile = profile_bundled(
        architecture, spec, dtype=dtype, micro_batch_sizes=(1, 3), recompute=("none", "full"), **QUICK
    )
    assert [(group.kind, group.count) for group in profile.layers] == [("embedding", 1), ("block", 4), ("head", 1)]
    assert profile.num_layers == 6
    assert set(profile.variants) == {
        Variant(micro_batch_size=size, sequence_length=8, dtype=dtype, recompute=mode)
        for size, mode in itertools.product((1, 3), ("none", "full"))
    }
    for variant in profile.variants:
        assert all(layer.forward_us > 0 for layer in profile.at(variant))
    assert profile.architecture == architecture
    assert profile.model == spec
    assert profile.origin.kind == "measured"
    assert profile.origin.engine == "deferred-linear"
    assert profile.origin.how == f"median of 2 runs after 1 warm-up, torch {torch.__version__}, 1 thread"
    assert datetime.datetime.fromisoformat(profile.origin.when).utcoffset() == datetime.timedelta(0)
    path = tmp_path / "profile.json"
    profile.save(path)
    assert ModelProfile.load(path) == profile


def test_bytes_of_a_bundled_profile_are_those_of_its_shape():
    spec = model_spec_for("gpt2", **SIZES)
    element = 4
    block = profile_bundled("gpt2", spec, micro_batch_sizes=(2,), **QUICK).layers[1].profiles[0]
    tokens = 2 * 8
    assert block.output_bytes == tokens * 16 * element
    assert block.parameter_bytes == (12 * 16 * 16 + 13 * 16) * element
    # inputs 1 + 1 + 1 + 4 and output gradients 3 + 1 + 4 + 1 of qkv, out, in, out: 16 hidden sizes a token
    assert block.weight_activation_bytes == tokens * 16 * 16 * element


def test_a_profile_says_whose_weight_gradients_w_computes():
    spec = model_spec_for("gpt2", **SIZES)
    embedding, block, head = (
        group.profiles[0] for group in profile_bundled("gpt2", spec, micro_batch_sizes=(1,), **QUICK).layers
    )
    norm_bytes = 2 * 16 * 4  # weight and bias in float32, within B
    assert embedding.deferred_parameter_bytes == embedding.parameter_bytes
    assert block.deferred_parameter_bytes == block.parameter_bytes - 2 * norm_bytes
    assert head.deferred_parameter_bytes == head.parameter_bytes - norm_bytes
    attention = nn.MultiheadAttention(16, 2)  # torch hides its products

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    fused = profile_layers(
        [ProfiledLayer("first", "block", nn.Linear(16, 16)), ProfiledLayer("hidden", "block", Attention())],
        lambda n: (torch.randn(n, 8, 16), torch.randn(n, 8, 16)),
        nn.functional.mse_loss,
        model=spec,
        micro_batch_sizes=(1,),
        **QUICK,
    )
    assert fused.layers[1].profiles[0].deferred_parameter_bytes == 0
    assert fused.layers[1].profiles[0].weight_activation_bytes == 0


def test_own_layers_are_profiled_too():
    spec = model_spec_for("gpt2", **SIZES)
    inputs, targets = torch.randn(4, 8, 16), torch.randn(4, 8, 16)
    layers = [
        ProfiledLayer("first", "block", nn.Linear(16, 16), count=2),
        ProfiledLayer("rest", "block", nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))),
    ]
    profile = profile_layers(
        layers,
        lambda n: (inputs[:n], targets[:n]),
        nn.functional.mse_loss,
        model=spec,
        micro_batch_sizes=(1, 2),
        **QUICK,
    )
    assert profile.architecture is None
    assert profile.num_layers == 3
    assert len(profile.variants) == 2


def test_threads_are_set_for_the_measurement_and_given_back():
    before = torch.get_num_threads()
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return super().forward(x)

    profile_layers(
        [ProfiledLayer("only", "block", Spy(4, 4))],
        lambda n: (torch.ones(n, 4), torch.ones(n, 4)),
        nn.functional.mse_loss,
        model=model_spec_for("gpt2", **SIZES),
        micro_batch_sizes=(1,),
        **QUICK,
    )
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("meta", "device 'meta' cannot be measured; choose cpu or cuda"),
        ("cuda:99", r"device 'cuda:99' is not there: torch .* sees \d+ CUDA devices; choose cpu"),
        ("gpu", "device 'gpu' is none that torch knows; choose cpu or cuda"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, message):
    with pytest.raises(ProfileError, match=message):
        profile_bundled("gpt2", model_spec_for("gpt2", **SIZES), device=device, **QUICK)


def test_median_and_quartile_spread_of_a_few_numbers():
    assert Timing.of([5.0]) == Timing(5.0, 0.0)
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Timing(3.0, (4.0 - 2.0) / 3.0)
    assert Timing.of([0.0, 0.0]) == Timing(0.0, 0.0)


def test_a_stopwatch_keeps_spans_by_name_until_cleared():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(3):
        with watch.span("a"):
            torch.ones(10).sum()
    assert len(watch.samples_us("a")) == 3
    assert all(sample > 0 for sample in watch.samples_us("a"))
    assert watch.samples_us("b") == []
    watch.clear()
    assert watch.samples_us("a") == []


def test_latency_and_bandwidth_are_fitted_exactly_to_a_line_and_stay_positive_off_it():
    sizes = (1_000, 100_000, 10_000_000)
    constant, slope = _fit_line(sizes, [20 + size * 1e-3 for size in sizes])
    assert constant == pytest.approx(20)
    assert slope == pytest.approx(1e-3)
    assert _fit_line(sizes, [0.5, 100, 10_000])[0] >= 0
    constant, slope = _fit_line(sizes, [30.0, 20.0, 10.0])
    assert (constant, slope) == (0.0, 1e-6)


def test_links_between_two_processes_of_this_machine():
    links = measure_links_here(2, "gloo")
    for link in (links.point_to_point, links.all_reduce):
        assert link.bandwidth_bytes_per_s > 1e6
        assert link.latency_us < 1e6
    assert links.how.startswith("2 processes, gloo, 1024 to 16777216 bytes, median of 15 runs after 3 warm-ups, torch")


def test_links_that_fail_say_why():
    with pytest.raises(ProfileError, match=r"between 2 processes \(carrier-pigeon\) failed; profile without links"):
        measure_links_here(2, "carrier-pigeon")
    with pytest.raises(ProfileError, match=r"between 2 processes \(gloo\) took over 0.01 s"):
        measure_links_here(2, "gloo", timeout_s=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bundled_profile_on_cuda(dtype):
    spec = model_spec_for("llama", **SIZES)
    profile = profile_bundled(
        "llama", spec, device="cuda", dtype=dtype, micro_batch_sizes=(1, 2), recompute=("none", "full"), **QUICK
    )
    assert profile.origin.device == torch.cuda.get_device_name(0)
    assert all(layer.forward_us > 0 for variant in profile.variants for layer in profile.at(variant))
