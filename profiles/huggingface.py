"""Which `ModelSpec` a Hugging Face `config.json` describes.

Sizes must be present; what may be left out gets the default that the transformers class of this
`model_type` gives it. What `ModelSpec` cannot express, such as dense layers between expert layers, is
refused; only sliding-window attention is let through, and counts as full attention.
"""

import json
from collections.abc import Callable, Mapping

from profiles.errors import FileError
from profiles.facts import parse_facts
from profiles.model import ModelSpec


def known_model_types() -> tuple[str, ...]:
    """Every `model_type` that can be read, sorted."""
    return tuple(sorted(_READERS))


def model_spec_from_config(config: Mapping[str, object], *, name: str, where: str) -> ModelSpec:
    """The shape that `config`, a parsed `config.json`, describes.

    `name` becomes the name of the model, `where` stands before every message. FileError names the key that
    is missing, of the wrong type or out of range, or says what about the model cannot be expressed.
    """
    if "text_config" in config:
        raise FileError(
            f"{where}: a model whose text part is nested in text_config is not supported; save that part as "
            "a config.json of its own"
        )
    model_type = config.get("model_type")
    read = _READERS.get(model_type) if isinstance(model_type, str) else None
    if read is None:
        what = f"{_show(model_type)} is not known" if "model_type" in config else "missing"
        raise FileError(f"{where}: $.model_type: {what}; known: {', '.join(known_model_types())}")
    fields = read(_Config(config, where))
    fields |= {"name": name, "source": f"Hugging Face config.json ({model_type}), read from {where}"}
    return parse_facts(ModelSpec, json.dumps(fields), where=where)


