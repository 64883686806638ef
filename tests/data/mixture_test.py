"""Mixtures: the format, the holdout, and weights that hold in every shard."""

import ast
import collections
import itertools
import pathlib
import re
import shlex

import numpy as np
import pytest

from lucid_jax.config import ConfigError
from lucid_jax.data.mixture import held_out, interleave, open_mixture, parse_mixture
from lucid_jax.data.sources import SourceSpec

_ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def _read(source):
    return [source[i] for i in range(len(source))]


def test_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_mixture("a.jsonl@3, text:books , python-stdlib@0.5,me@home/x.txt@1") == (
        (SourceSpec("jsonl", f"{tmp_path}/a.jsonl"), 3.0),
        (SourceSpec("text", f"{tmp_path}/books"), 1.0),
        (SourceSpec("python-stdlib"), 0.5),
        (SourceSpec("text", f"{tmp_path}/me@home/x.txt"), 1.0),
    )
    assert parse_mixture("") == ()
    # A final slash means a folder of text, unless an ending tells the kind.
    assert parse_mixture("books/@2, a.jsonl/") == (
        (SourceSpec("text", f"{tmp_path}/books"), 2.0),
        (SourceSpec("jsonl", f"{tmp_path}/a.jsonl"), 1.0),
    )


@pytest.mark.parametrize("file", ["README.md", "run.py", "lucid_jax/data/tokenize.py"])
def test_documented_sources_can_be_parsed(file):
    """Parses what follows data.train=, data.eval= or tokenize's --input= in a command."""
    text = (_ROOT / file).read_text()
    if file.endswith(".py"):
        text = ast.get_docstring(ast.parse(text))
    found = re.findall(r"(?:data\.(?:train|eval)|tokenize --input)=('[^']+'|[\w:./-]+)", text)
    assert found
    for words in map(shlex.split, found):
        assert parse_mixture(*words)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "", "much", "1e-400"])
def test_a_weight_must_be_a_positive_number(weight):
    with pytest.raises(ConfigError, match=r"weight of 'a.txt@.*must be a positive number"):
        parse_mixture(f"python-stdlib, a.txt@{weight}")


def test_an_empty_entry_is_refused():
    with pytest.raises(ConfigError, match="source '' has no known kind"):
        parse_mixture("a.txt,,b.txt")


def test_held_out_documents_are_fixed_and_few():
    chosen = held_out(20_000, 0.1)
    assert abs(chosen.mean() - 0.1) < 0.01
    # A source that grows, and a larger share, keep the documents held out before.
    np.testing.assert_array_equal(held_out(7, 0.1), chosen[:7])
    assert held_out(20_000, 0.2)[chosen].all()
    # With another hash, a resumed run would train on held-out text.
    assert np.flatnonzero(chosen)[:8].tolist() == [2, 32, 33, 41, 42, 43, 53, 94]


def test_holdout_is_a_partition(corpus, write_jsonl, texts, make_config):
    other = write_jsonl("other.jsonl", ["x", "y"])
    data = make_config(train=corpus, eval=f"jsonl:{corpus}, {other}", holdout=0.2).data
    (train,) = [_read(component.source) for component in open_mixture(data, "train")]
    evaluated, whole = [_read(component.source) for component in open_mixture(data, "eval")]
    assert collections.Counter(train + evaluated) == collections.Counter(texts)
    assert 0 < len(evaluated) < len(train)
    assert whole == ["x", "y"]


@pytest.mark.parametrize(("split", "holdout"), [("eval", 0.01), ("train", 0.99)])
def test_a_holdout_that_leaves_nothing_is_refused(write_jsonl, make_config, split, holdout):
    few = write_jsonl("few.jsonl", ["x", "y"])
    data = make_config(train=few, eval=few, holdout=holdout).data
    with pytest.raises(ConfigError, match=rf"leaves data.{split} none of the 2 .*few.jsonl"):
        open_mixture(data, split)


def test_interleaved_sources_are_read_in_proportion():
    sources = [[f"a{i}" for i in range(90)], [f"b{i}" for i in range(30)], ["c0"]]
    order = _read(interleave(sources))
    assert sorted(order) == sorted(itertools.chain(*sources))
    for part in range(0, 120, 20):
        count = sum(name.startswith("b") for name in order[part : part + 20])
        assert abs(count - 5) <= 1
    assert [name for name in order if name.startswith("a")] == sources[0]


def test_weights_count_documents_in_every_batch_and_shard(
    write_jsonl, make_config, make_loader, take
):
    a, b = write_jsonl("a.jsonl", ["a"] * 500), write_jsonl("b.jsonl", ["b"] * 5000)
    config = make_config(train=f"{a}@3, {b}", packing="document", sequence_length=4)
    is_a = take(make_loader(config), 100)["tokens"][:, :, 1] == ord("a")
    # Eight documents a batch are two periods of the mixture.
    assert (is_a.sum(axis=1) == 6).all()
    # Each of the eight shards sees the mixture too, and not only one of its sources.
    assert (abs(is_a.mean(axis=0) - 0.75) < 0.15).all()


def test_every_epoch_reads_each_document_once_in_a_new_order(
    write_jsonl, make_config, make_loader, take
):
    path = write_jsonl("a.jsonl", [chr(ord("a") + i) for i in range(24)])
    config = make_config(train=path, packing="document", sequence_length=4, shards=1)
    epochs = take(make_loader(config), 9)["tokens"][:, :, 1].reshape(3, 24)
    for epoch in epochs:
        assert sorted(epoch) == sorted(map(ord, "abcdefghijklmnopqrstuvwx"))
    assert len({tuple(epoch) for epoch in epochs}) == 3
