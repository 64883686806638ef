"""Log-likelihoods of texts by the forward pass and the loss of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lucid_jax.config import Config
from lucid_jax.data.packing import empty_rows
from lucid_jax.evaluate.answers import rows_of_batch
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.models.loss import losses_and_margins

# No batch is shorter; each is as long as a power of two.
_SHORTEST = 64


@dataclasses.dataclass(frozen=True)
class Continuation:
    """The last `counted` of `tokens`, given those before."""

    tokens: Sequence[int]
    counted: int


class Likelihood:
    """Log-likelihoods of continuations under one model, and whether it would write them."""

    def __init__(self, config: Config, model: LanguageModel, params: Any):
        # Each row is one document.
        data = dataclasses.replace(config.data, packing="document")
        self._config = dataclasses.replace(config, data=data)
        self._layout, self._params = model.layout, params
        # On all devices, as every process reads all of it.
        self._run = jax.jit(
            lambda params, batch: losses_and_margins(self._config, model, params, batch),
            out_shardings=model.layout.sharding(),
        )

    def __call__(
        self,
        continuations: Sequence[Continuation],
        done: Callable[[int], Any] = lambda count: None,
    ) -> list[tuple[float, bool]]:
        """In nats, the sum over its tokens, and whether each is the most likely one.

        Args:
          continuations: in any order, which that of the results is.
          done: told after each batch how many it has had.
        """
        buckets: dict[int, list[int]] = {}
        for i, continuation in enumerate(continuations):
            length = max(len(continuation.tokens) - 1, _SHORTEST)
            buckets.setdefault(1 << (length - 1).bit_length(), []).append(i)
        results: dict[int, tuple[float, bool]] = {}
        # What may not fit in memory comes first.
        for length, members in sorted(buckets.items(), reverse=True):
            rows = rows_of_batch(self._config, self._layout, length, len(members))
            for first in range(0, len(members), rows):
                batch = members[first : first + rows]
                of_batch = self._score([continuations[i] for i in batch], rows, length)
                results.update(zip(batch, of_batch))
                done(len(batch))
        return [results[i] for i in range(len(continuations))]

    def _score(
        self, continuations: Sequence[Continuation], rows: int, length: int
    ) -> list[tuple[float, bool]]:
        batch = empty_rows(rows, length)
        for i, continuation in enumerate(continuations):
            size = len(continuation.tokens) - 1
            batch["tokens"][i, :size] = continuation.tokens[:-1]
            batch["targets"][i, :size] = continuation.tokens[1:]
            batch["segment_ids"][i, :size] = 1
            batch["positions"][i, :size] = np.arange(size)
            batch["weights"][i, size - continuation.counted : size] = 1
        stripes = self._layout.stripes(length)
        sharding = self._layout.sharding("batch", "sequence")
        on_devices = {name: jax.device_put(x, sharding) for name, x in stripes.apply(batch).items()}
        losses, margins = (
            stripes.restore(np.asarray(x)) for x in self._run(self._params, on_devices)
        )
        counted = batch["weights"] > 0
        return [
            (-float(losses[i].sum(dtype=np.float64)), bool((margins[i][counted[i]] <= 0).all()))
            for i in range(len(continuations))
        ]
