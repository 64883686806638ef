"""The `config.json` of published models, and of models that are refused."""

import dataclasses
import math

import jax
import pytest
from convert.llama_fixtures import llama_json, write_llama

from configs import tinyllama_lucid
from lucid_jax.config import Config, ConfigError
from lucid_jax.convert.from_hf import from_hf
from lucid_jax.convert.llama_config import to_config
from lucid_jax.convert.llama_tensors import abstract_params


def test_rope_keys_of_transformers_4():
    changes = {"rope_parameters": None, "rope_theta": 500.0}
    parameters = llama_json("tied_llama3")["rope_parameters"]
    scaling = {key: x for key, x in parameters.items() if key != "rope_theta"}
    new = to_config(llama_json("tied_llama3"))
    assert new.model.rope_scaling == "llama3"
    assert to_config(llama_json("tied_llama3", **changes, rope_scaling=scaling)) == new
    scaling["type"] = scaling.pop("rope_type")
    assert to_config(llama_json("tied_llama3", **changes, rope_scaling=scaling)) == new


def test_defaults_of_absent_keys():
    absent = ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings",
              "rope_parameters", "max_position_embeddings", "initializer_range")  # fmt: skip
    config = to_config(llama_json("tied_llama3", **dict.fromkeys(absent)))
    model = config.model
    assert (model.num_kv_heads, model.head_dim, model.norm_eps) == (4, 8, 1e-6)
    assert (model.tie_embeddings, model.rope_base, model.rope_scaling) == (False, 10_000.0, "none")
    assert config.data.sequence_length == 2048
    # A null is an absent base of RoPE.
    values = llama_json("tied_llama3", rope_parameters=None) | {"rope_theta": None}
    for nulls in (values, {**values, "rope_parameters": {"rope_theta": None}}):
        assert to_config(nulls).model.rope_base == 10_000.0


# What the published `config.json` says, beside keys that change nothing here.
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "initializer_range": 0.02}
QWEN = {
    **COMMON, "attention_dropout": 0.0, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000,
    "use_sliding_window": False, "vocab_size": 151_936, "tie_word_embeddings": True,
}  # fmt: skip
PUBLISHED = {
    "Mistral-7B-v0.3": {
        **COMMON, "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32_768, "rope_theta": 1_000_000.0, "sliding_window": None,
        "tie_word_embeddings": False, "vocab_size": 32_768,
    },
    "Qwen2.5-0.5B": {
        **QWEN, "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "max_position_embeddings": 32_768, "max_window_layers": 24, "sliding_window": 32_768,
    },
    "Qwen3-0.6B": {
        **QWEN, "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40_960, "max_window_layers": 28,
        "sliding_window": None, "rope_scaling": None, "attention_bias": False,
    },
    "Llama-3.2-1B": {
        **COMMON, "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131_072, "rope_theta": 500_000.0,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
        "tie_word_embeddings": True, "vocab_size": 128_256,
    },
    "SmolLM2-135M": {
        **COMMON, "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100_000, "is_llama_config": True, "attention_bias": False,
        "tie_word_embeddings": True, "vocab_size": 49_152,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters", "fields"),
    [
        ("Mistral-7B-v0.3", 7_248_023_552, {"num_kv_heads": 8}),
        ("Qwen2.5-0.5B", 494_032_768, {"attention_bias": True, "rope_base": 1e6}),
        ("Qwen3-0.6B", 596_049_920, {"qk_norm": "rms", "head_dim": 128, "norm_eps": 1e-6}),
        ("Llama-3.2-1B", 1_235_814_400, {"rope_factor": 32.0, "rope_original_length": 8192}),
        ("SmolLM2-135M", 134_515_008, {"rope_base": 1e5, "tie_embeddings": True}),
    ],
)
def test_published_models_have_their_published_number_of_parameters(name, parameters, fields):
    model = to_config(PUBLISHED[name]).model
    assert {field: getattr(model, field) for field in fields} == fields
    shapes = (x.shape for x in jax.tree.leaves(abstract_params(model)))
    assert sum(map(math.prod, shapes)) == parameters


@pytest.mark.parametrize(
    ("model_type", "num_kv_heads", "head_dim", "length"),
    [("llama", 64, 16, 2048), ("mistral", 8, 16, 131_072), ("qwen2", 32, 16, 32_768),
     ("qwen3", 32, 128, 32_768)],
)  # fmt: skip
def test_defaults_of_absent_keys_depend_on_the_model_type(
    model_type, num_kv_heads, head_dim, length
):
    absent = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    sizes = {"hidden_size": 1024, "num_attention_heads": 64, "model_type": model_type}
    values = {**llama_json("linear", **dict.fromkeys(absent), **sizes), "sliding_window": None}
    config = to_config(values)
    assert (config.model.num_kv_heads, config.model.head_dim) == (num_kv_heads, head_dim)
    assert config.data.sequence_length == length


def test_the_shipped_configuration_matches_the_published_tinyllama():
    published = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5632, "max_position_embeddings": 2048, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True,
        "vocab_size": 32000,
    }  # fmt: skip
    shipped = Config.from_dict(tinyllama_lucid.get_config().to_dict())
    converted = to_config(published)
    assert dataclasses.replace(shipped.model, attention="softmax") == converted.model
    assert shipped.data.sequence_length == converted.data.sequence_length


