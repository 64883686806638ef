"""Partial sums over a cache, and how parts and the new token are combined."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.decode.new_token import LayerCache, NewToken
from lucid_jax.ops.numerics import accumulator_dtype, finite


class PartialSoftmax(NamedTuple):
    """Sums over a part of the cached tokens j, in the accumulator dtype.

    The logits s are exponents of 2. A part without tokens has the smallest finite number as
    `largest`, and zeros.

    Attributes:
      largest: The largest logit of each query `[…,K,G]`.
      norm: `Σ 2^(s_j − largest)` `[…,K,G]`.
      total: `Σ 2^(s_j − largest) y_j` `[…,K,G,D]`.
      update: `Σ A_tj y_j` `[…,K,D]`, or None for softmax attention.
    """

    largest: jax.Array
    norm: jax.Array
    total: jax.Array
    update: jax.Array | None

    def combine(self, axis: int) -> PartialSoftmax:
        """Combines the parts that lie along an axis of each array."""
        largest = jnp.max(self.largest, axis, keepdims=True)
        return self._combine(largest, lambda x: jnp.sum(x, axis))._replace(
            largest=jnp.squeeze(largest, axis)
        )

    def combine_devices(self, axis_name: str | None) -> PartialSoftmax:
        """Combines the parts of all devices of a mesh axis, under `shard_map`; None is one."""
        if axis_name is None:
            return self
        largest = jax.lax.pmax(self.largest, axis_name)
        return self._combine(largest, lambda x: jax.lax.psum(x, axis_name))

    def _combine(self, largest: jax.Array, add: Callable[[jax.Array], jax.Array]) -> PartialSoftmax:
        decay = jnp.exp2(self.largest - largest)
        return PartialSoftmax(
            largest,
            add(self.norm * decay),
            add(self.total * decay[..., None]),
            None if self.update is None else add(self.update),
        )

    def finish(self, token: NewToken, scale: float) -> tuple[jax.Array, jax.Array]:
        """Adds the new token's own share.

        Args:
          token: The new token.
          scale: Factor of the logits.

        Returns:
          `o [B,K,G,D]` in the accumulator dtype, and the token's `y [B,K,D]`, which is its value
          for softmax attention.
        """
        q, k, v, beta = token
        y = v
        if self.update is not None:
            y = v.astype(self.update.dtype) - self.update
            # Rounded before use, because the softmax of a whole sequence reads the rounded values.
            y = (y if beta is None else beta[..., None] * y).astype(v.dtype)
        dtype = accumulator_dtype(q.dtype)
        logits = finite(scale * jnp.einsum("bkgd,bkd->bkg", q, k, preferred_element_type=dtype))
        largest = jnp.maximum(self.largest, logits)
        decay, weight = jnp.exp2(self.largest - largest), jnp.exp2(logits - largest)
        total = self.total * decay[..., None] + weight[..., None] * y[:, :, None].astype(dtype)
        return total / (self.norm * decay + weight)[..., None], y


def attend_and_append(
    sum_up: Callable[[LayerCache], PartialSoftmax],
    token: NewToken,
    cached: LayerCache,
    length: jax.Array,
    scale: float,
) -> tuple[jax.Array, LayerCache]:
    """Attends to a cache and appends the token to it.

    Args:
      sum_up: Sums over the first `length` tokens of a cache.
      token: The new token.
      cached: The cache.
      length: int32 `[B]`, the number of cached tokens.
      scale: Factor of the logits.

    Returns:
      `o [B,K,G,D]`, and the cache with the token.
    """
    # Everything known is written before the cache is read. Written after it, and independent of
    # the read, it would be written into a copy of the whole cache.
    cached = cached.with_key(token.k, length)
    if cached.inverse_norms is None:
        cached = cached.with_value(token.v, length)
    o, y = sum_up(cached).finish(token, scale)
    return o, cached if cached.inverse_norms is None else cached.with_value(y, length)
