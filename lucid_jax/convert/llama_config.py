"""`config.json` of a Llama model, and the fields of a run that say the same."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from lucid_jax.config import Config, ConfigError
from lucid_jax.ops.rope import LLAMA3_HIGH, LLAMA3_LOW, ntk_base

# By field of `ModelConfig`: the key. Without the first ones there is no model.
_SIZES = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_DERIVED = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
_OTHERS = {
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
_LENGTH = "max_position_embeddings"
_BASE = "rope_theta"
# What transformers takes where a key is not there.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    _LENGTH: 2048,
    _BASE: 10_000.0,
}
# What else decides the function of a model, at the one value that ours has; a key that is
# not there has it.
_ONLY = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "quantization_config": None,
}
_ONLY_ROPE = {"partial_rotary_factor": 1.0}
_ONLY_LLAMA3 = {"low_freq_factor": LLAMA3_LOW, "high_freq_factor": LLAMA3_HIGH}
# The types of RoPE, and the numbers that they cannot do without.
_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings"),
}
# A section of our own, for fields that transformers has no key for, and what it computes.
_OURS = "lucid_jax"
_PLAIN = {"attention": "softmax", "temperature": 1.0}


def read_llama_config(path: pathlib.Path) -> dict[str, Any]:
    """The keys of a `config.json`.

    Raises:
      ConfigError: no such file, or it holds no object.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold an object; got {type(values).__name__}")
    return values


def to_config(values: Mapping[str, Any], sequence_length: int | None = None) -> Config:
    """A run of the model that a `config.json` describes.

    Args:
      values: Its keys, as transformers 4 or 5 writes them.
      sequence_length: Tokens of a row, on which the "dynamic" type of RoPE depends;
        None: as many as the model was made for.

    Raises:
      ConfigError: the model has something that ours has not; all of it is named.
    """
    # transformers 4 has the base beside rope_scaling, and once said type for rope_type.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if problems := [*_wrong_sizes(values), *_unknown_features(values, rope, kind)]:
        raise ConfigError(f"a model that lucid_jax does not have: {', '.join(problems)}")
    made_for = _get(values, _LENGTH)
    length = sequence_length or made_for
    model = {
        **{field: values[key] for field, key in _SIZES.items()},
        "num_kv_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        "head_dim": values.get("head_dim")
        or values["hidden_size"] // values["num_attention_heads"],
        **{field: _get(values, key) for field, key in _OTHERS.items()},
        "rope_base": rope.get(_BASE, _get(values, _BASE)),
        **_rope_scaling(rope, kind, stretch=length / made_for),
        **_PLAIN,
        **values.get(_OURS, {}),
    }
    return Config.from_dict({"model": model, "data": {"sequence_length": length}})


def _get(values: Mapping[str, Any], key: str) -> Any:
    return values.get(key, _DEFAULTS[key])


def _wrong_sizes(values: Mapping[str, Any]) -> list[str]:
    found = {key: values.get(key) for key in (*_SIZES.values(), *_DERIVED.values(), _LENGTH)}
    return [
        f"{key}={size!r} (expected a positive integer)"
        for key, size in found.items()
        if not (type(size) is int and size > 0) and (size is not None or key in _SIZES.values())
    ]


def _unknown_features(values: Mapping[str, Any], rope: Mapping[str, Any], kind: str) -> list[str]:
    if kind not in _ROPE_NUMBERS:
        wrong = [f"rope_type={kind!r} (expected one of {', '.join(_ROPE_NUMBERS)})"]
    else:
        wrong = [
            f"{key}={rope.get(key)!r} of rope_type={kind!r} (expected a number)"
            for key in _ROPE_NUMBERS[kind]
            if type(rope.get(key)) not in (int, float)
        ]
    checks: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [(values, _ONLY)]
    checks.append(({**values, **rope}, _ONLY_ROPE))
    if kind == "llama3":
        checks.append((rope, _ONLY_LLAMA3))
    return wrong + [
        f"{key}={found.get(key)!r} (expected {only!r})"
        for found, expected in checks
        for key, only in expected.items()
        if found.get(key, only) != only
    ]


def _rope_scaling(rope: Mapping[str, Any], kind: str, stretch: float) -> dict[str, Any]:
    """The fields of `ModelConfig` for rows `stretch` times as long as the model was made for."""
    if kind == "dynamic" and stretch > 1:
        # The base grows with the length of a row: for one length it is that of "ntk".
        return {"rope_scaling": "ntk", "rope_factor": rope["factor"] * (stretch - 1) + 1}
    if kind in ("default", "dynamic"):
        return {}
    scaling = {"rope_scaling": kind, "rope_factor": rope["factor"]}
    if kind == "llama3":
        scaling["rope_original_length"] = rope["original_max_position_embeddings"]
    return scaling


def to_llama_config(config: Config, dtype: str) -> dict[str, Any]:
    """A `config.json` that transformers 4 and 5 read; without the ids of special tokens.

    Args:
      config: The run whose parameters the weights are.
      dtype: Type of the weights.
    """
    model = config.model
    base, scaling = model.rope_base, None
    if model.rope_scaling == "ntk":
        base = ntk_base(model.head_dim, base, model.rope_factor)
    elif model.rope_scaling != "none":
        scaling = {"rope_type": model.rope_scaling, "factor": model.rope_factor}
        if model.rope_scaling == "llama3":
            original = model.rope_original_length
            scaling |= {"original_max_position_embeddings": original, **_ONLY_LLAMA3}
    same = {**_SIZES, **_DERIVED, **_OTHERS}
    extras = beyond_llama(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        # transformers 4 fails on a quantization_config that is null.
        **{key: only for key, only in _ONLY.items() if only is not None},
        **{key: getattr(model, field) for field, key in same.items()},
        _LENGTH: config.data.sequence_length,
        _BASE: base,
        "rope_scaling": scaling,
        "torch_dtype": dtype,
        **({_OURS: extras} if extras else {}),
    }


def beyond_llama(config: Config) -> dict[str, Any]:
    """The fields of the model by which transformers, with its weights, computes another one."""
    found = {field: getattr(config.model, field) for field in _PLAIN}
    return {field: value for field, value in found.items() if value != _PLAIN[field]}
