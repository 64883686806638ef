"""Evaluation loss and perplexity, overall and by position.

The position of a prediction is the number of tokens of the same document that precede, in its
sequence, the last token read. Where packing splits a document, positions begin at 0 again,
because the model does not see the part before the split.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.config import Config
from lucid_jax.data import BatchLoader
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.models.loss import micro_batches, weighted_losses

_FIRST_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class LossReport:
    """The result of an evaluation, with losses in nats per token.

    Attributes:
      unigram_loss: The entropy of the targets: the lowest loss of a model that ignores context.
      buckets: (first position, last position + 1, tokens, loss) of each range of positions.
    """

    loss: float
    tokens: int
    unigram_loss: float
    buckets: tuple[tuple[int, int, int, float], ...]

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, or infinity where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for a JSON file."""
        return {**dataclasses.asdict(self), "perplexity": self.perplexity}

    def table(self) -> str:
        """Returns lines for a terminal."""
        lines = [
            f"loss {self.loss:.4f}   perplexity {self.perplexity:.2f}   tokens {self.tokens:,}"
            f"   (best unigram model: {self.unigram_loss:.4f})",
            f"{'positions':>17}  {'tokens':>12}  {'loss':>8}",
        ]
        lines += [
            f"{start:>8}–{stop - 1:<8}  {tokens:>12,}  {loss:>8.4f}"
            for start, stop, tokens, loss in self.buckets
        ]
        return "\n".join(lines)


class LossEvaluator:
    """Evaluates parameters on the first `eval_batches` batches of the evaluation data."""

    def __init__(self, config: Config, model: LanguageModel, loader: BatchLoader):
        self._loader, self._batches = loader, config.eval_batches
        self._edges = _bucket_edges(config.data.sequence_length)
        self._step = jax.jit(_make_eval_step(config, model, self._edges[1:-1]))

    def __call__(
        self, params: Any, stopped: Callable[[], bool] = lambda: False
    ) -> LossReport | None:
        """Evaluates `params`, unless `stopped`, called before each batch, returns true.

        Returns None if the evaluation was stopped or its data holds no token.
        """
        self._loader.reset()
        total: dict[str, np.ndarray] | None = None
        for _ in range(self._batches):
            if stopped():
                return None
            sums = jax.device_get(self._step(params, next(self._loader)))
            # A batch may hold nothing but parts of prompts, so the targets do not tell the end.
            if not sums.pop("read"):
                break
            sums = {name: x.astype(np.float64) for name, x in sums.items()}
            total = sums if total is None else {name: total[name] + sums[name] for name in sums}
        return None if total is None or not total["tokens"].any() else self._report(total)

    def _report(self, total: dict[str, np.ndarray]) -> LossReport:
        tokens = total["tokens"].sum()
        share = total["targets"][total["targets"] > 0] / tokens
        buckets = tuple(
            (start, stop, int(n), float(nats / n))
            for start, stop, n, nats in zip(
                self._edges, self._edges[1:], total["tokens"], total["nats"]
            )
            if n
        )
        return LossReport(
            loss=float(total["nats"].sum() / tokens),
            tokens=int(tokens),
            unigram_loss=float(-(share * np.log(share)).sum()),
            buckets=buckets,
        )


def _bucket_edges(sequence_length: int) -> list[int]:
    """Returns 0, 64, 128, 256, … and the length; each edge is twice the one before it."""
    edges = [0]
    while (edge := _FIRST_BUCKET << (len(edges) - 1)) < sequence_length:
        edges.append(edge)
    return [*edges, sequence_length]


def _make_eval_step(
    config: Config, model: LanguageModel, inner_edges: list[int]
) -> Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]:
    def micro_step(params, batch):
        losses, _ = weighted_losses(config, model, params, batch)
        bucket = jnp.searchsorted(jnp.asarray(inner_edges), batch["positions"], side="right")
        one_hot = bucket[..., None] == jnp.arange(len(inner_edges) + 1)
        counted = jnp.zeros(config.model.vocab_size).at[batch["targets"]].add(batch["weights"])
        return {
            "nats": jnp.einsum("bs,bsn->n", losses, one_hot),
            "tokens": jnp.einsum("bs,bsn->n", batch["weights"], one_hot),
            "targets": counted,
            "read": (batch["segment_ids"] > 0).sum(),
        }

    def step(params, batch):
        sums = jax.lax.map(
            lambda micro: micro_step(params, micro), micro_batches(batch, config.accumulation)
        )
        return jax.tree.map(lambda x: x.sum(0), sums)

    return step
