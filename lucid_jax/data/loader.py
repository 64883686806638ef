"""Global batches on the devices of a mesh, from the shards that are needed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lucid_jax.config import Config, ConfigError
from lucid_jax.data.mixture import Split, describe_mixture, open_mixture
from lucid_jax.data.packing import FIELDS, empty_rows
from lucid_jax.data.pipeline import count_shards, shard_batches
from lucid_jax.data.tokenizer import Tokenizer, fingerprint
from lucid_jax.parallel.stripes import Stripes

# Those that decide, beside the sources, what a position in the data means.
_FIELDS_OF_A_RUN = ("text_field", "sequence_length", "packing", "holdout")


class BatchLoader:
    """An endless iterator over global batches.

    A batch is a dict of the fields of `packing`, each a global `jax.Array`
    [batch_size, S], in the order of `stripes` if given. Rows `[s * n, (s + 1) * n)`
    come from shard `s`, with `n = batch_size / num_shards`. A process reads the shards
    whose rows its devices hold, and no others. What a shard gives does not depend on
    the processes, so a run may go on with another number of them.

    Evaluation reads every document once. After its last row a shard gives empty
    rows, of weight 0, and so does the loader when all shards have ended: it
    never raises StopIteration, because processes that end at different batches
    would wait for one another. Stop at the first batch whose weights sum to 0.
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
          config: the run.
          tokenizer: that of `config.data.tokenizer`.
          sharding: how the devices hold a [batch_size, S] array.
          split: `"train"` or `"eval"`.
          stripes: the order of tokens where devices share a row, which is then S =
            `stripes.size` long; None leaves rows as they are.

        Raises:
          ConfigError: a source cannot be read; see `open_mixture`.
        """
        self._sharding = sharding
        self._stripes = stripes or Stripes(config.data.sequence_length, shards=1, width=1)
        self._shape = (config.batch_size, self._stripes.size)
        self._num_shards = count_shards(config)
        self._rows_per_shard = config.batch_size // self._num_shards
        shard_of_row, row_of_shard = divmod(np.arange(config.batch_size), self._rows_per_shard)
        blocks = sharding.addressable_devices_indices_map(self._shape).values()
        shards = np.unique(np.concatenate([shard_of_row[block[0]] for block in blocks if block]))
        # Where a row of the global batch lies among the rows read here.
        self._local_row = (
            np.searchsorted(shards, shard_of_row) * self._rows_per_shard + row_of_shard
        )
        mixture = open_mixture(config.data, split)
        # What a saved state must share with the loader that restores it.
        self._identity = {
            "batch_size": config.batch_size,
            "seed": config.seed,
            "data.shards": self._num_shards,
            **{f"data.{name}": getattr(config.data, name) for name in _FIELDS_OF_A_RUN},
            "data.tokenizer": fingerprint(config.data.tokenizer),
            f"data.{split}": describe_mixture(config.data, split, mixture),
        }
        self._iterators = {
            shard: iter(shard_batches(mixture, tokenizer, config, split=split, shard=shard))
            for shard in shards.tolist()
        }
        self._start = self.get_state()

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        empty = empty_rows(self._rows_per_shard, self._stripes.length)
        parts = [next(iterator, empty) for iterator in self._iterators.values()]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in FIELDS}
        return {name: self._to_global(x) for name, x in self._stripes.apply(batch).items()}

    def get_state(self) -> dict[str, Any]:
        """Where the shards of this process stand, as plain JSON values.

        The keys are shard numbers: the union of the dicts of all processes is
        the state of the run, which any number of processes can restore.
        """
        return {
            str(shard): {**self._identity, "stream": iterator.get_state()}
            for shard, iterator in self._iterators.items()
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `get_state` was called; the next batch is the one that came then.

        Args:
          state: of all processes, or at least of the shards of this one.

        Raises:
          ConfigError: a state of other data, or of data that was read in another way.
        """
        for saved in state.values():
            for field, ours in self._identity.items():
                # Earlier versions saved fewer fields.
                if saved.get(field, ours) != ours:
                    raise ConfigError(
                        f"{field} was {saved[field]!r}, is now {ours!r}: a run resumes on the"
                        " data it began with; to start a new one from its parameters, give"
                        " another --workdir and checkpoint.init_from"
                    )
        for shard, iterator in self._iterators.items():
            if str(shard) not in state:
                raise ConfigError(
                    f"the saved data state lacks shard {shard} of {self._num_shards}: it must"
                    " hold the shards of every process that wrote it"
                )
            iterator.set_state(_with_tuples(state[str(shard)]["stream"]))

    def reset(self) -> None:
        """Goes back to the first batch, for another pass of an evaluation."""
        self.set_state(self._start)

    def _to_global(self, local: np.ndarray) -> jax.Array:
        """The global [batch_size, S] array of which this process has read the rows `local`."""

        def device_block(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return local[self._local_row[index[0]], index[1]]

        return jax.make_array_from_callback(self._shape, self._sharding, device_block)


def _with_tuples(state: Any) -> Any:
    """Undoes what JSON does to tuples: the packing iterator compares its state with them."""
    if isinstance(state, Mapping):
        return {key: _with_tuples(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return tuple(_with_tuples(value) for value in state)
    return state
