"""A causal convolution over few tokens, with a filter of its own for every channel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lucid_jax.ops.numerics import accumulator_dtype


def short_convolution(
    x: jax.Array,
    taps: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    before: jax.Array | None = None,
) -> jax.Array:
    """Computes `Σ_s taps[W−1−s] · x_{t−s}` over the last W tokens of the same segment.

    Args:
      x: `[B,T,K,D]`.
      taps: The filters `[W,K,D]`, of which the last entry multiplies the token itself.
      segment_ids: int32 `[B,T]`, or None for one segment.
      before: The W−1 tokens before `x`, `[B,W−1,K,D]`, for one segment; None is zeros.

    Returns:
      `[B,T,K,D]`, summed in and of the accumulator dtype.
    """
    t, earlier = x.shape[1], taps.shape[0] - 1
    if before is None:
        before = jnp.zeros_like(x, shape=(x.shape[0], earlier, *x.shape[2:]))
    x, taps = (a.astype(accumulator_dtype(x.dtype)) for a in (x, taps))
    tokens = jnp.concatenate([before.astype(x.dtype), x], 1)
    total = taps[earlier] * x
    for s in range(1, earlier + 1):
        shifted = tokens[:, earlier - s : earlier - s + t]
        if segment_ids is not None:
            same = jnp.pad(segment_ids, ((0, 0), (s, 0)))[:, :t] == segment_ids
            shifted = jnp.where(same[..., None, None], shifted, 0)
        total += taps[earlier - s] * shifted
    return total


def last_tokens(x: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
    """Returns the last `count` of the first `lengths` int32 `[B]` tokens, `[B,count,K,D]`.

    Zeros stand before the first token of `x [B,T,K,D]`, as in `short_convolution`.
    """
    padded = jnp.pad(x, ((0, 0), (count, 0), (0, 0), (0, 0)))
    places = lengths[:, None] + jnp.arange(count)
    return jnp.take_along_axis(padded, places[..., None, None], 1)
