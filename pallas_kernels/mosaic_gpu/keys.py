"""The normalisation of keys, and its gradient, for the rows of a group of warps in registers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import tile
from pallas_kernels.scaling import select_range


class KeysInRange(NamedTuple):
    """Keys `u = c k`, whose squares neither overflow nor underflow, in float32.

    Attributes:
      u: `[R/2,W]`.
      factor: `c [R/2]`.
      square: `‖u‖² [R/2]`, or 1 for a key of zeros.
    """

    u: jax.Array
    factor: jax.Array
    square: jax.Array

    @classmethod
    def from_rows(cls, k: jax.Array) -> KeysInRange:
        """Scales keys `[R/2,W]`."""
        k = k.astype(jnp.float32)
        largest = jnp.max(jnp.abs(k), axis=1)
        factor = select_range(largest, jnp.ones_like(largest))
        u = k * tile.over_columns(factor, k.shape)
        square = jnp.sum(u * u, axis=1)
        return cls(u, factor, jnp.where(square == 0, 1.0, square))

    def normalize(self, norm: float) -> jax.Array:
        """Returns keys of a norm; a key of zeros stays zero."""
        return self.u * tile.over_columns(norm * jax.lax.rsqrt(self.square), self.u.shape)

    def pull_back(self, k_hat_bar: jax.Array, norm: float) -> jax.Array:
        """Returns `k̄` of keys that were normalised to a norm; keys of zeros have none."""
        along = jnp.sum(self.u * k_hat_bar, axis=1) / self.square
        across = k_hat_bar - self.u * tile.over_columns(along, self.u.shape)
        slope = norm * self.factor * jax.lax.rsqrt(self.square)
        is_zero = jnp.max(jnp.abs(self.u), axis=1) == 0
        return across * tile.over_columns(jnp.where(is_zero, 0.0, slope), across.shape)
