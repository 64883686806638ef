"""A small corpus, configurations that read it, and batches as numpy arrays."""

import itertools
import json

import jax
import numpy as np
import pytest
import tokenizers

from lucid_jax.config import Config
from lucid_jax.data import BatchLoader, load_tokenizer

_WORDS = ["lower", "triangle", "keys", "rows", "of", "a", "causal", "solve", "ünïcode", "\n"]


@pytest.fixture
def sharding():
    """Shards sequences over eight devices."""
    mesh = jax.make_mesh((8,), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes texts to a jsonl file and returns its path."""

    def write(name, texts):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return write


@pytest.fixture
def write_words(tmp_path):
    """Writes a tokenizer of whole words, given by their ids, and returns its path."""

    def write(ids, name="words.json"):
        model = tokenizers.models.WordLevel(ids, unk_token=next(iter(ids)))
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / name))
        return str(tmp_path / name)

    return write


@pytest.fixture
def texts():
    """41 documents of 1 to 60 words, shorter and longer than a sequence of 64 bytes."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(_WORDS, size=rng.integers(1, 61))) for _ in range(41)]


@pytest.fixture
def corpus(write_jsonl, texts):
    """The path of `texts` as a jsonl file."""
    return write_jsonl("corpus.jsonl", texts)


@pytest.fixture
def make_config():
    """Makes a run of eight sequences of 64 tokens; keywords are fields of `DataConfig`."""

    def make(*, batch_size=8, seed=0, vocab_size=512, **data):
        return Config.from_dict(
            {
                "batch_size": batch_size,
                "seed": seed,
                "model": {"vocab_size": vocab_size},
                "data": {"sequence_length": 64, **data},
            }
        )

    return make


@pytest.fixture
def make_loader(sharding):
    """Makes a loader with the tokenizer of its configuration."""

    def make(config, split="train", sharding=sharding):
        return BatchLoader(config, load_tokenizer(config.data.tokenizer), sharding, split=split)

    return make


@pytest.fixture
def take():
    """Returns the next batches as one dict of numpy fields [count, batch_size, S]."""

    def take(loader, count):
        batches = list(itertools.islice(loader, count))
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    return take


@pytest.fixture
def take_epoch():
    """Returns all batches of an evaluation as numpy fields [shards, sequences, S]."""

    def take(loader, shards):
        batches = list(itertools.takewhile(lambda batch: batch["weights"].sum() > 0, loader))
        fields = {}
        for name in batches[0]:
            x = np.stack([batch[name] for batch in batches])
            x = x.reshape(len(batches), shards, -1, x.shape[-1])
            fields[name] = x.swapaxes(0, 1).reshape(shards, -1, x.shape[-1])
        return fields

    return take
