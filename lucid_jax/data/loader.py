"""Global batches on a mesh, of which each process reads only its own shards."""

import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np

from lucid_jax.config import Config, ConfigError
from lucid_jax.data.bad_lines import BadLines
from lucid_jax.data.mixture import (
    Split,
    describe_mixture,
    open_mixture,
    sample_checksums,
    without_folders,
)
from lucid_jax.data.packing import FIELDS, empty_batch
from lucid_jax.data.pipeline import count_shards, shard_batches
from lucid_jax.data.tokenizer import Tokenizer, fingerprint
from lucid_jax.parallel.stripes import Stripes

# A saved position means the same data only if these fields of `DataConfig` are unchanged.
_IDENTITY_FIELDS = ("text_field", "sequence_length", "packing", "holdout")


class BatchLoader:
    """An endless iterator over global batches.

    A batch is a dict of the fields of `packing`, each a global `jax.Array` [batch_size, S],
    with its tokens in the order of `stripes`. Sequences `[s * n, (s + 1) * n)` come from shard
    `s`, with `n = batch_size / num_shards`. A process reads the shards whose sequences its
    devices hold, and no others. The content of a shard does not depend on the processes, so a
    run can resume with another number of them.

    Evaluation reads every document once. A shard that has ended gives empty sequences, of
    segment 0. The loader never raises StopIteration, because shards end at different batches
    and processes would wait for one another: stop at the first batch without another segment.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        sharding: jax.sharding.Sharding,
        *,
        split: Split,
        stripes: Stripes | None = None,
    ):
        """Opens the sources of `split`.

        Args:
          tokenizer: the tokenizer that `config.data.tokenizer` names.
          sharding: how the devices hold a [batch_size, S] array.
          stripes: the order of the tokens when devices share a sequence, which then has
            S = `stripes.size` tokens; None keeps the order.

        Raises:
          ConfigError: a source cannot be read; see `open_mixture`.
        """
        self._sharding = sharding
        self._stripes = stripes or Stripes(config.data.sequence_length, shards=1, width=1)
        self._shape = (config.batch_size, self._stripes.size)
        self._num_shards = count_shards(config)
        self._shard_size = config.batch_size // self._num_shards
        shard, index = divmod(np.arange(config.batch_size), self._shard_size)
        blocks = sharding.addressable_devices_indices_map(self._shape).values()
        own_shards = np.unique(np.concatenate([shard[block[0]] for block in blocks if block]))
        # For each sequence of the global batch, its place among the sequences read here.
        self._local_index = np.searchsorted(own_shards, shard) * self._shard_size + index
        mixture = open_mixture(config.data, split)
        # A saved state can only be restored by a loader with the same identity.
        self._identity = {
            "batch_size": config.batch_size,
            "seed": config.seed,
            "data.shards": self._num_shards,
            **{f"data.{name}": getattr(config.data, name) for name in _IDENTITY_FIELDS},
            "data.tokenizer": fingerprint(config.data.tokenizer),
            f"data.{split}": describe_mixture(mixture),
            f"content of data.{split}": sample_checksums(mixture),
        }
        self._bad_lines = BadLines(f"data.{split}", config.data.on_bad_line)
        make_shard = functools.partial(
            shard_batches, mixture, tokenizer, config, split=split, bad_lines=self._bad_lines
        )
        self._iterators = {n: iter(make_shard(shard=n)) for n in own_shards.tolist()}
        self._start = self.get_state()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        empty = empty_batch(self._shard_size, self._stripes.length)
        parts = [next(iterator, empty) for iterator in self._iterators.values()]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in FIELDS}
        return {name: self._to_global(x) for name, x in self._stripes.apply(batch).items()}

    def get_state(self) -> dict[str, Any]:
        """Returns the positions of this process's shards, as plain JSON values.

        The keys are shard numbers. The union of the dicts of all processes is the state of the
        run, which any number of processes can restore.
        """
        return {
            str(shard): {**self._identity, "stream": iterator.get_state()}
            for shard, iterator in self._iterators.items()
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Returns to the position at which `get_state` was called.

        `state` is that of the run, or at least of this process's shards.

        Raises:
          ConfigError: the state lacks a shard, or is of other data or of another way to read it.
        """
        for saved in state.values():
            for field, ours in self._identity.items():
                # States of earlier versions have fewer fields, and descriptions with folders.
                theirs = saved.get(field, ours)
                if field in ("data.train", "data.eval"):
                    theirs = without_folders(theirs)
                if theirs != ours:
                    raise ConfigError(
                        f"{field} was {theirs!r}, is now {ours!r}: a run resumes on the"
                        " data it began with; to start a new run from its parameters, give"
                        " another --workdir and checkpoint.init_from; --overwrite removes it"
                    )
        for shard, iterator in self._iterators.items():
            if str(shard) not in state:
                raise ConfigError(
                    f"the saved data state lacks shard {shard} of {self._num_shards}: it must"
                    " hold the shards of every process that wrote it"
                )
            iterator.set_state(_with_tuples(state[str(shard)]["stream"]))

    def reset(self) -> None:
        """Returns to the first batch, for another evaluation."""
        self.set_state(self._start)

    def log_skipped(self) -> None:
        """Logs how many documents this process could not read, if any."""
        self._bad_lines.log_count()

    def _to_global(self, local: np.ndarray) -> jax.Array:
        """Builds the global [batch_size, S] array from the sequences that this process read."""

        def device_block(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return local[self._local_index[index[0]], index[1]]

        return jax.make_array_from_callback(self._shape, self._sharding, device_block)


def _with_tuples(state: Any) -> Any:
    """Turns lists back into tuples, which JSON lacks and the packing iterator compares with."""
    if isinstance(state, Mapping):
        return {key: _with_tuples(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return tuple(_with_tuples(value) for value in state)
    return state
