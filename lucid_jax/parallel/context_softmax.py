"""The softmax of rows that are spread over devices; see `context_attention`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from lucid_jax.ops.attention.api import RowsBackend, choose_backend, choose_rows_backend
from lucid_jax.ops.blocks import take
from lucid_jax.ops.query_positions import Rows
from lucid_jax.parallel.context_shard import Spread


def choose_softmax(
    spread: Spread,
    implementation: str | None,
    q: jax.Array,
    k: jax.Array,
    segment_ids: jax.Array | None,
) -> RowsBackend:
    """Attention of the rows of this device, or of whole rows of its query heads.

    Args:
      spread: How the rows lie.
      implementation: None or one of the op of one device.
      q: Queries `[B,S/C,H,D]`.
      k: Keys `[B,S/C,K,D]`.
      segment_ids: int32 `[B,S/C]`, or None.

    Raises:
      ValueError: an implementation that is unknown, cannot run the call, or takes whole rows
        where the heads do not go round.
    """
    whole = jax.eval_shape(spread.gather, q)
    backend = choose_backend(implementation, whole, segment_ids, None)
    if backend.of_rows is not None:
        return backend.of_rows
    if spread.by_query_heads(q, k):
        return RowsBackend.of(functools.partial(_attend_by_heads, spread, backend.attention))
    if implementation is None:
        return choose_rows_backend(None, q)
    raise ValueError(
        f"implementation={implementation!r} takes whole rows: the number of devices must divide K,"
        f" or divide H and be a multiple of K; got {spread.stripes.shards} devices,"
        f" H={q.shape[2]}, K={k.shape[2]}"
    )


def _attend_by_heads(
    spread: Spread,
    attention: Callable[..., jax.Array],
    scale: float,
    precision: jax.lax.Precision | None,
    rows: Rows,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """`o [B,S/C,H,D]`, by `attention` of all rows of H/C heads, which read the same keys."""
    head = jax.lax.axis_index(spread.axis) * k.shape[2] // spread.stripes.shards
    k, v = take(k, head, 1, 2), take(v, head, 1, 2)
    o = attention(spread.to_heads(q), k, v, rows.key_segment_ids, scale, precision)
    return spread.to_rows(o.astype(q.dtype))
