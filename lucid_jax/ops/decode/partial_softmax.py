"""What one pass over a part of a cache gives, and how parts and the new row are put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.ops.decode.new_token import LayerCache, NewToken
from lucid_jax.ops.precondition.gram import accumulator_dtype


class PartialSoftmax(NamedTuple):
    """Sums over cached rows j in the accumulator dtype; logits s are powers of two's.

    A part without any row has the smallest finite number and zeros.

    Attributes:
      largest: The largest logit of each query `[…,K,G]`.
      norm: `Σ 2^(s_j − largest)` `[…,K,G]`.
      total: `Σ 2^(s_j − largest) y_j` `[…,K,G,D]`.
      update: `Σ A_tj y_j` `[…,K,D]`, or None where values are not preconditioned.
    """

    largest: jax.Array
    norm: jax.Array
    total: jax.Array
    update: jax.Array | None

    def added(self, axis: int) -> PartialSoftmax:
        """Those of all parts, which lie along an axis of each array."""
        largest = jnp.max(self.largest, axis, keepdims=True)
        return self._added(largest, lambda x: jnp.sum(x, axis))._replace(
            largest=jnp.squeeze(largest, axis)
        )

    def added_over(self, axis_name: str | None) -> PartialSoftmax:
        """Those of all devices of a mesh axis, under `shard_map`; None is one device."""
        if axis_name is None:
            return self
        largest = jax.lax.pmax(self.largest, axis_name)
        return self._added(largest, lambda x: jax.lax.psum(x, axis_name))

    def _added(self, largest: jax.Array, add: Callable[[jax.Array], jax.Array]) -> PartialSoftmax:
        decay = jnp.exp2(self.largest - largest)
        return PartialSoftmax(
            largest,
            add(self.norm * decay),
            add(self.total * decay[..., None]),
            None if self.update is None else add(self.update),
        )

    def with_row(self, new: NewToken, scale: float) -> tuple[jax.Array, jax.Array]:
        """The new row's own share added; `scale` is that of the logits.

        Returns:
          `o [B,K,G,D]` in the accumulator dtype, and the row's `y [B,K,D]`, which is its value
          where values are not preconditioned.
        """
        q, k, v = new
        # Rounded first: the softmax of a whole sequence reads what the cache will hold.
        y = v if self.update is None else (v - self.update).astype(v.dtype)
        dtype = accumulator_dtype(q.dtype)
        logits = scale * jnp.einsum("bkgd,bkd->bkg", q, k, preferred_element_type=dtype)
        largest = jnp.maximum(self.largest, logits)
        decay, weight = jnp.exp2(self.largest - largest), jnp.exp2(logits - largest)
        total = self.total * decay[..., None] + weight[..., None] * y[:, :, None]
        return total / (self.norm * decay + weight)[..., None], y


def attend_by(
    sum_up: Callable[[LayerCache], PartialSoftmax],
    new: NewToken,
    cached: LayerCache,
    length: jax.Array,
    scale: float,
) -> tuple[jax.Array, LayerCache]:
    """`o [B,K,G,D]`, and the cache with the new row behind `length` rows; `sum_up` takes those."""
    # What is known is written before the cache is read. Written after, without anything that
    # depends on the reading, it would be written into a copy of the whole cache.
    cached = cached.with_key(new.k, length)
    if cached.inverse_norms is None:
        cached = cached.with_value(new.v, length)
    o, y = sum_up(cached).with_row(new, scale)
    return o, cached if cached.inverse_norms is None else cached.with_value(y, length)
