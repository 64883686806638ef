"""The start of a run says what its sources hold, and warns of likely mistakes."""

import re

import pytest

from lucid_jax.data import check_data, load_tokenizer, log_data
from lucid_jax.data.tokenize import main

# The fields of the data, and what a line says; {} is the folder of the files.
_LINES = {
    "jsonl": (
        {"train": "{}/corpus.jsonl@3, {}/texts/"},
        [
            "data.train: {}/corpus.jsonl (jsonl), 1 file, ",
            " kB, 41 documents, 75.0% of the mixture",
            "data.train: {}/texts (text), 2 files, 1.5 kB, 2 documents, 25.0% of the mixture\n",
        ],
    ),
    "tokens": (
        {"train": "{}/tokens/", "holdout": 0.2, "eval": "{}/tokens/"},
        [
            "data.train: {}/tokens (arrayrecord), 1 file, 7,545 tokens, 41 documents, 5 of them"
            " held out, 100.0% of the mixture\n",
            "data.eval: {}/tokens (arrayrecord), 1 file, 7,545 tokens, 41 documents, 5 of them"
            " held out\n",
        ],
    ),
    "left-out": (
        {"train": "jsonl:{}/mixed"},
        [
            "{}/mixed (jsonl), 1 file, 13 bytes, 1 document, 100.0% of the mixture; 1 other file"
            " below it not read"
        ],
    ),
    "shared": (
        {"train": "{}/texts/", "eval": "{}/texts/a.txt"},
        ["data.eval reads what data.train trains on: 1 file of {}/texts/a.txt, such as"],
    ),
    "ends": ({"train": "{}/texts/", "tokenizer": "{}/words.json"}, ["has no token that ends a"]),
    "empty": ({"train": "{}/empty/"}, ["all 2 documents of {}/empty are empty"]),
}  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), _LINES.values(), ids=_LINES)
def test_lines_and_warnings(tmp_path, corpus, write_words, make_config, caplog, data, expected):
    caplog.set_level("INFO")
    contents = {
        "texts/a.txt": "x" * 700, "texts/b.txt": "x " * 400, "empty/a": "", "empty/b": "\n",
        "mixed/a.jsonl": '{"text": "a"}', "mixed/b.json": "{}", "mixed/metadata.json": "{}",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    write_words({"x": 0})
    main([f"--input={corpus}", "--tokenizer=bytes", f"--output={tmp_path}/tokens"])
    data = {k: v.format(*[tmp_path] * 2) if isinstance(v, str) else v for k, v in data.items()}
    config = make_config(**data)
    tokenizer = load_tokenizer(config.data.tokenizer)
    log_data(config.data, tokenizer, check_data(config, tokenizer))
    for line in expected:
        assert line.format(tmp_path) in caplog.text
    warnings = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
    likely = re.compile("reads what|no token that ends|are empty")
    assert sum(bool(likely.search(x)) for x in warnings) == sum(
        bool(likely.search(x)) for x in expected
    ), warnings
