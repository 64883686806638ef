"""The tokenising command: its files and errors, and that training from them is the same."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import toy

from lucid_jax.config import ConfigError
from lucid_jax.data import shard_writer
from lucid_jax.data.arrayrecord import ArrayRecordSource, TokensMetadata
from lucid_jax.data.tokenize import main
from lucid_jax.data.tokenizer import encode_document, load_tokenizer


def _run(source, output, *flags, tokenizer="bytes"):
    main([f"--input={source}", f"--tokenizer={tokenizer}", f"--output={output}", *flags])


@pytest.mark.parametrize("shards", [1, 3, 60])
def test_round_trip(tmp_path, corpus, texts, shards, capsys):
    output = tmp_path / "new" / "tokens"
    _run(corpus, output, f"--shards={shards}")
    expected = [encode_document(load_tokenizer("bytes"), text) for text in texts]
    source = ArrayRecordSource(str(output))
    assert len(source) == len(texts)
    for i, tokens in enumerate(expected):
        assert source[i].dtype == np.int32
        np.testing.assert_array_equal(source[i], tokens)
    names = sorted(path.name for path in output.glob("*.array_record"))
    assert names[-1] == f"tokens-{shards - 1:05d}-of-{shards:05d}.array_record"
    assert len(names) == shards
    assert json.loads((output / "metadata.json").read_text()) == {
        "dtype": "uint16",
        "vocab_size": 258,
        "documents": len(texts),
        "tokens": sum(map(len, expected)),
        "tokenizer": "bytes",
        "tokenizer_fingerprint": "bytes",
    }
    printed = capsys.readouterr()
    assert "tokenising: 41 of 41 documents, " in printed.err
    assert f"{sum(map(len, expected)):,} tokens" in printed.err
    assert printed.out == f"data.train=arrayrecord:{output}\n"


@pytest.fixture
def words_file(write_words):
    """A tokenizer of two words, one with an id of more than 16 bits."""
    return write_words({"a": 1, "b": 70_000})


def test_ids_of_more_than_16_bits(tmp_path, write_jsonl, words_file):
    _run(write_jsonl("a.jsonl", ["b", "a"]), tmp_path / "tokens", tokenizer=words_file)
    source = ArrayRecordSource(str(tmp_path / "tokens"))
    assert [source[i].tolist() for i in range(2)] == [[70_000], [1]]
    metadata = TokensMetadata.read(tmp_path / "tokens")
    assert (metadata.dtype, metadata.tokenizer) == ("uint32", "words.json")


@pytest.mark.parametrize("packing", ["pack", pytest.param("document", marks=pytest.mark.slow)])
def test_training_from_tokens_equals_training_from_text(
    tmp_path, corpus, make_config, make_loader, take, packing
):
    _run(corpus, tmp_path / "tokens", "--shards=3")
    tokens = f"arrayrecord:{tmp_path}/tokens"
    configs = [
        make_config(train=path, eval=path, holdout=0.2, packing=packing)
        for path in (tokens, corpus)
    ]
    for split in ("train", "eval"):
        actual, expected = (take(make_loader(config, split), 10) for config in configs)
        for name, values in expected.items():
            np.testing.assert_array_equal(actual[name], values, name)


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_run_goes_on_and_cleans_up(tmp_path, corpus, monkeypatch, capsys):
    tokens = tmp_path / "tokens"
    _run(corpus, tmp_path / "whole", "--shards=4")
    done = []

    def encode(tokenizer, document):
        done.append(document)
        if len(done) == 25:
            raise KeyboardInterrupt
        return encode_document(tokenizer, document)

    monkeypatch.setattr(shard_writer, "encode_document", encode)
    for flags in (["--shards=3"], ["--shards=4"]):
        done.clear()
        with pytest.raises(SystemExit, match="130"):
            _run(corpus, tokens, *flags)
        assert not tokens.exists()
    assert "stopped; the same command goes on" in capsys.readouterr().err
    _run(corpus, tokens, "--shards=4")
    # Two of four files were finished, of 10 documents each; the files of another request are gone.
    assert "2 of 4 files are there already" in capsys.readouterr().err
    assert len(done) == 25 + 21
    assert _contents(tokens) == _contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "tokens", "whole"}


def test_two_runs_cannot_write_one_output(tmp_path, corpus, monkeypatch, capsys):
    def encode(tokenizer, document):
        with pytest.raises(SystemExit, match="2"):
            _run(corpus, tmp_path / "tokens")
        return np.zeros(2, np.int32)

    monkeypatch.setattr(shard_writer, "encode_document", encode)
    _run(corpus, tmp_path / "tokens")
    assert "another process is writing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_of_several_processes_goes_on(tmp_path, write_jsonl):
    big = write_jsonl("big.jsonl", ["word " * 2000] * 4000)
    flags = [f"--input={big}", "--tokenizer=bytes", "--shards=8"]
    command = [sys.executable, "-m", "lucid_jax.data.tokenize", *flags, "--processes=2"]
    command.append(f"--output={tmp_path}/tokens")
    process = subprocess.Popen(command, cwd=toy.ROOT, start_new_session=True)
    toy.until(process, lambda: any(tmp_path.glob("tokens.unfinished/0*.json")))
    process.kill()
    process.wait()
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the children of a killed process live on")
    again = subprocess.run(command, cwd=toy.ROOT, capture_output=True, text=True, check=True)
    assert "of 8 files are there already" in again.stderr
    main([*flags, "--processes=1", f"--output={tmp_path}/whole"])
    assert _contents(tmp_path / "tokens") == _contents(tmp_path / "whole")
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_prompt_and_its_completion_are_kept_apart(tmp_path, make_config, make_loader, take):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"prompt": f"p{i}", "completion": "yes"}) for i in range(9)]
    file.write_text("\n".join([*lines, "not JSON"]))
    _run(file, tmp_path / "tokens")
    source = ArrayRecordSource(str(tmp_path / "tokens"))
    assert TokensMetadata.read(tmp_path / "tokens").dtype == "int32"
    assert source[8].tolist() == [~256, ~ord("p"), ~ord("8"), *b"yes", 257]
    assert source[9].tolist() == []
    actual, expected = (
        take(make_loader(make_config(train=path, shards=1)), 1)
        for path in (str(file), f"arrayrecord:{tmp_path}/tokens")
    )
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values, name)
    with pytest.raises(SystemExit, match="2"):
        _run(file, tmp_path / "strict", "--on_bad_line=fail")


_BOTH_FOLDERS = pytest.mark.parametrize("path", ["{}", "{}/*/*.array_record"])


@_BOTH_FOLDERS
def test_folders_with_the_same_tokenizer_are_one_source(tmp_path, corpus, write_jsonl, path):
    _run(corpus, tmp_path / "b", "--shards=2")
    _run(write_jsonl("few.jsonl", ["x", "y"]), tmp_path / "a")
    source = ArrayRecordSource(path.format(tmp_path))
    assert len(source) == 43
    assert source[1].tolist() == [256, ord("y"), 257]


@_BOTH_FOLDERS
def test_folders_with_different_tokenizers_are_refused(tmp_path, corpus, words_file, path):
    _run(corpus, tmp_path / "a")
    _run(corpus, tmp_path / "b", tokenizer=words_file)
    message = r"one tokenizer: .*/a was .* 'bytes' \(258 tokens\), .*/b with 'words.json' \(70001"
    with pytest.raises(ConfigError, match=message):
        ArrayRecordSource(path.format(tmp_path))


@pytest.mark.parametrize("path", ["{}", "{}/gap", "{}/*/*.array_record"])
def test_missing_files_are_reported(tmp_path, corpus, path):
    _run(corpus, tmp_path / "whole")
    _run(corpus, tmp_path / "gap", "--shards=3")
    next((tmp_path / "gap").glob("*.array_record")).unlink()
    message = r"/gap holds \d+ documents, but its metadata.json says 41: files are missing"
    with pytest.raises(ConfigError, match=message):
        ArrayRecordSource(path.format(tmp_path))


def test_damaged_files_are_named(tmp_path, corpus):
    _run(corpus, tmp_path / "tokens")
    (file,) = (tmp_path / "tokens").glob("*.array_record")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        ConfigError, match=rf"{file} or a file beside it is not an ArrayRecord file: .+"
    ):
        ArrayRecordSource(str(file))


_ERRORS = {
    "exists": ("already exists", {}),
    "input": ("no such file.*absent", {"input": "{}/absent.jsonl"}),
    "tokenizer": ("is not a file", {"tokenizer": "{}/absent.json"}),
    "column": ("no column 'body'", {"text_field": "body"}),
    "shards": ("--shards must be positive; got 0", {"shards": "0"}),
    "again": ("is already tokenised", {"input": "arrayrecord:{}/tokens"}),
}


@pytest.mark.parametrize(("message", "changes"), _ERRORS.values(), ids=_ERRORS)
def test_user_errors_exit_with_one_line(tmp_path, corpus, capsys, message, changes):
    _run(corpus, tmp_path / "tokens")
    output = tmp_path / ("new" if changes else "tokens")
    flags = {"input": corpus, "tokenizer": "bytes", "output": str(output), **changes}
    with pytest.raises(SystemExit) as stop:
        main([f"--{name}={value.format(tmp_path)}" for name, value in flags.items()])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error
    assert re.search(message, error), error
    assert not (tmp_path / "new").exists()
