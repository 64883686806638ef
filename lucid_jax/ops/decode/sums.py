"""What one pass over a part of a cache gives, and how parts and the new token are put together."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sums(NamedTuple):
    """Sums over cached rows j, in the accumulator dtype, up to `exp(largest)`.

    A part without any row has the smallest finite number and zeros.

    Attributes:
      largest: The largest logit of each query `[…,K,G]`.
      norm: `Σ exp(s_j − largest)` `[…,K,G]`.
      total: `Σ exp(s_j − largest) y_j` `[…,K,G,D]`.
      update: `Σ A_tj y_j` `[…,K,D]`, or None where values are not preconditioned.
    """

    largest: jax.Array
    norm: jax.Array
    total: jax.Array
    update: jax.Array | None

    def added(self, axis: int) -> Sums:
        """Those of all parts, which lie along an axis of each array."""
        return self._rescaled(
            jnp.max(self.largest, axis, keepdims=True), lambda x: jnp.sum(x, axis)
        )._replace(largest=jnp.max(self.largest, axis))

    def added_over(self, axis_name: str) -> Sums:
        """Those of all devices of a mesh axis; called under `shard_map`."""
        return self._rescaled(
            jax.lax.pmax(self.largest, axis_name), lambda x: jax.lax.psum(x, axis_name)
        )

    def _rescaled(self, largest: jax.Array, add) -> Sums:
        decay = jnp.exp(self.largest - largest)
        return Sums(
            largest,
            add(self.norm * decay),
            add(self.total * decay[..., None]),
            None if self.update is None else add(self.update),
        )

    def with_row(self, logits: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The output and the new row's own `y`, which its queries see too.

        Args:
          logits: Of the new key `[B,K,G]`.
          v: Its value `[B,K,D]`.

        Returns:
          `o [B,K,G,D]` in the accumulator dtype, and `y [B,K,D]` in the dtype of `v`.
        """
        # Rounded first: the softmax of a whole sequence reads what the cache will hold.
        y = v if self.update is None else (v - self.update).astype(v.dtype)
        largest = jnp.maximum(self.largest, logits)
        decay, weight = jnp.exp(self.largest - largest), jnp.exp(logits - largest)
        total = self.total * decay[..., None] + weight[..., None] * y[:, :, None]
        return total / (self.norm * decay + weight)[..., None], y
