"""Translates between the `config.json` of a Llama-like model and a run's configuration."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from lucid_jax.config import Config, ConfigError, ModelConfig
from lucid_jax.ops.rope import LLAMA3_HIGH, LLAMA3_LOW, ntk_base

# The key of each field of `ModelConfig`. Only the first group is required.
_SIZES = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_OPTIONAL_SIZES = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
_OTHERS = {
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
_MAX_LENGTH = "max_position_embeddings"
_ROPE_BASE = "rope_theta"
# The fields of `ModelConfig` that a model type of transformers implies, if not these values.
_PLAIN = {
    "attention": "softmax",
    "temperature": 1.0,
    "attention_bias": False,
    "qk_norm": "none",
    "positions": "rope",
}
_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": "rms"},
}
# Our own type, for models that transformers computes with our file of code alone, and the section
# of `config.json` that holds the fields of `_PLAIN`.
_LUCID, LUCID_CODE, _SECTION = "lucid_llama", "modeling_lucid_llama.py", "lucid_jax"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    _LUCID: "LucidLlamaForCausalLM",
}
# The defaults of transformers for absent keys, and those that depend on the model type.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    _MAX_LENGTH: 2048,
    _ROPE_BASE: 10_000.0,
}
_TYPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, _MAX_LENGTH: 131_072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, _MAX_LENGTH: 32_768},
    "qwen3": {"num_key_value_heads": 32, _MAX_LENGTH: 32_768, "head_dim": 128},
}
# The other keys that change what a model computes, with the one value that lucid_jax supports,
# which an absent key has.
_WRITTEN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_SUPPORTED: dict[str, Any] = {
    **_WRITTEN,
    "sliding_window": None,
    "layer_types": ["full_attention"],
    "num_local_experts": None,
    "num_experts": None,
    "n_routed_experts": None,
    "quantization_config": None,
}
# What these keys stand for.
_FEATURES = {
    "attention_bias": "biases of the attention output",
    "mlp_bias": "biases of the MLP",
    "sliding_window": "sliding windows",
    "layer_types": "sliding windows",
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "quantization_config": "quantised weights",
    "partial_rotary_factor": "partial RoPE",
}
_SUPPORTED_ROPE = {"partial_rotary_factor": 1.0}
_SUPPORTED_LLAMA3 = {"low_freq_factor": LLAMA3_LOW, "high_freq_factor": LLAMA3_HIGH}
# The supported types of RoPE, and the keys that each requires.
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings"),
}


def read_llama_config(path: pathlib.Path) -> dict[str, Any]:
    """Reads a `config.json`; raises ConfigError unless it holds a JSON object."""
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
    """Returns the configuration of a run of the model that a `config.json` describes.

    Args:
      values: The contents of `config.json`, as transformers 4 or 5 writes it.
      sequence_length: Tokens of a sequence, on which the "dynamic" type of RoPE depends;
        None is the model's `max_position_embeddings`.

    Raises:
      ConfigError: lucid_jax does not support the model; the message names every reason.
    """
    model_type = values.get("model_type", "llama")
    values = _complete(values, model_type)
    problems = _wrong_sections(values, model_type)
    # transformers 4 stores the RoPE base outside rope_scaling, and once called rope_type type.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = {} if problems else rope
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    problems += [*_wrong_sizes(values), *_unsupported_features(values, rope, rope_type)]
    if problems:
        raise ConfigError(f"lucid_jax does not support this model: {', '.join(problems)}")
    max_length = _get(values, _MAX_LENGTH)
    length = sequence_length or max_length
    model = {
        **{field: values[key] for field, key in _SIZES.items()},
        "num_kv_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        "head_dim": values.get("head_dim")
        or values["hidden_size"] // values["num_attention_heads"],
        **{field: _get(values, key) for field, key in _OTHERS.items()},
        "rope_base": rope.get(_ROPE_BASE) or _get(values, _ROPE_BASE),
        **_rope_scaling(rope, rope_type, stretch=length / max_length),
        **_PLAIN,
        **_TYPES.get(model_type, {}),
        **(values.get(_SECTION) or {}),
    }
    config = Config.from_dict({"model": model, "data": {"sequence_length": length}})
    require_convertible(config.model)
    return config


def require_convertible(model: ModelConfig) -> None:
    """Raises ConfigError if neither transformers nor our code for it can compute the model."""
    if "differential" in model.layer_kinds:
        raise ConfigError(
            f"model.attention={model.attention!r} has layers that transformers cannot hold:"
            " expected lucid and softmax alone"
        )
    if model.positions == "path":
        raise ConfigError("model.positions='path' is not for transformers: expected rope or none")
    if model.lucid_beta:
        raise ConfigError("model.lucid_beta=True is not for transformers: expected False")


def _complete(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Adds what absent keys mean in a model type, and leaves out what it ignores."""
    values = {**_TYPE_DEFAULTS.get(model_type, {}), **values}
    if model_type == "qwen2":
        values.pop("attention_bias", None)
    if model_type in ("qwen2", "qwen3") and not values.get("use_sliding_window"):
        values["sliding_window"] = None
    values["layer_types"] = sorted(set(values.get("layer_types") or _SUPPORTED["layer_types"]))
    return values


