"""Fields of packed sequences agree with a table, and packing an epoch loses no token."""

import grain
import numpy as np
import pytest

from lucid_jax.data.packing import FIELDS, empty_batch, to_sequences
from lucid_jax.data.tokenizer import encode_document, load_tokenizer

_DOCUMENTS = ([1, 2, 3], [4, 5, 6, 7, 8, 9], [10, 11])
_SEQUENCES = {
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
def test_fields(packing):
    documents = grain.MapDataset.source([np.array(d, np.int32) for d in _DOCUMENTS])
    sequences = list(to_sequences(documents.to_iter_dataset(), packing, sequence_length=4))
    for name, dtype in FIELDS.items():
        actual = [sequence[name] for sequence in sequences]
        assert {x.dtype for x in actual} == {np.dtype(dtype)}, name
        np.testing.assert_array_equal(actual, _SEQUENCES[packing][name], name)


@pytest.mark.parametrize("packing", ["pack", "document"])
def test_tokens_of_a_prompt_are_read_and_are_no_targets(packing):
    documents = grain.MapDataset.source([np.array([~1, ~0, 5, 6], np.int32)])
    [fields] = to_sequences(documents.to_iter_dataset(), packing, sequence_length=4)
    assert fields["tokens"].tolist() == [1, 0, 5, 6]
    assert fields["targets"].tolist() == [0, 5, 6, 0]
    assert fields["segment_ids"].tolist() == [1, 1, 1, 1]
    assert fields["weights"].tolist() == [0, 1, 1, 0]


def test_an_empty_batch_has_the_fields_of_a_batch():
    batch = empty_batch(3, 4)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: ((3, 4), dtype) for name, dtype in FIELDS.items()
    }
    assert not any(x.any() for x in batch.values())


@pytest.mark.parametrize(
    "length", [64, 5000, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 7))]
)
def test_pack_keeps_every_token_once_and_in_order(
    corpus, texts, make_config, make_loader, take_epoch, length
):
    config = make_config(train=corpus, eval=corpus, sequence_length=length, shards=4)
    fields = take_epoch(make_loader(config, "eval"), shards=4)
    documents = [encode_document(load_tokenizer("bytes"), text) for text in texts]
    for shard in range(4):
        # The text has no NUL, so 0 is padding.
        tokens = np.column_stack([fields["tokens"][shard], fields["targets"][shard][:, -1:]])
        expected = np.concatenate(documents[shard::4])
        np.testing.assert_array_equal(tokens[tokens > 0], expected)
        starts = np.arange(length + 1, len(expected), length + 1)
        ends = np.cumsum([len(document) for document in documents[shard::4]])
        # Every token but the first of a document and of a sequence is a target.
        targets = len(expected) - len({0, *starts, *ends[:-1]})
        assert fields["weights"][shard].sum() == targets


def test_document_sequences_hold_the_start_of_each_document(
    corpus, texts, make_config, make_loader, take_epoch
):
    config = make_config(train=corpus, eval=corpus, packing="document", shards=1)
    fields = take_epoch(make_loader(config, "eval"), shards=1)
    documents = [encode_document(load_tokenizer("bytes"), text)[:65] for text in texts]
    assert fields["weights"].sum() == sum(len(document) - 1 for document in documents)
    for tokens, document in zip(fields["tokens"][0], documents):
        np.testing.assert_array_equal(tokens[: len(document)], document[:64])


@pytest.mark.parametrize("packing", ["pack", "document"])
def test_documents_without_a_token_to_predict_are_left_out(
    write_jsonl, write_words, make_config, make_loader, take, packing
):
    tokenizer = write_words({"<unk>": 3, "a": 1, "b": 2})
    path = write_jsonl("short.jsonl", ["", "a", "b b", "a", "b b b", ""] * 100)
    config = make_config(train=path, tokenizer=tokenizer, sequence_length=3, packing=packing)
    fields = take(make_loader(config), 5)
    assert 1 not in fields["tokens"]
    assert 2 in fields["targets"]

    none = write_jsonl("none.jsonl", ["a"] * 1000)
    config = make_config(train=none, tokenizer=tokenizer, packing=packing, shards=1)
    with pytest.raises(ValueError, match=r"skipped 100.00 %"):
        next(make_loader(config))
