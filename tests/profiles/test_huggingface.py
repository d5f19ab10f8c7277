"""A config.json means what transformers makes of it, or is refused in one sentence."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.catalog import model
from profiles.errors import FileError
from profiles.huggingface import known_model_types, model_spec_from_config
from profiles.model import ModelSpec

# The parts of published config.json files that tell the shape, and the catalogue entry they describe.
PUBLISHED = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "llama-2-13b": {  # as first released: no num_key_value_heads, no head_dim
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "max_position_embeddings": 4096,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "rope_scaling": None,
        "vocab_size": 32000,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 8192},
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "mistral-nemo-12b": {
        "model_type": "mistral",
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "vocab_size": 32000,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 1,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "shared_expert_intermediate_size": 5632,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 40960,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_inner": None,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "gpt-neox-20b": {
        "model_type": "gpt_neox",
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "max_position_embeddings": 2048,
        "num_attention_heads": 64,
        "num_hidden_layers": 44,
        "tie_word_embeddings": False,
        "vocab_size": 50432,
    },
}

TOO_LONG_TO_TELL = {"mistral-nemo-12b", "mixtral-8x7b", "qwen2.5-7b", "qwen3-4b", "qwen3-30b-a3b"}


def read(config: dict) -> ModelSpec:
    return model_spec_from_config(config, name="it", where="some/config.json")


def changed(name: str, **changes: object) -> dict:
    """A published config with keys changed; a value of ... takes the key away."""
    return {key: value for key, value in (PUBLISHED[name] | changes).items() if value is not ...}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_shape_of_the_catalogue(name):
    known = model(name)
    got = read(PUBLISHED[name])
    sequence_length = known.sequence_length
    if name in TOO_LONG_TO_TELL:  # the config tells the longest length only, not the one of pre-training
        sequence_length = PUBLISHED[name]["max_position_embeddings"]
    want = known.model_copy(update={"name": "it", "source": got.source, "sequence_length": sequence_length})
    assert got == want
    assert "some/config.json" in got.source


def test_every_kind_of_config_is_covered_by_a_published_one():
    assert {config["model_type"] for config in PUBLISHED.values()} == set(known_model_types())


def test_missing_optional_keys_get_the_defaults_of_transformers():
    assert read(changed("llama-3.1-8b", num_key_value_heads=...)).num_kv_heads == 32
    assert read(changed("llama-3.1-8b", num_key_value_heads=None)).num_kv_heads == 32
    assert read(changed("llama-3.1-8b", tie_word_embeddings=...)).tied_embeddings is False
    assert read(changed("llama-3.1-8b", head_dim=None)).head_dim == 128
    assert read(changed("mistral-nemo-12b", num_key_value_heads=...)).num_kv_heads == 8
    assert read(changed("mistral-nemo-12b", num_key_value_heads=None)).num_kv_heads == 32
    assert read(changed("mistral-nemo-12b", head_dim=...)).head_dim == 160
    assert read(changed("qwen3-4b", head_dim=...)).head_dim == 128
    assert read(changed("qwen3-4b", tie_word_embeddings=...)).tied_embeddings is False
    assert read(changed("qwen2.5-7b")).qkv_bias is True
    assert read(changed("gpt2", n_inner=...)).ffn_size == 3072
    assert read(changed("gpt2", n_inner=100)).ffn_size == 100
    assert read(changed("gpt2")).tied_embeddings is True
    assert read(changed("gpt2", tie_word_embeddings=False)).tied_embeddings is False
    assert read(changed("gpt-neox-20b", tie_word_embeddings=...)).tied_embeddings is False
    mixtral = read(changed("mixtral-8x7b", num_local_experts=..., num_experts_per_tok=...))
    assert mixtral.moe == model("mixtral-8x7b").moe


def test_biases_are_read_from_the_flags_that_hold_them():
    biased = read(changed("llama-3.1-8b", attention_bias=True, mlp_bias=True))
    assert (biased.qkv_bias, biased.linear_bias) == (True, True)
    assert read(changed("qwen3-4b", attention_bias=True)).qkv_bias is True
    assert read(changed("gpt-neox-20b", attention_bias=False)).qkv_bias is False
    assert read(changed("qwen1.5-moe-a2.7b", qkv_bias=False)).qkv_bias is False


def test_the_length_before_stretching_is_the_sequence_length():
    assert read(changed("llama-3.1-8b")).sequence_length == 8192
    assert read(changed("llama-3.1-8b", rope_scaling={"factor": 2.0})).sequence_length == 131072


def test_leading_dense_layers_of_a_mixture_are_kept():
    spec = read(changed("qwen3-30b-a3b", mlp_only_layers=[0, 1]))
    assert spec.moe is not None
    assert spec.moe.num_dense_layers == 2
    assert spec.block_parameters(0) == spec.attention_parameters + 3 * 2048 * 6144


def test_a_mixture_whose_layers_are_all_dense_has_no_experts():
    assert read(changed("qwen3-30b-a3b", mlp_only_layers=list(range(48)))).moe is None
    two_layers = changed("qwen3-30b-a3b", num_hidden_layers=2, decoder_sparse_step=2)
    assert read(two_layers).moe.num_dense_layers == 1


def test_a_mixture_without_shared_experts_is_read():
    spec = read(changed("qwen1.5-moe-a2.7b", shared_expert_intermediate_size=0))
    assert spec.moe.num_shared_experts == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            changed("gpt2", model_type="bert"),
            r"\$\.model_type: 'bert' is not known; known: gpt2, gpt_neox, llama, ",
        ),
        (changed("gpt2", model_type=...), r"\$\.model_type: missing; known: gpt2, "),
        (changed("gpt2", model_type=7), r"\$\.model_type: 7 is not known"),
        (
            {"model_type": "gemma3", "text_config": {}},
            r"nested in text_config is not supported; save that part",
        ),
        (changed("gpt2", n_embd=...), r"\$\.n_embd: missing; a gpt2 config needs it"),
        (changed("qwen2.5-7b", hidden_size=...), r"\$\.hidden_size: missing; a qwen2 config needs it"),
        (changed("qwen2.5-7b", hidden_size=None), r"\$\.hidden_size: expected .* \(given: None\)"),
        (
            changed("qwen2.5-7b", hidden_size="3584"),
            r"\$\.hidden_size: expected a whole number .* \(given: '3584'\)",
        ),
        (changed("qwen2.5-7b", hidden_size=3584.0), r"\$\.hidden_size: expected a whole number"),
        (changed("qwen2.5-7b", hidden_size=True), r"\$\.hidden_size: expected a whole number"),
        (changed("qwen2.5-7b", num_hidden_layers=-1), r"whole number of at least 1 \(given: -1\)"),
        (changed("qwen2.5-7b", vocab_size=0), r"\$\.vocab_size: .*at least 1 \(given: 0\)"),
        (
            changed("qwen2.5-7b", tie_word_embeddings="no"),
            r"tie_word_embeddings: expected true or false \(given: 'no'\)",
        ),
        (changed("qwen2.5-7b", num_key_value_heads=5), r"num_heads 28 is not a multiple of num_kv_heads 5"),
        (
            changed("qwen2.5-7b", num_key_value_heads=...),
            r"num_key_value_heads: missing, .*32, does not divide .* 28",
        ),
        (
            changed("qwen2.5-7b", hidden_size=3585),
            r"hidden size 3585 is not a multiple of its 28 attention heads",
        ),
        (
            changed("llama-3.1-8b", rope_scaling="yes"),
            r"\$\.rope_scaling: expected an object \(given: 'yes'\)",
        ),
        (
            changed("llama-3.1-8b", rope_scaling={"original_max_position_embeddings": 0}),
            r"in rope_scaling: \$\.original_max_position_embeddings: .*\(given: 0\)",
        ),
        (changed("mixtral-8x7b", num_experts_per_tok=9), r"experts_per_token 9 exceeds num_experts 8"),
        (changed("qwen3-30b-a3b", num_experts=...), r"\$\.num_experts: missing; a qwen3_moe config needs it"),
        (
            changed("qwen3-30b-a3b", decoder_sparse_step=2),
            r"decoder_sparse_step 2 .* among the expert layers",
        ),
        (changed("qwen3-30b-a3b", mlp_only_layers=[3]), r"mlp_only_layers \[3\] put dense layers among"),
        (
            changed("qwen3-30b-a3b", mlp_only_layers=[0.5]),
            r"mlp_only_layers: expected a list of layer numbers",
        ),
        (changed("qwen3-30b-a3b", mlp_only_layers="0"), r"mlp_only_layers: expected a list of layer numbers"),
        (
            changed("qwen1.5-moe-a2.7b", shared_expert_intermediate_size=1409),
            r"shared_expert_intermediate_size 1409 is not a multiple of moe_intermediate_size 1408",
        ),
        ({}, r"\$\.model_type: missing"),
    ],
)
def test_a_config_that_cannot_be_read_is_named_with_the_key(config, message):
    with pytest.raises(FileError, match=r"^some/config\.json: .*" + message) as caught:
        read(config)
    assert "\n" not in str(caught.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**10) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=300)
def test_any_value_of_any_key_gives_a_shape_or_one_error(data):
    name = data.draw(st.sampled_from(sorted(PUBLISHED)))
    key = data.draw(st.sampled_from(sorted(PUBLISHED[name])))
    config = changed(name, **{key: data.draw(JSON_VALUES)})
    try:
        spec = read(config)
    except FileError:
        return
    assert spec.num_parameters > 0
