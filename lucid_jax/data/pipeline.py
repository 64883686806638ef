"""The stream of batches of one shard.

A run reads `num_shards` independent streams, whatever the number of processes. All documents
have one global order; each round of `num_shards` documents gives every stream one.
"""

import functools
import random
from collections.abc import Sequence

import grain
import numpy as np

from lucid_jax.config import Config
from lucid_jax.data.bad_lines import BadLines, Guarded
from lucid_jax.data.documents import Document
from lucid_jax.data.mixture import Component, Split, interleave
from lucid_jax.data.packing import Fields, to_sequences
from lucid_jax.data.tokenizer import Tokenizer, encode_document

# A document needs one token to read and one to predict.
MIN_TOKENS = 2
# Documents that each reading thread prefetches; few, because one may be a whole book.
_PREFETCH_PER_THREAD = 16
# More shards than this only cost threads.
_MAX_DEFAULT_SHARDS = 16


def count_shards(config: Config) -> int:
    """Returns `data.shards`, by default the largest divisor of the batch size up to 16."""
    if config.data.shards:
        return config.data.shards
    return max(n for n in range(1, _MAX_DEFAULT_SHARDS + 1) if config.batch_size % n == 0)


def shard_batches(
    mixture: Sequence[Component],
    tokenizer: Tokenizer,
    config: Config,
    *,
    split: Split,
    shard: int,
    bad_lines: BadLines,
) -> grain.IterDataset[Fields]:
    """Returns the batches of one shard: the fields of `packing`, [batch_size / num_shards, S].

    Training never ends; evaluation reads every document once and pads its last batch with
    empty sequences. Documents of fewer than `MIN_TOKENS` tokens are left out, as are those that
    `bad_lines` skips. The shards of a process share it and the opened sources of `mixture`.
    """
    data = config.data
    num_shards = count_shards(config)
    if split == "train":
        endless = _endless_documents(mixture, config.seed, bad_lines)
        documents = _RoundRobin(endless, shard, num_shards)
    else:
        source = interleave([component.source for component in mixture])
        documents = grain.MapDataset.source(Guarded(source, bad_lines))[shard::num_shards]
    tokens = (
        documents.map(functools.partial(encode_document, tokenizer))
        .filter(lambda tokens: len(tokens) >= MIN_TOKENS)
        .to_iter_dataset(
            grain.ReadOptions(
                num_threads=data.read_threads,
                prefetch_buffer_size=_PREFETCH_PER_THREAD * data.read_threads,
            )
        )
    )
    if split == "train":
        # Without this error, an endless stream of too short documents would be searched forever.
        options = grain.experimental.DatasetOptions(filter_raise_threshold_ratio=1.0)
        tokens = grain.experimental.WithOptionsIterDataset(tokens, options)
    size = config.batch_size // num_shards
    return to_sequences(tokens, data.packing, data.sequence_length).batch(
        size, batch_fn=functools.partial(grain.experimental.batch_and_pad, batch_size=size)
    )


def _endless_documents(
    mixture: Sequence[Component], seed: int, bad_lines: BadLines
) -> grain.MapDataset[Document]:
    """Returns the global order of training: weights count documents, each epoch is shuffled."""
    # Halved, because grain adds the number of the epoch and needs 32 bits.
    seeds = np.random.SeedSequence(seed % 2**32).generate_state(len(mixture)) // 2
    return grain.MapDataset.mix(
        [
            grain.MapDataset.source(Guarded(source, bad_lines)).shuffle(seed=int(seed)).repeat()
            for source, seed in zip((component.source for component in mixture), seeds)
        ],
        [component.weight for component in mixture],
    )


class _RoundRobin(grain.MapDataset[Document]):
    """The documents of one shard, when every round deals one document to each shard.

    A mixture is periodic, and in a fixed order each shard might see only one source, so each
    round starts at a random shard.
    """

    def __init__(self, documents: grain.MapDataset[Document], shard: int, num_shards: int):
        super().__init__(documents)
        self._documents = documents
        self._shard = shard
        self._num_shards = num_shards

    def __len__(self) -> int:
        return len(self._documents) // self._num_shards

    def __getitem__(self, index):
        first = int(random.Random(index).random() * self._num_shards)
        place = (first + self._shard) % self._num_shards
        return self._documents[index * self._num_shards + place]
