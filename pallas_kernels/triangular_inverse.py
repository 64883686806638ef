"""The inverse of a unit lower triangular matrix by doubling, for one block inside a kernel."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def invert_unit_lower(a: jax.Array, dot: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Inverts the unit triangular matrix whose strictly lower part is that of `a`.

    Let `X` hold the inverses of the diagonal blocks of size n, and `L` the part of `a` that joins
    pairs of these blocks. The inverses of the blocks of size 2n are then `X − X L X`. Every
    intermediate result is an inverse of diagonal blocks, whose entries are at most 2 for blocks
    of `A` (`‖A⁻¹‖₂ ≤ 2`), and all blocks of a size share one matrix product.

    Args:
      a: `[R,R]` float32, R a power of two.
      dot: Multiplies two such matrices.

    Returns:
      `[R,R]` float32, zero above the diagonal.
    """
    size = a.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, a.shape, 1)

    def off_diagonal(n: int) -> jax.Array:
        """Returns the part of `a` that joins pairs of diagonal blocks of size n."""
        level = n.bit_length()
        pair = (row >> level) == (column >> level)
        return jnp.where(pair & (row >> (level - 1) > column >> (level - 1)), a, 0)

    x = jnp.where(row == column, 1.0, 0.0) - off_diagonal(1)
    n = 2
    while n < size:
        x = x - dot(x, dot(off_diagonal(n), x))
        n *= 2
    return x
