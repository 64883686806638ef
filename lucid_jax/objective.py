"""The training objective: next-token cross-entropy. One loss, for training and evaluation."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx

from lucid_jax.config import Config
from lucid_jax.ops.cross_entropy import token_losses

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
    model = nnx.merge(graph, params)
    segment_ids: jax.Array | None = batch["segment_ids"]
    if config.data.packing == "document" and not telemetry:
        # Only padding has another id. It comes last, so that no token sees it (but the
        # telemetry would), and without ids a library may have a faster kernel.
        segment_ids = None
    x, measured = model(batch["tokens"], batch["positions"], segment_ids, telemetry=telemetry)
    # The head is gathered once, and its gradient reduced once, not at every chunk.
    rows = ("batch", "sequence")
    chunked = functools.partial(
        token_losses, chunk=config.loss_chunk, axis=model.layout.mesh_axis("vocab")
    )
    losses = model.layout.shard_map(chunked, ((*rows, None), (None, "vocab"), rows), rows)(
        x, model.head, batch["targets"]
    )
    return losses * batch["weights"], measured


def micro_batches(batch: Batch, count: int) -> Batch:
    """Cuts `[B,S]` into `[count,B/count,S]`.

    Micro-batch `i` takes rows `i, i + count, …`: every device finds its share of each
    among its own rows, so nothing moves.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )
