"""Rows and fields, by hand; and that packing an epoch loses no token."""

import grain
import numpy as np
import pytest
import tokenizers

from lucid_jax.data.packing import FIELDS, empty_rows, to_rows
from lucid_jax.data.tokenizer import encode_document, load_tokenizer

_DOCUMENTS = ([1, 2, 3], [4, 5, 6, 7, 8, 9], [10, 11])
_ROWS = {
    "pack": {
        "tokens": [[1, 2, 3, 4], [6, 7, 8, 9], [11, 0, 0, 0]],
        "targets": [[2, 3, 4, 5], [7, 8, 9, 10], [0, 0, 0, 0]],
        "segment_ids": [[1, 1, 1, 2], [1, 1, 1, 1], [1, 0, 0, 0]],
        "positions": [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 0]],
        "weights": [[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]],
    },
    "document": {
        "tokens": [[1, 2, 3, 0], [4, 5, 6, 7], [10, 11, 0, 0]],
        "targets": [[2, 3, 0, 0], [5, 6, 7, 8], [11, 0, 0, 0]],
        "segment_ids": [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]],
        "positions": [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 0]],
        "weights": [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
    },
}


@pytest.mark.parametrize("packing", ["pack", "document"])
def test_fields_by_hand(packing):
    documents = grain.MapDataset.source([np.array(d, np.int32) for d in _DOCUMENTS])
    rows = list(to_rows(documents.to_iter_dataset(), packing, sequence_length=4))
    for name, dtype in FIELDS.items():
        assert {row[name].dtype for row in rows} == {np.dtype(dtype)}, name
        np.testing.assert_array_equal([row[name] for row in rows], _ROWS[packing][name], name)


def test_empty_rows_have_the_fields_of_rows():
    rows = empty_rows(3, 4)
    assert {name: (v.shape, v.dtype) for name, v in rows.items()} == {
        name: ((3, 4), dtype) for name, dtype in FIELDS.items()
    }
    assert not any(v.any() for v in rows.values())


@pytest.mark.parametrize("length", [1, 2, 7, 64, 5000])
def test_pack_keeps_every_token_once_and_in_order(
    corpus, texts, make_config, make_loader, take_epoch, length
):
    config = make_config(train=corpus, eval=corpus, sequence_length=length, shards=4)
    fields = take_epoch(make_loader(config, "eval"), shards=4)
    documents = [encode_document(load_tokenizer("bytes"), text) for text in texts]
    for shard in range(4):
        # The text has no NUL, so 0 is padding.
        rows = np.column_stack([fields["tokens"][shard], fields["targets"][shard][:, -1:]])
        expected = np.concatenate(documents[shard::4])
        np.testing.assert_array_equal(rows[rows > 0], expected)
        lost = np.arange(length + 1, len(expected), length + 1)
        ends = np.cumsum([len(document) for document in documents[shard::4]])
        # Every token but the first of a document and of a row is a target.
        targets = len(expected) - len({0, *lost, *ends[:-1]})
        assert fields["weights"][shard].sum() == targets


def test_document_rows_hold_the_start_of_each_document(
    corpus, texts, make_config, make_loader, take_epoch
):
    config = make_config(train=corpus, eval=corpus, packing="document", shards=1)
    fields = take_epoch(make_loader(config, "eval"), shards=1)
    documents = [encode_document(load_tokenizer("bytes"), text)[:65] for text in texts]
    assert fields["weights"].sum() == sum(len(document) - 1 for document in documents)
    for row, document in zip(fields["tokens"][0], documents):
        np.testing.assert_array_equal(row[: len(document)], document[:64])


@pytest.mark.parametrize("packing", ["pack", "document"])
def test_documents_too_short_to_predict_anything_are_left_out(
    tmp_path, write_jsonl, make_config, make_loader, take, packing
):
    model = tokenizers.models.WordLevel({"a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    path = write_jsonl("short.jsonl", ["", "a", "b b", "a", "b b b", ""])
    config = make_config(
        train=path, tokenizer=str(tmp_path / "words.json"), sequence_length=3, packing=packing
    )
    fields = take(make_loader(config), 20)
    assert 1 not in fields["tokens"]
    assert 2 in fields["targets"]

    none = write_jsonl("none.jsonl", ["a"])
    config = make_config(train=none, tokenizer=config.data.tokenizer, packing=packing, shards=1)
    with pytest.raises(ValueError, match=r"skipped 100.00 %"):
        next(make_loader(config))
