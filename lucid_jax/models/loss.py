"""The training objective: next-token cross-entropy. One loss, for training and evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from lucid_jax.config import Config
from lucid_jax.models.language_model import LanguageModel
from lucid_jax.models.transformer import Transformer
from lucid_jax.ops.cross_entropy import token_losses, token_margins

Batch = dict[str, jax.Array]


def weighted_losses(
    config: Config,
    model: LanguageModel,
    params: Any,
    batch: Batch,
    *,
    telemetry: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood times weight of every target.

    Args:
      config: The run.
      model: Its structure.
      params: Its parameters.
      batch: `tokens`, `targets`, `segment_ids`, `positions` int32 and `weights` float32,
        each `[B,S]`.
      telemetry: Whether to measure the layers too.

    Returns:
      float32 `[B,S]` in nats, and the telemetry of the model.
    """
    transformer, x, measured = _run_model(config, model, params, batch, telemetry)
    losses = _per_target(token_losses, config, transformer, x, batch)
    return losses * batch["weights"], measured


def losses_and_margins(
    config: Config, model: LanguageModel, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """`weighted_losses`, and how far the logit of every target is below the largest.

    Arguments are as there; the results float32 `[B,S]`.
    """
    transformer, x, _ = _run_model(config, model, params, batch, telemetry=False)
    losses, margins = (
        _per_target(op, config, transformer, x, batch) for op in (token_losses, token_margins)
    )
    return losses * batch["weights"], margins


def _run_model(
    config: Config, model: LanguageModel, params: Any, batch: Batch, telemetry: bool
) -> tuple[Transformer, jax.Array, dict[str, jax.Array]]:
    """The model, its hidden states `[B,S,E]`, and its telemetry."""
    transformer = model.merge(params)
    segment_ids: jax.Array | None = batch["segment_ids"]
    if config.data.packing == "document" and not telemetry:
        # Only padding has another id. It comes last, so that no token sees it (but the
        # telemetry would), and without ids a library may have a faster kernel.
        segment_ids = None
    x, measured = transformer(batch["tokens"], batch["positions"], segment_ids, telemetry=telemetry)
    return transformer, x, measured


def _per_target(
    op: Callable[..., jax.Array], config: Config, model: Transformer, x: jax.Array, batch: Batch
) -> jax.Array:
    """What an op of `cross_entropy` makes of every target, `[B,S]`."""
    # The head is gathered once, and its gradient reduced once, not at every chunk.
    rows = ("batch", "sequence")
    chunked = functools.partial(op, chunk=config.loss_chunk, axis=model.layout.mesh_axis("vocab"))
    return model.layout.shard_map(chunked, ((*rows, None), (None, "vocab"), rows), rows)(
        x, model.head, batch["targets"]
    )


def micro_batches(batch: Batch, count: int) -> Batch:
    """Cuts `[B,S]` into `[count,B/count,S]`.

    Micro-batch `i` takes rows `i, i + count, …`: every device finds its share of each
    among its own rows, so nothing moves.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )
