import math

import pytest
import torch

from profiles.errors import ProfileError
from profiles.measure.models import build_layers, loss_fn, model_spec_for, synthetic_batch
from profiles.model import MixtureOfExperts


def tiny(architecture, **changes):
    grouped = {"num_kv_heads": 2} if architecture == "llama" else {}
    sizes = {"num_layers": 3, "hidden_size": 16, "num_heads": 4, "vocab_size": 50, "sequence_length": 8}
    return model_spec_for(architecture, **{**sizes, **grouped, **changes})


def build(architecture, spec, **options):
    return build_layers(architecture, spec, **{"dtype": torch.float32, "device": "cpu", "seed": 1, **options})


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_part_has_the_weights_it_has_in_the_whole(architecture):
    spec = tiny(architecture)
    whole = build(architecture, spec)
    part = build(architecture, spec, only=range(2, 5))
    for mine, same in zip(part, whole[2:], strict=True):
        assert mine.state_dict().keys() == same.state_dict().keys()
        assert all(
            torch.equal(a, b) for a, b in zip(mine.state_dict().values(), same.state_dict().values(), strict=True)
        )
        for (name, a), (_, b) in zip(mine.named_buffers(), same.named_buffers(), strict=True):
            assert torch.equal(a, b), name


def test_layers_seeds_and_dtypes_draw_as_they_should():
    spec = tiny("gpt2")
    torch.manual_seed(0)
    _, first, second, *_ = build("gpt2", spec)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(0).get_state())  # the global generator is untouched
    _, other, *_ = build("gpt2", spec, seed=2)
    _, wide, *_ = build("gpt2", spec, dtype=torch.float64)
    assert not torch.equal(first.qkv.weight, second.qkv.weight)
    assert not torch.equal(first.qkv.weight, other.qkv.weight)
    assert torch.equal(first.qkv.weight.double(), wide.qkv.weight)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_fresh_model_guesses_like_chance_and_learns(architecture):
    spec = tiny(architecture)
    layers = build(architecture, spec)
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer.parameters()], lr=1e-2)
    losses = []
    for step in range(12):
        x, targets = synthetic_batch(spec, 4, seed=0, step=step)
        for layer in layers:
            x = layer(x)
        assert x.shape == (4, 8, 50)
        loss = loss_fn(x, targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(50), rel=0.02)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_later_tokens_change_no_earlier_logits(architecture):
    spec = tiny(architecture)
    layers = build(architecture, spec, dtype=torch.float64)
    tokens, _ = synthetic_batch(spec, 2, seed=0, step=0)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    logits = []
    for x in (tokens, changed):
        for layer in layers:
            x = layer(x)
        logits.append(x)
    torch.testing.assert_close(logits[0][:, :-1], logits[1][:, :-1])
    assert not torch.allclose(logits[0][:, -1], logits[1][:, -1])


def test_rotary_attention_sees_distances_only():
    spec = tiny("llama", num_layers=1)
    rotary = build("llama", spec, dtype=torch.float64)[1].rotary
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 4, dtype=torch.float64).expand(2, 1, 1, 8, 4)
    scores = (rotary(query) @ rotary(key).transpose(-1, -2))[0, 0]
    for offset in (-2, 0, 3):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "norms_and_biases"),
    # per block: 2 norms and the biases; gpt2 adds positions; the final norm
    [("gpt2", 3 * (4 * 16 + 48 + 16 + 64 + 16) + 8 * 16 + 2 * 16), ("llama", 3 * 2 * 16 + 16)],
)
def test_parameters_are_those_of_the_spec(architecture, norms_and_biases):
    spec = tiny(architecture)
    built = sum(p.numel() for layer in build(architecture, spec) for p in layer.parameters())
    assert built == spec.num_parameters + norms_and_biases


def test_batches_depend_on_seed_and_step_only_and_targets_follow_inputs():
    spec = tiny("gpt2")
    inputs, targets = synthetic_batch(spec, 3, seed=0, step=0)
    again, _ = synthetic_batch(spec, 3, seed=0, step=0)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (3, 8)
    assert torch.equal(inputs, again)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert not torch.equal(inputs, synthetic_batch(spec, 3, seed=0, step=1)[0])
    assert not torch.equal(inputs, synthetic_batch(spec, 3, seed=1, step=0)[0])
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < 50


def test_loss_is_float32_for_half_precision_and_float64_for_double():
    targets = torch.tensor([[1, 0]])
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        loss = loss_fn(torch.zeros(1, 2, 4, dtype=dtype), targets)
        assert loss.dtype == wide
        assert loss.item() == pytest.approx(math.log(4))


def test_a_llama_with_query_biases_is_bundled_too():
    spec = tiny("llama").model_copy(update={"qkv_bias": True})
    assert build("llama", spec)[1].query.bias is not None


def test_shapes_that_are_not_bundled_are_refused_by_name():
    experts = MixtureOfExperts(num_experts=4, experts_per_token=1, expert_ffn_size=8)
    spec = tiny("llama").model_copy(update={"moe": experts})
    with pytest.raises(
        ProfileError, match="not a bundled llama model: moe is not None; profile it from your own layers"
    ):
        build("llama", spec)
    with pytest.raises(ProfileError, match="not a bundled gpt2 model: num_kv_heads 2 is not num_heads 4"):
        tiny("gpt2", num_kv_heads=2)
    with pytest.raises(ProfileError, match="hidden_size 16 is not a multiple of num_heads 3"):
        tiny("gpt2", num_heads=3)
    with pytest.raises(ProfileError, match="not a bundled gpt2 model: gated_mlp is not False"):
        build("gpt2", tiny("llama"))


def test_layers_outside_of_the_model_are_refused():
    with pytest.raises(ValueError, match=r"only=range\(3, 6\) reaches outside of the 5 layers"):
        build("gpt2", tiny("gpt2"), only=range(3, 6))
