"""A small corpus, runs over it, and batches pulled from loaders as numpy."""

import itertools
import json

import jax
import numpy as np
import pytest

from lucid_jax.config import Config
from lucid_jax.data import BatchLoader, load_tokenizer

_WORDS = ["lower", "triangle", "keys", "rows", "of", "a", "causal", "solve", "ünïcode", "\n"]


@pytest.fixture
def sharding():
    """Rows over eight devices."""
    mesh = jax.make_mesh((8,), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes texts as jsonl and gives the path."""

    def write(name, texts):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return write


@pytest.fixture
def texts():
    """41 documents of 1 to 60 words: shorter and longer than a row of 64 bytes."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(_WORDS, size=rng.integers(1, 61))) for _ in range(41)]


@pytest.fixture
def corpus(write_jsonl, texts):
    """`texts` as a jsonl file."""
    return write_jsonl("corpus.jsonl", texts)


@pytest.fixture
def make_config():
    """A run of eight rows of 64 tokens; keywords are fields of `DataConfig`."""

    def make(*, batch_size=8, seed=0, vocab_size=512, **data):
        values = {"sequence_length": 64, **data}
        return Config.from_dict(
            {
                "batch_size": batch_size,
                "seed": seed,
                "model": {"vocab_size": vocab_size},
                "data": values,
            }
        )

    return make


@pytest.fixture
def make_loader(sharding):
    """A loader with the tokenizer of its configuration."""

    def make(config, split="train", sharding=sharding):
        return BatchLoader(config, load_tokenizer(config.data.tokenizer), sharding, split=split)

    return make


@pytest.fixture
def take():
    """The next batches as one dict of numpy fields [count, batch_size, S]."""

    def take(loader, count):
        batches = list(itertools.islice(loader, count))
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    return take


@pytest.fixture
def take_epoch():
    """Every batch of an evaluation, rows of a shard together: [shards, rows, S]."""

    def take(loader, shards):
        batches = []
        for batch in itertools.islice(loader, 10_000):
            if batch["weights"].sum() == 0:
                break
            batches.append(batch)
        fields = {}
        for name in batches[0]:
            rows = np.stack([batch[name] for batch in batches])
            rows = rows.reshape(len(batches), shards, -1, rows.shape[-1])
            fields[name] = rows.swapaxes(0, 1).reshape(shards, -1, rows.shape[-1])
        return fields

    return take
