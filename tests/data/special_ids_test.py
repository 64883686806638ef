"""Special tokens are those that the files beside a tokenizer name."""

import json

import pytest

from lucid_jax.config import ConfigError
from lucid_jax.data.special_ids import SpecialIds

VOCABULARY = {"<s>": 1, "</s>": 2, "<|endoftext|>": 3, "<|im_end|>": 4, "<|eot|>": 5, "<pad>": 6}


def read(directory, **files):
    for name, values in files.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    return SpecialIds.read(directory, VOCABULARY.get)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Like Llama-3-Instruct: a document ends otherwise than a turn.
        (
            {
                "config": {"model_type": "llama", "bos_token_id": 1, "eos_token_id": [3, 5]},
                "generation_config": {"eos_token_id": [3, 4, 5]},
                "tokenizer_config": {"bos_token": "<s>", "eos_token": "<|eot|>"},
            },
            (1, 3, (3, 5, 4), None),
        ),
        # Like SmolLM2-Instruct: well-known names would be wrong.
        (
            {
                "config": {"model_type": "llama", "bos_token_id": 3, "eos_token_id": 4},
                "tokenizer_config": {
                    "bos_token": "<|im_end|>", "eos_token": {"content": "<|im_end|>"},
                    "pad_token": "<pad>",
                },
            },
            (3, 4, (4,), 6),
        ),
        # Like Qwen: documents have no beginning.
        (
            {
                "config": {"model_type": "qwen2", "bos_token_id": 3, "eos_token_id": 3},
                "tokenizer_config": {"bos_token": None, "eos_token": "<|im_end|>"},
            },
            (None, 3, (3, 4), None),
        ),
        # Like SmolLM2-Instruct in GGUF: only a turn has a beginning.
        ({"tokenizer_config": {"bos_token": "<s>", "add_bos_token": False}}, (None, 2, (2,), None)),
        ({"tokenizer_config": {"eos_token": "<|eot|>"}}, (1, 5, (5,), None)),
        ({"generation_config": {"eos_token_id": 4}}, (1, 4, (4,), None)),
        # The configuration of a run has no ids.
        ({"config": {"eos_token_id": 4}}, (1, 2, (2,), None)),
        ({}, (1, 2, (2,), None)),
    ],
)  # fmt: skip
def test_ids_of_the_files(tmp_path, files, expected):
    assert read(tmp_path, **files) == expected


def test_what_is_written_is_read_again(tmp_path):
    for special in (SpecialIds(1, 3, (3, 5), 6), SpecialIds(None, 2, (2,), None)):
        beginning = {"tokenizer_config": {"bos_token": None}} if special.bos is None else {}
        assert read(tmp_path, generation_config=special.to_json(), **beginning) == special


def test_a_damaged_file_is_an_error(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config.json cannot be read as JSON"):
        read(tmp_path)
