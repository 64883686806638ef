"""The stream of rows of one shard.

A run reads `num_shards` independent streams, whatever the number of processes.
Each round of `num_shards` documents of one global order gives every stream one.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import grain
import numpy as np

from lucid_jax.config import Config
from lucid_jax.data.mixture import Interleaved, Split
from lucid_jax.data.packing import Fields, to_rows
from lucid_jax.data.sources import Document, Source
from lucid_jax.data.tokenizer import Tokenizer, encode_document

# Of a document: one to read and one to predict.
MIN_TOKENS = 2
# Documents that each reading thread has ready; a document may be a whole book.
_PREFETCH_PER_THREAD = 16
# Above this many rows of a batch, more shards only cost threads.
_MAX_DEFAULT_SHARDS = 16


def count_shards(config: Config) -> int:
    """`data.shards`, or by default the largest divisor of the batch size up to 16."""
    if config.data.shards:
        return config.data.shards
    return max(n for n in range(1, _MAX_DEFAULT_SHARDS + 1) if config.batch_size % n == 0)


def shard_batches(
    mixture: Sequence[tuple[Source, float]],
    tokenizer: Tokenizer,
    config: Config,
    *,
    split: Split,
    shard: int,
) -> grain.IterDataset[Fields]:
    """Batches of one shard: the fields of `packing`, [batch_size / num_shards, S].

    Training never ends; evaluation reads every document once, and pads its last
    batch with empty rows. Documents of fewer than `MIN_TOKENS` are left out.

    Args:
      mixture: what `open_mixture` gives, shared by the shards of a process.
      tokenizer: turns texts into tokens; tokenised documents are taken as they are.
      config: the run.
      split: `"train"` or `"eval"`.
      shard: which stream, in [0, num_shards).
    """
    data = config.data
    num_shards = count_shards(config)
    sources = [source for source, _ in mixture]
    if split == "train":
        weights = [weight for _, weight in mixture]
        documents = _Dealt(_endless_documents(sources, weights, config.seed), shard, num_shards)
    else:
        documents = grain.MapDataset.source(Interleaved(sources))[shard::num_shards]
    tokens = (
        documents.map(functools.partial(to_tokens, tokenizer))
        .filter(lambda tokens: len(tokens) >= MIN_TOKENS)
        .to_iter_dataset(
            grain.ReadOptions(
                num_threads=data.read_threads,
                prefetch_buffer_size=_PREFETCH_PER_THREAD * data.read_threads,
            )
        )
    )
    if split == "train":
        # An endless stream of which nothing is left would be searched for ever.
        options = grain.experimental.DatasetOptions(filter_raise_threshold_ratio=1.0)
        tokens = grain.experimental.WithOptionsIterDataset(tokens, options)
    rows = config.batch_size // num_shards
    return to_rows(tokens, data.packing, data.sequence_length).batch(
        rows, batch_fn=functools.partial(grain.experimental.batch_and_pad, batch_size=rows)
    )


def _endless_documents(
    sources: Sequence[Source], weights: Sequence[float], seed: int
) -> grain.MapDataset[Document]:
    """The global order of training: weights count documents, epochs differ."""
    # Halved: grain adds the number of the epoch and wants 32 bits.
    seeds = np.random.SeedSequence(seed % 2**32).generate_state(len(sources)) // 2
    return grain.MapDataset.mix(
        [
            grain.MapDataset.source(source).shuffle(seed=int(source_seed)).repeat()
            for source, source_seed in zip(sources, seeds)
        ],
        weights,
    )


class _Dealt(grain.MapDataset[Document]):
    """What one shard gets when `documents` are dealt in rounds, one to each shard.

    Mixing is periodic, and dealt in order each shard might see but one source:
    so the shard to begin with is drawn anew each round.
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


def to_tokens(tokenizer: Tokenizer, document: Document) -> np.ndarray:
    """The tokens of a document, int32 [T], special tokens included."""
    return encode_document(tokenizer, document) if isinstance(document, str) else document
