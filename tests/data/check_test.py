"""`check_data` reports every fault of a run's data."""

import json

import pytest

from lucid_jax.config import ConfigError
from lucid_jax.data import check_data, load_tokenizer
from lucid_jax.data.tokenize import main

_FAULTS = {
    "no-train": ("data.train is empty", {"train": ""}),
    "train-missing": ("no such file.*absent", {"train": "{}/absent.txt"}),
    "eval-missing": ("no such file.*absent", {"eval": "{}/absent.txt"}),
    "eval-column": ("no column 'body'.*there are text", {"text_field": "body"}),
    "vocabulary": (
        "data.tokenizer='bytes' has 258 tokens.*model.vocab_size=257",
        {"vocab_size": 257},
    ),
    "tokenizer": (
        r"tokens of .*bytes were written with the tokenizer 'bytes' \(258 tokens\)",
        {"eval": "arrayrecord:{}/bytes", "tokenizer": "{}/words.json"},
    ),
    "prompts": (
        "none of the 1 documents of .*/long.jsonl has the 2 tokens .* within the first 65",
        {"train": "{}/long.jsonl", "packing": "document"},
    ),
    "tokens": (
        "none of the 2 documents of .*/short.jsonl has the 2 tokens that predicting one takes",
        {"train": "{}/short.jsonl", "tokenizer": "{}/words.json"},
    ),
}


@pytest.mark.parametrize(("message", "changes"), _FAULTS.values(), ids=_FAULTS)
def test_faults(tmp_path, corpus, write_jsonl, write_words, make_config, message, changes):
    write_jsonl("short.jsonl", ["a", ""])
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 70, "completion": "y"}))
    write_words({"a": 0})
    main([f"--input={corpus}", "--tokenizer=bytes", f"--output={tmp_path}/bytes"])
    changes = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    config = make_config(**{"train": corpus, **changes})
    with pytest.raises(ConfigError, match=message):
        check_data(config, load_tokenizer(config.data.tokenizer))


def test_valid_data_passes(tmp_path, corpus, make_config):
    main([f"--input={corpus}", "--tokenizer=bytes", f"--output={tmp_path}/bytes"])
    config = make_config(
        train=f"{corpus}@2, arrayrecord:{tmp_path}/bytes", eval=corpus, holdout=0.1, vocab_size=258
    )
    check_data(config, load_tokenizer("bytes"))


@pytest.mark.parametrize("train", ["", "/nowhere/x.jsonl", "/nowhere/x", "arrayrecord:/nowhere"])
def test_evaluation_needs_no_training_data(corpus, make_config, train):
    check_data(make_config(train=train, eval=corpus), load_tokenizer("bytes"), "eval")
    with pytest.raises(ConfigError, match=r"data\.eval is empty"):
        check_data(make_config(train=corpus), load_tokenizer("bytes"), "eval")
