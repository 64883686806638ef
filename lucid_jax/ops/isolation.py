"""Isolation: a value that is not finite reaches the tokens that depend on it, and no others.

A product of zero and NaN is NaN, so a masked entry of a tile does not keep a bad token from the
other rows of its block, nor from other documents. The ops in plain XLA, the solve on TPUs and
that of stripes therefore compute with zeros in its place, and set the results that depend on it
to NaN afterwards.

The kernels for GPUs do not for whole sequences: by Triton a solve of 16 × 2048 tokens would take
1.2 to 1.4 times as long (H200, bfloat16, 4 heads of 64). They keep documents (`documents`) apart
instead, so that a bad token reaches no row of an earlier block and no document that has no row in
its block. In cuDNN and splash attention, which are libraries, it may reach all rows of its block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def bad_tokens(*arrays: jax.Array) -> jax.Array:
    """Returns whether any entry of a token is not finite: bool `[B,S,K]`, of `[B,S,K,D]` arrays."""
    finite = [jnp.isfinite(x).all(-1) for x in arrays]
    return ~jnp.stack(finite).all(0)


def clear(x: jax.Array, bad: jax.Array) -> jax.Array:
    """Returns `x [B,S,K,D]` with zeros for bad tokens."""
    return jnp.where(bad[..., None], jnp.zeros((), x.dtype), x)


def mark(x: jax.Array, bad: jax.Array) -> jax.Array:
    """Returns `x [B,S,K,D]` with NaN for bad tokens."""
    return jnp.where(bad[..., None], jnp.full((), jnp.nan, x.dtype), x)


def spread(bad: jax.Array, segment_ids: jax.Array | None, *, reverse: bool = False) -> jax.Array:
    """Returns the tokens at and behind a bad token of the same segment, or before if `reverse`.

    Args:
      bad: bool `[B,S,K]`.
      segment_ids: int32 `[B,S]`, in any order, or None for one segment.
      reverse: Whether to look backwards.
    """
    if reverse:
        ids = None if segment_ids is None else jnp.flip(segment_ids, 1)
        return jnp.flip(spread(jnp.flip(bad, 1), ids), 1)
    # Almost no step has a bad token, and to find one takes less time than to sort.
    return jax.lax.cond(bad.any(), _spread, lambda bad, ids: bad, bad, segment_ids)


def _spread(bad: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    count = bad.astype(jnp.int32)
    if segment_ids is None:
        return jax.lax.cummax(count, 1) > 0
    # Sorted by segment, which keeps the order of tokens, a segment is a range.
    order = jnp.argsort(segment_ids, axis=1, stable=True)
    ids = jnp.take_along_axis(segment_ids, order, 1)
    count = jnp.take_along_axis(count, order[..., None], 1)
    total = jnp.cumsum(count, 1, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], 1)
    before = jax.lax.cummax(jnp.where(starts[..., None], total - count, 0), 1)
    place = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(total > before, place[..., None], 1)