def _get(values: Mapping[str, Any], key: str) -> Any:
    # Some writers spell an absent value as null.
    value = values.get(key)
    return _DEFAULTS[key] if value is None else value


def _wrong_sections(values: Mapping[str, Any], model_type: str) -> list[str]:
    def holds_values(section: Any) -> bool:
        return isinstance(section, Mapping) and not any(
            isinstance(value, Mapping) for value in section.values()
        )

    wrong = [
        f"{key}={section!r} (expected an object, the same for all layers)"
        for key in ("rope_parameters", "rope_scaling", _SECTION)
        if (section := values.get(key)) and not holds_values(section)
    ]
    if model_type == _LUCID and not values.get(_SECTION):
        wrong.append(f"no section {_SECTION} (expected {', '.join(_PLAIN)})")
    return wrong


def _wrong_sizes(values: Mapping[str, Any]) -> list[str]:
    keys = (*_SIZES.values(), *_OPTIONAL_SIZES.values(), _MAX_LENGTH)
    sizes = {key: values.get(key) for key in keys}
    return [
        f"{key}={size!r} (expected a positive integer)"
        for key, size in sizes.items()
        if not (type(size) is int and size > 0) and (size is not None or key in _SIZES.values())
    ]


def _unsupported_features(
    values: Mapping[str, Any], rope: Mapping[str, Any], rope_type: str
) -> list[str]:
    if rope_type not in _ROPE_KEYS:
        feature = "YaRN" if rope_type == "yarn" else "RoPE"
        wrong = [f"{feature}: rope_type={rope_type!r} (expected one of {', '.join(_ROPE_KEYS)})"]
    else:
        wrong = [
            f"{key}={rope.get(key)!r} of rope_type={rope_type!r} (expected a number)"
            for key in _ROPE_KEYS[rope_type]
            if type(rope.get(key)) not in (int, float)
        ]
    if (model_type := values.get("model_type", "llama")) not in (*_TYPES, _LUCID):
        wrong.append(f"model_type={model_type!r} (expected one of {', '.join(_TYPES)})")
    checks: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [(values, _SUPPORTED)]
    checks.append(({**values, **rope}, _SUPPORTED_ROPE))
    if rope_type == "llama3":
        checks.append((rope, _SUPPORTED_LLAMA3))
    return wrong + [
        f"{_FEATURES[key] + ': ' if key in _FEATURES else ''}{key}={found.get(key)!r}"
        f" (expected {supported!r})"
        for found, expected in checks
        for key, supported in expected.items()
        if found.get(key, supported) != supported
    ]


def _rope_scaling(rope: Mapping[str, Any], rope_type: str, stretch: float) -> dict[str, Any]:
    """Returns the `ModelConfig` fields for sequences `stretch` times the model's maximum length."""
    if rope_type == "dynamic" and stretch > 1:
        # The base of "dynamic" grows with the length; at one length it equals that of "ntk".
        return {"rope_scaling": "ntk", "rope_factor": rope["factor"] * (stretch - 1) + 1}
    if rope_type in ("default", "dynamic"):
        return {}
    scaling = {"rope_scaling": rope_type, "rope_factor": rope["factor"]}
    if rope_type == "llama3":
        scaling["rope_original_length"] = rope["original_max_position_embeddings"]
    return scaling


def to_llama_config(config: Config, dtype: str) -> dict[str, Any]:
    """Returns a `config.json` for transformers 4 and 5, without the ids of special tokens."""
    model = config.model
    base, scaling = model.rope_base, None
    if model.rope_scaling == "ntk":
        base = ntk_base(model.head_dim, base, model.rope_factor)
    elif model.rope_scaling != "none":
        scaling = {"rope_type": model.rope_scaling, "factor": model.rope_factor}
        if model.rope_scaling == "llama3":
            original = model.rope_original_length
            scaling |= {"original_max_position_embeddings": original, **_SUPPORTED_LLAMA3}
    model_type = _model_type(model)
    ours = {}
    if model_type == _LUCID:
        module = LUCID_CODE.removesuffix(".py")
        classes = {"AutoConfig": "LucidLlamaConfig", "AutoModelForCausalLM": _ARCHITECTURES[_LUCID]}
        ours = {
            "auto_map": {name: f"{module}.{kind}" for name, kind in classes.items()},
            _SECTION: {field: getattr(model, field) for field in _PLAIN},
        }
    return {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        # Where the model type implies biases, another value of the key would deny them.
        **{
            key: x
            for key, x in _WRITTEN.items()
            if key != "attention_bias" or not model.attention_bias
        },
        **{
            key: getattr(model, field)
            for field, key in {**_SIZES, **_OPTIONAL_SIZES, **_OTHERS}.items()
        },
        _MAX_LENGTH: config.data.sequence_length,
        _ROPE_BASE: base,
        "rope_scaling": scaling,
        "torch_dtype": dtype,
        **ours,
    }


def _model_type(model: ModelConfig) -> str:
    """Returns the first model type of transformers that computes this model; ours if none does."""
    fields = {field: getattr(model, field) for field in _PLAIN}
    return next((name for name, x in _TYPES.items() if {**_PLAIN, **x} == fields), _LUCID)
