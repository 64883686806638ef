"""The softmax of rows that are shard over devices; see `context_attention`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from lucid_jax.ops.attention.api import SubsetBackend, choose_backend, choose_subset_backend
from lucid_jax.ops.blocks import take
from lucid_jax.ops.query_positions import QueryPositions
from lucid_jax.parallel.context_shard import ContextShard


def choose_softmax(
    shard: ContextShard,
    implementation: str | None,
    q: jax.Array,
    k: jax.Array,
    segment_ids: jax.Array | None,
) -> SubsetBackend:
    """Attention of the rows of this device, or of whole rows of its query heads.

    Args:
      shard: How the rows lie.
      implementation: None or one of the op of one device.
      q: Queries `[B,S/C,H,D]`.
      k: Keys `[B,S/C,K,D]`.
      segment_ids: int32 `[B,S/C]`, or None.

    Raises:
      ValueError: an implementation that is unknown, cannot run the call, or takes whole rows
        where the heads do not go round.
    """
    whole = jax.eval_shape(shard.gather, q)
    backend = choose_backend(implementation, whole, segment_ids, None)
    if backend.subset is not None:
        return backend.subset
    if shard.by_query_heads(q, k):
        return SubsetBackend.of(functools.partial(_attend_by_heads, shard, backend.attention))
    if implementation is None:
        return choose_subset_backend(None, q)
    raise ValueError(
        f"implementation={implementation!r} takes whole rows: the number of devices must divide K,"
        f" or divide H and be a multiple of K; got {shard.stripes.shards} devices,"
        f" H={q.shape[2]}, K={k.shape[2]}"
    )


def _attend_by_heads(
    shard: ContextShard,
    attention: Callable[..., jax.Array],
    scale: float,
    precision: jax.lax.Precision | None,
    rows: QueryPositions,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """`o [B,S/C,H,D]`, by `attention` of all rows of H/C heads, which read the same keys."""
    head = jax.lax.axis_index(shard.axis) * k.shape[2] // shard.stripes.shards
    k, v = take(k, head, 1, 2), take(v, head, 1, 2)
    o = attention(shard.to_heads(q), k, v, rows.key_segment_ids, scale, precision)
    return shard.to_rows(o.astype(q.dtype))
