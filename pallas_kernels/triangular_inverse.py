"""Inverses of unit triangular matrices by doubling, for one block inside a kernel."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def invert_unit_lower(a: jax.Array, dot: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """The inverse of the unit triangular matrix whose strictly lower part is that of `a`.

    With `X` the inverses of the diagonal blocks of size n, and `L` the part of `a` that
    joins two of them, those of size 2n are `X − X L X`. Every intermediate is an inverse
    of diagonal blocks, whose entries are at most 2 for blocks of `A` (`‖A⁻¹‖₂ ≤ 2`), and
    all blocks of a size share one matrix product.

    Args:
      a: `[R,R]` float32, R a power of two.
      dot: The product of two such matrices.

    Returns:
      `[R,R]` float32, zero above the diagonal.
    """
    size = a.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, a.shape, 1)

    def joining(n: int) -> jax.Array:
        """The part of `a` below the diagonal that joins two blocks of n to one of 2n."""
        level = n.bit_length()
        pair = (row >> level) == (column >> level)
        return jnp.where(pair & (row >> (level - 1) > column >> (level - 1)), a, 0)

    x = jnp.where(row == column, 1.0, 0.0) - joining(1)
    n = 2
    while n < size:
        x = x - dot(x, dot(joining(n), x))
        n *= 2
    return x