@pytest.mark.parametrize(("length", "factor"), [(None, 1), (8, 1), (16, 1), (32, 3), (40, 4)])
def test_dynamic_rope_becomes_ntk_at_one_length(length, factor):
    model = to_config(llama_json("dynamic"), length).model
    assert (model.rope_scaling, model.rope_factor) == ("ntk" if factor > 1 else "none", factor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type='gemma' (expected one of llama, mistral, qwen2, "),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "mixture of experts: num_local_experts=8 (expected None)",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 128},
            "mixture of experts: num_experts=128 (expected None)",
        ),
        ({"attention_bias": True}, "biases of the attention output: attention_bias=True (expect"),
        (
            {"mlp_bias": True, "hidden_act": "gelu"},
            "hidden_act='gelu' (expected 'silu'), biases of the MLP: mlp_bias=True (expected ",
        ),
        ({"sliding_window": 4096}, "sliding windows: sliding_window=4096 (expected None)"),
        # The default of Mistral.
        ({"model_type": "mistral"}, "sliding windows: sliding_window=4096 (expected None)"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32},
            "sliding windows: sliding_window=32 (expected None)",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "sliding windows: layer_types=['full_attention', 'sliding_attention'] (expected",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "quantised weights: quantization_config={'bits': 4} (expected None)",
        ),
        ({"partial_rotary_factor": 0.5}, "partial RoPE: partial_rotary_factor=0.5 (expected 1.0)"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "YaRN: rope_type='yarn' (expected one of default, linear, dynamic, llama3)",
        ),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "factor=None of rope_type='linear' (expected a number)",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3", "factor": 8, "low_freq_factor": 2.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
                }
            },
            "low_freq_factor=2.0 (expected 1.0)",
        ),
        ({"rope_parameters": "yarn"}, "rope_parameters='yarn' (expected an object, the same for"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "rope_parameters={'full_attention': {'rope_theta': 5.0}} (expected an object, the same",
        ),
        (
            {"model_type": "lucid_llama"},
            "no section lucid_jax (expected attention, temperature, attention_bias, qk_norm,",
        ),
        ({"hidden_size": None}, "hidden_size=None (expected a positive integer)"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2' (expected a positive integer)"),
        ({"head_dim": 7}, "model.head_dim must be even; got 7"),
        ({"num_key_value_heads": 3}, "model.num_heads (4) must be a multiple"),
        (
            {
                "model_type": "lucid_llama",
                "num_key_value_heads": 2,
                "lucid_jax": {"attention": "differential,lucid"},
            },
            "model.attention='differential,lucid' has layers that transformers cannot hold",
        ),
        (
            {
                "model_type": "lucid_llama",
                "rope_parameters": None,
                "lucid_jax": {"positions": "path"},
            },
            "model.positions='path' is not for transformers: expected rope or none",
        ),
    ],
)  # fmt: skip
def test_an_unsupported_model_is_refused(tmp_path, changes, message):
    source = write_llama(tmp_path / "in", **changes)
    with pytest.raises(ConfigError) as error:
        from_hf(source, tmp_path / "out")
    assert message in str(error.value)
    assert str(error.value).startswith(f"{source}/config.json: ")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))
