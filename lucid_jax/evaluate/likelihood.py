"""Log-likelihoods of texts, from the forward pass and the loss of training."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lucid_jax.config import Config
from lucid_jax.data.packing import empty_batch
from lucid_jax.evaluate.batching import batches_by_length
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.models.loss import losses_and_margins

# Batches are at least this long, and each length is a power of two.
_MIN_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Token ids of a text, of which the last `counted` are scored given those before them."""

    tokens: Sequence[int]
    counted: int


class Likelihood:
    """Scores continuations with one model."""

    def __init__(self, config: Config, model: LanguageModel, params: Any):
        # Each sequence is one document.
        data = dataclasses.replace(config.data, packing="document")
        self._config = dataclasses.replace(config, data=data)
        self._layout, self._params = model.layout, params
        # The results are replicated, because every process reads all of them.
        self._run = jax.jit(
            lambda params, batch: losses_and_margins(self._config, model, params, batch),
            out_shardings=model.layout.sharding(),
        )

    def __call__(
        self,
        continuations: Sequence[Continuation],
        progress: Callable[[int], Any] = lambda count: None,
    ) -> list[tuple[float, bool]]:
        """Scores continuations in batches of similar length.

        `progress` is called after each batch with the number of its continuations.

        Returns:
          For each continuation the log-likelihood of its counted tokens in nats, and whether
          each of them is the most likely one, in the order of `continuations`.
        """
        lengths = [max(len(x.tokens) - 1, _MIN_LENGTH) for x in continuations]
        results: dict[int, tuple[float, bool]] = {}
        batches = batches_by_length(self._config, self._layout, lengths)
        for length, batch_size, indices in batches:
            scores = self._score([continuations[i] for i in indices], batch_size, length)
            results.update(zip(indices, scores))
            progress(len(indices))
        return [results[i] for i in range(len(continuations))]

    def _score(
        self, continuations: Sequence[Continuation], batch_size: int, length: int
    ) -> list[tuple[float, bool]]:
        batch = empty_batch(batch_size, length)
        for i, continuation in enumerate(continuations):
            size = len(continuation.tokens) - 1
            batch["tokens"][i, :size] = continuation.tokens[:-1]
            batch["targets"][i, :size] = continuation.tokens[1:]
            batch["segment_ids"][i, :size] = 1
            batch["positions"][i, :size] = np.arange(size)
            batch["weights"][i, size - continuation.counted : size] = 1
        stripes = self._layout.stripes(length)
        sharding = self._layout.sharding("batch", "sequence")
        sharded = {name: jax.device_put(x, sharding) for name, x in stripes.apply(batch).items()}
        losses, margins = (stripes.restore(np.asarray(x)) for x in self._run(self._params, sharded))
        counted = batch["weights"] > 0
        return [
            (-float(losses[i].sum(dtype=np.float64)), bool((margins[i][counted[i]] <= 0).all()))
            for i in range(len(continuations))
        ]
