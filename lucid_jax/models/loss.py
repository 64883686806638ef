"""The training objective: next-token cross-entropy. One loss, for training and evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lucid_jax.config import Config
from lucid_jax.models.transformer import Transformer
from lucid_jax.ops.cross_entropy import token_losses, token_margins

Batch = dict[str, jax.Array]


def weighted_losses(
    config: Config,
    graph: nnx.GraphDef,
    params: Any,
    batch: Batch,
    *,
    telemetry: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood times weight of every target.

    Args:
      config: The run.
      graph: Structure of the model.
      params: Its parameters.
      batch: `tokens`, `targets`, `segment_ids`, `positions` int32 and `weights` float32,
        each `[B,S]`.
      telemetry: Whether to measure the layers too.

    Returns:
      float32 `[B,S]` in nats, and the telemetry of the model.
    """
    model, x, measured = _run_model(config, graph, params, batch, telemetry)
    losses = _of_targets(token_losses, config, model, x, batch)
    return losses * batch["weights"], measured


def losses_and_margins(
    config: Config, graph: nnx.GraphDef, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """`weighted_losses`, and how far the logit of every target is below the largest.

    Arguments are as there; the results float32 `[B,S]`.
    """
    model, x, _ = _run_model(config, graph, params, batch, telemetry=False)
    losses, margins = (
        _of_targets(op, config, model, x, batch) for op in (token_losses, token_margins)
    )
    return losses * batch["weights"], margins


def _run_model(
    config: Config, graph: nnx.GraphDef, params: Any, batch: Batch, telemetry: bool
) -> tuple[Transformer, jax.Array, dict[str, jax.Array]]:
    """The model, its hidden states `[B,S,E]`, and its telemetry."""
    model = nnx.merge(graph, params)
    segment_ids: jax.Array | None = batch["segment_ids"]
    if config.data.packing == "document" and not telemetry:
        # Only padding has another id. It comes last, so that no token sees it (but the
        # telemetry would), and without ids a library may have a faster kernel.
        segment_ids = None
    x, measured = model(batch["tokens"], batch["positions"], segment_ids, telemetry=telemetry)
    return model, x, measured


def _of_targets(
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