class _Config:
    """Typed access to the keys of one file; every refusal names file, key and value."""

    def __init__(self, config: Mapping[str, object], where: str) -> None:
        self._config = config
        self._where = where

    def __contains__(self, key: str) -> bool:
        """Whether the key is there with a value; transformers reads null as absent."""
        return self._config.get(key) is not None

    def has_null(self, key: str) -> bool:
        return key in self._config and self._config[key] is None

    def fail(self, message: str) -> FileError:
        return FileError(f"{self._where}: {message}")

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`; a missing key is an error unless there is a default."""
        if key not in self._config and default is not None:
            return default
        if key not in self._config:
            raise self.fail(f"$.{key}: missing; a {self._config['model_type']} config needs it")
        value = self._config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(f"$.{key}: expected a whole number of at least {least} (given: {_show(value)})")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false; missing or null is the default."""
        value = self._config[key] if key in self else default
        if not isinstance(value, bool):
            raise self.fail(f"$.{key}: expected true or false (given: {_show(value)})")
        return value

    def layers(self, key: str) -> set[int]:
        """A list of layer indices; missing or null is empty."""
        value = self._config.get(key) or []
        if not isinstance(value, list) or not all(type(layer) is int for layer in value):
            raise self.fail(f"$.{key}: expected a list of layer numbers (given: {_show(value)})")
        return set(value)

    def section(self, key: str) -> "_Config":
        """A nested object; missing or null is empty."""
        value = self._config.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.fail(f"$.{key}: expected an object (given: {_show(value)})")
        return _Config(value, f"{self._where}: in {key}")


Fields = dict[str, object]


def _decoder(
    config: _Config,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    qkv_bias: bool | None = None,
) -> Fields:
    """What all models of Llama's kind share; `kv_heads` and `head_dim` are the class's own defaults.

    `qkv_bias` None means that the config tells, in `attention_bias`. That flag covers the output projection
    too, but `linear_bias` here follows `mlp_bias`, which covers far more.
    """
    num_heads = config.count("num_attention_heads")
    hidden_size = config.count("hidden_size")
    return {
        "num_layers": config.count("num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": _kv_heads(config, num_heads, kv_heads),
        "head_dim": _head_dim(config, hidden_size, num_heads, head_dim),
        "ffn_size": config.count("intermediate_size"),
        "gated_mlp": True,
        "vocab_size": config.count("vocab_size"),
        "sequence_length": _sequence_length(config),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
        "norm": "rmsnorm",
        "qkv_bias": config.flag("attention_bias", False) if qkv_bias is None else qkv_bias,
        "linear_bias": config.flag("mlp_bias", False),
    }


def _kv_heads(config: _Config, num_heads: int, default: int | None) -> int:
    """Null is one per query head in every class; a missing key is the class's default, if it has one."""
    if "num_key_value_heads" in config:
        return config.count("num_key_value_heads")
    if default is None or config.has_null("num_key_value_heads"):
        return num_heads
    if num_heads % default:
        raise config.fail(
            f"$.num_key_value_heads: missing, and the default of its class, {default}, does not divide "
            f"num_attention_heads {num_heads}"
        )
    return default


def _head_dim(config: _Config, hidden_size: int, num_heads: int, default: int | None) -> int:
    if "head_dim" in config:
        return config.count("head_dim")
    if default is not None:
        return default
    if hidden_size % num_heads:
        raise config.fail(
            f"hidden size {hidden_size} is not a multiple of its {num_heads} attention heads; give head_dim"
        )
    return hidden_size // num_heads


def _sequence_length(config: _Config) -> int:
    """The length the model was trained at before its positions were stretched, where the config tells."""
    for key in ("rope_scaling", "rope_parameters"):
        section = config.section(key)
        if "original_max_position_embeddings" in section:
            return section.count("original_max_position_embeddings")
    return config.count("max_position_embeddings")


def _llama(config: _Config) -> Fields:
    return _decoder(config)


def _mistral(config: _Config) -> Fields:
    return _decoder(config, kv_heads=8, qkv_bias=False)


def _qwen2(config: _Config) -> Fields:
    return _decoder(config, kv_heads=32, qkv_bias=True)


def _qwen3(config: _Config) -> Fields:
    return _decoder(config, kv_heads=32, head_dim=128)


def _mixtral(config: _Config) -> Fields:
    fields = _decoder(config, kv_heads=8, qkv_bias=False)
    fields["moe"] = {
        "num_experts": config.count("num_local_experts", 8),
        "experts_per_token": config.count("num_experts_per_tok", 2),
        "expert_ffn_size": fields["ffn_size"],
    }
    return fields


def _qwen2_moe(config: _Config) -> Fields:
    fields = _decoder(config, kv_heads=16, qkv_bias=config.flag("qkv_bias", True))
    return fields | _qwen_experts(config, shared=True)


def _qwen3_moe(config: _Config) -> Fields:
    return _decoder(config, kv_heads=4) | _qwen_experts(config, shared=False)


def _qwen_experts(config: _Config, *, shared: bool) -> Fields:
    """The `moe` field of Qwen's two kinds of experts; empty when every layer is dense."""
    num_layers = config.count("num_hidden_layers")
    num_dense_layers = _leading_dense_layers(config, num_layers)
    if num_dense_layers == num_layers:
        return {}
    expert_ffn_size = config.count("moe_intermediate_size")
    moe: Fields = {
        "num_experts": config.count("num_experts"),
        "experts_per_token": config.count("num_experts_per_tok"),
        "expert_ffn_size": expert_ffn_size,
        "num_dense_layers": num_dense_layers,
    }
    if shared:
        shared_size = config.count("shared_expert_intermediate_size", least=0)
        if shared_size % expert_ffn_size:
            raise config.fail(
                f"$.shared_expert_intermediate_size {shared_size} is not a multiple of moe_intermediate_size "
                f"{expert_ffn_size}; only shared experts of the width of the others can be expressed"
            )
        moe["num_shared_experts"] = shared_size // expert_ffn_size
    return {"moe": moe}


def _leading_dense_layers(config: _Config, num_layers: int) -> int:
    """How many layers before the first expert layer are dense; FileError when others are dense too."""
    step = config.count("decoder_sparse_step", 1)
    always_dense = config.layers("mlp_only_layers")
    dense = [layer for layer in range(num_layers) if layer in always_dense or (layer + 1) % step]
    if dense != list(range(len(dense))):
        raise config.fail(
            f"decoder_sparse_step {step} and mlp_only_layers {_show(sorted(always_dense))} put dense layers "
            "among the expert layers; only dense layers before all expert layers can be expressed"
        )
    return len(dense)


def _gpt2(config: _Config) -> Fields:
    hidden_size, num_heads = config.count("n_embd"), config.count("n_head")
    return {
        "num_layers": config.count("n_layer"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": _head_dim(config, hidden_size, num_heads, None),
        "ffn_size": config.count("n_inner") if "n_inner" in config else 4 * hidden_size,
        "gated_mlp": False,
        "vocab_size": config.count("vocab_size"),
        "sequence_length": config.count("n_positions"),
        "tied_embeddings": config.flag("tie_word_embeddings", True),
        "learned_positions": True,
        "norm": "layernorm",
        "linear_bias": True,
        "qkv_bias": True,
    }


def _gpt_neox(config: _Config) -> Fields:
    hidden_size, num_heads = config.count("hidden_size"), config.count("num_attention_heads")
    return {
        "num_layers": config.count("num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": _head_dim(config, hidden_size, num_heads, None),
        "ffn_size": config.count("intermediate_size"),
        "gated_mlp": False,
        "vocab_size": config.count("vocab_size"),
        "sequence_length": config.count("max_position_embeddings"),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
        "norm": "layernorm",
        "linear_bias": True,
        "qkv_bias": config.flag("attention_bias", True),
    }


def _show(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


_READERS: dict[str, Callable[[_Config], Fields]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}
